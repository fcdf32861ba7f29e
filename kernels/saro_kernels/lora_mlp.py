"""A gated MLP (gate, up, activation, down) with LoRA on its layers as one autograd function.

It keeps neither the activation nor the input of the down layer, and with `chunk_rows` only its own input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saro_kernels.autocast import cast_input, outside_autocast
from saro_kernels.gated_activation import gated_product, gated_product_backward
from saro_kernels.lora_group import (
    FrozenLinear,
    LoraGroup,
    LoraLinear,
    compute_output,
    flatten_rows,
    list_gradients,
    list_matrices,
    reshape_output,
)


def lora_gated_mlp(
    x: Tensor,
    gate: LoraLinear,
    up: LoraLinear,
    down: LoraLinear,
    activation: str,
    *,
    a_stack: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Return ``down(activation(gate(x)) * up(x))``, each layer as in ``lora_linear``; the backward recomputes the activation.

    It keeps x, the outputs of gate and up, and three rank-r products. Separate layers also keep the activation and its
    product with up: four tensors of the intermediate size where this keeps two.

    Args:
        x: (..., D).
        activation: one of ``gated_activation.ACTIVATIONS``.
        a_stack: (R, D), the ``a`` of gate and up, as in ``lora_linears``.
        chunk_rows: compute this many rows at a time, and keep only x. No tensor of the intermediate size then has
            more rows, but the backward computes gate and up again.

    Returns:
        (..., D) in x's dtype.
    """
    mlp = _GatedMlp(LoraGroup((gate, up), a_stack), LoraGroup((down,)), activation)
    matrices = list_matrices(mlp.layers)
    x = cast_input(x)
    if chunk_rows is None:
        return _LoraGatedMlp.apply(x, mlp, *matrices)
    kept: list[torch.autograd.function.FunctionCtx] = []
    needs_x = torch.is_grad_enabled() and x.requires_grad
    if torch.is_grad_enabled():
        x = _Keep.apply(x, kept, *matrices)
    return _ChunkedMlp.apply(x, kept, needs_x, mlp, chunk_rows, *matrices)


@dataclass(frozen=True, eq=False)
class _GatedMlp:
    """The layers of a gated MLP of width D and intermediate width M, and the steps of its forward and backward.

    Attributes:
        inputs: gate and up.
        down: the down layer.
        activation: one of ``gated_activation.ACTIVATIONS``.
    """

    inputs: LoraGroup
    down: LoraGroup
    activation: str

    @property
    def layers(self) -> tuple[LoraLinear, ...]:
        """Gate, up and down."""
        return (*self.inputs.layers, *self.down.layers)

    def unpacked(self, dtype: torch.dtype) -> _GatedMlp:
        """Return the MLP with dense weights in `dtype`, so that each is dequantized once for all chunks."""
        return replace(self, inputs=_unpack(self.inputs, dtype), down=_unpack(self.down, dtype))

    def gate_and_up(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the outputs of gate and up, (N, M) each, and their rank-r products, (N, R)."""
        products = self.inputs.project(rows)
        gated, lifted = self.inputs.outputs(rows, products)
        return gated, lifted, products

    def backward(
        self,
        upstream: Tensor,
        rows: Tensor,
        gated: Tensor,
        lifted: Tensor,
        products: Tensor,
        p_down: Tensor | None,
        d_rows: Tensor | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the gradients of A and those of B of the three layers, in float32 or wider.

        Args:
            p_down: the rank-r product of down, (N, r), or None to compute it again.
            d_rows: the gradient of the rows, (N, D), is written here; None if it is not needed.
        """
        d_p_down = self.down.backward_to_products([upstream])
        # Compute the down layer's input again, after its gradient: one pass then gives both, and the gradients of gate and up.
        d_hidden = self.down.backward_to_rows([upstream], d_p_down)
        hidden, *upstreams = gated_product_backward(self.activation, d_hidden, gated, lifted)
        if p_down is None:
            p_down = self.down.project(hidden)
        d_b_down = self.down.backward_to_b([upstream], p_down)
        d_a_down = self.down.backward_to_a(d_p_down, hidden)
        del hidden
        d_products = self.inputs.backward_to_products(upstreams)
        d_bs = self.inputs.backward_to_b(upstreams, products)
        d_as = self.inputs.backward_to_a(d_products, rows)
        if d_rows is not None:
            self.inputs.backward_to_rows(upstreams, d_products, d_rows)
        return d_as + d_a_down, d_bs + d_b_down


def _unpack(group: LoraGroup, dtype: torch.dtype) -> LoraGroup:
    bases = [FrozenLinear(layer.base.dense(dtype), bias=layer.base.bias) for layer in group.layers]
    layers = tuple(replace(layer, base=base) for layer, base in zip(group.layers, bases, strict=True))
    return replace(group, layers=layers)


class _LoraGatedMlp(torch.autograd.Function):
    @staticmethod
    @outside_autocast
    def forward(ctx, x, mlp, *matrices):
        ctx.mlp = mlp
        rows = flatten_rows(x)
        gated, lifted, products = mlp.gate_and_up(rows)
        hidden = gated_product(mlp.activation, gated, lifted)
        p_down = mlp.down.project(hidden)
        ctx.save_for_backward(rows, gated, lifted, products, p_down, *matrices)
        (out,) = mlp.down.outputs(hidden, p_down)
        return reshape_output(out, x)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, gradient):
        mlp = ctx.mlp
        rows, gated, lifted, products, p_down, *_ = ctx.saved_tensors
        d_rows = rows.new_empty(rows.shape) if ctx.needs_input_grad[0] else None
        d_as, d_bs = mlp.backward(flatten_rows(gradient), rows, gated, lifted, products, p_down, d_rows)
        d_x = None if d_rows is None else d_rows.view(*gradient.shape[:-1], rows.shape[-1])
        return d_x, None, *list_gradients(mlp.layers, d_as, d_bs)


