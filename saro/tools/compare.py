"""`saro compare`: several models on the same held-out records, such as before training, after RW and after SRPO."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain

import numpy as np
from rich.console import Console

from saro.config import DEMO, DataConfig, check_at_least
from saro.data.records import Record, read_examples, read_pairs
from saro.demo import data_files
from saro.errors import SaroError, nearest
from saro.evaluate.heldout import heldout_loss, heldout_preference
from saro.evaluate.heldout_prompts import choose_prompts, count_reasoning_tokens, label_prompts
from saro.evaluate.options import LoadOptions, ServerOptions, check_names
from saro.evaluate.subjects import Subject, find_subjects
from saro.model.generate import answer_prompts
from saro.program import as_list, progress_bar, shown
from saro.report.tables import compare_table
from saro.runs.finished import this_device


@dataclass(frozen=True)
class Options:
    """Options of `saro compare`.

    Attributes:
        models: Models to compare, one column each: a run's folder, or a folder or hub name of a model or adapter.
        names: Names of the models in the table, one for each; default: from --models.
        load: How the models are loaded.
        examples: JSONL file or files of examples (RW) for the loss; "demo" is the held-out demo data.
        pairs: JSONL file or files of pairs (SRPO) for the preferences; "demo" is the held-out demo data.
        show: Ids of records whose prompts and answers are shown.
        prompts: How many prompts to answer, in one batch, including those of --show.
        max_tokens: Longest answer, in tokens.
        data: How the records become tokens. The default day, tags and template variables are those of the first run among
            the models.
    """

    models: list[str] = field(default_factory=lambda: [DEMO])
    names: list[str] = field(default_factory=list)
    load: LoadOptions = field(default_factory=LoadOptions, metadata=shown("method", "dtype", "trust_remote_code"))
    examples: list[str] | str = field(default_factory=lambda: [DEMO])
    pairs: list[str] | str = field(default_factory=lambda: [DEMO])
    show: list[str] = field(default_factory=list)
    prompts: int = 4
    max_tokens: int = 96
    data: DataConfig = field(
        default_factory=DataConfig,
        metadata=shown("pack_tokens", "think_tags", "chat_template", "template_date", "template_variables"),
    )

    def __post_init__(self) -> None:
        check_names(self.names, self.models)
        check_at_least(self, "--", 0, "prompts")
        check_at_least(self, "--", 1, "max_tokens")


def run(options: Options, console: Console) -> int:
    """Measure several models on the same held-out records, in one table.

    Raises:
        SaroError: a model, a file or an id does not exist.
    """
    compare(options, console)
    return 0


@dataclass(frozen=True)
class Figures:
    """The figures of one model on the held-out records.

    Attributes:
        loss: nats per scored token of the examples; None without examples.
        likelier: share of the pairs whose chosen response has the higher log-prob; None without pairs.
        margin: mean over the pairs of log p(chosen) - log p(rejected), nats; None without pairs.
        reasoning_tokens: mean over the answers, with those cut at the limit; None without prompts.
        answers: to the prompts, in their order.
    """

    loss: float | None
    likelier: float | None
    margin: float | None
    reasoning_tokens: float | None
    answers: tuple[str, ...]


def compare(options: Options, console: Console) -> list[Figures]:
    """Measure the models one after the other, each freed before the next, and print the table.

    Raises:
        SaroError: a model, a file or an id does not exist.
    """
    examples = data_files(as_list(options.examples), "rw_heldout")
    pairs = data_files(as_list(options.pairs), "srpo_heldout")
    if not (examples or pairs):
        raise SaroError("there is nothing to compare on; give --examples or --pairs")
    prompts = _choose_prompts(examples, pairs, options)
    subjects = _find_models(options)
    figures = []
    for subject in progress_bar(subjects, "comparing", "models"):
        console.print(f"measuring {subject.spec}", markup=False, highlight=False, soft_wrap=True)
        figures.append(_measure(subject, examples, pairs, prompts, options))
        # A module and the forward that is bound to it refer to each other: collect them before the next model loads.
        gc.collect()
    labels = label_prompts(prompts[: len(options.show)], show_texts=True)
    files = list(dict.fromkeys([*as_list(options.examples), *as_list(options.pairs)]))
    names = [subject.name for subject in subjects]
    console.print(compare_table(names, [asdict(f) for f in figures], labels, num_prompts=len(prompts), files=files))
    return figures


def _choose_prompts(examples: Sequence[str], pairs: Sequence[str], options: Options) -> list[Record]:
    """Return the records of --show, then others, taking their kinds in turn."""
    records = list(chain(*map(read_pairs, pairs), *map(read_examples, examples)))
    by_id = {record.id: record for record in records}
    for name in options.show:
        if name not in by_id:
            raise SaroError(f"--show: no record has the id {name!r}{nearest(name, by_id)}")
    shown = [by_id[name] for name in options.show]
    others = choose_prompts([r for r in records if r.id not in options.show], options.prompts)
    return [*shown, *others][: max(options.prompts, len(shown))]


def _find_models(options: Options) -> list[Subject]:
    """Find the models. Raises SaroError if one is a server, or does not exist."""
    subjects = find_subjects(options.models, options.names, options.load, ServerOptions(), options.data)
    for subject in subjects:
        if subject.source is None:
            raise SaroError(f"--models: {subject.spec} is a server, which scores no given text; name a local model")
    return subjects


def _measure(
    subject: Subject, examples: Sequence[str], pairs: Sequence[str], prompts: Sequence[Record], options: Options
) -> Figures:
    """Load one model and measure it."""
    chat, policy = subject.chat, subject.load_policy(this_device())
    loss = likelier = margin = None
    if examples:
        loss = heldout_loss(policy, chat, examples, options.data)
    if pairs:
        likelier, margin = heldout_preference(policy, chat, pairs, options.data)
    answers = answer_prompts(policy, chat, [record.prompt for record in prompts], options.max_tokens)
    reasoning = [count_reasoning_tokens(text, chat) for text in answers]
    return Figures(
        loss=loss,
        likelier=likelier,
        margin=margin,
        reasoning_tokens=float(np.mean(reasoning)) if reasoning else None,
        answers=tuple(answers),
    )
