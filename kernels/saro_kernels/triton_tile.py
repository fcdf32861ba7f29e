"""The tile op as one Triton kernel: one program per row computes the statistics online, then the gradient in place.

Online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867. Importing this module needs triton, so only `find_tile_op`
imports it. If TRITON_INTERPRET=1 is in the environment when triton is first imported, the kernel runs on the CPU, as in
the tests.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from saro_kernels.torch_tile import overlay

# Limits of the logits that a program holds at a time. A block needs at least one element per thread: if two threads
# shared an element, one could write the gradient where the other still reads the logit. 16 warps are 512 threads on
# NVIDIA and 1024 on AMD. Blocks of 8192 made some variants spill registers (benchmarks/compile_matrix.py).
MIN_BLOCK, MAX_BLOCK, WARPS = 1024, 4096, 16
# Rows start at multiples of 16 elements, so that loads and stores are 16 bytes wide for any vocabulary size.
ALIGNMENT = 16


@triton.jit
def _tanh_and_slope(x):
    """Return tanh(x) and its slope 1 - tanh(x)^2, each within a few ulp (near zero by Cephes' polynomial)."""
    square = x * x
    small = -5.70498872745e-3
    small = small * square + 2.06390887954e-2
    small = small * square - 5.37397155531e-2
    small = small * square + 1.33314422036e-1
    small = small * square - 3.33332819422e-1
    small = small * square * x + x
    # Where tanh is near one, compute the slope from 1 - |tanh|: 1 - tanh^2 would cancel its digits.
    rest = 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    large = tl.where(x < 0, rest - 1.0, 1.0 - rest)
    near_zero = tl.abs(x) < 0.625
    return tl.where(near_zero, small, large), tl.where(near_zero, 1.0 - small * small, rest * (2.0 - rest))


@triton.jit
def _logits(product, product_scale, softcap):
    """Return the logits of products and the slope of the softcap (1 without a softcap)."""
    logit = product * product_scale
    slope = 1.0
    if softcap is not None:
        logit, slope = _tanh_and_slope(logit)
        logit *= softcap
    return logit, slope


@triton.jit
def _load(product, columns, vocab, width, product_scale, softcap):
    """Return the logits at `columns` of a row, -inf beyond the vocabulary, and the softcap's slope."""
    # Mask the load at the allocated width, not at the vocabulary: a multiple of the alignment keeps the load wide.
    logit, slope = _logits(tl.load(product + columns, mask=columns < width, other=0.0), product_scale, softcap)
    return tl.where(columns < vocab, logit, float("-inf")), slope


@triton.jit
def _one_minus_exp(x):
    """Return 1 - exp(x) for x <= 0. Near zero it uses the series, since the difference would cancel."""
    y = -x
    series = y * (1 - y / 2 * (1 - y / 3 * (1 - y / 4 * (1 - y / 5 * (1 - y / 6 * (1 - y / 7))))))
    return tl.where(y < 0.25, series, 1.0 - tl.exp(x))


@triton.jit
def tile_kernel(
    product,  # (rows, width) float32, with products in the first `vocab` columns
    gradient,  # (rows, width), output, in the memory of `product`, see `TritonTile`; or None
    targets,  # (rows,) int64
    logps,  # (rows,) float32, output
    upstream,  # (rows,) float32, or None for ones
    entropies,  # (rows,) float32, output, or None
    tops,  # (rows,) bool, output: True where no token is likelier than the target; or None
    vocab,
    width,
    product_stride,
    gradient_stride,
    targets_stride,
    upstream_stride,
    product_scale,  # factor of the products: scale, or scale / softcap if there is a softcap
    softcap,  # or None
    scale,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    product += row * product_stride
    lanes = tl.arange(0, BLOCK)
    # Read the target's logit first: the reductions below synchronise, so no thread has written a gradient there yet.
    target = tl.load(targets + row * targets_stride)
    in_vocab = (target >= 0) & (target < vocab)
    at_target = _logits(tl.load(product + target, mask=in_vocab, other=0.0), product_scale, softcap)[0]
    # A target outside the vocabulary is not read, and makes its row NaN instead of giving a wrong score.
    at_target = tl.where(in_vocab, at_target, float("nan"))

    # Each lane keeps its own maximum and sum: the loop then needs no reduction and one exponential per logit.
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        logit = _load(product, start + lanes, vocab, width, product_scale, softcap)[0]
        decayed = tl.exp(-tl.abs(logit - highest))
        added = tl.where(logit == float("-inf"), total, total + decayed)
        total = tl.where(logit > highest, total * decayed + 1.0, added)
        highest = tl.maximum(highest, logit)
    maximum = tl.max(highest, 0)
    total = tl.sum(total * tl.exp(highest - maximum), 0)
    # Subtract the maximum first: for large logits, logit - logsumexp would cancel the digits of the result.
    logp = at_target - maximum - tl.log(total)
    tl.store(logps + row, logp)

    if entropies is not None:
        weighted = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            logit = _load(product, start + lanes, vocab, width, product_scale, softcap)[0]
            below = logit - maximum
            weighted += tl.where(below > float("-inf"), tl.exp(below) * below, 0.0)
        tl.store(entropies + row, tl.log(total) - tl.sum(weighted, 0) / total)
        tl.store(tops + row, at_target >= maximum)

    if gradient is not None:
        gradient += row * gradient_stride
        factor = scale
        if upstream is not None:
            factor *= tl.load(upstream + row * upstream_stride)
        factor = tl.where(in_vocab, factor, float("nan"))
        factor_of_others = -factor / total
        gradient_at_target = factor * _one_minus_exp(logp)
        for start in range(0, vocab, BLOCK):
            if gradient.dtype != product.dtype:
                # This block's gradient overwrites logits of earlier blocks. A thread gets here after it has written the
                # gradients of those, so it has read their logits. Wait until all threads have.
                tl.debug_barrier()
            columns = start + lanes
            logit, slope = _load(product, columns, vocab, width, product_scale, softcap)
            gradient_of_others = tl.exp(logit - maximum) * factor_of_others
            values = tl.where(columns == target, gradient_at_target, gradient_of_others) * slope
            tl.store(gradient + columns, values.to(gradient.dtype.element_ty), mask=columns < width)


class TritonTile:
    """The tile op in Triton, for CUDA, ROCm and XPU, with hidden states in float32, bfloat16 or float16.

    It has the attributes of `TorchTile`, and needs only one buffer. A gradient of half the size begins half a block
    before the logits, so that the gradient of each block ends where its logits begin, or before.
    """

    def __init__(self, rows: int, like: Tensor, vocab: int, *, softcap: float | None, scale: float, gradient: bool):
        self.softcap, self.scale = softcap, scale
        lead = block_size(vocab) // 2 if gradient and like.itemsize == 2 else 0
        self.width = -(-vocab // ALIGNMENT) * ALIGNMENT
        buffer = like.new_empty(rows, lead + self.width, dtype=torch.float32)
        self.product = buffer[:, lead : lead + vocab]
        self.gradient = overlay(buffer, like.dtype)[:, :vocab] if gradient else None

    def run(self, targets: Tensor, upstream: Tensor | None = None) -> Tensor:
        """See `TorchTile.run`. For a target outside the vocabulary, the row's log-prob and gradient are NaN."""
        logps = self.product.new_empty(len(targets), dtype=torch.float32)
        self._launch(targets, logps, gradient=self.gradient, upstream=upstream)
        return logps

    def statistics(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `TorchTile.statistics`. This one does not change `product`."""
        logps, entropies = self.product.new_empty(2, len(targets), dtype=torch.float32)
        tops = torch.empty(len(targets), dtype=torch.bool, device=logps.device)
        self._launch(targets, logps, entropies=entropies, tops=tops)
        return logps, entropies, tops

    def _launch(
        self,
        targets: Tensor,
        logps: Tensor,
        *,
        gradient: Tensor | None = None,
        upstream: Tensor | None = None,
        entropies: Tensor | None = None,
        tops: Tensor | None = None,
    ) -> None:
        if len(targets) == 0:
            return
        with _on(self.product.device):
            tile_kernel[(len(targets),)](
                product=self.product,
                gradient=gradient,
                targets=targets,
                logps=logps,
                upstream=upstream,
                entropies=entropies,
                tops=tops,
                vocab=self.product.shape[1],
                width=self.width,
                product_stride=self.product.stride(0),
                gradient_stride=0 if gradient is None else gradient.stride(0),
                targets_stride=targets.stride(0),
                upstream_stride=0 if upstream is None else upstream.stride(0),
                product_scale=self.scale if self.softcap is None else self.scale / self.softcap,
                softcap=self.softcap,
                scale=self.scale,
                BLOCK=block_size(self.product.shape[1]),
                num_warps=WARPS,
                # With fused multiply-adds, a logit could have other bits in the loop that finds the maximum than in the
                # lines that compare it with the maximum or subtract the maximum from it.
                enable_fp_fusion=False,
            )


def block_size(vocab: int) -> int:
    """Return how many logits a program holds at a time."""
    return min(MAX_BLOCK, max(MIN_BLOCK, triton.next_power_of_2(vocab)))


def _on(device: torch.device) -> AbstractContextManager:
    """Return a context in which kernels start on `device`: Triton uses the current device, not that of the tensors."""
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device)
    return nullcontext() if device.index == module.current_device() else module.device(device)
