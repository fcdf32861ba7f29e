"""The objective of stage 2 on pairs: a loss on the margin between their sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from saro.config import PreferenceConfig
from saro.data.packs import Pack, PairLogps, send_like
from saro.data.records import CHOSEN, SIDES
from saro.data.tree import RowKind, SequenceTree
from saro.train.groups import Groups
from saro.train.losses import PAIR_LOSSES, log_odds, margins_of, nll_sum
from saro.train.objective import Metrics, Objective, Sums
from saro_kernels import TokenStatistics

# A chosen response has fallen if its log-prob fell by more than this, nats per token. Rounding changes it by less.
FELL = 1e-3


class SRPOObjective(Objective):
    """Preference optimization of pairs: a function of the margin between chosen and rejected, against a reference.

    The reference is subtracted token by token, before the sum: where policy and reference agree, the result is zero, not
    the difference of two rounded sums.

    Metrics: rewards (``beta`` times the score, see ``losses``), their margin and accuracy, the log-probs, and the
    displacement: how far the log-probs moved, split into reasoning and the rest, and the share of pairs whose chosen
    response has fallen. All are averaged over all pairs, by kind of pair and by form. ``Sums.pair_values`` has the margin and
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

    def on_pairs(self) -> SRPOObjective:
        """Return this objective itself, see ``KTOObjective.on_pairs``."""
        return self

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
        return self._groups.describe_sides(statistics, pack, members, lambda entries: _sum_sides(entries, pack))

    def combine(self, means: dict[str, float]) -> dict[str, float]:
        if "loss/nll" not in means:
            return means
        minimised = means["loss"] + self._nll_weight * means["loss/nll"]
        return means | {"loss": minimised, "loss/preference": means["loss"]}


def _sum_sides(entries: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Sum (E,) values of entries over the sequences of each pair: (P, 2), chosen and rejected."""
    return pack.sum_sequences(entries).view(-1, len(SIDES))
