"""`saro inspect`: the lengths of records and their scored tokens, before any training."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.markup import escape
from rich.text import Text
from rich.tree import Tree
from transformers import PreTrainedTokenizerBase

from saro.checks.check_masks import check_masks
from saro.config import DEMO, DataConfig, ModelConfig
from saro.data.chat_format import ChatFormat
from saro.data.dataset import ExampleSet, PairSet
from saro.data.encode_files import encode_files, encode_pair_files
from saro.data.jsonl import fault, read_objects
from saro.data.lengths import LengthReport
from saro.data.records import SIDES, holds_pairs
from saro.data.tree import RowKind, ScoredSequence, common_prefix
from saro.data.unpaired_records import holds_labels
from saro.data.unpaired_set import encode_unpaired_files
from saro.demo import data_files, find_demo
from saro.errors import SaroError, nearest
from saro.model.architectures import TokenLimits
from saro.model.source import find_model
from saro.program import as_list, shown
from saro.report.tables import print_lengths

STYLES = {RowKind.THINK: "cyan", RowKind.ANSWER: "green", RowKind.STOP: "bold red"}
# Styles of steps by their reward.
HIGHER, LOWER = "white on dark_green", "white on dark_red"


@dataclass(frozen=True)
class Options:
    """Options of `saro inspect`.

    Attributes:
        model: The model whose tokenizer and chat template encode the records.
        data: The records and how they become tokens.
        pairs: Show the demo pairs (SRPO) instead of the demo examples.
        show: How many of the first records to show.
        ids: Show the records of these ids instead.
        scores: What `saro score --steps` wrote of these records: show the reward of each step of the reasoning behind it.
    """

    # The method matters only for an adapter, which is found with the method that trained it.
    model: ModelConfig = field(
        default_factory=ModelConfig, metadata=shown("name", "revision", "method", "trust_remote_code")
    )
    data: DataConfig = field(
        default_factory=DataConfig,
        metadata=shown(
            "train", "train_on", "pack_tokens", "think_tags", "chat_template", "template_date", "template_variables"
        ),
    )
    pairs: bool = False
    show: int = 3
    ids: list[str] | str = field(default_factory=list)
    scores: str | None = None

    def __post_init__(self) -> None:
        if self.pairs and DEMO not in self.data.train:
            raise SaroError(
                "--pairs chooses among the demo data; a file of pairs is known by its fields: leave --pairs out"
            )


def run(options: Options, console: Console) -> int:
    """Show how long examples, preference pairs or labelled responses are, and which of their tokens are scored and shared.

    The first record decides between them.

    Raises:
        SaroError: for whatever training would refuse, or an id that no record has.
    """
    data, ids = options.data, as_list(options.ids)
    scores = {} if options.scores is None else _read_scores(options.scores)
    files = data_files(data.train, "srpo_train" if options.pairs else "rw_train")
    source = find_model(replace(options.model, name=find_demo(options.model.name)))
    data = source.continue_chat(data)
    chat = source.chat_format(data, date.fromisoformat(data.template_date) if data.template_date else date.today())
    encoded = _encode(files, chat, data, source.token_limits())
    print_lengths(console, ", ".join(files), LengthReport.of(encoded).as_dict())
    _list_too_long(encoded, data.pack_tokens, console)
    for record in ids:
        if record not in encoded.ids:
            raise SaroError(f"--ids: no record has the id {record!r}{nearest(record, encoded.ids)}")
    indices = [encoded.ids.index(record) for record in ids] or range(min(options.show, len(encoded)))
    for index in indices:
        _show_record(encoded, index, scores, chat.tokenizer, console)
    if options.show or ids:
        legend = Text("not scored: ").append("prompt", "dim").append("   scored: ")
        for kind, style in STYLES.items():
            legend.append(kind.name.lower(), style).append("  ")
        if scores:
            legend.append(" steps: ").append("likelier", HIGHER).append("  ").append("less likely", LOWER)
            legend.append(" than by the reference")
        console.rule()
        console.print(legend)
    return 0


def _encode(files: Sequence[str], chat: ChatFormat, data: DataConfig, limits: TokenLimits) -> ExampleSet | PairSet:
    """Encode and check all records, however long they are."""
    data = replace(data, pack_tokens=sys.maxsize)
    if holds_labels(files[0]):
        encode = encode_unpaired_files
    else:
        encode = encode_pair_files if holds_pairs(files[0]) else encode_files
    return encode(files, chat, data, progress=True, check=partial(check_masks, limits=limits))


def _list_too_long(encoded: ExampleSet | PairSet, pack_tokens: int, console: Console) -> None:
    """Print the ids of the records that are longer than a pack."""
    too_long = [encoded.ids[i] for i in np.flatnonzero(encoded.lengths > pack_tokens)]
    if too_long:
        noun = "pairs" if isinstance(encoded, PairSet) else "records"
        line = f"{len(too_long):,} {noun} are longer than a pack of {pack_tokens:,} tokens: {', '.join(too_long)}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _read_scores(path: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the lines that `saro score --steps` wrote, by (id of the record, side)."""
    scores = {}
    for _, where, line in read_objects(path):
        if not {"id", "side", "tokens", "steps"} <= line.keys() or any("first" not in step for step in line["steps"]):
            fault(
                where, "has no rewards of steps", "give --scores a file that `saro score --steps` of this version wrote"
            )
        scores[line["id"], line["side"]] = line
    return scores


