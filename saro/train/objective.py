"""Objectives: the log-probs of a pack -> sums. The engine divides each sum once, by its count over the whole step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from saro.config import KINDS, PAIR_KINDS, PARTS, PreferenceConfig, row_weight
from saro.data.packs import CHOSEN, SIDES, Pack, PairLogps, send
from saro.data.tree import RowKind, SequenceTree
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.model.policy import Policy
from saro.train.losses import PAIR_LOSSES, log_odds, margins_of, nll_sum
from saro_kernels import TokenStatistics

# Forms of pairs whose shared beginning holds, or may hold, a step that nobody should learn: the chosen side comes back from it.
_FORMS_WITH_CUE = ("mirror", "recover", "sibling")


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


def check_forms(options: PreferenceConfig, forms: Sequence[str | None]) -> None:
    """Check that the loss would not teach the wrong steps that some forms of pairs have before their fork.

    In the margin these steps cancel. The NLL of whole chosen responses has them, and so has a loss on single responses.

    Args:
        forms: form of each pair to train on, as in ``PairSet.forms``.

    Raises:
        SaroError: it would.
    """
    found = sorted(set(_FORMS_WITH_CUE) & set(forms))
    if not found or options.scored == "divergent":
        return
    steps = f"the wrong steps that {', '.join(found)} pairs have before their fork"
    if options.loss in ("orpo", "kto"):
        raise SaroError(
            f"preference.loss {options.loss} would teach {steps}; take a loss on the margin, such as sigmoid"
        )
    if options.nll:
        raise SaroError(f"preference.nll would teach {steps}; give --preference.scored divergent")


class RWObjective(Objective):
    """Reasoning-style Warmup: the mean negative log-likelihood of the scored tokens.

    With weights, it is the weighted mean, ``sum_i w_i nll_i / sum_i w_i`` over the tokens of the step on all ranks. The
    unweighted one is the case of equal weights.

    Metrics: the loss, over all tokens, by kind of record and by kind of token (reasoning, answer, stop). Evaluations add
    entropy and accuracy in the same way. With weights, ``loss`` is the weighted mean, which is minimised, and
    ``loss/unweighted`` the mean over all tokens; all others are unweighted.

    Args:
        kinds: (n,) the kind of each record, as an index into ``KINDS``.
        weights: weights of tokens, as in ``DataConfig.row_weights``.
    """

    def __init__(self, kinds: np.ndarray, weights: Mapping[str, float] | None = None) -> None:
        self._kinds = torch.from_numpy(kinds.astype(np.int64))
        self._weights = None
        if weights:
            table = [[row_weight(weights, kind, part) for part in PARTS] for kind in KINDS]
            self._weights = torch.tensor(table, dtype=torch.float64)  # (KINDS, PARTS)

    def counts(self, trees: Sequence[SequenceTree]) -> Mapping[str, float]:
        sequences = [s for tree in trees for s in tree.sequences]
        if self._weights is None:
            return {"rows": sum(len(s.row_kinds) for s in sequences)}
        tokens = np.zeros(self._weights.shape)  # (KINDS, PARTS) number of tokens
        for s in sequences:
            tokens[int(self._kinds[s.record])] += np.bincount(s.row_kinds, minlength=len(PARTS))
        return {"row_weights": float((tokens * self._weights.numpy()).sum())}

    def gradient_rows(self, pack: Pack) -> int:
        return pack.rows

    def __call__(self, logps: torch.Tensor, pack: Pack) -> Sums:
        entry_logps = logps.index_select(0, pack.entry_row)
        metrics = self._means("loss", -logps.detach(), pack)
        if self._weights is None:
            return Sums({"rows": nll_sum(entry_logps)}, metrics)
        token_kind = pack.row_kind.index_select(0, pack.entry_row)
        table = send(self._weights, entry_logps.device)
        weights = table[_record_kinds(self._kinds, pack), token_kind]  # (E,) float64
        unweighted = Metrics(("loss/unweighted", *metrics.names[1:]), metrics.table)
        metrics = Metrics.of({"loss": (nll_sum(weights * entry_logps.detach()), weights.sum())}).join(unweighted)
        return Sums({"row_weights": nll_sum(weights.to(entry_logps.dtype) * entry_logps)}, metrics)

    def describe(self, statistics: TokenStatistics, pack: Pack) -> Metrics:
        entropy = self._means("entropy", statistics.entropy, pack)
        return entropy.join(self._means("mean_token_accuracy", statistics.top1, pack))

    def combine(self, means: dict[str, float]) -> dict[str, float]:
        return means

    def _means(self, name: str, values: torch.Tensor, pack: Pack) -> Metrics:
        """Sum (R,) values of rows over entries as ``NAME``, and as ``NAME/KIND`` by kind of record and of token."""
        entries = values.index_select(0, pack.entry_row).double()  # (E,)
        record_kind = _record_kinds(self._kinds, pack)
        token_kind = pack.row_kind.index_select(0, pack.entry_row)
        names = [name, *(f"{name}/{kind}" for kind in KINDS), *(f"{name}/{kind.name.lower()}" for kind in RowKind)]
        everyone = torch.ones_like(entries, dtype=torch.bool)[None]
        members = torch.cat([everyone, _one_hot(record_kind, len(KINDS)), _one_hot(token_kind, len(RowKind))])  # (M, E)
        # A sum over a mask, because index_add on a GPU adds in another order each time.
        sums = entries.where(members, 0).sum(1)
        return Metrics(tuple(names), torch.stack([sums, members.sum(1).double()], dim=1))


class Groups:
    """The kinds and forms of records, by which metrics are reported too, whether or not a pack has records of them.

    Args:
        kinds: (n,) the kind of each record, as an index into ``PAIR_KINDS``.
        forms: (n,) the form of each record, as in ``PairSet.forms``; empty if no record has one.
    """

    def __init__(self, kinds: np.ndarray, forms: Sequence[str | None]) -> None:
        form_names = sorted({form for form in forms if form is not None})
        self._names = (*PAIR_KINDS, *form_names)
        members = [kinds == index for index in range(len(PAIR_KINDS))]
        members += [np.array([form == name for form in forms]) for name in form_names]
        self._members = torch.from_numpy(np.stack(members, axis=1))  # (n, groups) bool

    def members(self, records: Sequence[int], device: torch.device) -> torch.Tensor:
        """Return (P, groups) bool, True if the record is in the group."""
        return send(self._members[list(records)], device)

    def sum(
        self, values: Mapping[str, torch.Tensor], members: torch.Tensor, counts: torch.Tensor | None = None
    ) -> Metrics:
        """Sum (P,) values over all records as ``NAME``, and over the records of each group as ``GROUP/NAME``.

        Args:
            members: those of the P records.
            counts: (P,) what each record counts for in the divisor; default 1.
        """
        everyone = torch.ones_like(members[:, :1])
        in_group = torch.cat([everyone, members], dim=1).T  # (groups + 1, P)
        columns = [value.detach().double() for value in values.values()]
        if counts is None:
            counts = torch.ones(len(members), dtype=torch.float64, device=members.device)
        # Stack the values, so that one kernel makes all sums.
        table = torch.stack([*columns, counts.double()])  # (names + 1, P)
        sums = table[None].where(in_group[:, None], 0).sum(-1)  # (groups + 1, names + 1)
        names = tuple(prefix + name for prefix in ("", *(f"{group}/" for group in self._names)) for name in values)
        return Metrics(names, torch.stack([sums[:, :-1], sums[:, -1:].expand(-1, len(values))], dim=2).view(-1, 2))


# A chosen response has fallen if its log-prob fell by more than this, nats per token. Rounding changes it by less.
FELL = 1e-3


class SRPOObjective(Objective):
    """Preference optimization of pairs: a function of the margin between chosen and rejected, against a reference.

    The reference is subtracted token by token, before the sum: where policy and reference agree, the result is zero, not
    the difference of two rounded sums.

    Metrics: rewards (``beta`` times the score, see ``losses``), their margin and accuracy, the log-probs, and the
    displacement: how far the log-probs moved, split into reasoning and the rest, and the share of pairs whose chosen
    response has fallen. All are averaged over all pairs, by kind of pair and by form. ``Sums.pairs`` has the margin and
    the changes of each pair, in nats. Evaluations add the entropy and the accuracy of the scored tokens of each side.
    Losses without a reference have no displacement. ORPO adds the log odds ratio of the two sides, ``log_odds_chosen``,
    and its log-sigmoid, ``log_odds_ratio``, as TRL names them.

    Args:
        kinds: (n,) the kind of each pair, as an index into ``PAIR_KINDS``.
        reference: log-probs of the pairs' scored tokens under the reference model; None for a loss without one.
        options: the loss and its parameters. If ``scored`` is divergent, the pairs are those of ``PairSet.divergent``,
            the nll term counts the chosen tokens after the fork, and metrics that need whole responses are left out.
        forms: (n,) the form of each pair, as in ``PairSet.forms``; empty if no pair has one.
    """

    def __init__(
        self,
        kinds: np.ndarray,
        reference: PairLogps | None,
        options: PreferenceConfig,
        forms: Sequence[str | None] = (),
    ) -> None:
        if (reference is not None) != options.needs_reference:
            raise ValueError(f"{options.loss} {'needs a' if options.needs_reference else 'has no'} reference")
        self.options = options
        self.reference = reference
        self._loss = PAIR_LOSSES[options.loss]
        self._nll_weight = options.nll_weight
        self._is_length_normalized = options.is_length_normalized
        self._groups = Groups(kinds, forms)

    def counts(self, trees: Sequence[SequenceTree]) -> Mapping[str, float]:
        chosen = [s for tree in trees for s in tree.sequences[CHOSEN::2]]
        return {"pairs": len(chosen), "chosen_rows": sum(len(s.row_kinds) for s in chosen)}

    def loss_of(self, margin: float) -> float:
        """Return a pair's loss at a given margin, without the nll term. At 0: ln 2 for sigmoid, 1 / (4 beta^2) for ipo."""
        scores = torch.tensor([[margin, 0.0]], dtype=torch.float64)
        return self._loss(scores, self.options).item()

    def gradient_rows(self, pack: Pack) -> int:
        # Averages over sides of different lengths do not cancel, nor does the NLL of the chosen side.
        cancels = not self._nll_weight and not self._is_length_normalized
        return pack.margin_rows if cancels else pack.rows

    def __call__(self, logps: torch.Tensor, pack: Pack) -> Sums:
        entry_logps = logps.index_select(0, pack.entry_row)  # (E,)
        entry_moved = entry_logps
        if self.reference is not None:
            entry_moved = entry_logps - send_like(self.reference.pack_logps(pack), entry_logps)
        policy = _sum_sides(entry_logps, pack)  # (P, 2) chosen, rejected; as are moved and rows
        moved = _sum_sides(entry_moved, pack)
        rows = _sum_sides(torch.ones_like(entry_moved), pack)
        scores = moved / rows if self._is_length_normalized else moved
        margins = margins_of(scores)  # (P,)
        losses = self._loss(scores, self.options)
        terms = {"pairs": losses.sum()}
        if self._nll_weight:
            # RPO (Pang et al. 2024, arXiv 2404.19733). The engine divides by the chosen rows of the step, not of this pack.
            terms["chosen_rows"] = self._nll_weight * nll_sum(policy[:, CHOSEN])
        with torch.no_grad():
            # Add a metric of pairs to ``values``: name -> (P,). It is averaged over all pairs and those of each kind and form.
            beta = self.options.beta
            values = {"loss": losses, "rewards/margins": beta * margins, "rewards/accuracies": margins > 0}
            pair_values = {"margin": margins}
            if self.options.scored == "all":
                for side, name in enumerate(SIDES):
                    values[f"rewards/{name}"] = beta * scores[:, side]
                    values[f"logps/{name}"] = policy[:, side]
            if self.options.scored == "all" and self.reference is not None:
                entry_thinks = pack.row_kind.index_select(0, pack.entry_row) == RowKind.THINK
                moved_think = _sum_sides(entry_moved * entry_thinks, pack)
                for side, name in enumerate(SIDES):
                    values[f"delta_logps/{name}"] = moved[:, side]
                    values[f"delta_logps/{name}/think"] = moved_think[:, side]
                    values[f"delta_logps/{name}/answer"] = moved[:, side] - moved_think[:, side]
                    pair_values[f"delta_logps/{name}"] = moved[:, side]
                fell = moved[:, CHOSEN] < -FELL * rows[:, CHOSEN]
                values["chosen_fell"] = pair_values["chosen_fell"] = fell
            if self.options.loss == "orpo":
                values["log_odds_chosen"] = margins_of(log_odds(scores))
                values["log_odds_ratio"] = F.logsigmoid(values["log_odds_chosen"])
            metrics = self._groups.sum(values, self._groups.members(pack.pairs, logps.device))
            if self._nll_weight:
                nll = {"loss/nll": (nll_sum(policy[:, CHOSEN]), rows[:, CHOSEN].sum())}
                metrics = metrics.join(Metrics.of(nll))
        return Sums(terms, metrics, {name: v.detach() for name, v in pair_values.items()})

    def describe(self, statistics: TokenStatistics, pack: Pack) -> Metrics:
        members = self._groups.members(pack.pairs, pack.entry_row.device)
        return describe_sides(statistics, pack, self._groups, members, lambda entries: _sum_sides(entries, pack))

    def combine(self, means: dict[str, float]) -> dict[str, float]:
        if "loss/nll" not in means:
            return means
        minimised = means["loss"] + self._nll_weight * means["loss/nll"]
        return means | {"loss": minimised, "loss/preference": means["loss"]}


