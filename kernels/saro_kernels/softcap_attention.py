"""Attention with capped scores (Gemma 2, arXiv 2408.00118, section 2): ``softcap * tanh(scale * q k^T / softcap)``.

Neither torch's SDPA nor its varlen attention supports a softcap. Queries are processed in blocks, and the backward
recomputes each block's scores from the rows' logsumexp, as FlashAttention does (Dao 2023, arXiv 2307.08691). So no
tensor of size queries x keys outlives a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saro_kernels.torch_tile import statistics_dtype


def softcap_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softcap: float,
    scale: float,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Compute ``F.scaled_dot_product_attention`` with capped scores. It is causal, and once differentiable.

    Scores and probabilities are computed in float32, or in float64 for float64 inputs.

    Args:
        query: (1, H, Q, D).
        key: (1, G, K, D), H a multiple of G.
        value: (1, G, K, D).
        softcap: bound of the scores, positive.
        scale: factor of the scores before the softcap.
        attn_mask: (Q, K) bool, True where a query attends to a key. The last query is at the position of the last key,
            and no query may attend to a later key. None exactly if ``is_causal``.
        is_causal: True if each query attends to all keys up to its own position.

    Returns:
        (1, H, Q, D).

    Raises:
        ValueError: both or neither of ``attn_mask`` and ``is_causal`` are given.
    """
    if is_causal != (attn_mask is None):
        raise ValueError("softcap_attention: needs either attn_mask or is_causal; pass exactly one of them")
    # (1, H, Q, D) -> (G, H/G, Q, D): the heads of a group read the same keys.
    grouped = query[0].unflatten(0, (key.shape[1], -1))
    return _SoftcapAttention.apply(grouped, key[0], value[0], attn_mask, softcap, scale).flatten(0, 1)[None]


class _SoftcapAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, softcap, scale):
        output = torch.empty_like(query)
        logsumexp = query.new_empty(query.shape[:3], dtype=statistics_dtype(query.dtype))
        for rows, keys, masked in _blocks(query, key, mask):
            tanh = _tanh(query[:, :, rows], key[:, keys], scale / softcap)
            scores = tanh.mul_(softcap).masked_fill_(masked, -torch.inf)  # (G, H/G, rows, keys)
            logsumexp[:, :, rows] = scores.logsumexp(-1)
            probabilities = scores.sub_(logsumexp[:, :, rows, None]).exp_()
            output[:, :, rows] = _product(probabilities.to(value.dtype), value[:, keys])
        ctx.save_for_backward(query, key, value, mask, output, logsumexp)
        ctx.softcap, ctx.scale = softcap, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        query, key, value, mask, output, logsumexp = ctx.saved_tensors
        d_query = torch.empty_like(query)
        dtype = statistics_dtype(query.dtype)
        # Sum over blocks in float32: a bfloat16 sum would lose the later blocks to rounding.
        d_key, d_value = (torch.zeros_like(x, dtype=dtype) for x in (key, value))
        for rows, keys, masked in _blocks(query, key, mask):
            q, d_output = query[:, :, rows], upstream[:, :, rows]
            tanh = _tanh(q, key[:, keys], ctx.scale / ctx.softcap)
            probabilities = (tanh * ctx.softcap).masked_fill_(masked, -torch.inf)  # (G, H/G, rows, keys)
            probabilities.sub_(logsumexp[:, :, rows, None]).exp_()
            d_value[:, keys] += _sum_over_queries(probabilities.to(value.dtype), d_output)
            row_dot = (d_output.to(dtype) * output[:, :, rows]).sum(-1, keepdim=True)  # (G, H/G, rows, 1)
            d_scores = _product(d_output, value[:, keys].mT).to(dtype).sub_(row_dot).mul_(probabilities)
            d_scores.mul_(tanh.square_().neg_().add_(1)).mul_(ctx.scale)
            d_scores = d_scores.to(query.dtype)
            d_query[:, :, rows] = _product(d_scores, key[:, keys])
            d_key[:, keys] += _sum_over_queries(d_scores, q)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


def _scores_per_block(device: torch.device) -> int:
    """Return how many scores, over all heads, a block holds.

    In float32, 16 MiB on a CPU, to stay in its caches, and 256 MiB elsewhere, to launch few kernels.
    """
    return 2**22 if device.type == "cpu" else 2**26


def _blocks(query: Tensor, key: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield, for each block, its queries, the keys up to its last query, and a bool mask (queries, keys).

    The mask is True where a query does not attend to a key.
    """
    groups, heads, num_queries, _ = query.shape
    num_keys = key.shape[1]
    height = max(1, _scores_per_block(query.device) // (groups * heads * num_keys))
    for start in range(0, num_queries, height):
        stop = min(start + height, num_queries)
        rows, keys = stop - start, num_keys - num_queries + stop
        if mask is None:
            masked = torch.ones(rows, keys, dtype=torch.bool, device=query.device).triu(keys - rows + 1)
        else:
            masked = ~mask[start:stop, :keys]
        yield slice(start, stop), slice(keys), masked


def _tanh(query: Tensor, key: Tensor, factor: float) -> Tensor:
    """Return tanh(factor * query @ key^T), (G, R, B, K), for queries (G, R, B, D) and keys (G, K, D)."""
    return _product(query, key.mT).to(statistics_dtype(query.dtype)).mul_(factor).tanh_()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, (G, R, B, n) times (G, n, m), with one GEMM for all R heads of a group."""
    return (left.flatten(1, 2) @ right).unflatten(1, left.shape[1:3])


def _sum_over_queries(left: Tensor, right: Tensor) -> Tensor:
    """Return left^T @ right, (G, K, D) from (G, R, B, K) and (G, R, B, D), summed over the queries of all R heads."""
    return left.flatten(1, 2).mT @ right.flatten(1, 2)
