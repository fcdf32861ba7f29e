"""The tile op as one Triton kernel: a program per row, statistics in float32 online, then the gradient in place.

Online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867. Importing this module needs triton; `find_tile_op` does
it. With TRITON_INTERPRET=1 in the environment when triton is first imported, the kernel runs on the CPU, for tests.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# Logits that a program holds at a time. Every thread must own its places of a row (else one would write the gradient
# where another still reads the logit), so a block has no fewer places than a program has threads: 16 warps are 512 on
# NVIDIA, 1024 on AMD. 8192 places made some variants spill registers (benchmarks/compile_matrix.py).
MIN_BLOCK, MAX_BLOCK, WARPS = 1024, 4096, 16
# Rows start at multiples of so many numbers, so that loads and stores are 16 bytes wide whatever the vocabulary is.
ALIGNMENT = 16


@triton.jit
def _tanh_and_slope(x):
    """tanh(x) and its slope 1 - tanh(x)^2, each to a few last bits (Cephes' polynomial near zero)."""
    square = x * x
    small = -5.70498872745e-3
    small = small * square + 2.06390887954e-2
    small = small * square - 5.37397155531e-2
    small = small * square + 1.33314422036e-1
    small = small * square - 3.33332819422e-1
    small = small * square * x + x
    # Where tanh is near one, the slope has digits only as a function of 1 - tanh.
    rest = 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    large = tl.where(x < 0, rest - 1.0, 1.0 - rest)
    near_zero = tl.abs(x) < 0.625
    return tl.where(near_zero, small, large), tl.where(near_zero, 1.0 - small * small, rest * (2.0 - rest))


@triton.jit
def _logits(product, inner, softcap):
    """Logits of products, and the slope of the softcap, 1 without one."""
    logit = product.to(tl.float32) * inner
    slope = 1.0
    if softcap is not None:
        logit, slope = _tanh_and_slope(logit)
        logit *= softcap
    return logit, slope


@triton.jit
def _load(product, columns, vocab, width, inner, softcap):
    """Logits at `columns` of a row, -inf beyond the vocabulary, and the softcap's slope."""
    # The mask of the load ends with the allocated row, a multiple of the alignment, and so does not narrow the load.
    logit, slope = _logits(tl.load(product + columns, mask=columns < width, other=0.0), inner, softcap)
    return tl.where(columns < vocab, logit, float("-inf")), slope


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0, by its series near zero, where the difference would cancel."""
    y = -x
    series = y * (1 - y / 2 * (1 - y / 3 * (1 - y / 4 * (1 - y / 5 * (1 - y / 6 * (1 - y / 7))))))
    return tl.where(y < 0.25, series, 1.0 - tl.exp(x))


@triton.jit
def tile_kernel(
    product,  # (rows, width), of which (rows, vocab) are products; takes the gradient
    targets,  # (rows,) int64
    logps,  # (rows,) float32, written
    upstream,  # (rows,) float32, or None for ones
    entropies,  # (rows,) float32, written, or None
    tops,  # (rows,) bool, written, or None
    vocab,
    width,
    targets_stride,
    upstream_stride,
    inner,  # factor of the products: the scale, divided by the softcap where there is one
    softcap,  # or None
    scale,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    product += row * width
    lanes = tl.arange(0, BLOCK)
    # Read before any other thread of the program can have written a gradient there: the reductions below synchronise.
    target = tl.load(targets + row * targets_stride)
    known = (target >= 0) & (target < vocab)
    at_target = _logits(tl.load(product + target, mask=known, other=0.0), inner, softcap)[0]
    # A target outside the vocabulary makes its row NaN: it is neither read nor silently scored.
    at_target = tl.where(known, at_target, float("nan"))

    # Each lane has its own maximum and sum, so that the loop needs no reduction, and one exponential per logit.
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        logit = _load(product, start + lanes, vocab, width, inner, softcap)[0]
        decayed = tl.exp(-tl.abs(logit - highest))
        added = tl.where(logit == float("-inf"), total, total + decayed)
        total = tl.where(logit > highest, total * decayed + 1.0, added)
        highest = tl.maximum(highest, logit)
    maximum = tl.max(highest, 0)
    total = tl.sum(total * tl.exp(highest - maximum), 0)
    # Subtracting the maximum first keeps the result's digits at any size of logits.
    logp = at_target - maximum - tl.log(total)
    tl.store(logps + row, logp)

    if entropies is not None:
        weighted = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            logit = _load(product, start + lanes, vocab, width, inner, softcap)[0]
            below = logit - maximum
            weighted += tl.where(below > float("-inf"), tl.exp(below) * below, 0.0)
        tl.store(entropies + row, tl.log(total) - tl.sum(weighted, 0) / total)
        tl.store(tops + row, at_target >= maximum)

    if GRADIENT:
        factor = scale
        if upstream is not None:
            factor *= tl.load(upstream + row * upstream_stride)
        factor = tl.where(known, factor, float("nan"))
        others = -factor / total
        hit = factor * _one_minus_exp(logp)
        for start in range(0, vocab, BLOCK):
            columns = start + lanes
            logit, slope = _load(product, columns, vocab, width, inner, softcap)
            gradient = tl.where(columns == target, hit, tl.exp(logit - maximum) * others) * slope
            tl.store(product + columns, gradient.to(product.dtype.element_ty), mask=columns < width)


class TritonTile:
    """The tile op in Triton, for CUDA, ROCm and XPU. Products in float32, bfloat16 or float16.

    It needs one buffer: `work` is `product`, which takes the gradient rounded to the product's dtype.
    """

    def __init__(self, rows: int, like: Tensor, vocab: int, *, softcap: float | None, scale: float, gradient: bool):
        self.softcap, self.scale, self.gradient = softcap, scale, gradient
        self.product = like.new_empty(rows, -(-vocab // ALIGNMENT) * ALIGNMENT)[:, :vocab]
        self.work = self.product

    @staticmethod
    def logit_bytes(dtype: torch.dtype) -> int:
        """Bytes of a tile for each product of that dtype."""
        return dtype.itemsize

    def run(self, targets: Tensor, upstream: Tensor | None = None) -> Tensor:
        """See `TorchTile.run`. A target outside the vocabulary makes its row NaN, log-prob and gradient."""
        logps = self.product.new_empty(len(targets), dtype=torch.float32)
        self._launch(targets, logps, upstream, None, None, self.gradient)
        return logps

    def statistics(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `TorchTile.statistics`; `product` stays as it is."""
        logps, entropies = self.product.new_empty(2, len(targets), dtype=torch.float32)
        tops = torch.empty(len(targets), dtype=torch.bool, device=logps.device)
        self._launch(targets, logps, None, entropies, tops, False)
        return logps, entropies, tops

    def _launch(self, targets, logps, upstream, entropies, tops, gradient: bool) -> None:
        if len(targets) == 0:
            return
        with _on(self.product.device):
            tile_kernel[(len(targets),)](
                self.product,
                targets,
                logps,
                upstream,
                entropies,
                tops,
                self.product.shape[1],
                self.product.stride(0),
                targets.stride(0),
                0 if upstream is None else upstream.stride(0),
                self.scale if self.softcap is None else self.scale / self.softcap,
                self.softcap,
                self.scale,
                GRADIENT=gradient,
                BLOCK=block_of(self.product.shape[1]),
                num_warps=WARPS,
                # A fused multiply-add would give a logit other bits where it is compared or subtracted than where its
                # maximum was taken.
                enable_fp_fusion=False,
            )


def block_of(vocab: int) -> int:
    """Logits that a program holds at a time."""
    return min(MAX_BLOCK, max(MIN_BLOCK, triton.next_power_of_2(vocab)))


def _on(device: torch.device) -> AbstractContextManager:
    """The context in which kernels start on `device`; Triton takes the current one, not the tensors'."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
