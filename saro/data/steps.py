"""Choose the records of each step, and make the step's packs.

The records of a step depend only on the step's number, the options of ``Schedule`` and the records' kinds and groups.
They do not depend on pack size, number of ranks or resuming, so none of these changes what a step learns from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch

from saro.config import DataConfig, TrainConfig
from saro.data.dataset import ExampleSet, PairSet
from saro.data.packs import ALL_WORK, Pack, Share, pack_trees
from saro.data.tree import SequenceTree
from saro.data.unpaired_set import UnpairedSet
from saro.errors import SaroError


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        records: indices of the step's records, over all ranks.
        trees: the trees of these records, over all ranks.
        packs: this rank's share of them, at least one pack.
    """

    records: tuple[int, ...]
    trees: tuple[SequenceTree, ...]
    packs: tuple[Pack, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens that the model reads in this step, over all ranks."""
        return sum(tree.tokens for tree in self.trees)

    def to(self, device: torch.device | str) -> Step:
        """Return the step with its packs on ``device``."""
        return replace(self, packs=tuple(pack.to(device) for pack in self.packs))


@dataclass(frozen=True)
class Steps:
    """All steps of a run: ``steps[i]`` is made when it is asked for.

    Attributes:
        data: the records; records that share tokens come in one tree (``data.trees``).
        schedule: chooses the records of each step.
        pack_tokens: budget of a pack.
        share: the rank whose packs are laid out.
    """

    data: ExampleSet | PairSet
    schedule: Schedule
    pack_tokens: int
    share: Share = ALL_WORK

    def __getitem__(self, step: int) -> Step:
        records = self.schedule.records(step).tolist()
        trees = self.data.trees(records, self.pack_tokens)
        packs = pack_trees(trees, self.pack_tokens, self.share)
        return Step(tuple(records), tuple(trees), tuple(packs))


class Schedule:
    """The records of each step, drawn from one shuffled epoch after another.

    An epoch of n records has ceil(n / records_per_step) steps, whose sizes differ by at most one. So an epoch does not
    end with a step that gives a handful of records the weight of a full step.

    Args:
        kinds: (n,) the kind of each record, as small integers.
        records_per_step: upper bound of the records in a step.
        seed: seed of the shuffle.
        weights: kind -> how often an epoch draws each record of this kind, on average; default 1. 2 draws every record
            twice, 0.5 draws half of the records, and a new random half in each epoch.
        groups: (n,) integers. Records with the same number, such as those on one prompt, are drawn next to each other.
            Each record is drawn as often as without groups, and steps keep their sizes: the end of a step may split a
            group, and a group larger than a step fills consecutive steps. Two copies of a record never stand in the
            same run of their group: if a weight draws records twice, the group has a second run at another place.

    Raises:
        SaroError: no record is left to draw.
        ValueError: there is not one group for each record.
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
        kinds_present, counts = np.unique(self.kinds, return_counts=True)
        self.records_per_epoch = 0
        for kind, count in zip(kinds_present.tolist(), counts.tolist(), strict=True):
            self.records_per_epoch += round(self.weights.get(kind, 1.0) * count)
        if self.records_per_epoch < 1:
            raise SaroError("the weights leave no record to draw; raise --data.weights of a kind that the data holds")
        self.steps_per_epoch = math.ceil(self.records_per_epoch / records_per_step)
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    @classmethod
    def of(cls, data: ExampleSet | PairSet, data_options: DataConfig, train: TrainConfig) -> Schedule:
        """Make the schedule that the options of a run ask for."""
        present = {data.kind_names[kind] for kind in np.unique(data.kinds)}
        if absent := data_options.weights.keys() - present:
            raise SaroError(f"data.weights: no record is of kind {min(absent)}; leave it out, or add records")
        weights = {kind: data_options.weights.get(name, 1.0) for kind, name in enumerate(data.kind_names)}
        shares_prompts = isinstance(data, PairSet | UnpairedSet)
        groups = data.prompts if shares_prompts else data.conversations
        if shares_prompts and not data_options.group_by_prompt:
            groups = None
        return cls(data.kinds, train.records_per_step, train.seed, weights, groups)

    def num_steps(self, train: TrainConfig) -> int:
        """Return the number of steps of a run: its epochs, or ``max_steps`` if that is less."""
        return count_steps(train, self.steps_per_epoch)

    def records(self, step: int) -> np.ndarray:
        """Return the indices of the records of step ``step``, counted from 0 over all epochs."""
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._draw(epoch)
        start = in_epoch * self.records_per_epoch // self.steps_per_epoch
        stop = (in_epoch + 1) * self.records_per_epoch // self.steps_per_epoch
        # Copy, so that callers cannot change the order.
        return self._order[start:stop].copy()

    def _draw(self, epoch: int) -> np.ndarray:
        """Return the indices of an epoch's records, (records_per_epoch,), in the order in which steps take them."""
        rng = np.random.default_rng([self.seed, epoch])
        drawn = []
        for kind in np.unique(self.kinds):
            members = np.flatnonzero(self.kinds == kind)
            copies, rest = divmod(round(self.weights.get(int(kind), 1.0) * len(members)), len(members))
            drawn.extend([members] * copies)
            drawn.append(rng.permutation(members)[:rest])  # another part in each epoch
        order = rng.permutation(np.concatenate(drawn))
        return order if self.groups is None else _gather_groups(order, self.groups)


def count_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Return the number of steps of ``epochs``, rounded up, or ``max_steps`` if that is less."""
    # The epochs as the user wrote them: in floats, 1.1 * 10 is above 11.
    steps = math.ceil(Fraction(str(train.epochs)) * steps_per_epoch)
    return steps if train.max_steps is None else min(steps, train.max_steps)


def _gather_groups(order: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Move the first draws of each group's records together, likewise their second draws, and so on.

    Such a run goes to the place where its lowest-numbered record was drawn, which is as random as any other. (The place
    of its earliest draw would bring large groups forward, with all their runs at once.)

    Example: records 0 and 1 are group 5, record 2 is group 7, and each is drawn twice.

        order            1  2  0  0  2  1    the draws
        copy             0  0  0  1  1  1    how often the record was drawn before
        run             5a 7a 5a 5b 7b 5b    one for each (group, copy)
        place of run     2  1  2  3  4  3    where its lowest record was drawn: record 0 for 5a, 5b, record 2 for 7a, 7b
        result           2  1  0  0  1  2    sorted by place; draws of one run keep their order
    """
    # Sort the draws by record. Draws of one record keep their order, so a draw's distance from the record's first one
    # says how often the record was drawn before.
    by_record = np.argsort(order, kind="stable")
    records = order[by_record]
    copy = np.arange(len(order)) - np.searchsorted(records, records)
    group = np.unique(groups[records], return_inverse=True)[1]
    # In this order, the first draw of a run is that of its lowest record.
    _, run_first, run = np.unique(group * (copy.max() + 1) + copy, return_index=True, return_inverse=True)
    place = np.empty(len(order), np.int64)
    place[by_record] = by_record[run_first][run]
    return order[np.argsort(place, kind="stable")]
