"""The objective of stage 1: the negative log-likelihood of scored tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from saro.config import KINDS, PARTS, row_weight
from saro.data.packs import Pack, send
from saro.data.tree import RowKind, SequenceTree
from saro.train.losses import nll_sum
from saro.train.objective import Metrics, Objective, Sums
from saro_kernels import TokenStatistics


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


def _record_kinds(kinds: torch.Tensor, pack: Pack) -> torch.Tensor:
    """Return the kind (E,) of each entry's record, from the kinds (n,) of all records."""
    sequence_kinds = send(kinds[list(pack.records)], pack.entry_sequence.device)
    return sequence_kinds.index_select(0, pack.entry_sequence)


def _one_hot(indices: torch.Tensor, size: int) -> torch.Tensor:
    """Return a (size, E) bool mask: row i is True where an index (E,) is i."""
    return torch.arange(size, device=indices.device)[:, None] == indices
