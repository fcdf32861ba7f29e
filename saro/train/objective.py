"""Objectives: the log-probs of a pack -> sums. The engine divides each once, by a count over the whole step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch

from saro.config import KINDS, PAIR_KINDS, PreferenceConfig
from saro.data.packs import Pack
from saro.data.tree import RowKind, SequenceTree
from saro.train.losses import PAIR_LOSSES, nll_sum
from saro.train.reference import Reference
from saro_kernels import TokenStatistics

# By name, a sum and what divides it.
Metrics = dict[str, tuple[torch.Tensor, torch.Tensor | int]]


@dataclass(frozen=True)
class Sums:
    """What one pack adds to a step.

    Attributes:
        losses: scalar sums, by the name of the count that divides them.
        metrics: ``loss`` among them; the same names from every pack.
        pairs: by name, (P,) a value for each pair of the pack; empty where there are no pairs.
    """

    losses: dict[str, torch.Tensor]
    metrics: Metrics
    pairs: dict[str, torch.Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What is minimised."""

    def counts(self, trees: Sequence[SequenceTree]) -> dict[str, int]:
        """Divisors of the losses, over all trees of a step."""

    def __call__(self, logps: torch.Tensor, pack: Pack) -> Sums:
        """Sums over one pack. ``logps``: (R,) of its rows."""

    def describe(self, statistics: TokenStatistics, pack: Pack) -> Metrics:
        """What an evaluation reports besides, of the distributions of a pack's rows: (R,) each.

        ``entropy``, nats, and ``mean_token_accuracy``, the share of scored tokens that are the likeliest.
        """

    def combine(self, means: dict[str, float]) -> dict[str, float]:
        """The means of the metrics, ``loss`` being what is minimised."""


