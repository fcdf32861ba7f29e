"""Frozen linear layers with LoRA that read one input: their products, and the gradients of these (LoRA: Hu et al. 2021,
arXiv 2106.09685; NF4: Dettmers et al. 2023, arXiv 2305.14314). `lora.py` and `lora_mlp.py` make autograd functions of them.

Products with A and B are bound by memory, so they are arranged to read and write less of it. Layers with one input share
one product with their A, stacked, and one for its gradient. In the backward the rank-r part of a sum is written first, and
the large products are added to it: their kernels read the sum while they compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saro_kernels import nf4

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
        scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
        a_cast: `a` in the input's dtype, if the caller has cast it already. The backward reads it too: nobody may write to it.
        b_cast: `b`, like `a_cast`.
    """

    base: FrozenLinear
    a: Tensor
    b: Tensor
    scaling: float
    a_cast: Tensor | None = None
    b_cast: Tensor | None = None

    def cast_gradients(self, d_a: Tensor, d_b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of A and B in the dtypes of A and B."""
        return d_a.to(self.a.dtype), d_b.to(self.b.dtype)


@dataclass(frozen=True, eq=False)
class LoraGroup:
    """Layers that read one input (N, in). R is the sum of their ranks.

    Attributes:
        layers: the layers.
        a_stack: (R, in), their A one below another in the input's dtype, if the caller has them so already; read instead of
            ``a_cast``.
    """

    layers: tuple[LoraLinear, ...]
    a_stack: Tensor | None = None

    def project(self, rows: Tensor) -> Tensor:
        """Return scaling * x A^T of all layers, side by side: (N, R)."""
        stack = self._stack(rows.dtype)
        products = rows.new_empty(rows.shape[0], stack.shape[0])
        if len({layer.scaling for layer in self.layers}) == 1:
            return _scaled_mm(rows, stack.t(), self.layers[0].scaling, products)
        parts = zip(self._columns(products), stack.split(self._ranks), self.layers, strict=True)
        for product, a, layer in parts:
            _scaled_mm(rows, a.t(), layer.scaling, product)
        return products

    def outputs(self, rows: Tensor, products: Tensor) -> tuple[Tensor, ...]:
        """Return the output (N, out) of each layer, from the products of ``project``."""
        parts = zip(self._columns(products), self.layers, strict=True)
        return tuple(compute_output(rows, product, layer) for product, layer in parts)

    def backward_to_products(self, upstreams: Sequence[Tensor]) -> Tensor:
        """Return the gradients of x A^T of all layers, (N, R), from those of the outputs, (N, out) each."""
        d_products = upstreams[0].new_empty(upstreams[0].shape[0], sum(self._ranks))
        for upstream, d_product, layer in zip(upstreams, self._columns(d_products), self.layers, strict=True):
            _project(upstream, _cast(layer.b, layer.b_cast, upstream.dtype), layer.scaling, d_product)
        return d_products

    def backward_to_b(self, upstreams: Sequence[Tensor], products: Tensor) -> list[Tensor]:
        """Return the gradient of each B, in float32 or wider."""
        return [_outer(*pair) for pair in zip(upstreams, self._columns(products), strict=True)]

    def backward_to_a(self, d_products: Tensor, rows: Tensor) -> list[Tensor]:
        """Return the gradient of each A, in float32 or wider, from those of x A^T, (N, R)."""
        return list(_outer(d_products, rows).split(self._ranks))

    def backward_to_rows(self, upstreams: Sequence[Tensor], d_products: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the gradient of the input, (N, in); it is written to ``out``, if that is given."""
        d_rows = torch.mm(d_products, self._stack(d_products.dtype), out=out)
        for upstream, layer in zip(upstreams, self.layers, strict=True):
            d_rows.addmm_(upstream, layer.base.dense(upstream.dtype))
        return d_rows

    @property
    def _ranks(self) -> list[int]:
        return [layer.a.shape[0] for layer in self.layers]

    def _columns(self, products: Tensor) -> tuple[Tensor, ...]:
        """Return each layer's part of the products (N, R): views (N, r)."""
        return (products,) if len(self.layers) == 1 else products.split(self._ranks, 1)

    def _stack(self, dtype: torch.dtype) -> Tensor:
        """Return the A of all layers one below another, (R, in) in `dtype`: the caller's if they have this dtype."""
        if self.a_stack is not None and self.a_stack.dtype == dtype:
            return self.a_stack
        casts = [_cast(layer.a, layer.a_cast, dtype) for layer in self.layers]
        return casts[0] if len(casts) == 1 else torch.cat(casts)


def compute_output(rows: Tensor, product: Tensor, layer: LoraLinear, out: Tensor | None = None) -> Tensor:
    """Return a layer's output (N, out) from its rank-r product (N, r); it is written to ``out``, if that is given."""
    # Compute the large product first, as PEFT's layers do: both then round it to the same bits, and packs can be compared
    # with the unmodified model more closely.
    weight = layer.base.dense(rows.dtype).t()
    if layer.base.bias is None:
        out = torch.mm(rows, weight, out=out)
    else:
        out = torch.addmm(layer.base.bias.to(rows.dtype), rows, weight, out=out)
    return out.addmm_(product, _cast(layer.b, layer.b_cast, rows.dtype).t())


def list_matrices(layers: Sequence[LoraLinear]) -> list[Tensor]:
    """Return A and B of each layer. A function takes them as arguments, so that autograd knows that it depends on them."""
    return [matrix for layer in layers for matrix in (layer.a, layer.b)]


def list_gradients(layers: Sequence[LoraLinear], d_as: Sequence[Tensor], d_bs: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of ``list_matrices``, in the dtypes of A and B."""
    parts = zip(layers, d_as, d_bs, strict=True)
    return [gradient for layer, d_a, d_b in parts for gradient in layer.cast_gradients(d_a, d_b)]


def flatten_rows(x: Tensor) -> Tensor:
    """Return (..., D) as rows (N, D)."""
    return x.reshape(-1, x.shape[-1])


def reshape_output(out: Tensor, x: Tensor) -> Tensor:
    """Return rows (N, out) in x's shape (..., out), by the operator with which ``F.linear`` ends.

    autograd lets nobody change a view in place that a Function returns, and some models clamp their queries in place.
    """
    return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[-1]))


def _cast(matrix: Tensor, cast: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the matrix in `dtype`: the caller's cast if its dtype fits, else a new one."""
    return cast if cast is not None and cast.dtype == dtype else matrix.to(dtype)


def _scaled_mm(left: Tensor, right: Tensor, scaling: float, out: Tensor) -> Tensor:
    """Write scaling * (left @ right) to `out`. The GEMM itself multiplies, before it rounds."""
    return out.addmm_(left, right, beta=0, alpha=scaling)


def _project(rows: Tensor, matrix: Tensor, scaling: float, out: Tensor) -> None:
    """Write scaling * (rows @ matrix), (N, m) times (m, r), to ``out``."""
    if matrix.device.type == "cpu" and matrix.shape[1] < _THIN_RANK:
        matrix = matrix.t().contiguous().t()  # the same values, column-major, for which MKL is fast
    _scaled_mm(rows, matrix, scaling, out)


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
