"""Attention whose scores are capped (Gemma 2, arXiv 2408.00118, section 2), which neither torch's SDPA nor its varlen
attention has: ``scores = softcap * tanh(scale * q k^T / softcap)``.

Queries go by blocks, and the backward computes each block's scores again from the rows' logsumexp, as FlashAttention does
(Dao 2023, arXiv 2307.08691): of queries x keys nothing outlives a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    """As ``F.scaled_dot_product_attention``, with the scores capped. Once differentiable.

    Args:
        query: (1, H, Q, D); key and value: (1, G, K, D), H a multiple of G. Scores and probabilities are computed in
            float32, or float64 for float64.
        softcap: bound of the scores, positive.
        attn_mask: (Q, K) bool, True where attended: the last query stands at the last key, and none attends to what is
            behind it. None with ``is_causal``, for all that is not.

    Returns:
        (1, H, Q, D).

    Raises:
        ValueError: without a mask, and not causal.
    """
    if is_causal != (attn_mask is None):
        raise ValueError("softcapped attention is causal: it takes a mask, or is_causal")
    # (1, H, Q, D) -> (G, H/G, Q, D): the heads of a group read the same keys.
    grouped = query[0].unflatten(0, (key.shape[1], -1))
    return _SoftcapAttention.apply(grouped, key[0], value[0], attn_mask, softcap, scale).flatten(0, 1)[None]


class _SoftcapAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, softcap, scale):
        output = torch.empty_like(query)
        logsumexp = query.new_empty(query.shape[:3], dtype=_wide(query))
        for rows, keys, hidden in _blocks(query, key, mask):
            scores = (
                _tanh(query[:, :, rows], key[:, keys], scale / softcap).mul_(softcap).masked_fill_(hidden, -torch.inf)
            )
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
        # Blocks are summed in float32: in bfloat16 the later ones would be rounded away.
        d_key, d_value = (torch.zeros_like(x, dtype=_wide(x)) for x in (key, value))
        for rows, keys, hidden in _blocks(query, key, mask):
            q, d_output = query[:, :, rows], upstream[:, :, rows]
            tanh = _tanh(q, key[:, keys], ctx.scale / ctx.softcap)
            probabilities = (tanh * ctx.softcap).masked_fill_(hidden, -torch.inf)
            probabilities.sub_(logsumexp[:, :, rows, None]).exp_()
            d_value[:, keys] += _product_of_queries(probabilities.to(value.dtype), d_output)
            of_row = (d_output.to(_wide(query)) * output[:, :, rows]).sum(-1, keepdim=True)
            d_scores = _product(d_output, value[:, keys].mT).to(_wide(query)).sub_(of_row).mul_(probabilities)
            d_scores.mul_(tanh.square_().neg_().add_(1)).mul_(ctx.scale)
            d_scores = d_scores.to(query.dtype)
            d_query[:, :, rows] = _product(d_scores, key[:, keys])
            d_key[:, keys] += _product_of_queries(d_scores, q)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _block(device: torch.device) -> int:
    """Scores of a block, over all heads: 16 MiB in float32 on a CPU, for its caches, 256 MiB elsewhere, for few launches."""
    return 2**22 if device.type == "cpu" else 2**26


def _blocks(query: Tensor, key: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Of each block its queries, the keys up to its last query, and (queries, keys) where those are not attended."""
    (groups, heads, queries, _), total = query.shape, key.shape[1]
    height = max(1, _block(query.device) // (groups * heads * total))
    for start in range(0, queries, height):
        stop = min(start + height, queries)
        keys = total - queries + stop
        if mask is None:
            hidden = torch.ones(stop - start, keys, dtype=torch.bool, device=query.device).triu(
                keys - (stop - start) + 1
            )
        else:
            hidden = ~mask[start:stop, :keys]
        yield slice(start, stop), slice(keys), hidden


def _tanh(query: Tensor, key: Tensor, factor: float) -> Tensor:
    """(G, R, B, K) tanh of the products of queries and keys times ``factor``."""
    return _product(query, key.mT).to(_wide(query)).mul_(factor).tanh_()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """(G, R, B, n) times (G, n, m), one product for all R heads of a group."""
    return (left.flatten(1, 2) @ right).unflatten(1, left.shape[1:3])


def _product_of_queries(left: Tensor, right: Tensor) -> Tensor:
    """(G, R, B, K) and (G, R, B, D) -> (G, K, D), summed over the queries of all R heads."""
    return left.flatten(1, 2).mT @ right.flatten(1, 2)
