"""Groups the rows of an evaluation by model, suite and attack, and matches those of two models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from saro.evaluate.outcomes import FAILED, Row, find_twins
from saro.evaluate.statistics import restrict_lengths

# The rate of each expectation.
RATES = {"refuse": "harmful_compliance", "comply": "over_refusal", "answer": "accuracy"}
# The first columns of ``Cells.lengths``.
LENGTHS = ("think", "answer", "all")


class Cell(NamedTuple):
    """The answers of one model to one suite under one attack."""

    model: str
    suite: str
    attack: str


@dataclass(frozen=True)
class ScoreContext:
    """Names, limits and findings that scores need besides the rows.

    Attributes:
        models: names, in the order in which they are compared; the first one is the baseline.
        suites: names of the suites, in order.
        attacks: one mapping per attack, in order: {"id", "kind", "control"?, "step"?, "think_off"?}. Attacks that differ only in
            ``step``, and in the number at the end of their id, are the points of one recovery curve.
        judge: name of the main judge.
        gold: result of ``saro judge-check`` for this judge, None if it was never measured.
        limits: largest number of tokens of an answer, by model; a model without one has no known limit.
        templates: hash of the chat template, by model.
        contaminated: by model, "suite/item" of the prompts that its training data holds.
        threats: threats to validity that others found: {"id", "text"}.
        seeds: number of training seeds, by model; a model without one has one.
    """

    models: Sequence[str]
    suites: Sequence[str]
    attacks: Sequence[Mapping[str, Any]]
    judge: str
    gold: Mapping[str, Any] | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    contaminated: Mapping[str, Collection[str]] = field(default_factory=dict)
    threats: Sequence[Mapping[str, str]] = ()
    seeds: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Cells:
    """All rows of an evaluation by cell, with what their numbers depend on.

    Attributes:
        context: the names, and the limits of tokens.
        rows: rows of each cell, sorted by key, cells in the order of the context's names.
        twins: "suite/item" of the items with a twin.
    """

    context: ScoreContext
    rows: Mapping[Cell, Sequence[Row]]
    twins: frozenset[str]

    @classmethod
    def of(cls, rows: Sequence[Row], context: ScoreContext) -> Cells:
        """Group sorted rows."""
        by_cell = group_rows(rows, lambda row: Cell(row.answer.model, row.answer.suite, row.answer.attack))
        names = map(Cell._make, product(context.models, context.suites, [attack["id"] for attack in context.attacks]))
        ordered = {cell: by_cell[cell] for cell in names if cell in by_cell}
        return cls(context, ordered, find_twins([row.item for row in rows]))

    def has_twins(self, rows: Iterable[Row]) -> bool:
        """Return True if an item of the rows has a twin."""
        return any(f"{row.item.suite}/{row.item.id}" in self.twins for row in rows)

    def detection_rows(self, rows: Sequence[Row]) -> list[Row]:
        """Return the judged answers to twins, or to all prompts of a suite without twins; none if one kind is missing."""
        judged = [row for row in rows if row.is_judged and row.item.expect != "answer"]
        if self.has_twins(rows):
            judged = [row for row in judged if f"{row.item.suite}/{row.item.id}" in self.twins]
        return judged if len({row.item.expect for row in judged}) == 2 else []

    def match_rows(self, cell: Cell, other: str, is_usable: Callable[[Row], bool]) -> list[tuple[Row, Row]]:
        """Return the usable answers of two models to the same prompts, in the order of the prompts.

        Each seed of one model is compared with the same seed of the other, or with the only one that it has.
        """
        seeds = max(self._count_seeds(name) for name in (cell.model, other))
        own, others = (self._find_usable(name, is_usable, seeds) for name in (cell, cell._replace(model=other)))
        return [(own[prompt], others[prompt]) for prompt in sorted(own.keys() & others.keys())]

    def _find_usable(
        self, cell: Cell, is_usable: Callable[[Row], bool], seeds: int
    ) -> dict[tuple[tuple[str, int], int], Row]:
        """Return the usable rows of a cell by prompt and seed; those of a model with one seed stand for every seed."""
        is_single = self._count_seeds(cell.model) == 1
        usable = [row for row in self.rows.get(cell, ()) if is_usable(row)]
        return {(row.prompt, seed): row for row in usable for seed in (range(seeds) if is_single else (row.seed,))}

    def _count_seeds(self, model: str) -> int:
        return self.context.seeds.get(model, 1)

    def lengths(self, rows: Sequence[Row], models: Sequence[str]) -> np.ndarray:
        """Return tokens up to the smallest limit of the models: (rows, 4): think, answer, all, and 1 if it is cut."""
        limits = [self.context.limits[name] for name in models if name in self.context.limits]
        limit = min(limits, default=None)
        result = np.zeros((len(rows), 4), dtype=np.int64)
        for i, row in enumerate(rows):
            tokens = row.answer.tokens
            think, answer, is_cut = restrict_lengths(tokens["think"], tokens["answer"], limit)
            is_cut = is_cut or row.answer.state in ("cut", "unfinished", "looped")
            result[i] = think, answer, think + answer, is_cut
        return result


def has_lengths(row: Row) -> bool:
    """Return True if the tokens of a drawn answer are known: a server that gives text only leaves -1."""
    return row.outcome != FAILED and min(row.answer.tokens["think"], row.answer.tokens["answer"]) >= 0


def units_of(rows: Iterable[Row]) -> list[str]:
    """Return the unit of each row."""
    return [row.unit for row in rows]


def seeds_of(rows: Iterable[Row]) -> list[int]:
    """Return the training seed of each row."""
    return [row.seed for row in rows]


def seeds_of_pairs(pairs: Iterable[tuple[Row, Row]]) -> list[int]:
    """Return the training seed of each pair of ``Cells.match_rows``; that of a model with a single one is 0."""
    return [max(own.seed, other.seed) for own, other in pairs]


def detection_counts(rows: Sequence[Row]) -> list[np.ndarray]:
    """Return the columns of ``saro.evaluate.discrimination.d_prime``, a row being one of the four."""
    harmful = np.array([row.item.expect == "refuse" for row in rows])
    held_back = np.array([row.outcome in ("safe", "refused") for row in rows])
    return [harmful & held_back, harmful & ~held_back, ~harmful & held_back, ~harmful & ~held_back]


def group_rows(rows: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Return rows by key, keys in sorted order with None last."""
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return {name: groups[name] for name in sorted(groups, key=lambda name: (name is None, name))}
