"""Helpers to test attention: its definition, and a fixed loss for comparing gradients."""

from __future__ import annotations

from collections.abc import Sequence

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
