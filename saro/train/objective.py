"""Objectives: the log-probs of a pack -> sums. The engine divides each sum once, by its count over the whole step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from saro.data.packs import Pack
from saro.data.tree import SequenceTree
from saro.distributed.runtime import Runtime
from saro.model.policy import Policy
from saro_kernels import TokenStatistics


@dataclass(frozen=True, eq=False)
class Metrics(Mapping[str, torch.Tensor]):
    """Sums and counts by name, in one tensor, so that adding them up takes one kernel and reading them one copy.

    As a mapping: name -> (2,) sum and count.

    Attributes:
        names: M names.
        table: (M, 2) float64 sum and count, without gradient.
    """

    names: tuple[str, ...]
    table: torch.Tensor

    @classmethod
    def of(cls, values: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Metrics:
        """Make metrics of scalars: name -> (sum, count)."""
        flat = [value.detach().double() for pair in values.values() for value in pair]
        return cls(tuple(values), torch.stack(flat).view(-1, 2))

    def __getitem__(self, name: str) -> torch.Tensor:
        try:
            return self.table[self.names.index(name)]
        except ValueError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def join(self, other: Metrics) -> Metrics:
        """Return these metrics and others, which have other names."""
        return Metrics(self.names + other.names, torch.cat([self.table, other.table]))


@dataclass(frozen=True)
class Sums:
    """The contribution of one pack to a step.

    Attributes:
        losses: name of a count -> scalar sum, which the engine divides by this count of the step.
        metrics: sums and counts, ``loss`` among them; every pack has the same names in the same order.
        pair_values: name -> (P,) values, one for each pair of the pack; empty for packs of examples.
    """

    losses: dict[str, torch.Tensor]
    metrics: Metrics
    pair_values: dict[str, torch.Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A loss over packs that training minimises."""

    def counts(self, trees: Sequence[SequenceTree]) -> Mapping[str, float]:
        """Return the counts by which the losses are divided, over all trees of a step."""

    def start_step(self, runtime: Runtime, policy: Policy, records: Sequence[int]) -> None:
        """Compute what the losses of a step need of all its packs together; by default nothing. All ranks call it.

        Args:
            policy: the policy before the step, not wrapped for several ranks.
            records: indices of the step's records, over all ranks.
        """

    def gradient_rows(self, pack: Pack) -> int:
        """Return how many rows of a pack, the first ones, the losses have a gradient in."""

    def __call__(self, logps: torch.Tensor, pack: Pack) -> Sums:
        """Return the sums over one pack, from the log-probs (R,) of its rows."""

    def describe(self, statistics: TokenStatistics, pack: Pack) -> Metrics:
        """Return further metrics for evaluations, from statistics of a pack's rows, (R,) each.

        ``entropy`` is in nats, ``mean_token_accuracy`` is the share of scored tokens that are the likeliest.
        """

    def combine(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means of the metrics, in which ``loss`` is the quantity that is minimised."""


class Meter:
    """Averages metrics over packs, steps and ranks, from sums and counts by name: never an average of averages."""

    def __init__(self) -> None:
        self._sums: Metrics | None = None

    def add(self, metrics: Metrics) -> None:
        """Add the sums and counts of one pack, without reading them.

        Raises:
            ValueError: the names are not those of the packs before.
        """
        if self._sums is None:
            self._sums = metrics
        elif self._sums.names == metrics.names:
            self._sums = Metrics(metrics.names, self._sums.table + metrics.table)
        else:
            raise ValueError(f"a pack has the metrics {', '.join(metrics.names)}, and those before {self._sums.names}")

    def take(self, runtime: Runtime) -> Metrics | None:
        """Return the sums over all ranks, still on the device, and reset. None if nothing was added."""
        sums, self._sums = self._sums, None
        return None if sums is None else Metrics(sums.names, runtime.sum_(sums.table.clone()))

    def read(self, runtime: Runtime) -> dict[str, float]:
        """Return the average of each metric over all ranks, and reset; see ``average``."""
        sums = self.take(runtime)
        return {} if sums is None else average(sums.names, sums.table.flatten().tolist())


def average(names: Sequence[str], sums: Sequence[float]) -> dict[str, float]:
    """Return the average of each metric by name, sorted, without those that have a count of zero.

    Args:
        names: M names.
        sums: (2M,) sum and count of each.
    """
    triples = sorted(zip(names, sums[::2], sums[1::2], strict=True))
    return {name: total / count for name, total, count in triples if count}
