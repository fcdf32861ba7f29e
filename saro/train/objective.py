"""Objectives: the log-probs of a pack -> sums. The engine divides each sum once, by its count over the whole step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from saro.config import KINDS, PAIR_KINDS, PreferenceConfig
from saro.data.packs import CHOSEN, REJECTED, SIDES, Pack, PairLogps
from saro.data.tree import RowKind, SequenceTree
from saro.distributed.runtime import Runtime
from saro.train.losses import PAIR_LOSSES, nll_sum
from saro_kernels import TokenStatistics

# name -> (sum, count)
Metrics = dict[str, tuple[torch.Tensor, torch.Tensor | int]]


@dataclass(frozen=True)
class Sums:
    """The contribution of one pack to a step.

    Attributes:
        losses: name of a count -> scalar sum, which the engine divides by this count of the step.
        metrics: name -> (sum, count), including ``loss``; every pack has the same names.
        pair_values: name -> (P,) values, one for each pair of the pack; empty for packs of examples.
    """

    losses: dict[str, torch.Tensor]
    metrics: Metrics
    pair_values: dict[str, torch.Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A loss over packs that training minimises."""

    def counts(self, trees: Sequence[SequenceTree]) -> dict[str, int]:
        """Return the counts by which the losses are divided, over all trees of a step."""

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
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, metrics: Metrics) -> None:
        """Add the (sum, count) of each metric of one pack, without synchronising with the device."""
        for name, (total, count) in metrics.items():
            if isinstance(count, torch.Tensor):
                divisor = count.double()
            else:
                # new_full fills on the device; torch.tensor(count) would synchronise.
                divisor = total.new_full((), count, dtype=torch.float64)
            pair = torch.stack([total.detach().double(), divisor])  # (2,) sum, count
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def read(self, runtime: Runtime) -> dict[str, float]:
        """Return the average of each metric over all ranks, without those that have a count of zero, and reset."""
        names = sorted(self._sums)
        if not names:
            return {}
        sums = runtime.sum_(torch.stack([self._sums[name] for name in names])).tolist()  # (metrics, 2)
        self._sums.clear()
        return {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count}


class RWObjective:
    """Reasoning-style Warmup: the mean negative log-likelihood of the scored tokens.

    Metrics: the loss, over all tokens, by kind of record and by kind of token (reasoning, answer, stop). Evaluations add
    entropy and accuracy in the same way.

    Args:
        kinds: (n,) the kind of each record, as an index into ``KINDS``.
    """

    def __init__(self, kinds: np.ndarray) -> None:
        self._kinds = torch.from_numpy(kinds.astype(np.int64))

    def counts(self, trees: Sequence[SequenceTree]) -> dict[str, int]:
        return {"rows": sum(len(s.row_kinds) for tree in trees for s in tree.sequences)}

    def __call__(self, logps: torch.Tensor, pack: Pack) -> Sums:
        entry_logps = logps.index_select(0, pack.entry_row)
        return Sums({"rows": nll_sum(entry_logps)}, self._means("loss", -logps.detach(), pack))

    def describe(self, statistics: TokenStatistics, pack: Pack) -> Metrics:
        entropy = self._means("entropy", statistics.entropy, pack)
        return entropy | self._means("mean_token_accuracy", statistics.top1, pack)

    def combine(self, means: dict[str, float]) -> dict[str, float]:
        return means

    def _means(self, name: str, values: torch.Tensor, pack: Pack) -> Metrics:
        """Sum (R,) values of rows over entries as ``NAME``, and as ``NAME/KIND`` by kind of record and of token."""
        entries = values.index_select(0, pack.entry_row)  # (E,)
        record_kind = _record_kinds(self._kinds, pack)
        token_kind = pack.row_kind.index_select(0, pack.entry_row)
        return {
            name: (entries.double().sum(), len(entries)),
            **_binned(entries, record_kind, [f"{name}/{kind}" for kind in KINDS]),
            **_binned(entries, token_kind, [f"{name}/{kind.name.lower()}" for kind in RowKind]),
        }


