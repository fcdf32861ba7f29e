"""LoRA on frozen linear layers as one autograd function (LoRA: Hu et al. 2021, arXiv 2106.09685; NF4: Dettmers et al.
2023, arXiv 2305.14314).

`lora_linear` keeps only its input and the rank-r product for the backward. `lora_linears` does the same for layers with one
input, such as queries, keys and values. `lora_gated_mlp` does it for a gated MLP (gate, up, activation, down): it keeps
neither the activation nor the input of the down layer, and with `chunk_rows` only its own input.

Products with A and B are bound by memory, so they are arranged to read and write less of it. Layers with one input share
one product with their A, stacked, and one for its gradient. In the backward the rank-r part of a sum is written first, and
the large products are added to it: their kernels read the sum while they compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saro_kernels import nf4
from saro_kernels.gated_activation import gated_product, gated_product_backward

# Rank at which the fast layout of a thin product changes on a CPU. Below it, MKL takes up to ten times as long with the
# thin matrix as the right factor; from it on, a third longer with the thin matrix as the left factor. `_project` and
# `_outer` choose the fast one of the two layouts.
_THIN_RANK = 16


@dataclass(frozen=True, eq=False)
class FrozenLinear:
    """The frozen linear layer under an adapter.

    Attributes:
        weight: (out, in) in the dtype of the products, or packed 4-bit numbers.
        quant_state: bitsandbytes' QuantState of a packed weight; None for a dense weight.
        bias: (out,) or None; not trained.
    """

    weight: Tensor
    quant_state: object | None = None
    bias: Tensor | None = None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in) in `dtype`. A packed weight is dequantized on each call; no copy is kept here."""
        if self.quant_state is None:
            return self.weight.to(dtype)
        return nf4.dequantize(self.weight, self.quant_state).to(dtype)


@dataclass(frozen=True, eq=False)
class LoraLinear:
    """A frozen linear layer with a low-rank update: ``x W^T + bias + scaling (x A^T) B^T``.

    Attributes:
        base: the frozen W and bias.
        a: (r, in), trainable, in any floating dtype; cast to the input's dtype for the products.
        b: (out, r), like `a`.
        scaling: alpha / r.
        a_cast: `a` in the input's dtype, if the caller has cast it already. The backward reads it too: nobody may write to it.
        b_cast: `b`, like `a_cast`.
    """

    base: FrozenLinear
    a: Tensor
    b: Tensor
    scaling: float
    a_cast: Tensor | None = None
    b_cast: Tensor | None = None


def lora_linear(x: Tensor, layer: LoraLinear) -> Tensor:
    """Apply a linear layer with LoRA. It is once differentiable in ``x``, ``a`` and ``b``.

    Products run in x's dtype and accumulate in float32. The gradients of ``a`` and ``b`` have the dtypes of ``a`` and
    ``b``. Between forward and backward it keeps no copy of the base weight in another dtype and no dequantized weight.

    Args:
        x: (..., in).

    Returns:
        (..., out) in x's dtype.
    """
    (out,) = lora_linears(x, (layer,))
    return out


