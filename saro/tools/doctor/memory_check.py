"""Checks the memory of a training step, and recommends a pack size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from saro.config import TrainConfig
from saro.data.packs import Pack, lay_out
from saro.data.tree import RowKind, ScoredSequence, build_tree
from saro.errors import SaroError
from saro.tools.doctor.checked_model import CheckedModel
from saro.tools.doctor.finding import Finding
from saro.tools.doctor.machine_checks import device_memory
from saro.train.optim import make_optimizer
from saro.train.resident_memory import give_freed_memory_back, resident_peak

# Sizes of the two measured packs, as shares of the budget: small, so that they fit and are fast.
_SHARES = (0.0625, 0.25)
# Share of the device's memory that a step may take. The measurement does not see the rest, such as fragmentation.
_USED = 0.85
_USUAL_PACKS = (2048, 4096)

MEMORY = "memory of two packs"


@dataclass(frozen=True)
class Memory:
    """Peak memory of a training step, GiB: ``base + slope * tokens``."""

    base: float
    slope: float

    def at(self, tokens: int) -> float:
        """Return the peak memory with a pack of ``tokens`` tokens, GiB."""
        return self.base + self.slope * tokens

    def largest_pack(self, gib: float) -> int:
        """Return the most tokens that fit into ``gib``, a multiple of 256; 0 if not even 256 fit."""
        return max(0, int((gib - self.base) / self.slope) // 256 * 256)


def measure_memory(checked: CheckedModel) -> Memory:
    """Measure forward and backward of a small and of a larger pack of one sequence.

    Gradients and optimizer states exist before, as from the second step on. A first step allocates its states when the
    activations are already freed, so its peak may be the same for every pack.

    Raises:
        SaroError: the larger pack took no more memory, so there is no slope.
    """
    sizes = [int(share * checked.pack_tokens) for share in _SHARES]
    # lr ~ 0: only memory is measured, and the weights should stay finite.
    optimizer = make_optimizer(checked.policy.trainable().values(), TrainConfig(lr=1e-12))
    checked.policy.train()
    _backward(checked, _pack(checked, sizes[0]))
    optimizer.step()
    small, large = (_peak(checked, _pack(checked, tokens)) for tokens in sizes)
    optimizer.zero_grad(set_to_none=True)
    slope = (large - small) / (sizes[1] - sizes[0])
    if slope <= 0:
        raise SaroError(f"a pack of {sizes[1]} tokens took no more memory than one of {sizes[0]}")
    return Memory(small - slope * sizes[0], slope)


def _pack(checked: CheckedModel, tokens: int) -> Pack:
    """Return a pack of one sequence of random tokens, of which ``tokens`` are scored."""
    vocab = checked.policy.causal_lm.config.get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(vocab, size=tokens + 1).astype(np.int32)
    sequence = ScoredSequence(ids, 1, np.full(tokens, RowKind.THINK, np.uint8), 0)
    return lay_out([build_tree([sequence])]).to(checked.runtime.device)


def _backward(checked: CheckedModel, pack: Pack) -> None:
    (-checked.policy(pack).mean()).backward()


def _peak(checked: CheckedModel, pack: Pack) -> float:
    """Return the peak memory of forward and backward, GiB."""
    if checked.runtime.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(checked.runtime.device)
        _backward(checked, pack)
        return checked.runtime.memory()
    give_freed_memory_back()
    return resident_peak(lambda: _backward(checked, pack)) / 2**30


def memory_check(checked: CheckedModel, advise: Callable[[str], object]) -> Finding:
    """Measure, and advise on the largest pack that fits and on gradient checkpointing for the usual packs."""
    memory = measure_memory(checked)
    gib = _USED * device_memory(checked.runtime.device)
    largest = memory.largest_pack(gib)
    advise(f"pack size: up to {largest:,} tokens (--data.pack_tokens)" if largest else "pack size: none fits")
    for tokens in _USUAL_PACKS:
        needed = memory.at(tokens)
        verdict = "not needed" if needed <= gib else "needed (--model.gradient_checkpointing true)"
        advise(f"gradient checkpointing for packs of {tokens:,} tokens: {verdict}; a step takes {needed:.1f} GiB")
    return Finding(
        MEMORY,
        largest > 0,
        f"{memory.base:.2f} GiB + {memory.slope * 2**10:.2f} MiB per token",
        f"256 tokens in {gib:.1f} GiB, {_USED:.0%} of this machine's",
    )
