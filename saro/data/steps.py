"""Which records make which step: a pure function of (seed, epoch) and the records, and of nothing else.

Pack size, number of ranks and resuming do not enter, so none of them changes what a step learns from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from saro.errors import SaroError


class Schedule:
    """Steps of an epoch after epoch of shuffled records.

    An epoch of n records has ceil(n / records_per_step) steps whose sizes differ by one at most, so that no step at
    the end of an epoch gives a handful of records the weight of a full step.

    Args:
        kinds: (n,) the kind of each record, as small integers.
        records_per_step: upper bound of the records in a step.
        seed: of the shuffle.
        weights: for a kind, how often each of its records is drawn in an epoch on average: 2 draws every one twice,
            0.5 a half of them, another half in each epoch. 1 where absent.
        groups: (n,) integers: records with the same one, such as those on one prompt, are drawn next to each other.
            Each record is drawn as often as without groups, and steps keep their sizes: the end of a step may part a
            group, and a group larger than a step fills consecutive ones. Copies of a record are never in one run of
            its group: where a weight draws records twice, their group has a second run, at a place of its own.

    Raises:
        SaroError: no record is left to draw.
    """

    def __init__(
        self,
        kinds: Sequence[int] | np.ndarray,
        records_per_step: int,
        seed: int,
        weights: Mapping[int, float] | None = None,
        groups: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        self.kinds = np.asarray(kinds)
        self.groups = None if groups is None else np.asarray(groups)
        if self.groups is not None and len(self.groups) != len(self.kinds):
            raise ValueError(f"{len(self.groups)} groups for {len(self.kinds)} records")
        self.records_per_step = records_per_step
        self.seed = seed
        self.weights = dict(weights or {})
        self.records_per_epoch = sum(
            round(self.weights.get(int(kind), 1.0) * int(count))
            for kind, count in zip(*np.unique(self.kinds, return_counts=True), strict=True)
        )
        if self.records_per_epoch < 1:
            raise SaroError("the weights leave no record to draw; raise --data.weights of a kind that the data holds")
        self.steps_per_epoch = math.ceil(self.records_per_epoch / records_per_step)
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def records(self, step: int) -> np.ndarray:
        """Indices of the records of step ``step``, counted from 0 over all epochs."""
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._draw(epoch)
        bounds = np.arange(2) + in_epoch
        start, stop = bounds * self.records_per_epoch // self.steps_per_epoch
        # A copy: who changes what they get must not change the order.
        return self._order[start:stop].copy()

    def _draw(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        drawn = []
        for kind in np.unique(self.kinds):
            members = np.flatnonzero(self.kinds == kind)
            copies, rest = divmod(round(self.weights.get(int(kind), 1.0) * len(members)), len(members))
            drawn += [members] * copies + [rng.permutation(members)[:rest]]
        order = rng.permutation(np.concatenate(drawn))
        return order if self.groups is None else _together(order, self.groups)


def _together(order: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The order with each group's first draws moved together, its second draws too, and so on.

    Such a run goes where its lowest record was drawn: a place as random as any. (The place of its earliest draw would
    bring large groups forward, all their runs at once.)
    """
    # Draws by record; those of one record in their order, so that position minus first position counts its copies.
    by_record = np.argsort(order, kind="stable")
    records = order[by_record]
    copies = np.arange(len(order)) - np.searchsorted(records, records)
    _, runs = np.unique(groups[records], return_inverse=True)
    _, lowest, run_of = np.unique(runs * (copies.max() + 1) + copies, return_index=True, return_inverse=True)
    places = np.empty(len(order), np.int64)
    places[by_record] = by_record[lowest][run_of]
    return order[np.argsort(places, kind="stable")]
