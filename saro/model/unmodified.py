"""The unmodified model: what transformers and PEFT compute without us. Packs are checked against it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from saro.model.attention import native_attention
from saro.model.fused_lora import FUSED_FORWARDS
from saro.model.liger import is_ligers, own_rotary, replaced_forward
from saro.model.policy import Policy


@contextmanager
def unmodified(policy: Policy) -> Iterator[None]:
    """Let transformers and PEFT compute everything: attention, LoRA, norms, rotary embedding and MLPs.

    Never run the backward of an earlier forward in this context; see ``native_attention``.
    """
    with native_attention(policy.causal_lm), own_layers(policy.causal_lm):
        yield


@contextmanager
def own_layers(lm: PreTrainedModel) -> Iterator[None]:
    """Restore the forward of each layer's class, where this project or liger-kernel has replaced it.

    Attention stays as it is.
    """
    with own_rotary(lm):
        forwards = {module: module.__dict__.pop("forward") for module in lm.modules() if _is_replaced(module)}
        try:
            yield
        finally:
            for module, forward in forwards.items():
                module.forward = forward


def _is_replaced(module: nn.Module) -> bool:
    return replaced_forward(module) in FUSED_FORWARDS or is_ligers(module)
