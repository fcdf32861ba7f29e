"""Guarantee 4: before the first step the policy is its own reference, so margins are zero and the loss is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from saro.data.dataset import PairSet
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.model.policy import Policy
from saro.train.objective import SRPOObjective
from saro.train.reference import layout_noise
from saro.train.steps import Step

# Margins may be so many times what two layouts of the same trees differ by.
_ALLOWED = 3.0
# Trees on which the noise is measured.
_NOISE_TREES = 2


@dataclass(frozen=True)
class StartCheck:
    """What the check found.

    Attributes:
        margin: absolute margin of the pair that comes nearest to what rounding explains, nats.
        allowed: what rounding explains for that pair.
        loss: mean over the pairs.
    """

    margin: float
    allowed: float
    loss: float


@torch.no_grad()
def check_start(
    runtime: Runtime, policy: Policy, objective: SRPOObjective, step: Step, pairs: PairSet, pack_tokens: int
) -> StartCheck:
    """Score the first step's pairs without dropout and compare with the reference.

    Args:
        objective: with the reference of the policy as it is now.
        step: the first one.
        pack_tokens: budget of a pack, within which the noise is measured.

    Raises:
        SaroError: a margin is not zero, or the loss not its value at zero, by more than the layout's noise explains.
    """
    _, noise = layout_noise(policy, step.trees[:_NOISE_TREES], pack_tokens)
    found: list[tuple[int, float]] = []
    losses: list[tuple[float, int]] = []
    was_training = policy.training
    policy.eval()
    try:
        for pack in step.packs:
            pack = pack.to(runtime.device)
            sums = objective(policy(pack), pack)
            found += zip(pack.records[0::2], sums.pairs["margin"].tolist(), strict=True)
            losses.append(tuple(float(value) for value in sums.metrics["loss"]))
    finally:
        policy.train(was_training)
    found, losses = runtime.gather(found), runtime.gather(losses)
    # Length-normalized margins are differences of two means.
    rows = [
        2 if objective.options.length_normalize else sum(len(s.row_kinds) for s in pairs.sequences(record))
        for record, _ in found
    ]
    allowed = [_ALLOWED * (noise.mean * n + noise.most) for n in rows]
    # A margin that is not a number counts as the worst.
    worst = int(np.argmax([abs(m) / a if np.isfinite(m) else np.inf for (_, m), a in zip(found, allowed, strict=True)]))
    record, margin = found[worst]
    if not abs(margin) <= allowed[worst]:
        raise SaroError(
            f"before the first step the margin of {pairs.ids[record]} is {margin:.3g} nats, and rounding explains "
            f"{allowed[worst]:.3g}: the reference is not the model that training starts from; remove the cache of "
            "references ($SARO_CACHE/reference) and report it"
        )
    total, count = (sum(column) for column in zip(*losses, strict=True))
    loss, expected = total / count, objective.loss_of(0)
    tolerance = max(abs(objective.loss_of(sign * max(allowed)) - expected) for sign in (1, -1)) + 1e-6 * abs(expected)
    if not abs(loss - expected) <= tolerance:
        raise SaroError(
            f"before the first step the loss is {loss:.6g}, and {expected:.6g} at margins of zero; report it"
        )
    return StartCheck(abs(margin), allowed[worst], loss)