class RWObjective:
    """Reasoning-style Warmup: the mean negative log-likelihood of the scored tokens.

    Metrics: the same mean by kind of record, and by what the token is part of; entropy and accuracy likewise.

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
        """(R,) values of rows as ``NAME``, and as ``NAME/KIND`` by kind of record and of token."""
        entries = values.index_select(0, pack.entry_row)
        record_kind = _record_kinds(self._kinds, pack)
        token_kind = pack.row_kind.index_select(0, pack.entry_row)
        return {
            name: (entries.double().sum(), len(entries)),
            **_binned(entries, record_kind, [f"{name}/{kind}" for kind in KINDS]),
            **_binned(entries, token_kind, [f"{name}/{kind.name.lower()}" for kind in RowKind]),
        }


# Of a pair, in the order of a tree's sequences.
SIDES = ("chosen", "rejected")

# A chosen response counts as fallen when it lost more than this, nats per token: rounding alone moves it by less.
FELL = 1e-3


class SRPOObjective:
    """Preference optimization of pairs: a function of the margin between chosen and rejected, against a reference.

    A tree's sequences come in twos, chosen before rejected, and both carry the pair's record index. Differences to the
    reference are taken token by token, before they are summed: at the reference they are zero, not a rounded sum.

    Metrics: rewards (``beta`` times the change of a log-prob), their margin and accuracy, the log-probs, and the
    displacement: by how much they moved, split into reasoning and the rest, and the share of pairs whose chosen log-prob
    fell by more than ``FELL`` per token. All also by kind of pair. Of each pair: margin and changes, in nats. Entropy and
    accuracy are those of the scored tokens of each side.

    Args:
        kinds: (n,) the kind of each pair, as an index into ``PAIR_KINDS``.
        reference: log-probs of the pairs' scored tokens under the reference.
        options: the loss and its parameters. Where ``scored`` is divergent, the pairs are those of
            ``PairSet.divergent``, and what only whole responses tell is left out of the metrics.
    """

    def __init__(self, kinds: np.ndarray, reference: Reference, options: PreferenceConfig) -> None:
        self.options = options
        self._kinds = torch.from_numpy(kinds.astype(np.int64))
        self._reference = reference
        self._loss = PAIR_LOSSES[options.loss]

    def counts(self, trees: Sequence[SequenceTree]) -> dict[str, int]:
        chosen = [s for tree in trees for s in tree.sequences[0::2]]
        return {"pairs": len(chosen), "chosen_rows": sum(len(s.row_kinds) for s in chosen)}

    def loss_of(self, margin: float) -> float:
        """The loss of a pair of a given margin, the nll term aside. At 0: ln 2 for sigmoid, 1 / (4 beta^2) for ipo."""
        margins = torch.tensor([margin], dtype=torch.float64)
        return self._loss(margins, self.options.beta, self.options.label_smoothing).item()

    def __call__(self, logps: torch.Tensor, pack: Pack) -> Sums:
        beta = self.options.beta
        entry_logps = logps.index_select(0, pack.entry_row)
        entry_moved = entry_logps - self._reference.of_pack(pack).to(entry_logps, non_blocking=True)
        by_sequence = partial(_by_sequence, pack=pack)
        moved, rows = by_sequence(entry_moved), by_sequence(torch.ones_like(entry_moved))
        scaled = moved / rows if self.options.length_normalize else moved
        margins = scaled[:, 0] - scaled[:, 1]
        losses = self._loss(margins, beta, self.options.label_smoothing)
        terms = {"pairs": losses.sum()}
        policy = by_sequence(entry_logps)
        if self.options.nll:
            # RPO (Pang et al. 2024, arXiv 2404.19733). By the chosen rows of the whole step, not of this pack.
            terms["chosen_rows"] = self.options.nll * nll_sum(policy[:, 0])
        with torch.no_grad():
            values = {"loss": losses, "rewards/margins": beta * margins, "rewards/accuracies": margins > 0}
            pairs = {"margin": margins}
            if self.options.scored == "all":
                think = pack.row_kind.index_select(0, pack.entry_row) == RowKind.THINK
                thought = by_sequence(entry_moved * think)
                for side, name in enumerate(SIDES):
                    values |= {
                        f"rewards/{name}": beta * scaled[:, side],
                        f"logps/{name}": policy[:, side],
                        f"delta_logps/{name}": moved[:, side],
                        f"delta_logps/{name}/think": thought[:, side],
                        f"delta_logps/{name}/answer": moved[:, side] - thought[:, side],
                    }
                    pairs[f"delta_logps/{name}"] = moved[:, side]
                values["chosen_fell"] = pairs["chosen_fell"] = moved[:, 0] < -FELL * rows[:, 0]
            kinds = self._kinds[list(pack.records[0::2])].to(logps.device, non_blocking=True)
            metrics = _overall_and_by_kind({k: v.detach().double() for k, v in values.items()}, kinds)
            if self.options.nll:
                metrics["loss/nll"] = (nll_sum(policy[:, 0]), rows[:, 0].sum())
        return Sums(terms, metrics, {k: v.detach() for k, v in pairs.items()})

    def describe(self, statistics: TokenStatistics, pack: Pack) -> Metrics:
        kind = _record_kinds(self._kinds, pack)
        side = pack.entry_sequence % 2
        metrics = {}
        for name, values in {"entropy": statistics.entropy, "mean_token_accuracy": statistics.top1}.items():
            entries, names = values.index_select(0, pack.entry_row), [f"{name}/{of}" for of in SIDES]
            metrics |= _binned(entries, side, names)
            metrics |= _binned(entries, 2 * kind + side, [f"{of}/{n}" for of in PAIR_KINDS for n in names])
        return metrics

    def combine(self, means: dict[str, float]) -> dict[str, float]:
        if "loss/nll" not in means:
            return means
        whole = means["loss"] + self.options.nll * means["loss/nll"]
        return means | {"loss": whole, "loss/preference": means["loss"]}


def _record_kinds(kinds: torch.Tensor, pack: Pack) -> torch.Tensor:
    """(E,) the kind of each entry's record, of the (n,) kinds of all."""
    of_sequence = kinds[list(pack.records)].to(pack.entry_sequence.device, non_blocking=True)
    return of_sequence.index_select(0, pack.entry_sequence)


def _by_sequence(entries: torch.Tensor, pack: Pack) -> torch.Tensor:
    """(E,) values of entries -> (P, 2) sums over the sequences, chosen and rejected."""
    return entries.new_zeros(len(pack.records)).index_add(0, pack.entry_sequence, entries).view(-1, 2)


def _overall_and_by_kind(values: dict[str, torch.Tensor], kinds: torch.Tensor) -> Metrics:
    """Sums and counts of (P,) values: under their own names, and of each kind of pair as ``KIND/NAME``."""
    table = torch.stack(list(values.values()))
    metrics = {name: (total, table.shape[1]) for name, total in zip(values, table.sum(1), strict=True)}
    for index, kind in enumerate(PAIR_KINDS):
        of_kind = kinds == index
        sums, count = table.where(of_kind, 0).sum(1), of_kind.sum()
        metrics |= {f"{kind}/{name}": (total, count) for name, total in zip(values, sums, strict=True)}
    return metrics


def _binned(values: torch.Tensor, bins: torch.Tensor, names: Sequence[str]) -> Metrics:
    """Sums and counts of the values of each bin, by the bins' names."""
    zeros = torch.zeros(len(names), dtype=torch.float64, device=values.device)
    sums = zeros.index_add(0, bins, values.double())
    counts = zeros.index_add(0, bins, torch.ones_like(values, dtype=torch.float64))
    return {name: (sums[i], counts[i]) for i, name in enumerate(names)}
