"""Tile ops: from a tile of head products to log-probs and, in place, to their gradient.

A tile op is a class that owns the buffers of one (rows, V) tile. Each pass over the rows of a batch makes one and
reuses it: on a CPU the page faults of a fresh tile cost more than all arithmetic on it.
"""

import difflib
import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from saro_kernels.triton_tile import TritonTile


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of maxima, sums and log-probs: float32, or float64 for float64 products."""
    return torch.promote_types(dtype, torch.float32)


class TorchTile:
    """The tile op in plain torch, for any device.

    `product` (rows, V), in the dtype of the head's GEMM, takes h W^T + b and gives back the gradient. `work` holds the
    same numbers in the statistics dtype; it is `product` itself unless that is bfloat16 or float16.
    """

    def __init__(self, rows: int, like: Tensor, vocab: int, *, softcap: float | None, scale: float, gradient: bool):
        self.softcap, self.scale, self.gradient = softcap, scale, gradient
        dtype = statistics_dtype(like.dtype)
        self.product = like.new_empty(rows, vocab)
        self.work = self.product if like.dtype == dtype else like.new_empty(rows, vocab, dtype=dtype)
        # tanh's slope must outlive the exponentials that overwrite its argument.
        self.slope = like.new_empty(rows, vocab, dtype=dtype) if gradient and softcap is not None else None

    @staticmethod
    def logit_bytes(dtype: torch.dtype) -> int:
        """Bytes of a tile for each product of that dtype, counted in the statistics dtype."""
        return statistics_dtype(dtype).itemsize

    def run(self, targets: Tensor, upstream: Tensor | None = None) -> Tensor:
        """The log-probs (n,), in nats, of the first n = len(targets) rows of `product`.

        With `gradient`, those rows of `product` and `work` become d(sum(upstream * logps)) / d product; `upstream` is
        one by default.
        """
        work, targets = self._shifted_logits(len(targets)), targets[:, None]
        shifted_target = work.gather(1, targets)
        total = work.exp_().sum(1, keepdim=True)
        logps = shifted_target - total.log()

        if self.gradient:
            factor = self.scale if upstream is None else upstream[:, None] * self.scale
            work.mul_(total.reciprocal_().mul_(factor).neg_())
            # Writing 1 - p at the target, one place per row, rather than adding 1 to -p: no atomic add.
            work.scatter_(1, targets, torch.expm1(logps).mul_(factor).neg_())
            if self.slope is not None:
                work.mul_(self.slope[: len(work)])
            if self.work is not self.product:
                self.product[: len(work)].copy_(work)
        return logps.squeeze(1)

    def statistics(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the first n = len(targets) rows of `product`: log-probs (n,), entropies (n,) of the rows' distributions,
        both in nats, and whether no token is likelier than the target, (n,) bool. Overwrites `work`.
        """
        work = self._shifted_logits(len(targets))
        shifted_target = work.gather(1, targets[:, None])
        total = work.exp_().sum(1, keepdim=True)
        logps = shifted_target - total.log()
        entropies = torch.special.entr(work.div_(total), out=work).sum(1)
        return logps.squeeze(1), entropies, shifted_target.squeeze(1) == 0

    def _shifted_logits(self, rows: int) -> Tensor:
        """The first rows of `work`, made logits less their row's maximum; fills `slope`."""
        product, work = self.product[:rows], self.work[:rows]
        if self.work is not self.product:
            work.copy_(product)
        if self.softcap is not None:
            work.mul_(self.scale / self.softcap).tanh_()
            if self.slope is not None:
                torch.mul(work, work, out=self.slope[:rows]).neg_().add_(1)
            work.mul_(self.softcap)
        elif self.scale != 1:
            work.mul_(self.scale)
        # Subtracting the maximum first keeps the result's digits at any size of logits: logit - logsumexp would
        # cancel them.
        return work.sub_(work.amax(1, keepdim=True))


TILE_OPS = ("torch", "triton")
# Devices that Triton compiles for; ROCm poses as CUDA.
TRITON_DEVICES = ("cuda", "xpu")


def choose_tile_op(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The tile op for products of `dtype` on `device`: `name` itself, or for "auto" Triton's where it can run.

    Raises:
        ValueError: there is none of that name, or it cannot run here; it names the nearest that can.
    """
    if name == "auto":
        return "triton" if device.type in TRITON_DEVICES and _why_not_triton(device, dtype) is None else "torch"
    if name not in TILE_OPS:
        nearest = difflib.get_close_matches(name, TILE_OPS, n=1, cutoff=0)[0]
        raise ValueError(f"tile op {name!r} is not available; the nearest that is: {nearest!r}")
    reason = _why_not_triton(device, dtype) if name == "triton" else None
    if reason is not None:
        raise ValueError(f"tile op 'triton' is not available: {reason}; the nearest that is: 'torch'")
    return name


def find_tile_op(name: str) -> "type[TorchTile] | type[TritonTile]":
    """The class of a name that `choose_tile_op` gave."""
    if name == "torch":
        return TorchTile
    # Triton is optional, and importing it takes a second.
    from saro_kernels.triton_tile import TritonTile

    return TritonTile


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton's tile op cannot run there; None where it can."""
    if not _triton_is_here():
        return "triton is not installed"
    if dtype == torch.float64:
        return "it has no float64"
    if device.type not in TRITON_DEVICES and not _interpreted():
        return f"triton does not compile for {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None if _interpreted() else _why_no_launcher()


@functools.cache
def _triton_is_here() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def _why_no_launcher() -> str | None:
    """Why Triton cannot launch kernels here; None where it can. It compiles its launcher in C at the first use."""
    from triton.runtime import driver

    try:
        _ = driver.active.utils
    # No compiler, one that fails, no headers of Python, no libcuda: each has its own type.
    except Exception as error:
        return f"its launcher cannot be made: {str(error).strip().partition(chr(10))[0].rstrip('.')}"
    return None


def _interpreted() -> bool:
    """Whether Triton runs its kernels in the interpreter, on any device."""
    from triton import knobs

    return knobs.runtime.interpret
