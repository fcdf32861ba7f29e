"""Token log-probs by row tiles: the (N, V) logits never exist at once, only one reused tile of a few hundred rows.

The softmax statistics and the gradient are computed while the tile is in memory, as in Liger's fused linear
cross-entropy (Hsu et al. 2024, arXiv 2410.10989). Cut cross-entropy (Wijmans et al. 2024, arXiv 2411.09009) goes further
and keeps the tile in on-chip memory. Unlike both, these functions return one log-prob per row and leave the loss to the
caller.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saro_kernels.float32_products import add_product, precise_products
from saro_kernels.tile_height import free_bytes, l2_bytes, tile_rows
from saro_kernels.tile_ops import find_tile_op
from saro_kernels.torch_tile import TorchTile, statistics_dtype


class _Head(NamedTuple):
    """Arguments of the passes below that are not tensors."""

    softcap: float | None
    scale: float
    rows: int
    tile_op: type[TorchTile]

    def tile(self, hidden: Tensor, weight: Tensor, *, gradient: bool) -> TorchTile:
        return self.tile_op(self.rows, hidden, len(weight), softcap=self.softcap, scale=self.scale, gradient=gradient)


def _make_head(
    hidden: Tensor, weight: Tensor, softcap: float | None, scale: float, rows: int | None, name: str
) -> _Head:
    if rows is None:
        device = hidden.device
        rows = tile_rows(len(hidden), *weight.shape, hidden.itemsize, l2_bytes(device), free_bytes(device))
    return _Head(softcap, scale, rows, find_tile_op(name))


def tiled_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    rows: int | None = None,
    tile_op: str = "torch",
) -> Tensor:
    """Compute `token_logps` in tiles of `rows` rows (default: `tile_rows`). It does not check its arguments."""
    head = _make_head(hidden, weight, softcap, scale, rows, tile_op)
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _TrainableHead.apply(hidden, weight, bias, targets, head)
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _FrozenHead.apply(hidden, weight, bias, targets, head)
    return _logps(hidden, weight, bias, targets, head)


@torch.no_grad()
def tiled_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    rows: int | None = None,
    tile_op: str = "torch",
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `token_statistics` in tiles. Arguments as in `tiled_token_logps`."""
    head = _make_head(hidden, weight, softcap, scale, rows, tile_op)
    logps, entropies = hidden.new_empty(2, len(hidden), dtype=statistics_dtype(hidden.dtype))
    top1 = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    tile = head.tile(hidden, weight, gradient=False)
    matrix = _prepare_for_gemm(weight, hidden.dtype)
    with precise_products(hidden.device, hidden.dtype):
        for part in _tiles(hidden, matrix, bias, tile, head.rows):
            logps[part], entropies[part], top1[part] = tile.statistics(targets[part])
    return logps, entropies, top1


class _FrozenHead(torch.autograd.Function):
    """Log-probs under a head that needs no gradient.

    The forward already knows d logps / d hidden: the upstream gradient only multiplies each row by a factor. So one pass
    does two GEMMs (4NDV operations) and keeps (N, D) numbers; recomputing the logits in the backward would take three.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, head):
        unit_gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        ctx.save_for_backward(unit_gradient)
        return _logps(hidden, weight, bias, targets, head, unit_gradient)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (unit_gradient,) = ctx.saved_tensors
        # With `out`, a bfloat16 gradient is multiplied by the float32 factor and rounded only once.
        out = torch.empty_like(unit_gradient)
        return torch.mul(unit_gradient, upstream[:, None], out=out), None, None, None, None


class _TrainableHead(torch.autograd.Function):
    """Log-probs under a head that needs gradients.

    d weight is a sum over rows, each weighted by its upstream gradient, so the backward recomputes the tiles.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, head):
        ctx.head = head
        ctx.save_for_backward(hidden, weight, bias, targets)
        return _logps(hidden, weight, bias, targets, head)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        hidden, weight, bias, targets = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # Sum over tiles in float32: a bfloat16 sum would lose the later tiles to rounding.
        dtype = statistics_dtype(hidden.dtype)
        d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None
        d_weight = (
            torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format) if needs_weight else None
        )
        d_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None

        matrix = _prepare_for_gemm(weight, hidden.dtype)
        tile = ctx.head.tile(hidden, weight, gradient=True)
        with precise_products(hidden.device, hidden.dtype):
            for part in _tiles(hidden, matrix, bias, tile, ctx.head.rows):
                tile.run(targets[part], upstream[part])
                gradient = tile.gradient[: len(hidden[part])]  # (n, V)
                if needs_hidden:
                    add_product(d_hidden[part], gradient, matrix, beta=0)
                if needs_weight:
                    add_product(d_weight, gradient.t(), hidden[part], beta=1)
                if needs_bias:
                    d_bias += gradient.sum(0, dtype=dtype)
        return (
            d_hidden,
            d_weight.to(weight.dtype) if needs_weight else None,
            d_bias.to(bias.dtype) if needs_bias else None,
            None,
            None,
        )


def _logps(hidden, weight, bias, targets, head, unit_gradient=None) -> Tensor:
    """Return log-probs (N,) from one pass over the tiles. If given, `unit_gradient` (N, D) takes d logps / d hidden."""
    logps = hidden.new_empty(len(hidden), dtype=statistics_dtype(hidden.dtype))
    matrix = _prepare_for_gemm(weight, hidden.dtype)
    tile = head.tile(hidden, weight, gradient=unit_gradient is not None)
    with precise_products(hidden.device, hidden.dtype):
        for part in _tiles(hidden, matrix, bias, tile, head.rows):
            logps[part] = tile.run(targets[part])
            if unit_gradient is not None:
                add_product(unit_gradient[part], tile.gradient[: len(hidden[part])], matrix, beta=0)
    return logps


def _prepare_for_gemm(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a weight to the dtype of the hidden states, with strides that a GEMM call takes without a copy."""
    weight = weight.to(dtype)
    return weight if 1 in weight.stride() else weight.contiguous()


def _tiles(hidden: Tensor, matrix: Tensor, bias: Tensor | None, tile: TorchTile, rows: int) -> Iterator[slice]:
    """Yield the slice of each tile's rows, with hidden @ matrix^T + bias of these rows in `tile.product`."""
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        product = tile.product[: len(hidden[part])]
        if bias is not None:
            product.copy_(bias)
        add_product(product, hidden[part], matrix.t(), beta=0 if bias is None else 1)
        yield part
