"""Facts about model families: which ones packed training supports, and how each makes logits and attention scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from saro.errors import SaroError

# Types of layers that packed attention computes.
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Rotary embeddings whose frequencies depend on the length of the input: one pack holds sequences of many lengths.
REFUSED_ROPE = frozenset({"dynamic", "longrope"})
# MLPs whose forward is down_proj(act_fn(gate_proj(x)) * up_proj(x)) and nothing more; a test compares each.
GATED_MLPS = frozenset(
    {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP", "GemmaMLP", "Gemma2MLP", "Gemma3MLP"}
)
# Those in a layer that has a norm after the MLP, whose input the backward needs.
WITH_LAST_NORM = frozenset({"Gemma2MLP", "Gemma3MLP"})
# Attention modules that call q_proj, k_proj and v_proj on their input, each once; a test looks at each.
QKV_ATTENTIONS = frozenset(
    {
        "LlamaAttention",
        "MistralAttention",
        "Qwen2Attention",
        "Qwen3Attention",
        "SmolLM3Attention",
        "GemmaAttention",
        "Gemma2Attention",
        "Gemma3Attention",
    }
)
# Options by which a model scales its logits. The same name means a factor in one model and a divisor in another, so
# each model type is listed with the power of the option that is its factor.
_SCALES = {
    "cohere": ("logit_scale", 1),
    "cohere2": ("logit_scale", 1),
    "granite": ("logits_scaling", -1),
    "granitemoehybrid": ("logits_scaling", -1),
    "hyperclovax": ("logits_scaling", 1),
    "minicpm3": ("logits_scaling", -1),
}
# Options that change logits or attention in a way that is not computed here, with the values that change nothing.
_NEUTRAL = {
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "lm_head_multiplier": (None, 1),
    "logits_mup_width_multiplier": (None, 1),
    "use_bidirectional_attention": (None, False),
    "attention_chunk_size": (None,),
}
# Model types that none of the rules below finds, with the reason. benchmarks/model_sweep.py found them.
_UNFIT = {
    "bert-generation": "it is an encoder, or the decoder of an encoder-decoder",
    "gemma3n_text": "in train mode its AltUp layers read their weights past the adapter, and clamp them in place",
    "modernbert-decoder": "it has more layers between its decoder and its LM head",
    "nemotron": "its layers do not pass the layout of a pack on to their attention",
}
# A sub-config whose name begins like this belongs to a multimodal model.
_OTHER_MODALITIES = ("vision", "audio", "vq")


class LogitOptions(NamedTuple):
    """The arguments of ``token_logps`` by which a model turns the LM head's products into logits.

    Logits are ``softcap * tanh(scale * products / softcap)``, or ``scale * products`` without a softcap.
    """

    scale: float = 1.0
    softcap: float | None = None


def logit_options(config: PretrainedConfig) -> LogitOptions:
    """Return the scale and the softcap of a model's logits. ``check_supported`` refuses other changes to them."""
    scale = 1.0
    if config.model_type in _SCALES:
        name, power = _SCALES[config.model_type]
        scale = float(getattr(config, name)) ** power
    return LogitOptions(scale, getattr(config, "final_logit_softcapping", None) or None)


def attention_softcap(config: PretrainedConfig) -> float | None:
    """Return the bound of the attention scores (Gemma 2), or None if they are not bounded."""
    return getattr(config, "attn_logit_softcapping", None)


def head_sizes(config: PretrainedConfig) -> set[int]:
    """Return the sizes of the heads of queries, keys and values, over all layers."""
    return {size for layer in config.per_layer_config for size in layer_head_sizes(layer)}


def layer_head_sizes(layer: PretrainedConfig) -> tuple[int, int]:
    """Return the sizes of the heads of queries and keys, and of values, from one layer's config."""
    key_size = getattr(layer, "qk_head_dim", None) or getattr(layer, "head_dim", None)
    key_size = key_size or layer.hidden_size // layer.num_attention_heads
    return key_size, getattr(layer, "v_head_dim", None) or key_size


