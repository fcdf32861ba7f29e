"""`saro compare`: several models on the same held-out records, such as before training, after RW and after SRPO."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saro.config import DEMO, DataConfig, ModelConfig
from saro.data.chat_format import ChatFormat
from saro.data.dataset import encode_files, encode_pair_files
from saro.data.records import Record, read_examples, read_pairs
from saro.data.tree import build_tree
from saro.demo import data_files
from saro.errors import SaroError, nearest
from saro.evaluate.answers import answer, choose_prompts
from saro.model.adapter import find_adapter
from saro.model.load import find_model, load_policy
from saro.model.policy import Policy
from saro.program import as_list, progress_bar, shown
from saro.runs.folder import manifest_of
from saro.train.reference import score, score_pairs
from saro.train.steps import packs_of


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
        prompts: How many prompts are answered in one batch, those of --show among them.
        max_tokens: Longest answer.
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
        if self.prompts < 0:
            raise SaroError(f"--prompts is {self.prompts}; it must be at least 0")
        if self.max_tokens < 1:
            raise SaroError(f"--max_tokens is {self.max_tokens}; it must be at least 1")


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
    console.print(_table(names, figures, prompts, num_shown=len(options.show)))
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
        manifests = (manifest_of(Path(name).expanduser().parent) for name in options.models)
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
    model = ModelConfig(name=name, method=method)
    source = find_model(model)
    chat = source.chat_format(setting.data, setting.day)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = load_policy(source, model, device, seed=0).eval()
    pack_tokens = setting.data.pack_tokens
    loss = _loss(policy, chat, examples, pack_tokens) if examples else None
    likelier, margin = _preference(policy, chat, pairs, pack_tokens) if pairs else (None, None)
    answers = answer(policy, chat, prompts, max_tokens)
    reasoning = [_reasoning_tokens(text, chat) for text in answers]
    return Figures(
        loss=loss,
        likelier=likelier,
        margin=margin,
        reasoning_tokens=float(np.mean(reasoning)) if reasoning else None,
        answers=tuple(answers),
    )


def _loss(policy: Policy, chat: ChatFormat, files: Sequence[str], pack_tokens: int) -> float:
    """Return the mean negative log-prob of the scored tokens, nats."""
    data = encode_files(files, chat, max_tokens=pack_tokens)
    packs = packs_of([build_tree([data.sequence(i)]) for i in range(len(data))], pack_tokens)
    logps = np.concatenate([entries for _, entries in score(policy, packs, policy.causal_lm.device)])
    return float(-logps.mean(dtype=np.float64))


def _preference(policy: Policy, chat: ChatFormat, files: Sequence[str], pack_tokens: int) -> tuple[float, float]:
    """Return the share of pairs whose chosen response is likelier, and the mean margin in nats."""
    data = encode_pair_files(files, chat, max_tokens=pack_tokens)
    scored = score_pairs(policy, data, data.trees(range(len(data)), pack_tokens), pack_tokens)
    sums = np.array([[scored.of_side(i, side).sum(dtype=np.float64) for side in (0, 1)] for i in range(len(data))])
    margins = sums[:, 0] - sums[:, 1]
    return float((margins > 0).mean()), float(margins.mean())


def _reasoning_tokens(text: str, chat: ChatFormat) -> int:
    """Return the number of tokens between the tags, or to the end if the closing tag is missing; 0 without tags."""
    opening, closing = chat.think_tags
    if opening in text:
        reasoning = text.partition(opening)[2].partition(closing)[0]
    elif closing in text:
        # The template has opened the reasoning, so the answer holds the closing tag only.
        reasoning = text.partition(closing)[0]
    else:
        return 0
    return len(chat.tokenizer(reasoning, add_special_tokens=False).input_ids)


def _table(names: Sequence[str], figures: Sequence[Figures], prompts: Sequence[Record], num_shown: int) -> Table:
    """Return the table: a row for each figure, then the answers to the first ``num_shown`` prompts."""
    table = Table(title="Held-out records", title_justify="left", show_lines=True)
    table.add_column("", ratio=2)
    for name in names:
        table.add_column(escape(name), ratio=3)
    rows = {
        "loss, nats per token": ("loss", "{:.3f}"),
        "pairs whose chosen response is likelier": ("likelier", "{:.0%}"),
        "margin: log p(chosen) - log p(rejected), nats": ("margin", "{:.1f}"),
        f"reasoning tokens, mean of {len(prompts)} answers": ("reasoning_tokens", "{:.0f}"),
    }
    for label, (attribute, form) in rows.items():
        values = [getattr(f, attribute) for f in figures]
        if None not in values:
            table.add_row(label, *(form.format(value) for value in values))
    for i, record in enumerate(prompts[:num_shown]):
        prompt = record.prompt if isinstance(record.prompt, str) else record.prompt[-1].content
        label = f"[bold]{escape(record.id)}[/bold]\n{escape(prompt)}"
        table.add_row(label, *(escape(f.answers[i].strip()) for f in figures))
    return table
