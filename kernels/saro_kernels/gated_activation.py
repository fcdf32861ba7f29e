"""The activation between the layers of a gated MLP, ``activation(gated) * lifted``, and its gradients.

These are elementwise, so their time is that of reading and writing memory. On a GPU, Triton does each in one pass, computes in
float32 and rounds once; torch's operators read and write intermediate results.
"""

import torch
from torch import Tensor

from saro_kernels.tile_ops import TRITON_DEVICES, choose_tile_op

# Activations by name. The backward functions compute the gradient in one pass.
_FORWARD = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
_BACKWARD = {
    "silu": torch.ops.aten.silu_backward,
    "gelu_tanh": lambda gradient, x: torch.ops.aten.gelu_backward(gradient, x, approximate="tanh"),
}
ACTIVATIONS = tuple(_FORWARD)


def gated_product(activation: str, gated: Tensor, lifted: Tensor) -> Tensor:
    """Return ``activation(gated) * lifted`` of two contiguous tensors (N, M)."""
    if _uses_triton(gated):
        from saro_kernels.triton_gate import triton_gated_product

        return triton_gated_product(activation, gated, lifted)
    return _FORWARD[activation](gated).mul_(lifted)


def gated_product_backward(
    activation: str, d_hidden: Tensor, gated: Tensor, lifted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output of ``gated_product`` again, and the gradients of ``gated`` and ``lifted``.

    All tensors are contiguous and (N, M). ``d_hidden``, the gradient of the output, is overwritten.
    """
    if _uses_triton(gated):
        from saro_kernels.triton_gate import triton_gated_product_backward

        return triton_gated_product_backward(activation, d_hidden, gated, lifted)
    active = _FORWARD[activation](gated)
    hidden = active * lifted
    d_lifted = active.mul_(d_hidden)
    return hidden, _BACKWARD[activation](d_hidden.mul_(lifted), gated), d_lifted


def _uses_triton(tensor: Tensor) -> bool:
    return tensor.device.type in TRITON_DEVICES and choose_tile_op("auto", tensor.device, tensor.dtype) == "triton"
