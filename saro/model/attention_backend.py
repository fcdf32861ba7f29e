"""Choose the backend of packed attention for a model and a device.

``sdpa`` makes one call per segment, on any device. ``varlen`` makes one call to ``torch.nn.attention.varlen.varlen_attn`` per
pack, on CUDA.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from saro.model.architectures import attention_softcap, has_attention_dropout, has_sinks, head_sizes

BACKENDS = ("sdpa", "varlen")
# "auto" on CUDA: the faster of the two for each pack. For one sequence of 8,192 tokens, SDPA is 1.8 times as fast on an
# H100; for many sequences, and for trees, varlen is 2 to 5 times as fast (benchmarks/README.md).
EITHER = "varlen/sdpa"


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, config: PretrainedConfig) -> str:
    """Resolve "auto" for a model: ``EITHER`` if varlen can run here, else sdpa.

    Raises:
        ValueError: the backend that was asked for cannot run here.
    """
    reason = _why_not_varlen(device, dtype, config)
    if name == "auto":
        return EITHER if reason is None else "sdpa"
    if name == "varlen" and reason is not None:
        raise ValueError(f"varlen attention {reason}; set --model.attention sdpa")
    return name


def _why_not_varlen(device: torch.device, dtype: torch.dtype, config: PretrainedConfig) -> str | None:
    """Return the reason why varlen attention cannot run, or None if it can.

    varlen attention supports the head sizes of FlashAttention 2. As torch builds it, it has no backward for heads of
    more than 192 and at most 224 on the cards of compute capability 8.6, 8.9 and 12.0.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "needs CUDA and bfloat16"
    if attention_softcap(config) is not None:
        return "has no softcap, which the model needs"
    if has_sinks(config):
        return "has no sinks, which the model needs"
    if has_attention_dropout(config):
        return "has no dropout, which --model.dropout true keeps"
    sizes = head_sizes(config)
    largest = max(sizes)
    if len(sizes) > 1 or largest > 256 or largest % 8 or 192 < largest <= 224:
        return f"does not support heads of size {' and '.join(map(str, sorted(sizes)))}, which the model needs"
    return None
