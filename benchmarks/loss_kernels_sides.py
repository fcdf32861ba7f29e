"""The subjects of `loss_kernels.py`: LM heads of known models, and implementations that compute their log-probs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from saro_kernels import choose_impl, token_logps

# "scoring" computes no gradient, "frozen" that of the hidden states (LoRA, QLoRA), "trainable" also that of the weight.
PASSES = ("scoring", "frozen", "trainable")
# Multiplications and additions that the mathematics needs, in units of rows x width x vocabulary.
OPERATIONS = {"scoring": 2, "frozen": 4, "trainable": 6}


@dataclass(frozen=True)
class Head:
    """The sizes of an LM head.

    Attributes:
        width: D of its weight.
        vocab: V of its weight.
        cpu_rows: default of the rows scored at once on a CPU.
        gpu_rows: the same on a GPU.
    """

    width: int
    vocab: int
    cpu_rows: int
    gpu_rows: int = 4096


HEADS = {
    "SmolLM2-135M": Head(576, 49152, 2048),
    "Qwen2.5-0.5B": Head(896, 151936, 512),
    "Llama-3-8B": Head(4096, 128256, 512),
    "Gemma-2-2B": Head(2304, 256000, 256),
}
SMOKE = {"smoke": Head(32, 1000, 64, 64)}


@dataclass(frozen=True)
class Case:
    """Inputs of one measurement: hidden (N, D), weight (V, D), targets (N,)."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor

    @classmethod
    def of(cls, head: Head, rows: int, device: torch.device, dtype: torch.dtype) -> Case:
        """Make random inputs whose logits have standard deviation 2."""
        rng = torch.Generator(device).manual_seed(0)
        weight = torch.randn(head.vocab, head.width, device=device, dtype=dtype, generator=rng)
        weight.mul_(2 / head.width**0.5)
        hidden = torch.randn(rows, head.width, device=device, dtype=dtype, generator=rng)
        targets = torch.randint(head.vocab, (rows,), device=device, generator=rng)
        return cls(hidden, weight, targets)

    def run(self, side: str, pass_name: str) -> Tensor:
        """Return the sum of the log-probs. Except in "scoring", also compute the gradients and drop them."""
        self.hidden.requires_grad_(pass_name != "scoring")
        self.weight.requires_grad_(pass_name == "trainable")
        try:
            with torch.set_grad_enabled(pass_name != "scoring"):
                total = SIDES[side](self.hidden, self.weight, self.targets).sum()
            if pass_name != "scoring":
                total.backward()
        finally:
            self.hidden.grad = self.weight.grad = None
        return total.detach()

    def defined_sum(self) -> float:
        """Return the sum of the log-probs by their definition, in float32, with little memory."""
        chunks = zip(self.hidden.split(512), self.targets.split(512), strict=True)
        with torch.no_grad():
            return sum(
                token_logps(hidden, self.weight, targets, impl="reference").sum(dtype=torch.float64).item()
                for hidden, targets in chunks
            )

    def floor_bytes(self, pass_name: str) -> int:
        """Return the bytes of the results: log-probs and gradients."""
        logp_bytes = 4 * len(self.targets)
        if pass_name == "scoring":
            return logp_bytes
        if pass_name == "frozen":
            return logp_bytes + self.hidden.nbytes
        return logp_bytes + self.hidden.nbytes + self.weight.nbytes


def _saro(impl: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda hidden, weight, targets: token_logps(hidden, weight, targets, impl=impl)


def _log_softmax(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear(hidden, weight).float().log_softmax(1).gather(1, targets[:, None])


def _cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def _trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    # Arguments as in TRL's trainers: no bias; after the targets, temperature 1, the size of a chunk, no softcap, scale 1,
    # and no outputs for metrics. (An autograd function takes no keywords.)
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())[
        0
    ]


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)(weight, hidden, targets)


def _cut(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="sum")


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "saro, torch tiles": _saro("tiled-torch"),
    "saro, Triton tiles": _saro("tiled-triton"),
    "log_softmax": _log_softmax,
    "cross_entropy": _cross_entropy,
    "TRL": _trl,
    "Liger": _liger,
    "cut cross-entropy": _cut,
}
OWN_SIDES = ("saro, torch tiles", "saro, Triton tiles")
_PACKAGES = {"TRL": "trl", "Liger": "liger_kernel", "cut cross-entropy": "cut_cross_entropy"}


def why_unavailable(side: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a side cannot run here; None if it can."""
    if side == "saro, Triton tiles":
        try:
            choose_impl("tiled-triton", device, dtype)
        except ValueError as error:
            return str(error)
    if side in ("Liger", "cut cross-entropy") and device.type != "cuda":
        return "it runs on CUDA only"
    package = _PACKAGES.get(side)
    if package is not None and find_spec(package) is None:
        return f"{package} is not installed; pip install {package.replace('_', '-')}"
    return None
