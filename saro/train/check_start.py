"""Checks SRPO before the first step: the policy is its own reference, so margins are zero and the loss is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from saro.checks.noise import NOISE_FACTOR, Noise, layout_noise
from saro.data.dataset import PairSet
from saro.data.steps import Step
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.model.policy import Policy
from saro.train.objective import SRPOObjective

# Number of trees on which the noise is measured: on only one it could be unusually low.
_NOISE_TREES = 2


@dataclass(frozen=True)
class StartCheck:
    """The result of the check.

    Attributes:
        margin: absolute margin of the pair that comes closest to its limit, nats.
        allowed: the limit of that pair, nats: the largest margin that rounding explains.
        loss: mean loss of the pairs.
    """

    margin: float
    allowed: float
    loss: float


@torch.no_grad()
def check_start(
    runtime: Runtime, policy: Policy, objective: SRPOObjective, step: Step, pairs: PairSet, pack_tokens: int
) -> StartCheck:
    """Score the pairs of the first step in eval mode and compare them with the reference.

    Args:
        objective: its reference is the policy as it is now.
        step: the first step.
        pack_tokens: budget of a pack, within which the noise is measured.

    Raises:
        SaroError: a margin is not zero, or the loss is not its value at margins of zero, by more than the noise explains.
    """
    _, noise = layout_noise(policy, step.trees[:_NOISE_TREES], pack_tokens)
    margins: list[tuple[int, float]] = []  # record, nats
    losses: list[tuple[float, int]] = []  # sum, count
    with policy.evaluating():
        for pack in step.packs:
            pack = pack.to(runtime.device)
            sums = objective(policy(pack), pack)
            margins += zip(pack.pairs, sums.pair_values["margin"].tolist(), strict=True)
            loss_sum, count = sums.metrics["loss"]
            losses.append((float(loss_sum), int(count)))
    margins, losses = runtime.gather(margins), runtime.gather(losses)
    limits = [_allowed_margin(noise, pairs, pair, objective.options.length_normalize) for pair, _ in margins]
    worst = None
    for (record, margin), allowed in zip(margins, limits, strict=True):
        excess = abs(margin) / allowed
        if math.isnan(excess):  # of the margin or of the noise; it must not pass as small
            excess = math.inf
        if worst is None or excess > worst[0]:
            worst = excess, record, margin, allowed
    excess, record, margin, allowed = worst
    if excess > 1:
        raise SaroError(
            f"before the first step the margin of {pairs.ids[record]} is {margin:.3g} nats, and rounding explains "
            f"{allowed:.3g}: the reference is not the model that training starts from; remove the cache of "
            "references ($SARO_CACHE/reference) and report it"
        )
    loss = sum(loss_sum for loss_sum, _ in losses) / sum(count for _, count in losses)
    _check_loss(objective, loss, max(limits))
    return StartCheck(margin=abs(margin), allowed=allowed, loss=loss)


def _allowed_margin(noise: Noise, pairs: PairSet, record: int, length_normalize: bool) -> float:
    """Return the largest margin of a pair, in nats, that rounding explains."""
    # A length-normalized margin is a difference of two means.
    num_rows = 2 if length_normalize else sum(len(sequence.row_kinds) for sequence in pairs.sequences(record))
    return NOISE_FACTOR * (noise.mean * num_rows + noise.most)


def _check_loss(objective: SRPOObjective, loss: float, allowed_margin: float) -> None:
    """Raise SaroError if the mean loss is not its value at margins of zero, give or take ``allowed_margin`` nats."""
    expected = objective.loss_of(0)
    above, below = objective.loss_of(allowed_margin), objective.loss_of(-allowed_margin)
    tolerance = max(abs(above - expected), abs(below - expected)) + 1e-6 * abs(expected)
    if not abs(loss - expected) <= tolerance:
        raise SaroError(
            f"before the first step the loss is {loss:.6g}, and {expected:.6g} at margins of zero; report it"
        )
