"""Turn a policy into a plain model: merge the adapter into its base, dequantize 4-bit layers, use one dtype."""

from __future__ import annotations

from copy import deepcopy

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize
from transformers.integrations.mxfp4 import Mxfp4Dequantize

from saro.errors import SaroError
from saro.model.policy import Policy
from saro.program import progress_bar


@torch.no_grad()
def merge(policy: Policy, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the policy's model as a plain one on the CPU, with its weights in ``dtype``.

    This modifies the policy in place; do not use it afterwards.

    Each layer's new weight is the weight that was trained on (dequantized if it is 4-bit) plus the adapter's product,
    summed in fp32 and rounded once. PEFT's own merge would quantize the sum again.

    Args:
        config: the base model's config. The result has none of its quantization.

    Raises:
        SaroError: an adapter is not a plain sum of two weights; DoRA, for example, is not.
    """
    lm = policy.causal_lm
    # Keep names only: a list of modules would hold every old layer in memory until the end.
    names = [name for name, layer in lm.named_modules() if _is_special(name, layer)]
    for name in progress_bar(names, "merging", "layers"):
        lm.set_submodule(name, _plain_layer(lm.get_submodule(name), name, dtype))
    # Assign to .data, so that tied weights stay one parameter.
    for parameter in lm.parameters():
        parameter.data = parameter.data.to("cpu", dtype)
    for buffer in lm.buffers():
        buffer.data = buffer.data.cpu()
    lm.config = deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del lm.config.quantization_config
        # transformers would apply these conversions in reverse as it saves the model, and write names of quantized weights.
        lm._weight_conversions = [c for c in lm._weight_conversions if not _reads_4_bits(c)]
    lm.hf_quantizer = None
    return lm


def _reads_4_bits(conversion: object) -> bool:
    return any(
        isinstance(step, (Bnb4bitDeserialize, Mxfp4Dequantize)) for step in getattr(conversion, "operations", ())
    )


def _is_special(name: str, layer: nn.Module) -> bool:
    """Return True for a layer that must become plain: a LoRA layer, or a 4-bit layer without an adapter."""
    return isinstance(layer, LoraLayer) or (isinstance(layer, Linear4bit) and not name.endswith(".base_layer"))


def _plain_layer(layer: nn.Module, name: str, dtype: torch.dtype) -> nn.Module:
    """Return the layer as a plain linear layer on the CPU, without adapter and quantization."""
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    quantized = isinstance(base, Linear4bit)
    weight = dequantize_4bit(base.weight.data, base.weight.quant_state) if quantized else base.weight.data
    weight = weight.float()
    for adapter in layer.active_adapters if isinstance(layer, LoraLayer) else ():
        if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
            raise SaroError(f"{name}: the adapter is not plain LoRA (it has DoRA or its own bias); merge it with peft")
        weight = weight + layer.get_delta_weight(adapter).float()
    plain = base
    if quantized:
        plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        plain.bias = base.bias
    plain.weight = nn.Parameter(weight.to("cpu", dtype), requires_grad=False)
    return plain
