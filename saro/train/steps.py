"""The step that the engine asks for, by its number: records -> trees -> this process's packs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from saro.data.packs import Pack, lay_out, plan_step
from saro.data.steps import Schedule
from saro.data.tree import SequenceTree


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        records: indices of the step's records, over all processes.
        trees: of the step, over all processes.
        packs: this process's share, at least one.
    """

    records: tuple[int, ...]
    trees: tuple[SequenceTree, ...]
    packs: tuple[Pack, ...]

    @property
    def tokens(self) -> int:
        """Tokens that the model reads in this step, over all processes."""
        return sum(tree.tokens for tree in self.trees)


@dataclass(frozen=True)
class Steps:
    """All steps of a run.

    Attributes:
        schedule: which records make which step.
        trees: records -> trees.
        pack_tokens: budget of a pack.
        rank, processes: whose packs to lay out.
    """

    schedule: Schedule
    trees: Callable[[Sequence[int]], Sequence[SequenceTree]]
    pack_tokens: int
    rank: int = 0
    processes: int = 1

    def __getitem__(self, step: int) -> Step:
        records = tuple(self.schedule.records(step).tolist())
        trees = tuple(self.trees(records))
        packs = packs_of(trees, self.pack_tokens, self.rank, self.processes)
        return Step(records, trees, tuple(packs))


def packs_of(trees: Sequence[SequenceTree], pack_tokens: int, rank: int = 0, processes: int = 1) -> Iterator[Pack]:
    """One process's packs of some trees, laid out as they are asked for."""
    plan = plan_step([tree.tokens for tree in trees], pack_tokens, processes)
    for items in plan[rank]:
        yield lay_out([trees[i] for i in items])
