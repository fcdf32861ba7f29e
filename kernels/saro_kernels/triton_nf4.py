"""NF4 weights of bitsandbytes, dequantized by one Triton kernel, whether or not the block scales are quantized too.

NF4 and double quantization: Dettmers et al. 2023, arXiv 2305.14314. Importing this module needs triton, so only
`saro_kernels.nf4` imports it, and only if the kernel can run.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from saro_kernels.triton_tile import _on

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

# Packed words of 8 numbers that a program unpacks. A thread then loads 16 bytes at a time and stores 64 in bfloat16: four
# independent chains of loads, which hide the latency of memory.
WORDS, WARPS = 512, 4


# Only the alignment of the weight matters, which `why_not_triton` requires. One kernel then serves all weights of a model.
@triton.jit(do_not_specialize_on_alignment=["code", "absmax", "nested_code", "nested_absmax", "offset"])
def nf4_kernel(
    packed,  # (words * 4,) uint8, two numbers in a byte, the first in the high bits
    code,  # (16,) float32, the numbers of NF4
    absmax,  # float32 scale of each block; or uint8, its index in `nested_code`
    nested_code,  # (256,) float32, or None if `absmax` is float32
    nested_absmax,  # float32 scale of each block of scales, or None
    offset,  # () float32, the mean of the scales, or None
    out,  # (words * 8,), output
    words,
    BLOCK: tl.constexpr,  # words with one scale; divides WORDS
    NESTED_BLOCK: tl.constexpr,  # scales with one scale of scales
    WORDS: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * WORDS
    word = tl.arange(0, WORDS)
    bits = tl.load(packed.to(tl.pointer_type(tl.int32)) + start + word, mask=word < words - start, other=0)

    BLOCKS: tl.constexpr = WORDS // BLOCK
    block = start // BLOCK + tl.arange(0, BLOCKS)
    in_weight = block * BLOCK < words
    scale = tl.load(absmax + block, mask=in_weight, other=0)
    if nested_code is not None:
        nested_scale = tl.load(nested_absmax + block // NESTED_BLOCK, mask=in_weight, other=0.0)
        scale = tl.load(nested_code + scale) * nested_scale + tl.load(offset)
    scale = tl.broadcast_to(scale[:, None], (BLOCKS, BLOCK)).reshape(WORDS)

    # Little-endian words: byte i // 2 holds numbers i and i + 1, for even i, and number i in its high bits.
    i = tl.arange(0, 8)
    shift = i // 2 * 8 + 4 - i % 2 * 4
    index = (bits[:, None] >> shift[None, :]) & 15  # (WORDS, 8)
    values = tl.load(code + index) * scale[:, None]
    numbers = out + start * 8 + word[:, None] * 8 + i[None, :]
    tl.store(numbers, values.to(out.dtype.element_ty), mask=(word < words - start)[:, None])


def dequantize_nf4(packed: Tensor, state: "QuantState") -> Tensor:
    """Return the weight (out, in) in `state.dtype`, with the bits that bitsandbytes' CUDA kernels compute.

    A number is ``code[4 bits] * scale``, rounded once from float32. A quantized scale is ``code[8 bits] * scale of
    scales``, rounded to float32, plus the offset.

    Args:
        packed: the 4-bit numbers, in any dtype; `saro_kernels.nf4.why_not_triton` must have found no reason.
        state: of the same weight.
    """
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    words = out.numel() // 8
    nested = state.state2
    with _on(out.device):
        nf4_kernel[(-(-words // WORDS),)](  # triton.cdiv would cost a quarter of the launch
            packed=packed if packed.dtype == torch.uint8 else packed.view(torch.uint8),
            code=state.code,
            absmax=state.absmax,
            nested_code=None if nested is None else nested.code,
            nested_absmax=None if nested is None else nested.absmax,
            offset=None if nested is None else state.offset,
            out=out,
            words=words,
            BLOCK=state.blocksize // 8,
            NESTED_BLOCK=1 if nested is None else nested.blocksize,
            WORDS=WORDS,
            num_warps=WARPS,
            # A fused multiply-add would not round the product of a quantized scale before it adds the offset.
            enable_fp_fusion=False,
        )
    return out
