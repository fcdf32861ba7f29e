"""Measure how much rounding changes, and define the tolerances of all checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from saro.data.packs import Pack, lay_out
from saro.data.records import SIDES
from saro.data.tree import ScoredSequence, SequenceTree, build_tree, common_prefix
from saro.model.architectures import decoder_layers, is_router
from saro.model.policy import Policy
from saro.model.score import score_packs

# Two runs of the same numbers, such as packed and unpacked, or cached and scored again, may differ by this many times
# the noise, which is the change that another layout or another rounding makes. The noise is measured on a few sequences
# and so is uncertain. A factor of three leaves room for that; a wrong mask or position is off by a factor of a hundred.
NOISE_FACTOR = 3.0
# The largest of many values, such as the margins of a step or the rows of a pack, may exceed that limit by this factor.
LARGEST_FACTOR = 2.0
# A kernel's error against float64 may be this many times the plain path's error. Both errors are measured on the same
# numbers, so less room is needed.
KERNEL_FACTOR = 2.0
# An export may be off by this many times the noise, plus the share below. Noise and a lost update add in quadrature, so
# an export that lost the update is noticed if training changed log-probs by at least 1.3 times the noise.
EXPORT_FACTOR = 1.5
# An export may move log-probs by this share of what training moved them by.
EXPORT_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class LayoutNoise:
    """Log-probs of some sequences, and how much they change when scored in two other ways that are equally right.

    Attributes:
        logps: (E,) float64, nats: the log-probs of the scored tokens, sequence after sequence.
        changes: (2, E) float64, nats: their changes when each sequence is scored alone, and when every layer's output is
            perturbed by a rounding.
        sequences: the sequences, in this order.
    """

    logps: np.ndarray
    changes: np.ndarray
    sequences: tuple[ScoredSequence, ...]

    @property
    def mean(self) -> float:
        """Mean change of a log-prob, nats per token: the larger of the two, and at least one rounding to float32."""
        return max(np.abs(self.changes).mean(1).max(), np.abs(self._rounding).mean()).item()

    @property
    def most(self) -> float:
        """Largest change of a log-prob, nats, and at least one rounding to float32."""
        return max(np.abs(self.changes).max(), np.abs(self._rounding).max()).item()

    @property
    def margin(self) -> float:
        """Change of a pair's margin, nats per square root of the rows that its sides do not share. For pairs only.

        The errors of single rows add up like a random walk if they are independent. Those of one sequence need not be,
        so this is measured on sums: it is their root mean square over the pairs, for the larger of the two changes.
        """
        splits = np.cumsum([len(s.row_kinds) for s in self.sequences])[:-1]
        noises = [_rms(self._rounding)]
        for change in self.changes:
            # The noise of independent rows. On a few pairs, that of the sums could be unusually small.
            noises.append(_rms(change))
            parts = np.split(change, splits)
            sums = []
            for i in range(0, len(parts), len(SIDES)):
                sides = self.sequences[i : i + len(SIDES)]
                shared = shared_rows(sides)
                chosen, rejected = (part[shared:] for part in parts[i : i + len(SIDES)])
                sums.append((chosen.sum() - rejected.sum()) / max(1, len(chosen) + len(rejected)) ** 0.5)
            noises.append(_rms(np.array(sums)))
        return float(np.max(noises))  # max() can pass over a NaN

    @property
    def _rounding(self) -> np.ndarray:
        return np.finfo(np.float32).eps * self.logps


def shared_rows(sides: Sequence[ScoredSequence]) -> int:
    """Return the number of scored tokens that the two sequences of a pair share: their errors cancel in the margin."""
    shared = common_prefix([s.tokens for s in sides]) - sides[0].scored_from
    return max(0, min(shared, *(len(s.row_kinds) for s in sides)))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))


def layout_noise(policy: Policy, trees: Sequence[SequenceTree], pack_tokens: int) -> LayoutNoise:
    """Score trees as in training, then one sequence at a time, then as in training with perturbed layers.

    Args:
        trees: each fits into a pack.
        pack_tokens: budget of a pack.
    """
    sequences = tuple(sequence for tree in trees for sequence in tree.sequences)
    packs = [lay_out(group) for group in _neighbours(trees, pack_tokens)]
    together = _score(policy, packs)
    alone = _score(policy, [lay_out([build_tree([sequence])]) for sequence in sequences])
    with perturbed(policy):
        rounded = _score(policy, packs)
    return LayoutNoise(together, np.stack([alone - together, rounded - together]), sequences)


def _score(policy: Policy, packs: Sequence[Pack]) -> np.ndarray:
    """Return the log-probs (E,) of the packs' entries, pack after pack."""
    return np.concatenate([entries for _, entries in score_packs(policy, packs)]).astype(np.float64)


def _neighbours(trees: Sequence[SequenceTree], pack_tokens: int) -> list[list[SequenceTree]]:
    """Divide trees into groups of neighbours that fit into a pack together."""
    groups: list[list[SequenceTree]] = []
    room = 0
    for tree in trees:
        if tree.tokens > room:
            groups.append([])
            room = pack_tokens
        groups[-1].append(tree)
        room -= tree.tokens
    return groups


def fitting_trees(trees: Sequence[SequenceTree], pack_tokens: int) -> Sequence[SequenceTree]:
    """Return the first trees that fit into a pack together, at least one."""
    return _neighbours(trees, pack_tokens)[0]


@contextmanager
def all_experts(policy: Policy) -> Iterator[None]:
    """Let all experts of a mixture compute each token, weighted by the router. Other models do not change.

    Between the last expert that a token chooses and the next one, a rounding can decide. One choice changes the log-probs
    by as much as a fault. All else is as in training: experts know single tokens only.
    """
    routers = [module for module in policy.causal_lm.modules() if is_router(module)]
    chosen = [router.top_k for router in routers]
    for router in routers:
        router.top_k = router.num_experts
    try:
        yield
    finally:
        for router, number in zip(routers, chosen, strict=True):
            router.top_k = number


@contextmanager
def perturbed(policy: Policy) -> Iterator[None]:
    """Perturb every element of every layer's output by up to half an ulp, and with it the gradients.

    A padded batch can agree with single sequences to the bit, if one kernel computes both. Another kernel, just as near
    to the truth, rounds differently. The perturbation shows how much the later layers amplify such a rounding.
    """
    eps = torch.finfo(policy.compute_dtype).eps

    def perturb(seed: int, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        if isinstance(output, tuple):
            return perturb(seed, output[0]), *output[1:]
        # Use a separate generator, so that the check can be repeated and does not advance torch's.
        generator = torch.Generator().manual_seed(seed)
        offset = torch.rand(output.shape, generator=generator).sub_(0.5).mul_(eps)
        return (output * (1 + offset.to(output.device))).to(output.dtype)

    handles = [
        layer.register_forward_hook(lambda _, __, output, index=index: perturb(index, output))
        for index, layer in enumerate(decoder_layers(policy.causal_lm))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