def describe_sides(
    statistics: TokenStatistics,
    pack: Pack,
    groups: Groups,
    members: torch.Tensor,
    sum_sides: Callable[[torch.Tensor], torch.Tensor],
) -> Metrics:
    """Return the metrics of ``Objective.describe`` as ``NAME/SIDE``, over all records and those of each group.

    Args:
        members: (P, groups), those of the pack's records.
        sum_sides: sums values (E,) of entries over each side of each record: (P, 2), chosen and rejected.
    """
    parts = []
    for name, row_values in (("entropy", statistics.entropy), ("mean_token_accuracy", statistics.top1)):
        entries = row_values.index_select(0, pack.entry_row).double()
        # Sums over the tokens of each side, then over records, as for the metrics of the loss.
        sums = sum_sides(entries)  # (P, 2)
        rows = sum_sides(torch.ones_like(entries))
        for side, side_name in enumerate(SIDES):
            by_name = {f"{name}/{side_name}": sums[:, side]}
            parts.append(groups.sum(by_name, members, rows[:, side]))
    return reduce(Metrics.join, parts)


def send_like(values: np.ndarray, tensor: torch.Tensor) -> torch.Tensor:
    """Return an array of the host on the device of a tensor, in its dtype."""
    return send(torch.from_numpy(values), tensor.device).to(tensor.dtype)


def _record_kinds(kinds: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Return the kind (E,) of each entry's record, from the kinds (n,) of all records."""
    sequence_kinds = send(kinds[list(pack.records)], pack.entry_sequence.device)
    return sequence_kinds.index_select(0, pack.entry_sequence)


def sum_sequences(entries: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Sum (E,) values of entries over each sequence: (S,)."""
    return entries.new_zeros(len(pack.records)).index_add(0, pack.entry_sequence, entries)


def _sum_sides(entries: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Sum (E,) values of entries over the sequences of each pair: (P, 2), chosen and rejected."""
    return sum_sequences(entries, pack).view(-1, len(SIDES))


def _one_hot(indices: torch.Tensor, size: int) -> torch.Tensor:
    """Return a (size, E) bool mask: row i is True where an index (E,) is i."""
    return torch.arange(size, device=indices.device)[:, None] == indices