# A chosen response has fallen if its log-prob fell by more than this, nats per token. Rounding changes it by less.
FELL = 1e-3


class SRPOObjective:
    """Preference optimization of pairs: a function of the margin between chosen and rejected, against a reference.

    The reference is subtracted token by token, before the sum: where policy and reference agree, the result is zero, not
    the difference of two rounded sums.

    Metrics: rewards (``beta`` times the change of a log-prob), their margin and accuracy, the log-probs, and the
    displacement: how far the log-probs moved, split into reasoning and the rest, and the share of pairs whose chosen
    response has fallen. All are averaged over all pairs and by kind of pair. ``Sums.pairs`` has the margin and the
    changes of each pair, in nats. Evaluations add the entropy and the accuracy of the scored tokens of each side.

    Args:
        kinds: (n,) the kind of each pair, as an index into ``PAIR_KINDS``.
        reference: log-probs of the pairs' scored tokens under the reference model.
        options: the loss and its parameters. If ``scored`` is divergent, the pairs are those of ``PairSet.divergent``,
            and metrics that need whole responses are left out.
    """

    def __init__(self, kinds: np.ndarray, reference: PairLogps, options: PreferenceConfig) -> None:
        self.options = options
        self._kinds = torch.from_numpy(kinds.astype(np.int64))
        self.reference = reference
        self._loss = PAIR_LOSSES[options.loss]

    def counts(self, trees: Sequence[SequenceTree]) -> dict[str, int]:
        chosen = [s for tree in trees for s in tree.sequences[CHOSEN::2]]
        return {"pairs": len(chosen), "chosen_rows": sum(len(s.row_kinds) for s in chosen)}

    def loss_of(self, margin: float) -> float:
        """Return a pair's loss at a given margin, without the nll term. At 0: ln 2 for sigmoid, 1 / (4 beta^2) for ipo."""
        margins = torch.tensor([margin], dtype=torch.float64)
        return self._loss(margins, self.options.beta, self.options.label_smoothing).item()

    def __call__(self, logps: torch.Tensor, pack: Pack) -> Sums:
        entry_logps = logps.index_select(0, pack.entry_row)  # (E,)
        reference = torch.from_numpy(self.reference.pack_logps(pack)).to(entry_logps, non_blocking=True)
        entry_moved = entry_logps - reference
        policy = _sum_sides(entry_logps, pack)  # (P, 2) chosen, rejected; as are moved and rows
        moved = _sum_sides(entry_moved, pack)
        rows = _sum_sides(torch.ones_like(entry_moved), pack)
        scaled = moved / rows if self.options.length_normalize else moved
        margins = scaled[:, CHOSEN] - scaled[:, REJECTED]  # (P,)
        losses = self._loss(margins, self.options.beta, self.options.label_smoothing)
        terms = {"pairs": losses.sum()}
        if self.options.nll:
            # RPO (Pang et al. 2024, arXiv 2404.19733). The engine divides by the chosen rows of the step, not of this pack.
            terms["chosen_rows"] = self.options.nll * nll_sum(policy[:, CHOSEN])
        with torch.no_grad():
            # Add a metric of pairs to ``values``: name -> (P,). It is averaged over all pairs and over those of each kind.
            beta = self.options.beta
            values = {"loss": losses, "rewards/margins": beta * margins, "rewards/accuracies": margins > 0}
            pair_values = {"margin": margins}
            if self.options.scored == "all":
                entry_thinks = pack.row_kind.index_select(0, pack.entry_row) == RowKind.THINK
                moved_think = _sum_sides(entry_moved * entry_thinks, pack)
                for side, name in enumerate(SIDES):
                    values[f"rewards/{name}"] = beta * scaled[:, side]
                    values[f"logps/{name}"] = policy[:, side]
                    values[f"delta_logps/{name}"] = moved[:, side]
                    values[f"delta_logps/{name}/think"] = moved_think[:, side]
                    values[f"delta_logps/{name}/answer"] = moved[:, side] - moved_think[:, side]
                    pair_values[f"delta_logps/{name}"] = moved[:, side]
                fell = moved[:, CHOSEN] < -FELL * rows[:, CHOSEN]
                values["chosen_fell"] = pair_values["chosen_fell"] = fell
            kinds = self._kinds[list(pack.pairs)].to(logps.device, non_blocking=True)
            metrics = _sum_overall_and_by_kind({name: v.detach().double() for name, v in values.items()}, kinds)
            if self.options.nll:
                metrics["loss/nll"] = (nll_sum(policy[:, CHOSEN]), rows[:, CHOSEN].sum())
        return Sums(terms, metrics, {name: v.detach() for name, v in pair_values.items()})

    def describe(self, statistics: TokenStatistics, pack: Pack) -> Metrics:
        metrics = {}
        entry_side = pack.entry_side
        # All sides of the first kind, then all of the next: the order of ``kind_names`` below.
        entry_kind_and_side = len(SIDES) * _record_kinds(self._kinds, pack) + entry_side
        for name, row_values in (("entropy", statistics.entropy), ("mean_token_accuracy", statistics.top1)):
            entries = row_values.index_select(0, pack.entry_row)
            side_names = [f"{name}/{side}" for side in SIDES]
            kind_names = [f"{kind}/{side_name}" for kind in PAIR_KINDS for side_name in side_names]
            metrics |= _binned(entries, entry_side, side_names)
            metrics |= _binned(entries, entry_kind_and_side, kind_names)
        return metrics

    def combine(self, means: dict[str, float]) -> dict[str, float]:
        if "loss/nll" not in means:
            return means
        minimised = means["loss"] + self.options.nll * means["loss/nll"]
        return means | {"loss": minimised, "loss/preference": means["loss"]}


