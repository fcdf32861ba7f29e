"""A policy -> a plain model: the adapter merged into its base, 4-bit layers dequantized, one dtype."""

from __future__ import annotations

from copy import deepcopy

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from saro.errors import SaroError
from saro.model.policy import Policy
from saro.program import progress_bar


@torch.no_grad()
def merge(policy: Policy, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The policy's model as a plain one, on the CPU, its weights in ``dtype``. The policy is used up.

    Layer by layer: the weight that was trained on (dequantized where it is 4-bit) plus the adapter's product, in fp32,
    rounded once. PEFT's own merge would quantize the sum again.

    Args:
        config: of the base model, as it was before it was quantized.

    Raises:
        SaroError: an adapter is of a kind that is more than a sum of two weights, such as DoRA.
    """
    lm = policy.causal_lm
    # Names alone: a list of modules would keep every layer until the end.
    names = [name for name, layer in lm.named_modules() if _is_special(name, layer)]
    for name in progress_bar(names, "merging", "layers"):
        lm.set_submodule(name, _plain_layer(lm.get_submodule(name), name, dtype))
    # Tied weights are one parameter here, and stay one.
    for parameter in lm.parameters():
        parameter.data = parameter.data.to("cpu", dtype)
    for buffer in lm.buffers():
        buffer.data = buffer.data.cpu()
    lm.config = deepcopy(config)
    lm.hf_quantizer = None
    return lm


def _is_special(name: str, layer: nn.Module) -> bool:
    return isinstance(layer, LoraLayer) or (isinstance(layer, Linear4bit) and not name.endswith(".base_layer"))


def _plain_layer(layer: nn.Module, name: str, dtype: torch.dtype) -> nn.Module:
    """A linear layer without adapter and quantization, on the CPU."""
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    quantized = isinstance(base, Linear4bit)
    weight = dequantize_4bit(base.weight.data, base.weight.quant_state) if quantized else base.weight.data
    weight = weight.float()
    for adapter in layer.active_adapters if isinstance(layer, LoraLayer) else ():
        if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
            raise SaroError(f"{name}: the adapter is no plain LoRA (DoRA, or a bias of its own); merge it with peft")
        weight = weight + layer.get_delta_weight(adapter).float()
    plain = base
    if quantized:
        plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        plain.bias = base.bias
    plain.weight = nn.Parameter(weight.to("cpu", dtype), requires_grad=False)
    return plain