def sliding_window(config: PretrainedConfig) -> int | None:
    """Return the model's attention window in tokens, including the token itself; None if it has none."""
    types = getattr(config, "layer_types", None)
    if types and "sliding_attention" not in types:
        return None
    return getattr(config, "sliding_window", None)


def dropout_options(config: PretrainedConfig) -> dict[str, float]:
    """Return the dropout rates of a model's config by name."""
    return {name: value for name, value in config.to_dict().items() if isinstance(value, float) and "drop" in name}


def check_supported(config: PretrainedConfig) -> None:
    """Raise SaroError with the reason if packed training does not support a model of this type."""
    name = config.model_type

    def refusal(reason: str) -> SaroError:
        return SaroError(f"model type {name!r} is not supported: {reason}")

    if config.is_encoder_decoder:
        raise refusal("it is an encoder-decoder; use a decoder-only causal language model")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise refusal("it is an encoder, trained on masked tokens; use a decoder-only causal language model")
    if name in _UNFIT:
        raise refusal(_UNFIT[name])
    options = config.to_dict()
    scale_option, _ = _SCALES.get(config.model_type, (None, 1))
    wraps_text_model = config.get_text_config(decoder=True) is not config
    if wraps_text_model or any(key.endswith("_config") and key.startswith(_OTHER_MODALITIES) for key in options):
        raise refusal("it is multimodal; extract the text model and save it as a folder of its own")
    for key, value in _flat(options):
        if "expert" in key and isinstance(value, int) and not isinstance(value, bool) and value > 1:
            raise refusal(f"it is a mixture of experts ({key}={value})")
        if key in _NEUTRAL and value not in _NEUTRAL[key] and key != scale_option:
            raise refusal(f"{key}={value} changes its scores in a way that is not computed here yet")
    layer_types = set(getattr(config, "layer_types", None) or ())
    for layer_type in sorted(layer_types):
        if layer_type not in LAYER_TYPES:
            raise refusal(f"layers of type {layer_type}; only {' and '.join(sorted(LAYER_TYPES))} can be packed")
    # transformers then makes the mask with the window of a layer's type, and tells attention that there is none.
    if "sliding_attention" in layer_types and getattr(config, "use_sliding_window", None) is False:
        raise refusal("its layer_types have sliding_attention, but use_sliding_window is false; correct its config")
    if options.get("quantization_config"):
        raise refusal(
            "its weights are quantized already; give the original model, which --model.method qlora quantizes"
        )
    for rope in _rope_types(getattr(config, "rope_parameters", None) or {}):
        if rope in REFUSED_ROPE:
            raise refusal(f"its rotary embedding ({rope}) depends on the length of the input")
    model = _model_class(config)
    if model is not None and model._is_stateful and not layer_types:
        raise refusal("its layers carry a state from token to token, which a pack would carry between sequences")
    if model is not None and not model._supports_attention_backend:
        raise refusal("its attention cannot be replaced through transformers' attention interface")
    if model is not None and not model._supports_sdpa and not hasattr(config, "attn_logit_softcapping"):
        raise refusal("its attention is more than scaled_dot_product_attention computes, such as attention with sinks")


def _model_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class that transformers loads for this config; None for a model that brings its own code."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return model_class[0] if isinstance(model_class, (tuple, list)) else model_class


def _flat(options: dict) -> Iterator[tuple[str, object]]:
    """Yield (name, value) of all options, including those of nested configs."""
    for key, value in options.items():
        yield str(key), value
        if isinstance(value, dict):
            yield from _flat(value)


def _rope_types(parameters: dict) -> Iterator[str]:
    """Yield the rotary types of a config: one for all layers, or one for each layer type."""
    for value in parameters.values():
        if isinstance(value, dict):
            yield from _rope_types(value)
    if "rope_type" in parameters:
        yield parameters["rope_type"]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder's layers: the members of every module list that is as long as the decoder is deep."""
    num_layers = model.config.num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    return [layer for layers in lists for layer in layers]
