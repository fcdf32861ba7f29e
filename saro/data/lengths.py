"""The report on a data set and the gate of its masks, before the model loads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from saro.data.chat_format import ChatFormat
from saro.data.dataset import ExampleSet, PairSet
from saro.data.records import KINDS, PAIR_KINDS, Example, Pair
from saro.data.tree import build_tree
from saro.errors import SaroError


@dataclass(frozen=True)
class Lengths:
    """Spread of a length in tokens."""

    least: int
    median: int
    p95: int
    most: int
    total: int

    @classmethod
    def of(cls, tokens: np.ndarray) -> Lengths:
        least, median, p95, most = np.percentile(tokens, [0, 50, 95, 100], method="nearest").astype(int).tolist()
        return cls(least, median, p95, most, int(tokens.sum()))


@dataclass(frozen=True)
class Sharing:
    """Tokens of all pairs, with and without what they have in common.

    Attributes:
        apart: both sequences of each pair in full.
        by_pair: one tree for each pair, what its two sides share once.
        by_prompt: one tree for each prompt, what its pairs share once: the least that steps can reach.
    """

    apart: int
    by_pair: int
    by_prompt: int

    @classmethod
    def of(cls, data: PairSet) -> Sharing:
        order = np.argsort(data.prompts, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(data.prompts[order])) + 1)
        trees = (build_tree([side for pair in group for side in data.sequences(pair)]) for group in groups)
        by_prompt = sum(len(node.tokens) for tree in trees for node in tree.nodes)
        apart = int(data.chosen.lengths.sum() + data.rejected.lengths.sum())
        return cls(apart, int(data.lengths.sum()), by_prompt)

    def __str__(self) -> str:
        text = f"Sharing saves {self._saved(self.by_pair)} of {self.apart:,} tokens"
        if self.by_prompt < self.by_pair:
            text += f", and up to {self._saved(self.by_prompt)} where pairs on one prompt come into one step"
        return text

    def _saved(self, tokens: int) -> str:
        return f"{100 * (1 - tokens / self.apart):.1f} %"


@dataclass(frozen=True)
class Report:
    """What a data set holds.

    Attributes:
        records: number of records, by kind.
        lengths: spreads of lengths, by what is measured. Of an example: "whole record", "prompt", "reasoning" and
            "scored", which holds the reasoning. Of a pair: "chosen" and "rejected" (both with the prompt), "prompt",
            "shared reasoning" (with which both responses begin) and "pair, shared part once".
        dropped: ids of records that are too long.
        sharing: for pairs.
    """

    records: dict[str, int]
    lengths: dict[str, Lengths]
    dropped: tuple[str, ...]
    sharing: Sharing | None = None

    @classmethod
    def of(cls, data: ExampleSet | PairSet) -> Report:
        """The report on a set, as encoding gives it."""
        if isinstance(data, ExampleSet):
            lengths = {
                "whole record": data.lengths,
                "prompt": data.prompt_tokens,
                "reasoning": data.think_tokens,
                "scored": data.scored_tokens,
            }
            return cls(_by_kind(data.kinds, KINDS), _spreads(lengths), data.dropped)
        lengths = {
            "chosen": data.chosen.lengths,
            "rejected": data.rejected.lengths,
            "prompt": data.chosen.prompt_tokens,
            "shared reasoning": data.shared_tokens - data.chosen.prompt_tokens,
            "pair, shared part once": data.lengths,
        }
        return cls(_by_kind(data.kinds, PAIR_KINDS), _spreads(lengths), data.chosen.dropped, Sharing.of(data))

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, fit for JSON."""
        return asdict(self)

    def show(self, console: Console, title: str) -> None:
        """Print the report."""
        kinds = ", ".join(f"{n:,} {name}" for name, n in self.records.items())
        dropped = f"; {len(self.dropped):,} dropped as too long" if self.dropped else ""
        noun = "pairs" if self.sharing else "records"
        line = f"{title}: {sum(self.records.values()):,} {noun} ({kinds}){dropped}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        table = Table()
        table.add_column("tokens")
        for column in ("least", "median", "95 %", "most", "total"):
            table.add_column(column, justify="right")
        for label, lengths in self.lengths.items():
            table.add_row(label, *(f"{v:,}" for v in asdict(lengths).values()))
        console.print(table)
        if self.sharing:
            console.print(str(self.sharing), markup=False, highlight=False, soft_wrap=True)


def _by_kind(kinds: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    counts = {name: int((kinds == i).sum()) for i, name in enumerate(names)}
    return {name: n for name, n in counts.items() if n}


def _spreads(lengths: dict[str, np.ndarray]) -> dict[str, Lengths]:
    return {label: Lengths.of(tokens) for label, tokens in lengths.items()}


def check_masks(data: ExampleSet, chat: ChatFormat, records: Iterable[Example | Pair], vocabulary: int) -> None:
    """Guarantee 1, on what encoding produced: every sequence scores something and ends with its only stop token.

    Token ids must lie within the model's ``vocabulary``. Of a ``PairSet``, each side is checked for itself.

    For the records given, the prompt is compared with what ``apply_chat_template`` gives at inference.

    Raises:
        SaroError: with the record's id.
    """
    if data.tokens.max() >= vocabulary:
        raise SaroError(
            f"the tokenizer gives id {data.tokens.max()} and the model embeds {vocabulary} tokens; they do not belong together"
        )
    stops = np.fromiter(chat.stop_ids, np.int32)
    for i, record in enumerate(data.ids):
        sequence = data.sequence(i)
        scored = sequence.tokens[sequence.scored_from :]
        is_stop = np.isin(scored, stops)
        if not is_stop[-1] or is_stop[:-1].any():
            raise SaroError(f"record {record}: the scored tokens do not end with their only stop token")
    position = {record: i for i, record in enumerate(data.ids)}
    for record in records:
        if isinstance(record.prompt, str) or record.id not in position:
            continue
        sequence = data.sequence(position[record.id])
        expected = chat.inference_prompt_ids(record.prompt)
        if sequence.tokens[: sequence.scored_from].tolist() != expected:
            raise SaroError(f"{record.where}: the prompt's tokens differ from those that the model reads at inference")
