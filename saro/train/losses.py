"""Loss formulas as pure functions. They return sums over tokens or one value per pair, never averages.

Notation: the margin of a pair is m = (lp_c - ref_c) - (lp_r - ref_r), in nats. lp and ref are the log-probs of the
chosen (c) and the rejected (r) response under the policy and the reference, summed over the tokens of the response.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def nll_sum(logps: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood, ``-sum_i log p(y_i | x, y_<i)``, in nats.

    Args:
        logps: (E,) log-probs of the scored tokens.

    Returns:
        Scalar.
    """
    return -logps.sum()


def sigmoid(margins: torch.Tensor, beta: float, label_smoothing: float) -> torch.Tensor:
    """Return the DPO loss (Rafailov et al. 2023, arXiv 2305.18290, eq. 7): ``-log sigmoid(beta m)``.

    With label smoothing e it is cDPO (Mitchell 2023, "A note on DPO with noisy preferences"):
    ``-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m)``.

    Args:
        margins: (P,), one per pair. This loss and those below return (P,).
    """
    return -(1 - label_smoothing) * F.logsigmoid(beta * margins) - label_smoothing * F.logsigmoid(-beta * margins)


def robust(margins: torch.Tensor, beta: float, label_smoothing: float) -> torch.Tensor:
    """Return the robust DPO loss (Chowdhury et al. 2024, arXiv 2403.00409):
    ``(-(1 - e) log sigmoid(beta m) + e log sigmoid(-beta m)) / (1 - 2 e)``.

    It is unbiased if a share e < 1/2 of the labels is flipped.
    """
    kept = -(1 - label_smoothing) * F.logsigmoid(beta * margins)
    flipped = -label_smoothing * F.logsigmoid(-beta * margins)
    return (kept - flipped) / (1 - 2 * label_smoothing)


def hinge(margins: torch.Tensor, beta: float, label_smoothing: float) -> torch.Tensor:
    """Return the hinge loss of SLiC (Zhao et al. 2023, arXiv 2305.10425) on the DPO margin, as in RSO (Liu et al. 2023,
    arXiv 2309.06657): ``max(0, 1 - beta m)``. Label smoothing must be 0.
    """
    return F.relu(1 - beta * margins)


def ipo(margins: torch.Tensor, beta: float, label_smoothing: float) -> torch.Tensor:
    """Return the IPO loss (Azar et al. 2023, arXiv 2310.12036, eq. 17): ``(m - 1 / (2 beta))^2``.

    beta is the paper's tau. Label smoothing must be 0.
    """
    return (margins - 1 / (2 * beta)).square()


PairLoss = Callable[[torch.Tensor, float, float], torch.Tensor]
PAIR_LOSSES: dict[str, PairLoss] = {"sigmoid": sigmoid, "robust": robust, "hinge": hinge, "ipo": ipo}
