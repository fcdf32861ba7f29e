"""LoRA on a frozen linear layer as one autograd function (LoRA: Hu et al. 2021, arXiv 2106.09685; NF4: Dettmers et al.
2023, arXiv 2305.14314).

`lora_linear` keeps only its input and the rank-r product for the backward. `lora_gated_mlp` does the same for a gated
MLP (gate, up, activation, down): it keeps neither the activation nor the input of the down layer.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    return _LoraLinear.apply(x, layer.a, layer.b, layer)


def lora_gated_mlp(x: Tensor, gate: LoraLinear, up: LoraLinear, down: LoraLinear, activation: str) -> Tensor:
    """Return ``down(activation(gate(x)) * up(x))``, each layer as in ``lora_linear``; the backward recomputes the activation.

    It keeps x, the outputs of gate and up, and three rank-r products. Separate layers also keep the activation and its
    product with up: four tensors of the intermediate size where this keeps two.

    Args:
        x: (..., D).
        activation: one of ``gated_activation.ACTIVATIONS``.

    Returns:
        (..., D) in x's dtype.
    """
    layers = (gate, up, down)
    return _LoraGatedMlp.apply(x, *(matrix for layer in layers for matrix in (layer.a, layer.b)), layers, activation)


def _reshape_output(out: Tensor, x: Tensor) -> Tensor:
    """Return rows (N, out) in x's shape (..., out), as the operator that ``F.linear`` ends with.

    autograd lets nobody change a view in place that a Function returns, and some models clamp their queries in place.
    """
    return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[-1]))


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, b, layer):
        ctx.layer = layer
        rows = x.reshape(-1, x.shape[-1])
        out, product = _forward(rows, a, b, layer)
        ctx.save_for_backward(rows, product, a, b)
        return _reshape_output(out, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rows, product, a, b = ctx.saved_tensors
        upstream = gradient.reshape(-1, gradient.shape[-1])
        d_rows, d_a, d_b = _backward(upstream, rows, product, a, b, ctx.layer, ctx.needs_input_grad[0])
        if d_rows is not None:
            d_rows = d_rows.view(*gradient.shape[:-1], rows.shape[-1])
        return d_rows, d_a, d_b, None


class _LoraGatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a_gate, b_gate, a_up, b_up, a_down, b_down, layers, activation):
        gate, up, down = layers
        ctx.layers, ctx.activation = layers, activation
        rows = x.reshape(-1, x.shape[-1])
        gated, p_gate = _forward(rows, a_gate, b_gate, gate)
        lifted, p_up = _forward(rows, a_up, b_up, up)
        out, p_down = _forward(gated_product(activation, gated, lifted), a_down, b_down, down)
        ctx.save_for_backward(rows, gated, lifted, p_gate, p_up, p_down, a_gate, b_gate, a_up, b_up, a_down, b_down)
        return _reshape_output(out, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rows, gated, lifted, p_gate, p_up, p_down, a_gate, b_gate, a_up, b_up, a_down, b_down = ctx.saved_tensors
        gate, up, down = ctx.layers
        needs_x = ctx.needs_input_grad[0]
        upstream = gradient.reshape(-1, gradient.shape[-1])
        # The down layer's input is computed again, and after its gradient: one pass then gives both, and those of gate and up.
        d_product, d_b_down = _backward_to_product(upstream, p_down, b_down, down)
        d_hidden = _backward_to_rows(upstream, d_product, a_down, down)
        hidden, d_gated, d_lifted = gated_product_backward(ctx.activation, d_hidden, gated, lifted)
        d_a_down = _outer(d_product, hidden).to(a_down.dtype)
        del hidden
        d_rows, d_a_gate, d_b_gate = _backward(d_gated, rows, p_gate, a_gate, b_gate, gate, needs_x)
        d_x, d_a_up, d_b_up = _backward(d_lifted, rows, p_up, a_up, b_up, up, needs_x, into=d_rows)
        d_x = d_x.view(*gradient.shape[:-1], rows.shape[-1]) if needs_x else None
        return d_x, d_a_gate, d_b_gate, d_a_up, d_b_up, d_a_down, d_b_down, None, None


def _forward(rows: Tensor, a: Tensor, b: Tensor, layer: LoraLinear) -> tuple[Tensor, Tensor]:
    """Return the layer's output (N, out) and the rank-r product scaling x A^T, (N, r)."""
    weight = layer.base.dense(rows.dtype)
    if layer.base.bias is None:
        out = torch.mm(rows, weight.t())
    else:
        out = torch.addmm(layer.base.bias.to(rows.dtype), rows, weight.t())
    product = _scaled_mm(rows, _cast(a, layer.a_cast, rows.dtype).t(), layer.scaling)
    return out.addmm_(product, _cast(b, layer.b_cast, rows.dtype).t()), product


def _backward(
    upstream: Tensor,
    rows: Tensor,
    product: Tensor,
    a: Tensor,
    b: Tensor,
    layer: LoraLinear,
    needs_rows: bool,
    into: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of the rows, (N, in) or None, of ``a`` and of ``b``.

    ``into``: (N, in); if given, the gradient of the rows is added to it in place.
    """
    d_product, d_b = _backward_to_product(upstream, product, b, layer)
    d_a = _outer(d_product, rows).to(a.dtype)
    d_rows = _backward_to_rows(upstream, d_product, a, layer, into) if needs_rows else None
    return d_rows, d_a, d_b


def _backward_to_product(upstream: Tensor, product: Tensor, b: Tensor, layer: LoraLinear) -> tuple[Tensor, Tensor]:
    """Return the gradients of x A^T, (N, r), and of ``b``."""
    d_b = _outer(upstream, product).to(b.dtype)
    return _project(upstream, _cast(b, layer.b_cast, upstream.dtype), layer.scaling), d_b


def _backward_to_rows(
    upstream: Tensor, d_product: Tensor, a: Tensor, layer: LoraLinear, into: Tensor | None = None
) -> Tensor:
    """Return the gradient of the rows, (N, in); it is added to ``into`` in place, if that is given."""
    weight = layer.base.dense(upstream.dtype)
    d_rows = torch.mm(upstream, weight) if into is None else into.addmm_(upstream, weight)
    return d_rows.addmm_(d_product, _cast(a, layer.a_cast, upstream.dtype))


def _cast(matrix: Tensor, cast: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the matrix in `dtype`: the caller's cast if it has this dtype."""
    return cast if cast is not None and cast.dtype == dtype else matrix.to(dtype)


def _scaled_mm(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """Return scaling * (left @ right). The GEMM itself multiplies, before it rounds."""
    out = left.new_empty(len(left), right.shape[1])
    return out.addmm_(left, right, beta=0, alpha=scaling)


def _project(rows: Tensor, matrix: Tensor, scaling: float) -> Tensor:
    """Return scaling * (rows @ matrix), (N, m) times (m, r)."""
    if matrix.device.type == "cpu" and matrix.shape[1] < _THIN_RANK:
        matrix = matrix.t().contiguous().t()  # same values, column-major: MKL is fast on it
    return _scaled_mm(rows, matrix, scaling)


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
