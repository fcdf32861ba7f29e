"""Compute PEFT's LoRA layers with ``saro_kernels``. PEFT owns parameters, saving and loading; we replace the forward.

We replace it only where the result is exact: one active adapter of plain LoRA, without dropout, on a dense or 4-bit
linear layer. Every call checks this again, so that PEFT's own forward computes merged and disabled adapters.
"""

from __future__ import annotations

from types import MethodType

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.activations import GELUTanh, SiLUActivation

from saro.model.architectures import GATED_MLPS
from saro_kernels import FrozenLinear, LoraLinear, lora_gated_mlp, lora_linear

_ACTIVATIONS: dict[type, str] = {nn.SiLU: "silu", SiLUActivation: "silu", GELUTanh: "gelu_tanh"}
# A call without gradient on fewer tokens than this is a generation step. PEFT's forward computes it, because
# bitsandbytes has kernels for few tokens.
_FEW_ROWS = 8


def fuse_lora(model: PeftModel) -> int:
    """Let ``saro_kernels`` compute a model's LoRA layers, and its gated MLPs in one piece if they have no dropout.

    Layers that are not plain LoRA keep PEFT's forward. Returns the number of layers that are fused.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and _can_fuse(layer)]
    for layer in layers:
        layer.forward = MethodType(_linear_forward, layer)
    fused = {id(layer) for layer in layers}
    for module in model.modules():
        if type(module).__name__ in GATED_MLPS and type(module.act_fn) in _ACTIVATIONS:
            parts = (module.gate_proj, module.up_proj, module.down_proj)
            # With dropout, no training step could use the fused MLP, and liger-kernel's may be in its place already.
            if all(id(part) in fused and not _has_dropout(part) for part in parts):
                module.forward = MethodType(_mlp_forward, module)
    return len(layers)


def _can_fuse(layer: LoraLayer) -> bool:
    """Return True for plain LoRA, without a bias of its own, on a dense or 4-bit linear layer."""
    base = layer.get_base_layer()
    plain = isinstance(layer, nn.Module) and not layer.lora_variant and not getattr(layer, "fan_in_fan_out", False)
    biased = any(getattr(matrix, "bias", None) is not None for matrix in layer.lora_B.values())
    return plain and not biased and type(base) in (nn.Linear, bnb.nn.Linear4bit)


def _has_dropout(layer: LoraLayer) -> bool:
    return any(not isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())


def _can_run_fused(layer: LoraLayer, x: torch.Tensor) -> bool:
    """Return True if our forward is exact for this call: one plain adapter is active. False for a generation step."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    if not torch.is_grad_enabled() and x.numel() < _FEW_ROWS * x.shape[-1]:
        return False
    (name,) = layer.active_adapters
    if name not in layer.lora_A:
        return False
    dropout = layer.lora_dropout[name]
    return isinstance(dropout, nn.Identity) or not (layer.training and dropout.p > 0)


def _parts(layer: LoraLayer) -> LoraLinear:
    """Return a layer's weights and its active adapter as ``saro_kernels`` takes them."""
    base = layer.get_base_layer()
    (name,) = layer.active_adapters
    frozen = FrozenLinear(base.weight, getattr(base.weight, "quant_state", None), base.bias)
    return LoraLinear(frozen, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


def _linear_forward(self: LoraLayer, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    if args or kwargs or not _can_run_fused(self, x):
        return type(self).forward(self, x, *args, **kwargs)
    return lora_linear(x, _parts(self))


def _mlp_forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    layers = (self.gate_proj, self.up_proj, self.down_proj)
    if not all(_can_run_fused(layer, x) for layer in layers):
        return type(self).forward(self, x)
    return lora_gated_mlp(x, *map(_parts, layers), _ACTIVATIONS[type(self.act_fn)])


# The forwards that ``fuse_lora`` binds to modules.
FUSED_FORWARDS = (_linear_forward, _mlp_forward)
