"""Helpers to test attention: its definition, and a fixed loss for comparing gradients."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor


def definition(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """Return attention (1, H, Q, D) as transformers' eager attention computes it: the softmax in float32 or wider."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    scores = query @ key.mT * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype) @ value


def output_and_gradients(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the detached output, and the inputs' gradients of a weighted sum of it with a different weight per entry."""
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return [output.detach(), *torch.autograd.grad((output * upstream).sum(), inputs)]


def dense(query, key, value, mask, scale, softcap=None):
    """(1, T, H, D), as transformers' attention functions lay their output out."""
    return definition(query, key, value, mask, scale, softcap).transpose(1, 2)


class VarlenOnCPU:
    """Stand-in for ``varlen_attn`` of torch 2.13: its parameters and meaning, as loops, for any device and dtype."""

    def __init__(self):
        self.calls = []

    def __call__(
        self,
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
        seqused_k=None,
        block_table=None,
        num_splits=None,
    ):
        assert return_aux is seqused_k is block_table is num_splits is None
        assert enable_gqa == (query.shape[1] != key.shape[1])
        return self.attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    def attend(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
        assert query.dtype == key.dtype == value.dtype
        assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256
        assert query.shape[-1] % 8 == 0
        self.calls.append(SimpleNamespace(q=cu_seq_q, k=cu_seq_k, max_q=max_q, max_k=max_k, window=window_size))
        outputs = []
        for i in range(len(cu_seq_q) - 1):
            q = query[cu_seq_q[i] : cu_seq_q[i + 1]]
            k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]] for x in (key, value))
            # The last query stands at the last key; `left` and `right` count the keys on either side of that.
            at = torch.arange(len(q))[:, None] + len(k) - len(q)
            other = torch.arange(len(k))
            left, right = window_size
            mask = torch.ones(len(q), len(k), dtype=torch.bool)
            mask &= (other >= at - left) if left >= 0 else True
            mask &= (other <= at + right) if right >= 0 else True
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            with torch.autocast("cpu", enabled=False):  # which has no rule for the real one
                outputs.append(dense(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)[0])
        return torch.cat(outputs)


class VarlenOnCPUOf211(VarlenOnCPU):
    """Stand-in for ``varlen_attn`` of torch 2.11, which takes fewer key heads than query heads without being told."""

    def __call__(
        self,
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
    ):
        assert return_aux is None
        return self.attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)
