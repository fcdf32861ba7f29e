"""The objective of stage 2 on single responses with a label: KTO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from saro.config import PreferenceConfig
from saro.data.packs import Pack, PairLogps, pack_trees, send, send_like
from saro.data.records import CHOSEN, REJECTED, SIDES
from saro.data.tree import SequenceTree
from saro.data.unpaired_set import UnpairedSet
from saro.distributed.runtime import Runtime
from saro.model.policy import Policy
from saro.train.groups import Groups
from saro.train.losses import kto
from saro.train.objective import Metrics, Objective, Sums
from saro.train.srpo_objective import SRPOObjective
from saro_kernels import TokenStatistics


class KTOObjective(Objective):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7 and 8), see ``losses.kto``.

    The reference point z0 estimates ``KL(policy || reference)``. It is the mean change of log-prob, at least 0, of responses
    after prompts that they do not answer, ``UnpairedSet.mismatched``, over all records of a step on all ranks. The paper
    takes the next response of the batch; here each record has its own for the whole run, so that the reference scores
    each once. z0 is computed in eval mode before the step's gradients, and has none itself.

    Metrics, as TRL names them: ``kl`` is z0, ``rewards/chosen`` and ``rewards/rejected`` are beta times the change of a
    log-prob of desirable and undesirable responses, and ``rewards/margins`` the difference of these two means.

    Args:
        data: the records.
        reference: log-probs of ``data.as_pairs`` under the reference model.
        options: beta and the weights of the two labels.
        pack_tokens: budget of a pack of mismatched sequences.
    """

    def __init__(self, data: UnpairedSet, reference: PairLogps, options: PreferenceConfig, pack_tokens: int) -> None:
        self.options = options
        self._data = data
        self._reference = reference
        self._pack_tokens = pack_tokens
        self._labels = torch.from_numpy(data.labels)
        self._groups = Groups(data.kinds, data.forms)
        self._reference_point = torch.zeros((), dtype=torch.float64)

    def counts(self, trees: Sequence[SequenceTree]) -> Mapping[str, float]:
        return {"records": sum(len(tree.sequences) for tree in trees)}

    @torch.no_grad()
    def start_step(self, runtime: Runtime, policy: Policy, records: Sequence[int]) -> None:
        """Compute the reference point over ``records``, those of all ranks."""
        trees = self._data.mismatched_trees(records, self._pack_tokens)
        moved = torch.zeros((), dtype=torch.float64, device=runtime.device)
        with policy.evaluating():
            for pack in pack_trees(trees, self._pack_tokens, runtime.share):
                pack = pack.to(runtime.device)
                moved += self._entries_moved(policy(pack), pack, REJECTED).double().sum()
        self._reference_point = (runtime.sum_(moved) / len(records)).clamp(min=0)

    def on_pairs(self) -> SRPOObjective:
        """Return a loss on ``data.as_pairs``: unlike those of KTO, its margins are zero if the policy is its reference."""
        return SRPOObjective(self._data.kinds, self._reference, PreferenceConfig(beta=self.options.beta))

    def gradient_rows(self, pack: Pack) -> int:
        return pack.rows

    def __call__(self, logps: torch.Tensor, pack: Pack) -> Sums:
        policy = pack.sum_sequences(logps.index_select(0, pack.entry_row))  # (S,), as are moved and losses
        moved = pack.sum_sequences(self._entries_moved(logps, pack, CHOSEN))
        is_desirable = send(self._labels[list(pack.records)], logps.device)
        reference_point = self._reference_point.to(moved)
        losses = kto(moved, is_desirable, reference_point, self.options)
        with torch.no_grad():
            members = self._groups.members(pack.records, logps.device)
            metrics = self._groups.sum({"loss": losses}, members)
            records = torch.full_like(reference_point, len(pack.records))
            metrics = metrics.join(Metrics.of({"kl": (reference_point * records, records)}))
            for side, is_on_side in zip(SIDES, (is_desirable, ~is_desirable), strict=True):
                values = {
                    f"rewards/{side}": self.options.beta * moved,
                    f"logps/{side}": policy,
                    f"delta_logps/{side}": moved,
                }
                values = {name: value.where(is_on_side, 0) for name, value in values.items()}
                metrics = metrics.join(self._groups.sum(values, members, is_on_side))
        return Sums({"records": losses.sum()}, metrics)

    def describe(self, statistics: TokenStatistics, pack: Pack) -> Metrics:
        members = self._groups.members(pack.records, pack.entry_row.device)
        is_desirable = send(self._labels[list(pack.records)], pack.entry_row.device)
        sides = torch.stack([is_desirable, ~is_desirable], dim=1)  # (S, 2)

        def sum_sides(entries: torch.Tensor) -> torch.Tensor:
            return pack.sum_sequences(entries)[:, None].where(sides, 0)  # (S, 2)

        return self._groups.describe_sides(statistics, pack, members, sum_sides)

    def combine(self, means: dict[str, float]) -> dict[str, float]:
        margins = {}
        for name, mean in means.items():
            rejected = means.get(name.replace("rewards/chosen", "rewards/rejected"))
            if name.endswith("rewards/chosen") and rejected is not None:
                margins[name.replace("rewards/chosen", "rewards/margins")] = mean - rejected
        return means | margins

    def _entries_moved(self, logps: torch.Tensor, pack: Pack, side: int) -> torch.Tensor:
        """Return the change (E,) of each entry's log-prob against the reference.

        Args:
            side: ``CHOSEN`` for a pack of records, ``REJECTED`` for one of mismatched sequences, as in ``data.as_pairs``.
        """
        entries = logps.index_select(0, pack.entry_row)
        parts = [self._reference.side_logps(record, side) for record in pack.records]
        return entries - send_like(np.concatenate([np.empty(0, self._reference.logps.dtype), *parts]), entries)