class _Keep(torch.autograd.Function):
    """Keeps the input of a ``_ChunkedMlp`` for its backward, before the MLP runs.

    Gradient checkpointing stops recomputing a layer when it has all tensors that the layer's backward has kept. So it does
    not recompute the MLP if nothing after it keeps a tensor.
    """

    @staticmethod
    def forward(ctx, x, kept, *matrices):
        ctx.save_for_backward(x, *matrices)
        ctx.set_materialize_grads(False)
        kept.append(ctx)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient, *(None for _ in ctx.needs_input_grad[1:])


class _ChunkedMlp(torch.autograd.Function):
    @staticmethod
    @outside_autocast
    def forward(ctx, x, kept, needs_x, mlp, chunk_rows, *_):
        ctx.kept, ctx.needs_x, ctx.mlp, ctx.chunk_rows = kept, needs_x, mlp, chunk_rows
        rows = flatten_rows(x)
        mlp = mlp.unpacked(rows.dtype)
        (down,) = mlp.down.layers
        out = rows.new_empty(rows.shape[0], down.b.shape[0])
        for part, out_part in zip(rows.split(chunk_rows), out.split(chunk_rows), strict=True):
            gated, lifted, _ = mlp.gate_and_up(part)
            hidden = gated_product(mlp.activation, gated, lifted)
            del gated, lifted
            compute_output(hidden, mlp.down.project(hidden), down, out_part)
        return reshape_output(out, x)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, gradient):
        (keep,) = ctx.kept
        x, *_ = keep.saved_tensors
        rows, upstream = flatten_rows(x), flatten_rows(gradient)
        mlp = ctx.mlp.unpacked(rows.dtype)
        d_rows = rows.new_empty(rows.shape) if ctx.needs_x else None
        totals: list[Tensor] = []
        for start in range(0, max(1, rows.shape[0]), ctx.chunk_rows):
            chunk = slice(start, start + ctx.chunk_rows)
            d_part = None if d_rows is None else d_rows[chunk]
            d_as, d_bs = mlp.backward(upstream[chunk], rows[chunk], *mlp.gate_and_up(rows[chunk]), None, d_part)
            sums = [*d_as, *d_bs]  # in float32 or wider
            totals = [total.add_(value) for total, value in zip(totals, sums, strict=True)] if totals else sums
        d_x = None if d_rows is None else d_rows.view(x.shape)
        none = (None,) * 4  # kept, needs_x, mlp, chunk_rows
        return d_x, *none, *list_gradients(mlp.layers, totals[:3], totals[3:])