def _record_kinds(kinds: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Return the kind (E,) of each entry's record, from the kinds (n,) of all records."""
    sequence_kinds = kinds[list(pack.records)].to(pack.entry_sequence.device, non_blocking=True)
    return sequence_kinds.index_select(0, pack.entry_sequence)


def _sum_sides(entries: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Sum (E,) values of entries over the sequences of each pair: (P, 2), chosen and rejected."""
    sums = entries.new_zeros(len(pack.records)).index_add(0, pack.entry_sequence, entries)
    return sums.view(-1, len(SIDES))


def _sum_overall_and_by_kind(values: dict[str, torch.Tensor], kinds: torch.Tensor) -> Metrics:
    """Sum (P,) values over all pairs as ``NAME``, and over the pairs of each kind as ``KIND/NAME``."""
    # Stack the values, so that one kernel makes all sums.
    table = torch.stack(list(values.values()))  # (names, P)
    metrics: Metrics = {}
    for name, total in zip(values, table.sum(1), strict=True):
        metrics[name] = (total, table.shape[1])
    for index, kind in enumerate(PAIR_KINDS):
        is_kind = kinds == index
        count = is_kind.sum()
        for name, total in zip(values, table.where(is_kind, 0).sum(1), strict=True):
            metrics[f"{kind}/{name}"] = (total, count)
    return metrics


def _binned(values: torch.Tensor, bins: torch.Tensor, names: Sequence[str]) -> Metrics:
    """Sum (E,) values by bin, (E,) indices into ``names``."""
    zeros = torch.zeros(len(names), dtype=torch.float64, device=values.device)
    sums = zeros.index_add(0, bins, values.double())
    counts = zeros.index_add(0, bins, torch.ones_like(values, dtype=torch.float64))
    return {name: (sums[i], counts[i]) for i, name in enumerate(names)}