def _find_steps(
    scores: Mapping[tuple[str, str], dict[str, Any]], id: str, side: str, sequence: ScoredSequence
) -> list[dict[str, Any]]:
    """Return the steps of a response with their rewards; none without scores. Raises SaroError if they are of another text."""
    if not scores:
        return []
    line = scores.get((id, side))
    if line is None or line["tokens"] != len(sequence.row_kinds):
        wrong = (
            "are missing" if line is None else f"are of {line['tokens']} tokens, and it has {len(sequence.row_kinds)}"
        )
        raise SaroError(
            f"--scores: those of {id!r} ({side}) {wrong}; score these records with the tokenizer of --model.name"
        )
    return line["steps"]


def _show_record(
    encoded: ExampleSet | PairSet,
    index: int,
    scores: Mapping[tuple[str, str], dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> None:
    """Print one record with its tokens coloured."""
    id = encoded.ids[index]
    if isinstance(encoded, PairSet):
        console.rule(f"{escape(id)}: {encoded.lengths[index]} tokens, the shared part once")
        sides = encoded.sequences(index)
        steps = [_find_steps(scores, id, name, sequence) for name, sequence in zip(SIDES, sides, strict=True)]
        console.print(pair_tree(*sides, tokenizer, *steps))
    else:
        sequence = encoded.sequence(index)
        console.rule(f"{escape(id)}: {len(sequence.tokens)} tokens, {len(sequence.row_kinds)} scored")
        steps = _find_steps(scores, id, "response", sequence)
        console.print(colour(sequence, tokenizer, steps=steps), soft_wrap=True)


def pair_tree(
    chosen: ScoredSequence,
    rejected: ScoredSequence,
    tokenizer: PreTrainedTokenizerBase,
    chosen_steps: Sequence[Mapping[str, Any]] = (),
    rejected_steps: Sequence[Mapping[str, Any]] = (),
) -> Tree:
    """Return a tree of the tokens that both sides of a pair begin with, and a branch for the rest of each side."""
    shared = common_prefix([chosen.tokens, rejected.tokens])
    prompt = chosen.scored_from
    label = Text(f"shared: {shared} tokens ({prompt} of the prompt, {shared - prompt} of the responses)", "bold")
    tree = Tree(Group(label, colour(chosen, tokenizer, stop=shared, steps=chosen_steps)), guide_style="bold")
    for name, sequence, steps in (("chosen", chosen, chosen_steps), ("rejected", rejected, rejected_steps)):
        end = ", open" if sequence.is_open else ""
        label = Text(f"{name}: {len(sequence.tokens) - shared} tokens{end}", "bold")
        tree.add(Group(label, colour(sequence, tokenizer, start=shared, steps=steps)))
    return tree


def colour(
    sequence: ScoredSequence,
    tokenizer: PreTrainedTokenizerBase,
    start: int = 0,
    stop: int | None = None,
    steps: Sequence[Mapping[str, Any]] = (),
) -> Text:
    """Return tokens ``start`` to ``stop`` as text: the prompt dim, scored tokens in the style of their kind.

    Args:
        steps: steps of the reasoning as `saro score` writes them: the style is that of their reward, which stands behind
            each of them.
    """
    styles = ["dim"] * sequence.scored_from + [STYLES[RowKind(kind)] for kind in sequence.row_kinds]
    rewards: dict[int, float] = {}
    for step in steps:
        if not step["tokens"]:
            continue
        first = sequence.scored_from + step["first"]
        rewards[first + step["tokens"]] = step["reward"]
        styles[first : first + step["tokens"]] = [HIGHER if step["reward"] > 0 else LOWER] * step["tokens"]
    text = Text()
    stop = len(styles) if stop is None else stop
    # Decode runs of one style, not tokens: a character may take several tokens.
    for end in range(start + 1, stop + 1):
        if end == stop or end in rewards or styles[end] != styles[start]:
            text.append(tokenizer.decode(sequence.tokens[start:end].tolist()), styles[start])
            if end in rewards:
                text.append(f"[{rewards[end]:+.2f}]", "dim")
            start = end
    return text
