"""Token log-probs by row tiles: the (N, V) logits never exist at once, only one reused tile of a few hundred rows.

The softmax statistics and the gradient are computed while the tile is in memory, as in Liger's fused linear
cross-entropy (Hsu et al. 2024, arXiv 2410.10989). Cut cross-entropy (Wijmans et al. 2024, arXiv 2411.09009) goes further
and keeps the tile in on-chip memory. Unlike both, these functions return one log-prob per row and leave the loss to the
caller.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saro_kernels.tile_height import l2_bytes, tile_rows
from saro_kernels.tile_ops import TorchTile, find_tile_op, statistics_dtype


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
    tile_op = find_tile_op(name)
    if rows is None:
        rows = tile_rows(len(hidden), *weight.shape, tile_op.logit_bytes(hidden.dtype), l2_bytes(hidden.device))
    return _Head(softcap, scale, rows, tile_op)


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
    matrix, offset = _prepare_for_gemm(weight, hidden.dtype), _prepare_for_gemm(bias, hidden.dtype)
    with _float32_sums(hidden.device):
        for part, _ in _tiles(hidden, matrix, offset, tile, head.rows):
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

        matrix, offset = _prepare_for_gemm(weight, hidden.dtype), _prepare_for_gemm(bias, hidden.dtype)
        tile = ctx.head.tile(hidden, weight, gradient=True)
        with _float32_sums(hidden.device):
            for part, product in _tiles(hidden, matrix, offset, tile, ctx.head.rows):
                tile.run(targets[part], upstream[part])
                if needs_hidden:
                    torch.mm(product, matrix, out=d_hidden[part])
                if needs_weight:
                    _add_outer(d_weight, tile, hidden[part])
                if needs_bias:
                    d_bias += tile.work[: len(product)].sum(0, dtype=dtype)
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
    matrix, offset = _prepare_for_gemm(weight, hidden.dtype), _prepare_for_gemm(bias, hidden.dtype)
    tile = head.tile(hidden, weight, gradient=unit_gradient is not None)
    with _float32_sums(hidden.device):
        for part, product in _tiles(hidden, matrix, offset, tile, head.rows):
            logps[part] = tile.run(targets[part])
            if unit_gradient is not None:
                torch.mm(product, matrix, out=unit_gradient[part])
    return logps


def _prepare_for_gemm(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Cast a parameter to the GEMM's dtype, with strides that a GEMM call takes without a copy."""
    if parameter is None:
        return None
    parameter = parameter.to(dtype)
    return parameter if 1 in parameter.stride() else parameter.contiguous()


def _tiles(
    hidden: Tensor, matrix: Tensor, offset: Tensor | None, tile: TorchTile, rows: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield, for each tile, its rows of `hidden` and the part of `tile.product` filled with hidden @ matrix^T + offset."""
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        product = tile.product[: len(hidden[part])]
        if offset is None:
            torch.mm(hidden[part], matrix.t(), out=product)
        else:
            torch.addmm(offset, hidden[part], matrix.t(), out=product)
        yield part, product


def _add_outer(d_weight: Tensor, tile: TorchTile, hidden: Tensor) -> None:
    """Add (gradient of the products)^T @ hidden to d_weight, (V, D), summing in d_weight's dtype."""
    product = tile.product[: len(hidden)].t()
    if d_weight.dtype == hidden.dtype:
        d_weight.addmm_(product, hidden)
    elif hidden.device.type in ("cuda", "xpu"):
        torch.addmm(d_weight, product, hidden, out_dtype=d_weight.dtype, out=d_weight)
    else:
        # Only accelerators can sum bfloat16 products into a float32 matrix. Here a bfloat16 product would be rounded for
        # each tile and would need another (V, D) buffer.
        d_weight.addmm_(tile.work[: len(hidden)].t().to(d_weight.dtype), hidden.to(d_weight.dtype))


@contextmanager
def _float32_sums(device: torch.device) -> Iterator[None]:
    """Make cuBLAS accumulate bfloat16 and float16 products in float32, whatever the program has set.

    The sums of d hidden run over the full vocabulary. cuBLAS splits them and by default rounds the parts before adding.
    """
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: (getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in names}
    accumulation = matmul.allow_fp16_accumulation
    for name, (_, split) in before.items():
        setattr(matmul, name, (False, split))
    matmul.allow_fp16_accumulation = False
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
        matmul.allow_fp16_accumulation = accumulation
