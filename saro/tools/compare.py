"""`saro compare`: several models on the same held-out records, in one table: before training, after RW, after SRPO."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from saro.config import DataConfig, ModelConfig
from saro.data.chat_format import ChatFormat
from saro.data.dataset import encode_files, encode_pair_files
from saro.data.records import Record, read_examples, read_pairs
from saro.data.tree import build_tree
from saro.errors import SaroError, nearest
from saro.evaluate.answers import answer, choose_prompts
from saro.model.adapter import find_adapter
from saro.model.load import find_model, load_policy
from saro.model.policy import Policy
from saro.runs.folder import manifest_of
from saro.tool_config import CompareConfig
from saro.train.reference import score, score_pairs
from saro.train.steps import packs_of


@dataclass(frozen=True)
class Figures:
    """What one model does on held-out records.

    Attributes:
        loss: nats per scored token of the examples; None without examples.
        likelier: share of the pairs whose chosen response has the higher log-prob; None without pairs.
        margin: mean over the pairs of log p(chosen) - log p(rejected), nats; None without pairs.
        reasoning_tokens: mean over the answers, those cut at the limit included; None without prompts.
        answers: to the prompts, in their order.
    """

    loss: float | None
    likelier: float | None
    margin: float | None
    reasoning_tokens: float | None
    answers: tuple[str, ...]


def compare(options: CompareConfig, examples: Sequence[str], pairs: Sequence[str], console: Console) -> list[Figures]:
    """Measure the models one after the other, each freed before the next, and print the table.

    Args:
        examples, pairs: JSONL files of held-out records.

    Raises:
        SaroError: for a model, a file or an id that is not there.
    """
    names = options.names or options.models
    if len(names) != len(options.models):
        raise SaroError(f"--names names {len(names)} models, and --models {len(options.models)}")
    if not (examples or pairs):
        raise SaroError("there is nothing to compare on; give --examples or --pairs")
    prompts = _prompts(examples, pairs, options)
    setting = _Setting.of(options)
    figures = []
    # None shows the bar on a terminal alone.
    for name in tqdm(options.models, desc="comparing", unit=" models", leave=False, disable=None):
        console.print(f"measuring {name}", markup=False, highlight=False, soft_wrap=True)
        figures.append(_measure(name, setting, options, examples, pairs, prompts))
        # Modules and the forwards that are bound to them hold each other: freed before the next model is loaded.
        gc.collect()
    console.print(_table(names, figures, prompts, options))
    return figures


def _prompts(examples: Sequence[str], pairs: Sequence[str], options: CompareConfig) -> list[Record]:
    """The prompts of the ids to show, then of others, taking kinds in turn."""
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
    """How the models are loaded and read: as the first run among them was trained."""

    method: str
    data: DataConfig
    day: date

    @classmethod
    def of(cls, options: CompareConfig) -> _Setting:
        runs = (manifest_of(Path(name).expanduser().parent) for name in options.models)
        run = next((manifest for manifest in runs if manifest is not None), None)
        trained = run["config"] if run else {"model": {"method": "lora"}, "data": {}}
        known = {k: trained["data"][k] for k in ("think_tags", "template_variables") if k in trained["data"]}
        day = options.template_date or (run["template_date"] if run else date.today().isoformat())
        data = DataConfig(**known | ({"think_tags": tuple(known["think_tags"])} if "think_tags" in known else {}))
        return cls(options.method or trained["model"]["method"], data, date.fromisoformat(day))


def _measure(
    name: str,
    setting: _Setting,
    options: CompareConfig,
    examples: Sequence[str],
    pairs: Sequence[str],
    prompts: Sequence[Record],
) -> Figures:
    method = "lora" if setting.method == "full" and find_adapter(name) is not None else setting.method
    model = ModelConfig(name=name, method=method)
    source = find_model(model)
    chat = source.chat_format(setting.data, setting.day)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = load_policy(source, model, device, seed=0).eval()
    loss = _loss(policy, chat, examples, options.pack_tokens) if examples else None
    likelier, margin = _preference(policy, chat, pairs, options.pack_tokens) if pairs else (None, None)
    answers = answer(policy, chat, prompts, options.max_tokens)
    thought = [_reasoning_tokens(text, chat) for text in answers]
    return Figures(loss, likelier, margin, float(np.mean(thought)) if thought else None, tuple(answers))


def _loss(policy: Policy, chat: ChatFormat, files: Sequence[str], pack_tokens: int) -> float:
    data = encode_files(files, chat, max_tokens=pack_tokens)
    packs = packs_of([build_tree([data.sequence(i)]) for i in range(len(data))], pack_tokens)
    logps = np.concatenate([entries for _, entries in score(policy, packs, policy.causal_lm.device)])
    return float(-logps.mean(dtype=np.float64))


def _preference(policy: Policy, chat: ChatFormat, files: Sequence[str], pack_tokens: int) -> tuple[float, float]:
    data = encode_pair_files(files, chat, max_tokens=pack_tokens)
    scored = score_pairs(policy, data, data.trees(range(len(data)), pack_tokens), pack_tokens)
    sums = np.array([[scored.of_side(i, side).sum(dtype=np.float64) for side in (0, 1)] for i in range(len(data))])
    margins = sums[:, 0] - sums[:, 1]
    return float((margins > 0).mean()), float(margins.mean())


def _reasoning_tokens(text: str, chat: ChatFormat) -> int:
    """Tokens between the tags, or to the end where the closing one is missing; 0 without any.

    Where the template has opened the reasoning, the answer holds the closing tag alone.
    """
    opening, closing = chat.think_tags
    before, found, rest = text.partition(opening)
    thought = rest if found else before if closing in before else ""
    return len(chat.tokenizer(thought.partition(closing)[0], add_special_tokens=False).input_ids)


def _table(
    names: Sequence[str], figures: Sequence[Figures], prompts: Sequence[Record], options: CompareConfig
) -> Table:
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
    for label, (field, form) in rows.items():
        values = [getattr(f, field) for f in figures]
        if None not in values:
            table.add_row(label, *(form.format(value) for value in values))
    for i, record in enumerate(prompts[: len(options.show)]):
        prompt = record.prompt if isinstance(record.prompt, str) else record.prompt[-1].content
        label = f"[bold]{escape(record.id)}[/bold]\n{escape(prompt)}"
        table.add_row(label, *(escape(f.answers[i].strip()) for f in figures))
    return table
