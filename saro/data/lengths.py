"""Measure the lengths of a set's records, and how many tokens they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from saro.data.dataset import ExampleSet, PairSet, Repeats
from saro.data.repeats import count_duplicates, find_overlap
from saro.data.tree import build_tree


@dataclass(frozen=True)
class Lengths:
    """The distribution of a length, in tokens."""

    least: int
    median: int
    p95: int
    most: int
    total: int

    @classmethod
    def of(cls, tokens: np.ndarray) -> Lengths:
        """Return the distribution of (n,) lengths."""
        least, median, p95, most = np.percentile(tokens, [0, 50, 95, 100], method="nearest").astype(int).tolist()
        return cls(least, median, p95, most, int(tokens.sum()))


@dataclass(frozen=True)
class Sharing:
    """Number of tokens of all pairs, with and without sharing.

    Attributes:
        apart: both sequences of each pair in full.
        by_pair: one tree for each pair, so that the part its two sides share counts once.
        by_prompt: one tree for each prompt, so that the part its pairs share counts once. No schedule needs fewer.
    """

    apart: int
    by_pair: int
    by_prompt: int

    @classmethod
    def of(cls, data: PairSet) -> Sharing:
        """Count the tokens of a set of pairs."""
        apart = int(data.chosen.lengths.sum() + data.rejected.lengths.sum())
        by_prompt = _count_by_prompt(data) if data.repeats is None else data.repeats.by_prompt
        return cls(apart, int(data.lengths.sum()), by_prompt)


def count_repeats(data: ExampleSet | PairSet) -> Repeats:
    """Count what a set repeats. All tokens are read: this takes seconds for a gigabyte of them."""
    return Repeats(count_duplicates(data), _count_by_prompt(data) if isinstance(data, PairSet) else None)


def _count_by_prompt(data: PairSet) -> int:
    """Return the number of tokens of a set of pairs if all that are on one prompt share a tree."""
    _, number, pairs = np.unique(data.prompts, return_inverse=True, return_counts=True)
    # A tree of one pair is as long as the pair. Only the others are built.
    is_alone = pairs[number] == 1
    tokens = int(data.lengths[is_alone].sum())
    others = np.flatnonzero(~is_alone)
    others = others[np.argsort(number[others], kind="stable")]
    for group in np.split(others, np.flatnonzero(np.diff(number[others])) + 1):
        if len(group):
            tree = build_tree([side for pair in group for side in data.sequences(pair)])
            tokens += sum(len(node.tokens) for node in tree.nodes)
    return tokens


@dataclass(frozen=True)
class LengthReport:
    """Counts and lengths of the records of a set.

    Attributes:
        records: number of records of each kind.
        lengths: distribution of each length that is measured. Examples have "whole record", "prompt", "reasoning" and
            "scored", which includes the reasoning. Pairs have "chosen" and "rejected" (each with the prompt), "prompt",
            "shared reasoning" (the beginning of both responses) and "pair, shared part once".
        dropped: ids of the records that were too long.
        equal: ids of the pairs that were left out because their two sides are the same.
        ignored: names of the records' fields that were ignored.
        raw: number of records that are raw text although the model has a chat template.
        duplicates: number of records that repeat an earlier one, token by token; both sides of a pair must.
        trained_prompts: number of records with the prompt of a training record; 0 for the training records themselves.
        open_sides: number of sides of pairs that have no end.
        sharing: what trees save; None for examples.
    """

    records: dict[str, int]
    lengths: dict[str, Lengths]
    dropped: tuple[str, ...]
    equal: tuple[str, ...]
    duplicates: int
    trained_prompts: int
    open_sides: int
    sharing: Sharing | None
    ignored: tuple[str, ...] = ()
    raw: int = 0

    @classmethod
    def of(cls, data: ExampleSet | PairSet, train: ExampleSet | PairSet | None = None) -> LengthReport:
        """Measure an encoded set. ``train`` has the training records of the same run, and may be ``data`` itself."""
        first = data if isinstance(data, ExampleSet) else data.chosen
        if isinstance(data, ExampleSet):
            sharing = None
            open_sides = 0
            lengths = {
                "whole record": data.lengths,
                "prompt": data.prompt_tokens,
                "reasoning": data.think_tokens,
                "scored": data.scored_tokens,
            }
        else:
            sharing = Sharing.of(data)
            open_sides = sum(
                int(side.is_open.sum()) for side in (data.chosen, data.rejected) if side.is_open is not None
            )
            lengths = {
                "chosen": data.chosen.lengths,
                "rejected": data.rejected.lengths,
                "prompt": data.chosen.prompt_tokens,
                "shared reasoning": data.shared_tokens - data.chosen.prompt_tokens,
                "pair, shared part once": data.lengths,
            }
        return cls(
            records=_count_kinds(data.kinds, data.kind_names),
            lengths={label: Lengths.of(tokens) for label, tokens in lengths.items()},
            dropped=first.dropped,
            equal=first.equal,
            duplicates=count_duplicates(data) if data.repeats is None else data.repeats.duplicates,
            trained_prompts=0 if train is None or train is data else len(find_overlap(data, train)),
            open_sides=open_sides,
            sharing=sharing,
            ignored=first.ignored,
            raw=first.raw,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data that JSON can hold."""
        return asdict(self)


def _count_kinds(kinds: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    counts = {name: int((kinds == i).sum()) for i, name in enumerate(names)}
    return {name: n for name, n in counts.items() if n}
