"""`saro score`: rewards of responses and of the steps of their reasoning, from the log-probs of two models."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from saro.checks.check_masks import check_masks
from saro.config import DataConfig
from saro.data.chain import split_steps
from saro.data.chat_format import ChatFormat
from saro.data.dataset import ExampleSet, PairSet
from saro.data.encode_files import encode_files, encode_pair_files
from saro.data.packs import pack_trees
from saro.data.read_rows import is_hub
from saro.data.records import SIDES, Example, Pair, Response, holds_pairs, read_examples, read_pairs
from saro.data.tree import RowKind, ScoredSequence
from saro.errors import SaroError
from saro.evaluate.options import LoadOptions, ServerOptions
from saro.evaluate.subjects import Subject, find_subjects
from saro.files import atomic_write, check_file_target
from saro.model.score import score_packs, split_pairs, split_sequences
from saro.program import positional, progress_bar, shown
from saro.runs.finished import this_device

# Sums are written to this many decimals: rounding of the log-probs is larger.
_DECIMALS = 6


@dataclass(frozen=True)
class Options:
    """Options of `saro score`.

    Attributes:
        records: JSONL file of examples (RW) or pairs (SRPO).
        models: The model whose rewards are wanted and its reference, such as the models after and before SRPO; each is a
            run's folder, or folder or hub name of a model or adapter.
        steps: Also write the reward of each step of the reasoning.
        beta: Scale of the rewards; give that of the training, --preference.beta.
        output: JSONL file of the scores; default that of the records with .scores.jsonl at its end.
        overwrite: Replace the file if it exists.
        load: How the models are loaded.
        data: How the records become tokens. The default day, tags and template variables are those of the first run among
            the models.
    """

    records: str = field(metadata=positional())
    models: list[str] = field()
    steps: bool = False
    beta: float = 0.1
    output: str | None = None
    overwrite: bool = False
    load: LoadOptions = field(default_factory=LoadOptions, metadata=shown("method", "dtype", "trust_remote_code"))
    data: DataConfig = field(
        default_factory=DataConfig,
        metadata=shown("pack_tokens", "think_tags", "chat_template", "template_date", "template_variables"),
    )

    def __post_init__(self) -> None:
        if len(self.models) != 2:
            raise SaroError(f"--models names {len(self.models)} models; name two, the model and its reference")
        if not self.beta > 0:
            raise SaroError(f"--beta is {self.beta}; it must be above 0")


def run(options: Options, console: Console) -> int:
    """Score responses, and the steps of their reasoning, by how much likelier a model finds them than its reference.

    The reward of some tokens is ``beta * sum_t (log p_model(y_t) - log p_reference(y_t))``. Summed over a response it is
    DPO's implicit reward; summed over a step it is the process reward that a model has learned without labels of steps
    (Yuan et al. 2024, arXiv 2412.01981). It takes one forward of each model.

    Raises:
        SaroError: the file or a model does not exist, the two models have different vocabularies, the output exists, or
            whatever training would refuse.
    """
    if options.output is None and is_hub(options.records):
        raise SaroError(f"{options.records}: is a data set of the hub; name the file of the scores with --output FILE")
    target = Path(options.output or f"{options.records.removesuffix('.jsonl')}.scores.jsonl")
    if target.exists() and not options.overwrite:
        raise SaroError(f"{target}: exists already; name another --output, or replace it with --overwrite")
    check_file_target(target)
    model, reference = _find_models(options)
    records = list((read_pairs if holds_pairs(options.records) else read_examples)(options.records))
    data = _encode(options, records, model)
    logps = _score(model, data, options.data.pack_tokens, console)
    gc.collect()
    reference_logps = _score(reference, data, options.data.pack_tokens, console)
    totals: dict[str, list[float]] = {}
    with atomic_write(target) as file:
        for number, (record, side, response, sequence) in enumerate(_responses(records, data)):
            moved = options.beta * (logps[number] - reference_logps[number])  # (scored tokens,)
            score = {"id": record.id, "kind": record.kind, "side": side} | _sum_parts(moved, sequence)
            score |= {"logp": _sum(logps[number]), "reference_logp": _sum(reference_logps[number])}
            if options.steps:
                score["steps"] = _sum_steps(moved, record, response, model.chat)
            file.write(json.dumps(score) + "\n")
            totals.setdefault(side, []).append(score["reward"])
    for side, rewards in totals.items():
        console.out(f"{len(rewards):,} {side}: mean reward {np.mean(rewards):.4f}", highlight=False)
    if isinstance(data, PairSet):
        is_higher = np.greater(*(totals[side] for side in SIDES))
        console.out(
            f"the chosen response has the higher reward in {is_higher.mean():.1%} of the pairs", highlight=False
        )
    console.out(f"written to {target}", highlight=False)
    return 0


def _find_models(options: Options) -> list[Subject]:
    """Find the model and its reference. Raises SaroError if one is a server, or if they do not read the same tokens."""
    models = find_subjects(options.models, ["model", "reference"], options.load, ServerOptions(), options.data)
    for subject in models:
        if subject.source is None:
            raise SaroError(f"--models: {subject.spec} is a server, which scores no given text; name a local model")
    model, reference = models
    if model.chat.tokenizer.get_vocab() != reference.chat.tokenizer.get_vocab():
        raise SaroError(
            f"--models: {reference.spec} has another vocabulary than {model.spec}; name a reference of its family"
        )
    return models


def _encode(options: Options, records: Sequence[Example | Pair], model: Subject) -> ExampleSet | PairSet:
    """Encode and check the records as training does."""
    encode = encode_pair_files if isinstance(records[0], Pair) else encode_files
    data = encode([options.records], model.chat, DataConfig(pack_tokens=options.data.pack_tokens), progress=True)
    check_masks(data, model.chat, records, model.source.token_limits())
    return data


def _score(subject: Subject, data: ExampleSet | PairSet, pack_tokens: int, console: Console) -> list[np.ndarray]:
    """Return the log-probs of the scored tokens of each sequence, float64, nats; those of pairs by ``sequence_number``."""
    console.out(f"scoring by {subject.spec}", highlight=False)
    policy = subject.load_policy(this_device())
    packs = list(pack_trees(data.trees(range(len(data)), pack_tokens), pack_tokens))
    by_number: dict[int, np.ndarray] = {}
    for pack, entries in score_packs(policy, progress_bar(packs, "scoring", "packs")):
        if isinstance(data, PairSet):
            by_number.update(split_pairs(pack, entries))
        else:
            by_number.update(zip(pack.records, split_sequences(pack, entries), strict=True))
    return [by_number[number].astype(np.float64) for number in sorted(by_number)]


def _responses(
    records: Sequence[Example | Pair], data: ExampleSet | PairSet
) -> Iterator[tuple[Example | Pair, str, Response, ScoredSequence]]:
    """Yield (record, name of the side, response, sequence) in the order of the scores."""
    for i, record in enumerate(records):
        if isinstance(record, Pair):
            responses = (record.chosen, record.rejected)
            for side, response, sequence in zip(SIDES, responses, data.sequences(i), strict=True):
                yield record, side, response, sequence
        else:
            yield record, "response", record.response, data.sequence(i)


def _sum_parts(moved: np.ndarray, sequence: ScoredSequence) -> dict[str, Any]:
    """Sum the rewards of tokens over the response, its reasoning with the tags, and the rest with the stop token."""
    is_think = sequence.row_kinds == RowKind.THINK
    return {
        "tokens": len(moved),
        "reward": _sum(moved),
        "think": {"tokens": int(is_think.sum()), "reward": _sum(moved[is_think])},
        "answer": {"tokens": int((~is_think).sum()), "reward": _sum(moved[~is_think])},
        "open": sequence.is_open,
    }


def _sum_steps(moved: np.ndarray, record: Example | Pair, response: Response, chat: ChatFormat) -> list[dict[str, Any]]:
    """Sum the rewards of tokens over each step of the reasoning.

    ``start`` and ``stop`` are characters of the record's reasoning, and ``first`` is the number of the step's first token
    among the scored ones. A token belongs to the step in which it begins, and
    the white space between the tags and the chain to the first and the last step. The tags belong to none.
    """
    text, starts = chat.locate_tokens(record.prompt, response)
    chain, first, begin, end = _find_chain(text, response, chat.think_tags)
    steps = split_steps(chain)
    places = np.array(starts)
    is_chain = (places >= begin) & (places < end)
    step_of_token = np.searchsorted([first + step.start for step in steps[1:]], places, side="right")
    scores = []
    for number, step in enumerate(steps):
        is_own = is_chain & (step_of_token == number)
        place = {"start": step.start, "stop": step.stop, "first": int(is_own.argmax())}
        scores.append(place | {"tokens": int(is_own.sum()), "reward": _sum(moved[is_own])})
    return scores


def _find_chain(text: str, response: Response, tags: tuple[str, str]) -> tuple[str, int, int, int]:
    """Find the chain of reasoning in the text of a response.

    Returns:
        the chain, the place where it begins, and the places after the opening tag and before the closing one. The chain
        is empty if the response has no reasoning.
    """
    opening, closing = tags
    end = text.find(closing)
    if response.is_reasoning_open:
        end = len(text)
    if end < 0:
        return "", 0, 0, 0
    opened_at = text.find(opening, 0, end)
    begin = 0 if opened_at < 0 else opened_at + len(opening)
    between = text[begin:end]
    chain = between.strip() if response.reasoning is None else response.reasoning
    return chain, begin + between.index(chain), begin, end


def _sum(values: np.ndarray) -> float:
    return round(float(values.sum()), _DECIMALS)
