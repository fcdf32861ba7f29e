"""Loss formulas as pure functions. They return sums over tokens, or one value per pair or record, never averages.

Notation: each side of a pair has a score, s_c of the chosen response (c) and s_r of the rejected one (r). It is the change
of the response's log-prob, lp - ref, in nats: lp under the policy, ref under the reference, summed over its tokens. If
log-probs are length-normalized, it is divided by the number of these tokens. Losses without a reference have ref = 0. The
margin of a pair is m = s_c - s_r.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from saro.config import PreferenceConfig
from saro.data.records import CHOSEN, REJECTED


def nll_sum(logps: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood, ``-sum_i log p(y_i | x, y_<i)``, in nats.

    Args:
        logps: (E,) log-probs of the scored tokens.

    Returns:
        Scalar.
    """
    return -logps.sum()


def margins_of(scores: torch.Tensor) -> torch.Tensor:
    """Return the margins (P,) of pairs from the scores (P, 2) of their sides."""
    return scores[:, CHOSEN] - scores[:, REJECTED]


def sigmoid(scores: torch.Tensor, options: PreferenceConfig) -> torch.Tensor:
    """Return the DPO loss (Rafailov et al. 2023, arXiv 2305.18290, eq. 7): ``-log sigmoid(beta m)``.

    With label smoothing e it is cDPO (Mitchell 2023, "A note on DPO with noisy preferences"):
    ``-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m)``.

    Args:
        scores: (P, 2), chosen and rejected. This loss and those below return (P,).
    """
    return _smoothed(options.beta * margins_of(scores), options.label_smoothing)


def robust(scores: torch.Tensor, options: PreferenceConfig) -> torch.Tensor:
    """Return the robust DPO loss (Chowdhury et al. 2024, arXiv 2403.00409):
    ``(-(1 - e) log sigmoid(beta m) + e log sigmoid(-beta m)) / (1 - 2 e)``.

    It is unbiased if a share e < 1/2 of the labels is flipped.
    """
    logits, smoothing = options.beta * margins_of(scores), options.label_smoothing
    kept = -(1 - smoothing) * F.logsigmoid(logits)
    flipped = -smoothing * F.logsigmoid(-logits)
    return (kept - flipped) / (1 - 2 * smoothing)


def hinge(scores: torch.Tensor, options: PreferenceConfig) -> torch.Tensor:
    """Return the hinge loss of SLiC (Zhao et al. 2023, arXiv 2305.10425) on the DPO margin, as in RSO (Liu et al. 2023,
    arXiv 2309.06657): ``max(0, 1 - beta m)``. Label smoothing must be 0.
    """
    return F.relu(1 - options.beta * margins_of(scores))


def ipo(scores: torch.Tensor, options: PreferenceConfig) -> torch.Tensor:
    """Return the IPO loss (Azar et al. 2023, arXiv 2310.12036, eq. 17): ``(m - 1 / (2 beta))^2``.

    beta is the paper's tau. Label smoothing must be 0.
    """
    return (margins_of(scores) - 1 / (2 * options.beta)).square()


def simpo(scores: torch.Tensor, options: PreferenceConfig) -> torch.Tensor:
    """Return the SimPO loss (Meng et al. 2024, arXiv 2405.14734, eq. 6): ``-log sigmoid(beta m - gamma)``.

    Scores are mean log-probs of a token under the policy: there is no reference. gamma is the target reward margin.
    Label smoothing is that of ``sigmoid``, as in TRL.
    """
    return _smoothed(options.beta * margins_of(scores) - options.gamma, options.label_smoothing)


def orpo(scores: torch.Tensor, options: PreferenceConfig) -> torch.Tensor:
    """Return the odds-ratio term of ORPO (Hong et al. 2024, arXiv 2403.07691, eq. 7), times its weight:
    ``-beta log sigmoid(log odds(c) - log odds(r))``.

    Scores are mean log-probs of a token under the policy: there is no reference. beta is the paper's lambda. The
    paper's loss (eq. 6) is this term plus the NLL of the chosen response, which ``SRPOObjective`` adds. Label smoothing
    must be 0.
    """
    return -options.beta * F.logsigmoid(margins_of(log_odds(scores)))


def log_odds(scores: torch.Tensor) -> torch.Tensor:
    """Return ``log(p / (1 - p))`` with log p = ``scores`` (ORPO, arXiv 2403.07691, eq. 4), in any shape."""
    # A response of which every token rounds to probability 1 would have infinite odds and a gradient that is NaN.
    scores = scores.clamp(max=-torch.finfo(torch.float32).eps)
    return scores - torch.log(-torch.expm1(scores))


def kto(
    log_ratios: torch.Tensor, is_desirable: torch.Tensor, reference_point: torch.Tensor, options: PreferenceConfig
) -> torch.Tensor:
    """Return the KTO loss of unpaired responses (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8): ``lambda_y - v(x, y)``.

    v is ``lambda_D sigmoid(beta (r - z0))`` for a desirable response and ``lambda_U sigmoid(beta (z0 - r))`` for an
    undesirable one (eq. 7).

    Args:
        log_ratios: (S,) change r of each response's log-prob against the reference, nats.
        is_desirable: (S,) bool.
        reference_point: scalar z0, nats, without gradient; see ``KTOObjective``.

    Returns:
        (S,).
    """
    gains = options.beta * (log_ratios - reference_point)
    signed = torch.where(is_desirable, gains, -gains)
    # 1 - sigmoid(x), without the rounding of the difference.
    return label_weights(is_desirable, options).to(signed.dtype) * torch.sigmoid(-signed)


def label_weights(is_desirable: torch.Tensor, options: PreferenceConfig) -> torch.Tensor:
    """Return KTO's weight lambda_D or lambda_U of each response, (S,) float64."""
    weights = is_desirable.new_full(is_desirable.shape, options.undesirable_weight, dtype=torch.float64)
    return weights.masked_fill(is_desirable, options.desirable_weight)


def _smoothed(logits: torch.Tensor, smoothing: float) -> torch.Tensor:
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


PairLoss = Callable[[torch.Tensor, PreferenceConfig], torch.Tensor]
PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "simpo": simpo,
    "orpo": orpo,
}
