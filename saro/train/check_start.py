"""Checks SRPO before the first step: the policy is its own reference, so log-probs are equal and margins are zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from saro.checks.noise import LARGEST_FACTOR, NOISE_FACTOR, LayoutNoise, layout_noise, shared_rows
from saro.data.dataset import PairSet
from saro.data.packs import Pack, pack_trees
from saro.data.steps import Step
from saro.data.tree import SequenceTree
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.model.policy import Policy
from saro.train.kto_objective import KTOObjective
from saro.train.srpo_objective import SRPOObjective

# Check at least this many pairs, and measure the noise on trees of at least as many pairs and this many scored tokens: on
# fewer it could be unusually low.
_PAIRS, _TOKENS = 2, 256


@dataclass(frozen=True)
class StartCheck:
    """The result of the check. Each pair's values are compared with what rounding explains for a pair of its length.

    Attributes:
        logps: mean |log-prob - reference| in the pair that comes closest to its limit, nats per token.
        allowed_logps: the limit of that pair, nats per token.
        margin: absolute margin of the pair that comes closest to its limit, nats.
        allowed_margin: the limit of that pair, nats.
        loss: mean loss of the pairs; None if the objective is not one of pairs.
    """

    logps: float
    allowed_logps: float
    margin: float
    allowed_margin: float
    loss: float | None

    def describe(self) -> str:
        """Return a line that says what was found, and what rounding allows."""
        loss = "" if self.loss is None else f"loss {self.loss:.4f} at the start; "
        return (
            f"{loss}log-probs differ from the reference by {self.logps:.1e} of {self.allowed_logps:.1e} nats per token, "
            f"margins by {self.margin:.1e} of {self.allowed_margin:.1e} nats"
        )


@dataclass(frozen=True)
class _Pair:
    """The differences of one pair, and the largest ones that rounding explains.

    Attributes:
        record: index of the pair.
        logps, allowed_logps: mean |log-prob - reference| of its entries, nats per token, and the limit.
        margin, allowed_margin: its absolute margin, nats, and the limit.
    """

    record: int
    logps: float
    allowed_logps: float
    margin: float
    allowed_margin: float


@torch.no_grad()
def check_start(
    runtime: Runtime,
    policy: Policy,
    objective: SRPOObjective | KTOObjective,
    step: Step,
    pairs: PairSet,
    pack_tokens: int,
) -> StartCheck:
    """Score the pairs of the first step in eval mode, at least two pairs, and compare them with the reference.

    What rounding explains is measured on the first trees. Log-probs are compared token by token, where a reference of
    another model shows most, and summed to margins, where small errors of one direction add up.

    Args:
        objective: its reference is the policy as it is now. That of kto is checked on pairs, see ``KTOObjective.on_pairs``.
        step: the first step, of pairs.
        pairs: those to train on, or ``UnpairedSet.as_pairs``.
        pack_tokens: budget of a pack.

    Raises:
        SaroError: log-probs differ from the reference, a margin is not zero, or the loss is not its value at margins of
            zero, by more than rounding explains.
    """
    on_pairs = objective.on_pairs()
    trees = _choose_trees(step, pairs, pack_tokens)
    noise = layout_noise(policy, _first_pairs(trees), pack_tokens)
    compared: list[_Pair] = []
    losses: list[tuple[float, int]] = []  # sum, count
    with policy.evaluating():
        for pack in pack_trees(trees, pack_tokens, runtime.share):
            pack = pack.to(runtime.device)
            logps = policy(pack)
            sums = on_pairs(logps, pack)
            loss_sum, count = sums.metrics["loss"]
            losses.append((float(loss_sum), int(count)))
            entries = logps.index_select(0, pack.entry_row).cpu().numpy()
            compared += _compare(entries, sums.pair_values["margin"].tolist(), pack, on_pairs, pairs, noise)
    # All ranks judge the pairs of all ranks, so that all of them stop or none.
    compared, losses = runtime.gather(compared), runtime.gather(losses)
    off = max(compared, key=lambda pair: _share(pair.logps, pair.allowed_logps))
    wide = max(compared, key=lambda pair: _share(pair.margin, pair.allowed_margin))
    advice = (
        "the reference is not the model that training starts from; remove the cache of references "
        "($SARO_CACHE/reference) and report it"
    )
    if _share(off.logps, off.allowed_logps) > 1:
        raise SaroError(
            f"before the first step the log-probs of {pairs.ids[off.record]} differ from the reference by "
            f"{off.logps:.3g} nats per token, and rounding explains {off.allowed_logps:.3g}: {advice}"
        )
    if _share(wide.margin, wide.allowed_margin) > 1:
        raise SaroError(
            f"before the first step the margin of {pairs.ids[wide.record]} is {wide.margin:.3g} nats, and rounding "
            f"explains {wide.allowed_margin:.3g}: {advice}"
        )
    loss = sum(loss_sum for loss_sum, _ in losses) / sum(count for _, count in losses)
    _check_loss(on_pairs, loss, max(pair.allowed_margin for pair in compared))
    return StartCheck(
        logps=off.logps,
        allowed_logps=off.allowed_logps,
        margin=wide.margin,
        allowed_margin=wide.allowed_margin,
        loss=loss if on_pairs is objective else None,
    )


def _choose_trees(step: Step, pairs: PairSet, pack_tokens: int) -> Sequence[SequenceTree]:
    """Return the trees of the step, with those of further pairs if it has too few."""
    missing = _PAIRS - len(set(step.records))
    if missing <= 0:
        return step.trees
    others = [record for record in range(min(len(pairs), _PAIRS + 1)) if record not in step.records]
    return pairs.trees([*step.records, *others[:missing]], pack_tokens)


def _first_pairs(trees: Sequence[SequenceTree]) -> Sequence[SequenceTree]:
    """Return the first trees that hold enough pairs and scored tokens together, or all."""
    pairs = np.cumsum([len(tree.sequences) // 2 for tree in trees])
    tokens = np.cumsum([sum(len(s.row_kinds) for s in tree.sequences) for tree in trees])
    enough = (pairs >= _PAIRS) & (tokens >= _TOKENS)
    return trees[: int(enough.argmax()) + 1] if enough.any() else trees


def _compare(
    entries: np.ndarray,
    margins: Sequence[float],
    pack: Pack,
    objective: SRPOObjective,
    pairs: PairSet,
    noise: LayoutNoise,
) -> list[_Pair]:
    """Compare the pairs of a pack with the reference.

    Args:
        entries: (E,) log-probs of the pack's entries.
        margins: (P,) margins against the reference, nats.
    """
    differences = np.abs(entries.astype(np.float64) - objective.reference.pack_logps(pack))
    compared, start = [], 0
    for record, margin in zip(pack.pairs, margins, strict=True):
        sides = pairs.sequences(record)
        rows = sum(len(side.row_kinds) for side in sides)
        # One unusual token weighs much in a short response.
        allowed_logps = NOISE_FACTOR * (noise.mean + noise.most / rows)
        own = np.array([max(1, len(side.row_kinds) - shared_rows(sides)) for side in sides])
        # A margin sums the rows of both sides; a length-normalized one is a difference of two means.
        scale = (1 / own).sum() ** 0.5 if objective.options.length_normalize else own.sum() ** 0.5
        compared.append(
            _Pair(
                record=record,
                logps=float(differences[start : start + rows].mean()),
                allowed_logps=allowed_logps,
                margin=abs(margin),
                allowed_margin=LARGEST_FACTOR * NOISE_FACTOR * noise.margin * float(scale),
            )
        )
        start += rows
    return compared


def _share(value: float, allowed: float) -> float:
    """Return value / allowed; infinity if either is not a number, so that it cannot pass as small."""
    share = value / allowed
    return math.inf if math.isnan(share) else share


def _check_loss(objective: SRPOObjective, loss: float, allowed_margin: float) -> None:
    """Raise SaroError if the mean loss is not its value at margins of zero, give or take ``allowed_margin`` nats."""
    expected = objective.loss_of(0)
    above, below = objective.loss_of(allowed_margin), objective.loss_of(-allowed_margin)
    tolerance = max(abs(above - expected), abs(below - expected)) + 1e-6 * abs(expected)
    if not abs(loss - expected) <= tolerance:
        raise SaroError(
            f"before the first step the loss is {loss:.6g}, and {expected:.6g} at margins of zero; report it"
        )
