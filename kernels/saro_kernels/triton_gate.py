"""The functions of `gated_activation` as Triton kernels. Importing this module needs triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saro_kernels.triton_tile import _on, _tanh_and_slope

# Numbers that a program handles; each of its 128 threads loads 16 bytes of bfloat16 at a time.
BLOCK, WARPS = 1024, 4


@triton.jit
def _activate(x, GELU: tl.constexpr):
    """Return the activation of x and its slope."""
    if GELU:
        # GELU's tanh form: x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3).
        inner = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
        tanh, tanh_slope = _tanh_and_slope(inner)
        active = 0.5 * x * (1.0 + tanh)
        slope = 0.5 * (1.0 + tanh) + 0.5 * x * tanh_slope * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        active = x * sigmoid
        slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    return active, slope


@triton.jit
def gate_kernel(gated, lifted, hidden, numbers, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numbers
    active, _ = _activate(tl.load(gated + at, mask=mask, other=0.0).to(tl.float32), GELU)
    values = active * tl.load(lifted + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(hidden + at, values.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def gate_backward_kernel(
    d_hidden,  # overwritten with the gradient of gated
    gated,
    lifted,
    hidden,  # output
    d_lifted,  # output
    numbers,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numbers
    gradient = tl.load(d_hidden + at, mask=mask, other=0.0).to(tl.float32)
    active, slope = _activate(tl.load(gated + at, mask=mask, other=0.0).to(tl.float32), GELU)
    factor = tl.load(lifted + at, mask=mask, other=0.0).to(tl.float32)
    dtype = hidden.dtype.element_ty
    tl.store(hidden + at, (active * factor).to(dtype), mask=mask)
    tl.store(d_lifted + at, (active * gradient).to(dtype), mask=mask)
    tl.store(d_hidden + at, (gradient * factor * slope).to(dtype), mask=mask)


def triton_gated_product(activation: str, gated: Tensor, lifted: Tensor) -> Tensor:
    """Compute `gated_activation.gated_product`."""
    hidden = torch.empty_like(gated)
    _launch(gate_kernel, activation, gated, lifted, hidden)
    return hidden


def triton_gated_product_backward(
    activation: str, d_hidden: Tensor, gated: Tensor, lifted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `gated_activation.gated_product_backward`."""
    hidden, d_lifted = torch.empty_like(gated), torch.empty_like(gated)
    _launch(gate_backward_kernel, activation, d_hidden, gated, lifted, hidden, d_lifted)
    return hidden, d_hidden, d_lifted


def _launch(kernel: triton.JITFunction, activation: str, *tensors: Tensor) -> None:
    """Run a kernel on contiguous tensors of one size."""
    numbers = tensors[0].numel()
    if numbers:
        with _on(tensors[0].device):
            grid = (triton.cdiv(numbers, BLOCK),)
            kernel[grid](*tensors, numbers, GELU=activation == "gelu_tanh", BLOCK=BLOCK, num_warps=WARPS)
