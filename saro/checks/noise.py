"""Measures how much rounding changes, and defines the tolerances of all checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from saro.data.packs import lay_out
from saro.data.tree import SequenceTree, build_tree
from saro.model.policy import Policy
from saro.model.score import score_packs

# Two runs of the same numbers, such as packed and unpacked, or cached and scored again, may differ by this many times
# the noise, which is the change that another layout or another rounding makes. The noise is measured on a few sequences
# and so is uncertain. A factor of three leaves room for that; a wrong mask or position is off by a factor of a hundred.
NOISE_FACTOR = 3.0
# A kernel's error against float64 may be this many times the plain path's error. Both errors are measured on the same
# numbers, so less room is needed.
KERNEL_FACTOR = 2.0
# An export may be off by this many times the noise, plus the share below. Noise and a lost update add in quadrature, so
# an export that lost the update is noticed if training changed log-probs by at least 1.3 times the noise.
EXPORT_FACTOR = 1.5
# An export may move log-probs by this share of what training moved them by.
EXPORT_SHARE = 0.1


@dataclass(frozen=True)
class Noise:
    """The change of log-probs with the layout, in nats per token: its mean and its maximum."""

    mean: float
    most: float


def layout_noise(policy: Policy, trees: Sequence[SequenceTree], pack_tokens: int) -> tuple[np.ndarray, Noise]:
    """Score trees in one pack, and again one sequence at a time.

    Only the first trees that fit into a pack together are scored, at least one. The noise is never less than one
    rounding of the log-probs to the compute dtype.

    Returns:
        Log-probs (E,) of the entries of the pack, and how much they differ from those of single sequences.
    """
    trees = fitting_trees(trees, pack_tokens)
    ((_, together),) = score_packs(policy, [lay_out(trees)])
    singles = [lay_out([build_tree([sequence])]) for tree in trees for sequence in tree.sequences]
    single = np.concatenate([entries for _, entries in score_packs(policy, singles)])
    rounding = torch.finfo(policy.compute_dtype).eps * np.abs(together)
    change = np.abs(together - single)
    return together, Noise(
        mean=max(change.mean(), rounding.mean()).item(),
        most=max(change.max(), rounding.max()).item(),
    )


def fitting_trees(trees: Sequence[SequenceTree], pack_tokens: int) -> Sequence[SequenceTree]:
    """Return the first trees that fit into a pack together, at least one."""
    fits = np.cumsum([tree.tokens for tree in trees]) <= pack_tokens
    return trees[: max(1, int(fits.sum()))]


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
        # A generator of its own, so that the check can be repeated and does not advance torch's generator.
        generator = torch.Generator().manual_seed(seed)
        offset = torch.rand(output.shape, generator=generator).sub_(0.5).mul_(eps)
        return (output * (1 + offset.to(output.device))).to(output.dtype)

    handles = [
        layer.register_forward_hook(lambda _, __, output, index=index: perturb(index, output))
        for index, layer in enumerate(_decoder_layers(policy))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _decoder_layers(policy: Policy) -> list[nn.Module]:
    """Return the decoder's layers: the members of every module list that is as long as the decoder is deep."""
    num_layers = policy.causal_lm.config.num_hidden_layers
    lists = [m for m in policy.causal_lm.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    return [layer for layers in lists for layer in layers]
