"""LoRA on frozen linear layers as one autograd function, which keeps only its input and the rank-r products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saro_kernels.autocast import cast_input, outside_autocast
from saro_kernels.lora_group import (
    LoraGroup,
    LoraLinear,
    flatten_rows,
    list_gradients,
    list_matrices,
    reshape_output,
)


def lora_linear(x: Tensor, layer: LoraLinear) -> Tensor:
    """Apply a linear layer with LoRA. It is once differentiable in ``x``, ``a`` and ``b``.

    Products run in x's dtype and accumulate in float32. Under `torch.autocast`, a float32 `x` is cast first. The gradients
    of ``a`` and ``b`` have the dtypes of ``a`` and ``b``. Between forward and backward it keeps no copy of the base weight in
    another dtype and no dequantized weight.

    Args:
        x: (..., in).

    Returns:
        (..., out) in x's dtype.
    """
    (out,) = lora_linears(x, (layer,))
    return out


def lora_linears(x: Tensor, layers: Sequence[LoraLinear], a_stack: Tensor | None = None) -> tuple[Tensor, ...]:
    """Apply several layers to one input, such as queries, keys and values, each as in ``lora_linear``.

    Args:
        x: (..., in).
        a_stack: (R, in), the ``a`` of all layers one below another in x's dtype, if the caller has it. It is read
            instead of ``a_cast``, in the backward too, so nobody may write to it.

    Returns:
        A tensor (..., out) for each layer.
    """
    return _LoraLinears.apply(cast_input(x), LoraGroup(tuple(layers), a_stack), *list_matrices(layers))


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    @outside_autocast
    def forward(ctx, x, group, *matrices):
        ctx.group = group
        rows = flatten_rows(x)
        products = group.project(rows)
        ctx.save_for_backward(rows, products, *matrices)
        return tuple(reshape_output(out, x) for out in group.outputs(rows, products))

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, *gradients):
        group = ctx.group
        rows, products, *_ = ctx.saved_tensors
        upstreams = [flatten_rows(gradient) for gradient in gradients]
        d_products = group.backward_to_products(upstreams)
        d_bs = group.backward_to_b(upstreams, products)
        d_as = group.backward_to_a(d_products, rows)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_rows = group.backward_to_rows(upstreams, d_products)
            d_x = d_rows.view(*gradients[0].shape[:-1], rows.shape[-1])
        return d_x, None, *list_gradients(group.layers, d_as, d_bs)
