"""Selects among texts and records. No selection depends on the order of what it is given.

Ties are broken by ids, draw keys, or a hash of the seed and the id, never by chance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from saro.evaluate.answers import Answer
from saro.synth.bands import band_distance
from saro.synth.funnel import Funnel
from saro.synth.judgement import Judged
from saro.synth.prompts import Prompt


@dataclass(frozen=True)
class Candidate:
    """Something to choose for a data set.

    Attributes:
        id: unique among the candidates.
        cell: what is balanced, the most important first, such as (outcome, hazards, source, level); of one length
            for all candidates.
        rank: within a cell, lower ranks are chosen first.
    """

    id: str
    cell: tuple[str, ...]
    rank: int = 0


def cell_of(prompt: Prompt, outcome: str) -> tuple[str, ...]:
    """Return the cell of a text with this outcome.

    The outcome comes first: else the many hazards of harmful prompts would crowd out the harmless ones, which have none.
    """
    return outcome, "+".join(sorted(prompt.hazard)), prompt.item.source, prompt.level


def count_tokens(answer: Answer) -> int:
    """Return the number of tokens that the model drew for a text; its words if a server did not count them."""
    if answer.tokens["think"] < 0 or answer.tokens["answer"] < 0:
        return len(f"{answer.think} {answer.answer}".split())
    return answer.tokens["think"] + answer.tokens["answer"]


def sort_texts(texts: Iterable[Judged], funnel: Funnel) -> list[Judged]:
    """Return texts by prompt and draw key; those that repeat another text on the same prompt are left out."""
    unique: dict[tuple[str, str, str], Judged] = {}
    for text in sorted(texts, key=lambda text: (text.drawn.task.prompt.id, text.drawn.key)):
        id, answer = text.drawn.task.prompt.id, text.drawn.answer
        if unique.setdefault((id, answer.think, answer.answer), text) is not text:
            funnel.leave_out(id, "draws", "repeats another text", text.drawn.key)
    return list(unique.values())


def find_shortest(texts: Collection[Judged]) -> Judged:
    """Return the text with the shortest reasoning, among those that miss the band of their prompt's level by least.

    The answer's length only breaks ties: the shortest one is seldom the best.
    """

    def preference(text: Judged) -> tuple[int, int, int, str]:
        answer = text.drawn.answer
        total = count_tokens(answer)
        think = answer.tokens["think"] if answer.tokens["think"] >= 0 else len(answer.think.split())
        return band_distance(answer.think, text.drawn.task.prompt.level), think, total, text.drawn.key

    return min(texts, key=preference)


def choose_balanced(candidates: Iterable[Candidate], number: int, seed: int) -> list[str]:
    """Return the ids of at most ``number`` candidates, balanced over their cells, in the order in which they are chosen.

    One at a time: from the value of the cells' first field that has been chosen least, of this from the least chosen
    value of the second, and so on; ties in the order of the values. So a smaller number chooses a part of what a larger one
    chooses, and the chosen ones of a cell are its lowest ranks, in an order that only the seed decides.
    """
    root = _Branch()
    for one in sorted(candidates, key=lambda one: (one.rank, hashlib.sha256(f"{seed}/{one.id}".encode()).digest())):
        root.add(one.id, one.cell)
    return [root.choose() for _ in range(min(number, root.left))]


@dataclass
class _Branch:
    """All candidates whose cells begin alike.

    Attributes:
        left, chosen: numbers of candidates.
        branches: next value of the cell -> the candidates that have it.
        ids: candidates whose cell ends here, in the order in which they are chosen.
    """

    left: int = 0
    chosen: int = 0
    branches: dict[str, _Branch] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)

    def add(self, id: str, cell: Sequence[str]) -> None:
        self.left += 1
        if cell:
            self.branches.setdefault(cell[0], _Branch()).add(id, cell[1:])
        else:
            self.ids.append(id)

    def choose(self) -> str:
        self.left -= 1
        self.chosen += 1
        if self.ids:
            return self.ids[self.chosen - 1]
        _, branch = min((b.chosen, name) for name, b in self.branches.items() if b.left)
        return self.branches[branch].choose()


def pair_nearest(
    good: Iterable[Judged], bad: Iterable[Judged], most: int, lengths: Mapping[str, int] | None = None
) -> list[tuple[Judged, Judged]]:
    """Return at most ``most`` pairs of a good and a bad text, of nearest length first; each text is in one pair.

    Lengths are compared by their ratio. If the two sides of a pair are of one length, the length does not say which is
    chosen.

    Args:
        lengths: draw key -> tokens of the bad texts of which only a part is kept; the others count in full.
    """
    kept = lengths or {}
    goods = [(text, max(count_tokens(text.drawn.answer), 1)) for text in good]
    bads = [(text, max(kept.get(text.drawn.key, count_tokens(text.drawn.answer)), 1)) for text in bad]
    by_ratio = sorted(
        ((max(a, b) / min(a, b), x.drawn.key, y.drawn.key, x, y) for x, a in goods for y, b in bads),
        key=lambda entry: entry[:3],
    )
    pairs: list[tuple[Judged, Judged]] = []
    used: set[str] = set()
    for _, first, second, x, y in by_ratio:
        if len(pairs) < most and used.isdisjoint((first, second)):
            pairs.append((x, y))
            used |= {first, second}
    return pairs


def cap_shares(fixed: int, available: Mapping[str, int], shares: Mapping[str, float]) -> dict[str, int]:
    """Return how many records of each form to keep, so that none has more than its share of all that are kept.

    It is the largest such choice: no form could have more.

    Args:
        fixed: number of records that are all kept.
        available: number of records of each form that has a largest share.
        shares: form -> largest share, 0 to 1.
    """
    numbers = dict(available)
    while True:
        total = fixed + sum(numbers.values())
        # Rounded first: 0.1 * 30 is a little more than 3, and 0.7 * 10 a little less than 7.
        limits = {form: min(number, int(round(shares[form] * total, 6))) for form, number in numbers.items()}
        if limits == numbers:
            return numbers
        numbers = limits


def correlate(labels: Sequence[bool], values: Sequence[float]) -> float | None:
    """Return the point-biserial correlation of labels and values, -1 to 1; None if either is the same throughout."""
    x, y = np.asarray(labels, np.float64), np.asarray(values, np.float64)
    if len(x) == 0 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])
