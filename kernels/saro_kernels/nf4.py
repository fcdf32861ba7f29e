"""Dequantizes the NF4 weights of bitsandbytes (Dettmers et al. 2023, arXiv 2305.14314), on a GPU by one kernel.

bitsandbytes takes three for a weight whose scales are quantized too. The results are the same.
"""

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saro_kernels import tile_ops

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# bitsandbytes' block sizes. A program of the kernel holds whole blocks of any of them.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def dequantize(packed: Tensor, state: "QuantState") -> Tensor:
    """Return the weight (out, in) in `state.dtype`, by our kernel if it can run, else by bitsandbytes. Both give the same bits.

    Args:
        packed: the 4-bit numbers, as `bitsandbytes.functional.quantize_4bit` returns them, as bytes or as another dtype.
        state: the state that it returns with them.
    """
    if packed.dtype != torch.uint8:
        # Ranks that share a weight store its bytes as a floating dtype.
        packed = packed.detach().view(torch.uint8).view(-1, 1)
    # bitsandbytes' parameters would run a Python function each time that one of their attributes is read.
    with torch._C.DisableTorchFunctionSubclass():
        if why_not_triton(packed, state) is None:
            # Import it only here: Triton is optional, and its import takes a second.
            from saro_kernels.triton_nf4 import dequantize_nf4

            return dequantize_nf4(packed, state)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, state)


def why_not_triton(packed: Tensor, state: "QuantState") -> str | None:
    """Return why our kernel cannot dequantize a weight; None if it can."""
    return device_problem(packed.device) or layout_problem(packed, state)


@functools.cache
def device_problem(device: torch.device) -> str | None:
    """Return why our kernel cannot run on a device; None if it can. Cached: a step asks hundreds of times."""
    if device.type != "cuda":
        return f"it runs on CUDA, not on {device.type}"
    problem = tile_ops.triton_problem(device, torch.float32)
    if problem is not None:
        return problem
    from triton import knobs

    return "Triton's interpreter does not round to bfloat16, it cuts off" if knobs.runtime.interpret else None


def layout_problem(packed: Tensor, state: "QuantState") -> str | None:
    """Return why our kernel cannot read a weight, on whichever device; None if it can."""
    if state.quant_type != "nf4":
        return f"the weight is {state.quant_type}, not nf4"
    if state.dtype not in DTYPES:
        return f"it does not write {state.dtype}"
    if state.blocksize not in BLOCK_SIZES:
        return f"blocks have {state.blocksize} numbers, not one of {BLOCK_SIZES}"
    if state.shape.numel() % 8:
        return f"{state.shape.numel()} numbers are not a multiple of 8"
    # bitsandbytes transposes a weight that is stored as one row.
    if packed.shape[0] == 1 or not packed.is_contiguous() or packed.data_ptr() % 16:
        return "the packed numbers are not one contiguous column that starts at a multiple of 16 bytes"
    nested = state.state2
    if nested is not None and (state.absmax.dtype != torch.uint8 or nested.dtype != torch.float32 or nested.nested):
        return "the scales are not quantized once, to 8 bits"
    floats = (state.code, state.absmax) if nested is None else (state.code, nested.code, nested.absmax, state.offset)
    for x in floats:
        if x.dtype != torch.float32:
            return "scales or codes are not float32"
        if x.device != packed.device:
            return "its parts are on several devices"
    return None
