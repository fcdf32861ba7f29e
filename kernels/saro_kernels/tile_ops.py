"""Tile ops: they turn a tile of the head's products into log-probs and, in place, into their gradient.

A tile op is a class that owns the buffers of one (rows, V) tile. Each pass over a batch makes one tile and reuses it for
all rows: on a CPU, the page faults of a new tile cost more than all arithmetic on it.
"""

import difflib
import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from saro_kernels.triton_tile import TritonTile


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of maxima, sums and log-probs: float64 for float64 products, else float32."""
    return torch.promote_types(dtype, torch.float32)


class TorchTile:
    """The tile op in plain torch, for any device.

    Attributes:
        product: (rows, V), in the dtype of the head's GEMM. The caller writes h W^T + b into it; `run` replaces that by
            the gradient.
        work: (rows, V), the same numbers in the statistics dtype. It is `product` itself unless `product` is bfloat16
            or float16.
    """

    def __init__(self, rows: int, like: Tensor, vocab: int, *, softcap: float | None, scale: float, gradient: bool):
        self.softcap, self.scale, self.gradient = softcap, scale, gradient
        dtype = statistics_dtype(like.dtype)
        self.product = like.new_empty(rows, vocab)
        self.work = self.product if like.dtype == dtype else like.new_empty(rows, vocab, dtype=dtype)
        # The softcap's slope needs a buffer of its own: the exponentials overwrite the tanh that it comes from.
        self.slope = like.new_empty(rows, vocab, dtype=dtype) if gradient and softcap is not None else None

    @staticmethod
    def logit_bytes(dtype: torch.dtype) -> int:
        """Return the bytes that a tile takes for each logit: those of the statistics dtype of `dtype`."""
        return statistics_dtype(dtype).itemsize

    def run(self, targets: Tensor, upstream: Tensor | None = None) -> Tensor:
        """Return the log-probs (n,), in nats, of the first n = len(targets) rows of `product`.

        With `gradient`, those rows of `product` and `work` become d(sum(upstream * logps)) / d product. `upstream` is
        (n,); None stands for ones.
        """
        work, targets = self._shifted_logits(len(targets)), targets[:, None]
        shifted_target = work.gather(1, targets)
        total = work.exp_().sum(1, keepdim=True)
        logps = shifted_target - total.log()

        if self.gradient:
            factor = self.scale if upstream is None else upstream[:, None] * self.scale
            work.mul_(total.reciprocal_().mul_(factor).neg_())
            # Write 1 - p at the target, one element per row. Adding 1 to -p would need an atomic add.
            work.scatter_(1, targets, torch.expm1(logps).mul_(factor).neg_())
            if self.slope is not None:
                work.mul_(self.slope[: len(work)])
            if self.work is not self.product:
                self.product[: len(work)].copy_(work)
        return logps.squeeze(1)

    def statistics(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probs, entropies and top-1 flags of the first n = len(targets) rows of `product`. Overwrites `work`.

        Log-probs (n,) and entropies (n,) are in nats; the flags (n,) are True where no token is likelier than the target.
        """
        work = self._shifted_logits(len(targets))
        shifted_target = work.gather(1, targets[:, None])
        total = work.exp_().sum(1, keepdim=True)
        logps = shifted_target - total.log()
        entropies = torch.special.entr(work.div_(total), out=work).sum(1)
        return logps.squeeze(1), entropies, shifted_target.squeeze(1) == 0

    def _shifted_logits(self, rows: int) -> Tensor:
        """Turn the first rows of `work` into logits minus their row's maximum, and return them. Fills `slope`."""
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
        # Subtract the maximum first: for large logits, logit - logsumexp would cancel the digits of the result.
        return work.sub_(work.amax(1, keepdim=True))


TILE_OPS = ("torch", "triton")
# Devices that Triton compiles for. torch calls ROCm devices "cuda" too.
TRITON_DEVICES = ("cuda", "xpu")


def choose_tile_op(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the tile op to use for products of `dtype` on `device`: "torch" or "triton".

    "auto" becomes "triton" if that can run on this device, else "torch". Any other name is returned as it is.

    Raises:
        ValueError: `name` is unknown, or that tile op cannot run here. The message says which one to use.
    """
    if name == "auto":
        can_run_triton = device.type in TRITON_DEVICES and _triton_problem(device, dtype) is None
        return "triton" if can_run_triton else "torch"
    if name not in TILE_OPS:
        closest = difflib.get_close_matches(name, TILE_OPS, n=1, cutoff=0)[0]
        raise ValueError(f"tile op {name!r} is unknown; did you mean {closest!r}?")
    problem = _triton_problem(device, dtype) if name == "triton" else None
    if problem is not None:
        raise ValueError(f"tile op 'triton' cannot run here: {problem}; use 'torch'")
    return name


def find_tile_op(name: str) -> "type[TorchTile] | type[TritonTile]":
    """Return the class for a name that `choose_tile_op` returned."""
    if name == "torch":
        return TorchTile
    # Import it only here: Triton is optional, and its import takes a second.
    from saro_kernels.triton_tile import TritonTile

    return TritonTile


def _triton_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why Triton's tile op cannot run on `device`; None if it can."""
    if not _is_triton_installed():
        return "triton is not installed"
    if dtype == torch.float64:
        return "it does not support float64"
    if device.type not in TRITON_DEVICES and not _is_interpreted():
        return f"triton does not compile for {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None if _is_interpreted() else _launcher_problem()


@functools.cache
def _is_triton_installed() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def _launcher_problem() -> str | None:
    """Return why Triton cannot launch kernels here; None if it can. Triton compiles its C launcher at the first use."""
    from triton.runtime import driver

    try:
        _ = driver.active.utils
    # Catch everything: no compiler, a failing compiler, no Python headers and no libcuda raise different types.
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        return f"its launcher cannot be built: {first_line.rstrip('.')}"
    return None


def _is_interpreted() -> bool:
    """Return True if Triton runs its kernels in the interpreter, which works on any device."""
    from triton import knobs

    return knobs.runtime.interpret