def lora_linears(x: Tensor, layers: Sequence[LoraLinear], a_stack: Tensor | None = None) -> tuple[Tensor, ...]:
    """Apply several layers to one input, each as in ``lora_linear``.

    Args:
        x: (..., in).
        a_stack: (R, in), the ``a`` of all layers one below another in x's dtype, if the caller has them so already. It is
            read instead of ``a_cast``, and in the backward too: nobody may write to it.

    Returns:
        A tensor (..., out) for each layer.
    """
    layers = tuple(layers)
    return _LoraLinears.apply(x, layers, a_stack, *_matrices(layers))


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
        chunk_rows: compute so many rows at a time, and keep nothing but x. No tensor of the intermediate size then has
            more rows, but the backward computes gate and up again.

    Returns:
        (..., D) in x's dtype.
    """
    layers = (gate, up, down)
    if chunk_rows is None:
        return _LoraGatedMlp.apply(x, layers, activation, a_stack, *_matrices(layers))
    kept: list[torch.autograd.function.FunctionCtx] = []
    if torch.is_grad_enabled():
        needs_x = x.requires_grad
        x = _Keep.apply(x, kept, *_matrices(layers))
    else:
        needs_x = False
    return _ChunkedMlp.apply(x, kept, needs_x, layers, activation, a_stack, chunk_rows, *_matrices(layers))


def _matrices(layers: Sequence[LoraLinear]) -> list[Tensor]:
    """Return A and B of each layer."""
    return [matrix for layer in layers for matrix in (layer.a, layer.b)]


def _reshape_output(out: Tensor, x: Tensor) -> Tensor:
    """Return rows (N, out) in x's shape (..., out), as the operator that ``F.linear`` ends with.

    autograd lets nobody change a view in place that a Function returns, and some models clamp their queries in place.
    """
    return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[-1]))


def _flatten(x: Tensor) -> Tensor:
    """Return (..., D) as rows (N, D)."""
    return x.reshape(-1, x.shape[-1])


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layers, a_stack, *matrices):
        ctx.layers, ctx.a_stack = layers, a_stack
        rows = _flatten(x)
        products = _project_down(rows, _stack(layers, a_stack, rows.dtype), layers)
        ctx.save_for_backward(rows, products, *matrices)
        parts = zip(_columns(products, layers), layers, strict=True)
        return tuple(_reshape_output(_forward(rows, product, layer), x) for product, layer in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        rows, products, *_ = ctx.saved_tensors
        upstreams = [_flatten(gradient) for gradient in gradients]
        d_products, d_bs = _backward_to_products(upstreams, products, ctx.layers)
        d_as = _backward_to_a(d_products, rows, ctx.layers)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_rows = _backward_to_rows(upstreams, d_products, ctx.layers, ctx.a_stack)
            d_x = d_rows.view(*gradients[0].shape[:-1], rows.shape[-1])
        return d_x, None, None, *_matrix_gradients(ctx.layers, d_as, d_bs)


class _LoraGatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layers, activation, a_stack, *matrices):
        ctx.layers, ctx.activation, ctx.a_stack = layers, activation, a_stack
        rows = _flatten(x)
        gated, lifted, products = _forward_gate_and_up(rows, layers, a_stack)
        hidden = gated_product(activation, gated, lifted)
        p_down = _project_down(hidden, _stack(layers[2:], None, rows.dtype), layers[2:])
        ctx.save_for_backward(rows, gated, lifted, products, p_down, *matrices)
        return _reshape_output(_forward(hidden, p_down, layers[2]), x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rows, gated, lifted, products, p_down, *_ = ctx.saved_tensors
        d_rows = rows.new_empty(rows.shape) if ctx.needs_input_grad[0] else None
        d_as, d_bs = _backward_mlp(
            _flatten(gradient), rows, gated, lifted, products, p_down, ctx.layers, ctx.activation, ctx.a_stack, d_rows
        )
        d_x = None if d_rows is None else d_rows.view(*gradient.shape[:-1], rows.shape[-1])
        return d_x, None, None, None, *_matrix_gradients(ctx.layers, d_as, d_bs)


class _Keep(torch.autograd.Function):
    """Keeps the input of a ``_ChunkedMlp`` for its backward, before it is computed.

    Gradient checkpointing recomputes a layer until all tensors are there that its backward has kept, and no further. So it
    does not recompute the MLP, if nothing after it keeps a tensor.
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
    def forward(ctx, x, kept, needs_x, layers, activation, a_stack, chunk_rows, *_):
        ctx.kept, ctx.needs_x, ctx.layers, ctx.activation = kept, needs_x, layers, activation
        ctx.a_stack, ctx.chunk_rows = a_stack, chunk_rows
        rows = _flatten(x)
        layers = _unpack(layers, rows.dtype)
        out = rows.new_empty(rows.shape[0], layers[2].b.shape[0])
        for part, out_part in zip(rows.split(chunk_rows), out.split(chunk_rows), strict=True):
            gated, lifted, _ = _forward_gate_and_up(part, layers, a_stack)
            hidden = gated_product(activation, gated, lifted)
            del gated, lifted
            p_down = _project_down(hidden, _stack(layers[2:], None, rows.dtype), layers[2:])
            _forward(hidden, p_down, layers[2], out_part)
        return _reshape_output(out, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (keep,) = ctx.kept
        x, *_ = keep.saved_tensors
        rows, upstream = _flatten(x), _flatten(gradient)
        layers = _unpack(ctx.layers, rows.dtype)
        d_rows = rows.new_empty(rows.shape) if ctx.needs_x else None
        totals: list[Tensor] = []
        for start in range(0, max(1, rows.shape[0]), ctx.chunk_rows):
            chunk = slice(start, start + ctx.chunk_rows)
            part = rows[chunk]
            gated, lifted, products = _forward_gate_and_up(part, layers, ctx.a_stack)
            d_part = None if d_rows is None else d_rows[chunk]
            d_as, d_bs = _backward_mlp(
                upstream[chunk], part, gated, lifted, products, None, layers, ctx.activation, ctx.a_stack, d_part
            )
            del gated, lifted
            sums = [*d_as, *d_bs]  # in float32 or wider
            totals = [total.add_(value) for total, value in zip(totals, sums, strict=True)] if totals else sums
        d_x = None if d_rows is None else d_rows.view(x.shape)
        none = (None,) * 6  # kept, needs_x, layers, activation, a_stack, chunk_rows
        return d_x, *none, *_matrix_gradients(ctx.layers, totals[:3], totals[3:])


def _unpack(layers: Sequence[LoraLinear], dtype: torch.dtype) -> tuple[LoraLinear, ...]:
    """Return the layers with dense weights in `dtype`, so that each is dequantized once for all chunks."""
    return tuple(replace(layer, base=FrozenLinear(layer.base.dense(dtype), bias=layer.base.bias)) for layer in layers)


def _forward_gate_and_up(
    rows: Tensor, layers: Sequence[LoraLinear], a_stack: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs of gate and up, (N, M) each, and their rank-r products, (N, R)."""
    gate, up, _ = layers
    products = _project_down(rows, _stack((gate, up), a_stack, rows.dtype), (gate, up))
    p_gate, p_up = _columns(products, (gate, up))
    return _forward(rows, p_gate, gate), _forward(rows, p_up, up), products


def _backward_mlp(
    upstream: Tensor,
    rows: Tensor,
    gated: Tensor,
    lifted: Tensor,
    products: Tensor,
    p_down: Tensor | None,
    layers: Sequence[LoraLinear],
    activation: str,
    a_stack: Tensor | None,
    d_rows: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of A and those of B of the three layers, in float32 or wider.

    Args:
        p_down: the rank-r product of down, (N, r), or None to compute it again.
        d_rows: the gradient of the rows, (N, D), is written here; None if it is not needed.
    """
    gate, up, down = layers
    d_p_down = _project(upstream, _cast(down.b, down.b_cast, upstream.dtype), down.scaling)
    # The down layer's input is computed again, and after its gradient: one pass then gives both, and those of gate and up.
    d_hidden = _backward_to_rows([upstream], d_p_down, (down,), None)
    hidden, d_gated, d_lifted = gated_product_backward(activation, d_hidden, gated, lifted)
    if p_down is None:
        p_down = _project_down(hidden, _stack((down,), None, hidden.dtype), (down,))
    d_b_down = _outer(upstream, p_down)
    d_a_down = _outer(d_p_down, hidden)
    del hidden
    d_products, d_bs = _backward_to_products([d_gated, d_lifted], products, (gate, up))
    d_as = _backward_to_a(d_products, rows, (gate, up))
    if d_rows is not None:
        _backward_to_rows([d_gated, d_lifted], d_products, (gate, up), a_stack, d_rows)
    return [*d_as, d_a_down], [*d_bs, d_b_down]


def _forward(rows: Tensor, product: Tensor, layer: LoraLinear, out: Tensor | None = None) -> Tensor:
    """Return a layer's output (N, out) from its rank-r product (N, r); it is written to ``out``, if that is given."""
    # The large product first, as PEFT's layers have it: both then round it to the same bits, and packs can be compared with
    # the unmodified model more closely.
    weight = layer.base.dense(rows.dtype).t()
    if layer.base.bias is None:
        out = torch.mm(rows, weight, out=out)
    else:
        out = torch.addmm(layer.base.bias.to(rows.dtype), rows, weight, out=out)
    return out.addmm_(product, _cast(layer.b, layer.b_cast, rows.dtype).t())


def _backward_to_products(
    upstreams: Sequence[Tensor], products: Tensor, layers: Sequence[LoraLinear]
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of x A^T of all layers, (N, R), and of each B, in float32 or wider."""
    d_products = torch.empty_like(products)
    d_bs = []
    parts = zip(upstreams, _columns(products, layers), _columns(d_products, layers), layers, strict=True)
    for upstream, product, d_product, layer in parts:
        d_bs.append(_outer(upstream, product))
        _project(upstream, _cast(layer.b, layer.b_cast, upstream.dtype), layer.scaling, d_product)
    return d_products, d_bs


def _backward_to_a(d_products: Tensor, rows: Tensor, layers: Sequence[LoraLinear]) -> list[Tensor]:
    """Return the gradient of each A, in float32 or wider, from those of x A^T, (N, R)."""
    return list(_outer(d_products, rows).split([layer.a.shape[0] for layer in layers]))


def _backward_to_rows(
    upstreams: Sequence[Tensor],
    d_products: Tensor,
    layers: Sequence[LoraLinear],
    a_stack: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the rows that all layers have read, (N, in); it is written to ``out``, if that is given."""
    stack = _stack(layers, a_stack, d_products.dtype)
    d_rows = torch.mm(d_products, stack, out=out)
    for upstream, layer in zip(upstreams, layers, strict=True):
        d_rows.addmm_(upstream, layer.base.dense(upstream.dtype))
    return d_rows


def _matrix_gradients(layers: Sequence[LoraLinear], d_as: Sequence[Tensor], d_bs: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of A and B of each layer, in the dtypes of A and B."""
    gradients = [gradient for pair in zip(d_as, d_bs, strict=True) for gradient in pair]
    return [g.to(matrix.dtype) for g, matrix in zip(gradients, _matrices(layers), strict=True)]


def _stack(layers: Sequence[LoraLinear], a_stack: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the A of all layers one below another, (R, in) in `dtype`: the caller's if they have this dtype."""
    if a_stack is not None and a_stack.dtype == dtype:
        return a_stack
    casts = [_cast(layer.a, layer.a_cast, dtype) for layer in layers]
    return casts[0] if len(casts) == 1 else torch.cat(casts)


def _columns(products: Tensor, layers: Sequence[LoraLinear]) -> tuple[Tensor, ...]:
    """Return each layer's part of the products (N, R): views (N, r)."""
    return (products,) if len(layers) == 1 else products.split([layer.a.shape[0] for layer in layers], 1)


def _project_down(rows: Tensor, stack: Tensor, layers: Sequence[LoraLinear]) -> Tensor:
    """Return scaling * x A^T of all layers, side by side: (N, R)."""
    products = rows.new_empty(rows.shape[0], stack.shape[0])
    if len({layer.scaling for layer in layers}) == 1:
        return _scaled_mm(rows, stack.t(), layers[0].scaling, products)
    for product, a, layer in zip(
        _columns(products, layers), stack.split([layer.a.shape[0] for layer in layers]), layers, strict=True
    ):
        _scaled_mm(rows, a.t(), layer.scaling, product)
    return products


def _cast(matrix: Tensor, cast: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the matrix in `dtype`: the caller's cast if it has this dtype."""
    return cast if cast is not None and cast.dtype == dtype else matrix.to(dtype)


def _scaled_mm(left: Tensor, right: Tensor, scaling: float, out: Tensor) -> Tensor:
    """Write scaling * (left @ right) to `out`. The GEMM itself multiplies, before it rounds."""
    return out.addmm_(left, right, beta=0, alpha=scaling)


def _project(rows: Tensor, matrix: Tensor, scaling: float, out: Tensor | None = None) -> Tensor:
    """Return scaling * (rows @ matrix), (N, m) times (m, r); it is written to ``out``, if that is given."""
    if matrix.device.type == "cpu" and matrix.shape[1] < _THIN_RANK:
        matrix = matrix.t().contiguous().t()  # same values, column-major: MKL is fast on it
    if out is None:
        out = rows.new_empty(rows.shape[0], matrix.shape[1])
    return _scaled_mm(rows, matrix, scaling, out)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Return left^T @ right in float32 or wider: it sums over all rows, and the master weights are float32."""
    if left.is_cuda and left.dtype not in (torch.float32, torch.float64):
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    # Only CUDA can sum half-precision products into a float32 matrix.
    left, right = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (left, right))
    rank = min(left.shape[1], right.shape[1])
    right_is_thin = right.shape[1] == rank
    if left.device.type == "cpu" and right_is_thin == (rank < _THIN_RANK):
        return torch.mm(right.t(), left).t()
    return torch.mm(left.t(), right)
