"""`saro compare`: several models on the same held-out records, such as before training, after RW and after SRPO."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from saro.config import DEMO, DataConfig, ModelConfig, check_at_least
from saro.data.records import Record, read_examples, read_pairs
from saro.demo import data_files, find_demo
from saro.errors import SaroError, nearest
from saro.evaluate.heldout import heldout_loss, heldout_preference
from saro.evaluate.heldout_prompts import choose_prompts, count_reasoning_tokens, label_prompts
from saro.manifest import read_manifest
from saro.model.adapter import find_adapter
from saro.model.generate import answer_prompts
from saro.model.load import load_policy
from saro.model.source import find_model
from saro.program import as_list, progress_bar, shown
from saro.report.tables import compare_table
from saro.runs.finished import this_device


@dataclass(frozen=True)
class ModelOptions:
    """How the models are loaded.

    Attributes:
        method: qlora loads in 4 bits (NF4), lora and full in the compute dtype; default: as the first run among the
            models was trained, or lora without a run.
    """

    # Not saro.config.ModelConfig: its method always has a value, and here None means that of the first run.
    method: Literal["full", "lora", "qlora"] | None = None


@dataclass(frozen=True)
class Options:
    """Options of `saro compare`.

    Attributes:
        models: Folders or hub names of models, or folders of adapters such as RUN/final, one column each.
        names: Names of the models in the table; default: as in --models.
        model: How the models are loaded.
        examples: JSONL file or files of examples (RW) for the loss; "demo" is the held-out demo data.
        pairs: JSONL file or files of pairs (SRPO) for the preferences; "demo" is the held-out demo data.
        show: Ids of records whose prompts and answers are shown.
        prompts: How many prompts to answer, in one batch, including those of --show.
        max_tokens: Longest answer, in tokens.
        data: How the records become tokens. The default day, tags and template variables are those of the first run
            among the models.
    """

    models: list[str] = field(default_factory=lambda: [DEMO])
    names: list[str] = field(default_factory=list)
    model: ModelOptions = field(default_factory=ModelOptions)
    examples: list[str] | str = field(default_factory=lambda: [DEMO])
    pairs: list[str] | str = field(default_factory=lambda: [DEMO])
    show: list[str] = field(default_factory=list)
    prompts: int = 4
    max_tokens: int = 96
    data: DataConfig = field(default_factory=DataConfig, metadata=shown("pack_tokens", "template_date"))

    def __post_init__(self) -> None:
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
    names = options.names or options.models
    if len(names) != len(options.models):
        raise SaroError(f"--names names {len(names)} models, and --models {len(options.models)}; give one for each")
    examples = data_files(as_list(options.examples), "rw_heldout")
    pairs = data_files(as_list(options.pairs), "srpo_heldout")
    if not (examples or pairs):
        raise SaroError("there is nothing to compare on; give --examples or --pairs")
    prompts = _choose_prompts(examples, pairs, options)
    setting = _Setting.of(options)
    figures = []
    for name in progress_bar(options.models, "comparing", "models"):
        console.print(f"measuring {name}", markup=False, highlight=False, soft_wrap=True)
        figures.append(_measure(name, setting, examples, pairs, prompts, options.max_tokens))
        # A module and the forward that is bound to it refer to each other: collect them before the next model loads.
        gc.collect()
    labels = label_prompts(prompts[: len(options.show)], show_texts=True)
    files = list(dict.fromkeys([*as_list(options.examples), *as_list(options.pairs)]))
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


@dataclass(frozen=True)
class _Setting:
    """How the models are loaded and the records encoded: as the first run among the models was trained."""

    method: str
    data: DataConfig
    day: date

    @classmethod
    def of(cls, options: Options) -> _Setting:
        manifests = (read_manifest(Path(name).expanduser().parent) for name in options.models)
        run = next((manifest for manifest in manifests if manifest is not None), None)
        method, data, day = "lora", options.data, date.today().isoformat()
        if run is not None:
            method, trained, day = run["config"]["model"]["method"], run["config"]["data"], run["template_date"]
            if "think_tags" in trained:
                data = replace(data, think_tags=tuple(trained["think_tags"]))
            if "template_variables" in trained:
                data = replace(data, template_variables=trained["template_variables"])
        return cls(options.model.method or method, data, date.fromisoformat(options.data.template_date or day))


def _measure(
    name: str,
    setting: _Setting,
    examples: Sequence[str],
    pairs: Sequence[str],
    prompts: Sequence[Record],
    max_tokens: int,
) -> Figures:
    """Load one model and measure it."""
    # An adapter cannot be loaded for full fine-tuning; its base is in the same dtype with lora.
    method = "lora" if setting.method == "full" and find_adapter(name) is not None else setting.method
    model = ModelConfig(name=find_demo(name), method=method)
    source = find_model(model)
    chat = source.chat_format(setting.data, setting.day)
    policy = load_policy(source, model, this_device(), seed=0).eval()
    loss = likelier = margin = None
    if examples:
        loss = heldout_loss(policy, chat, examples, setting.data)
    if pairs:
        likelier, margin = heldout_preference(policy, chat, pairs, setting.data)
    answers = answer_prompts(policy, chat, [record.prompt for record in prompts], max_tokens)
    reasoning = [count_reasoning_tokens(text, chat) for text in answers]
    return Figures(
        loss=loss,
        likelier=likelier,
        margin=margin,
        reasoning_tokens=float(np.mean(reasoning)) if reasoning else None,
        answers=tuple(answers),
    )
