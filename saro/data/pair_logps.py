"""Log-probs of the scored tokens of pairs, flat: what the reference cache stores and the preference objective reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from saro.data.dataset import PairSet
from saro.data.packs import CHOSEN, REJECTED, Pack


def sequence_number(pair: int, side: int) -> int:
    """Return the number of one side of a pair: chosen and rejected of pair 0, then of pair 1, and so on."""
    return 2 * pair + side


def count_rows(pairs: PairSet) -> np.ndarray:
    """Return the number of scored tokens of each sequence, (2n,) int64, by ``sequence_number``."""
    rows = np.empty(2 * len(pairs), np.int64)
    rows[CHOSEN::2] = pairs.chosen.scored_tokens
    rows[REJECTED::2] = pairs.rejected.scored_tokens
    return rows


@dataclass(frozen=True, eq=False)
class PairLogps:
    """Log-probs of all scored tokens of n pairs under one model.

    Attributes:
        logps: (R,) nats; all sequences one after the other, by ``sequence_number``.
        offsets: (2n + 1,) int64; sequence i is ``logps[offsets[i]:offsets[i + 1]]``.
    """

    logps: np.ndarray
    offsets: np.ndarray

    def side_logps(self, pair: int, side: int) -> np.ndarray:
        """Return the log-probs, (rows,), of one side (``CHOSEN`` or ``REJECTED``) of one pair."""
        number = sequence_number(pair, side)
        return self.logps[self.offsets[number] : self.offsets[number + 1]]

    def side_sums(self, side: int) -> np.ndarray:
        """Return the log-probs of one side of each pair, (n,) float64, summed over its scored tokens."""
        num_pairs = len(self.offsets) // 2
        return np.array([self.side_logps(pair, side).sum(dtype=np.float64) for pair in range(num_pairs)])

    def pack_logps(self, pack: Pack) -> np.ndarray:
        """Return the log-probs of the pack's entries, (E,)."""
        parts = [np.empty(0, self.logps.dtype)]
        for pair in pack.pairs:
            parts += [self.side_logps(pair, CHOSEN), self.side_logps(pair, REJECTED)]
        return np.concatenate(parts)
