"""Facts about model families: which ones packed training supports, and how each makes logits and attention scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from saro.errors import SaroError

# Types of layers that packed attention computes.
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Multimodal models whose text model is trained in place, on text only. tests/model/test_kinds_of_models.py has each.
WRAPPERS = frozenset({"gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl"})
# Matches the names of all modules of a wrapper outside its text model.
OUTSIDE_TEXT_MODEL = r"(?!model\.language_model\.).*"
# Ids that stand for an image or a video in a text.
_PLACEHOLDERS = ("image_token_id", "video_token_id")
# Mixtures of experts that can be trained by adapters on their attention. Router and experts stay frozen.
MIXTURES = frozenset({"gpt_oss", "qwen3_moe"})
# Models whose attention has a sink: a score of each head beside those of the keys, without a value.
_WITH_SINKS = frozenset({"gpt_oss"})
# Rotary embeddings whose frequencies depend on the length of the input: one pack holds sequences of many lengths.
REFUSED_ROPE = frozenset({"dynamic"})
# Models with an embedding of each position, in place of rotary embeddings.
_POSITION_TABLES = frozenset({"ctrl", "gpt2", "gpt_bigcode", "opt"})
# MLPs whose forward is down_proj(act_fn(gate_proj(x)) * up_proj(x)) and nothing more; a test compares each.
GATED_MLPS = frozenset(
    {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP", "GemmaMLP", "Gemma2MLP", "Gemma3MLP"}
)
# MLPs whose layer has a norm after them. The backward needs the input of that norm.
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


class TokenLimits(NamedTuple):
    """Limits on a model's sequences.

    Attributes:
        vocabulary: number of tokens that the model embeds.
        longest: most tokens of a sequence; None for any number.
        beyond: what a longer sequence would meet, for the error.
        placeholders: ids that stand for images or videos. A text has none.
    """

    vocabulary: int
    longest: int | None = None
    beyond: str = ""
    placeholders: frozenset[int] = frozenset()


class LogitOptions(NamedTuple):
    """The arguments of ``token_logps`` by which a model turns the LM head's products into logits.

    Logits are ``softcap * tanh(scale * products / softcap)``, or ``scale * products`` without a softcap.
    """

    scale: float = 1.0
    softcap: float | None = None


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config of the text model if the model is multimodal, else the config itself."""
    return config.get_text_config(decoder=True)


def auto_class(config: PretrainedConfig) -> type[AutoModelForCausalLM | AutoModelForImageTextToText]:
    """Return the class by which transformers loads a model of this type."""
    return AutoModelForImageTextToText if config.model_type in WRAPPERS else AutoModelForCausalLM


def token_limits(config: PretrainedConfig) -> TokenLimits:
    """Return the limits on a model's sequences."""
    ids = [getattr(config, name, None) for name in _PLACEHOLDERS] if config.model_type in WRAPPERS else []
    text = text_config(config)
    longest = _longest_with_short_factors(config)
    beyond = "this model's rotary embedding (longrope) changes for every token of a pack"
    if text.model_type in _POSITION_TABLES:
        longest, beyond = text.max_position_embeddings, "this model's table of positions has no entry"
    return TokenLimits(
        vocabulary=text.vocab_size,
        longest=longest,
        beyond=beyond,
        placeholders=frozenset(i for i in ids if i is not None),
    )


def most_positions(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model reads, its answer included; None if its config does not say."""
    positions = getattr(text_config(config), "max_position_embeddings", None)
    limits = [n for n in (positions, _longest_with_short_factors(config)) if n]
    return min(limits, default=None)


def _longest_with_short_factors(config: PretrainedConfig) -> int | None:
    """Return the longest sequence, in tokens, for which LongRoPE has its short factors; None without LongRoPE.

    The factors are one choice for all tokens of a forward (Ding et al. 2024, arXiv 2402.13753): a pack with a longer
    sequence would change those of the others.
    """
    ropes = _ropes(getattr(text_config(config), "rope_parameters", None) or {})
    lengths = [rope["original_max_position_embeddings"] for rope in ropes if rope["rope_type"] == "longrope"]
    return min(lengths, default=None)


def is_mixture(config: PretrainedConfig) -> bool:
    """Return True for a mixture of experts."""
    options = text_config(config).to_dict()
    return any(_counts_experts(name, value) for name, value in _flat(options))


def is_router(module: nn.Module) -> bool:
    """Return True for the module that chooses the experts of each token."""
    return hasattr(module, "top_k") and hasattr(module, "num_experts") and type(module).__name__.endswith("Router")


def _counts_experts(name: str, value: object) -> bool:
    return "expert" in name and isinstance(value, int) and not isinstance(value, bool) and value > 1


def is_quantized(config: PretrainedConfig) -> bool:
    """Return True if the files of a model hold 4-bit weights of bitsandbytes, NF4."""
    return (getattr(config, "quantization_config", None) or {}).get("bnb_4bit_quant_type") == "nf4"


def is_mxfp4(config: PretrainedConfig) -> bool:
    """Return True if the files of a model hold experts in MXFP4, as those of gpt-oss do. They are loaded dequantized."""
    return (getattr(config, "quantization_config", None) or {}).get("quant_method") == "mxfp4"


def has_sinks(config: PretrainedConfig) -> bool:
    """Return True if a model's attention has a sink in each head."""
    return text_config(config).model_type in _WITH_SINKS


def logit_options(config: PretrainedConfig) -> LogitOptions:
    """Return the scale and the softcap of a model's logits. ``check_supported`` refuses other changes to them."""
    if config.model_type in WRAPPERS:
        return LogitOptions()  # their own forward ignores these options of the text model
    scale = 1.0
    if config.model_type in _SCALES:
        name, power = _SCALES[config.model_type]
        scale = float(getattr(config, name)) ** power
    return LogitOptions(scale, getattr(config, "final_logit_softcapping", None) or None)


def attention_softcap(config: PretrainedConfig) -> float | None:
    """Return the bound of the attention scores (Gemma 2), or None if they are not bounded."""
    return getattr(text_config(config), "attn_logit_softcapping", None)


def head_sizes(config: PretrainedConfig) -> set[int]:
    """Return the sizes of the heads of queries, keys and values, over all layers."""
    return {size for layer in text_config(config).per_layer_config for size in layer_head_sizes(layer)}


def layer_head_sizes(layer: PretrainedConfig) -> tuple[int, int]:
    """Return the sizes of the heads of queries and keys, and of values, from one layer's config."""
    key_size = getattr(layer, "qk_head_dim", None) or getattr(layer, "head_dim", None)
    key_size = key_size or layer.hidden_size // layer.num_attention_heads
    return key_size, getattr(layer, "v_head_dim", None) or key_size


def sliding_window(config: PretrainedConfig) -> int | None:
    """Return the model's attention window in tokens, including the token itself; None if it has none."""
    config = text_config(config)
    types = getattr(config, "layer_types", None)
    if types and "sliding_attention" not in types:
        return None
    return getattr(config, "sliding_window", None)


def dropout_options(config: PretrainedConfig) -> dict[str, float]:
    """Return the dropout rates by their names in the config of the text model."""
    options = text_config(config).to_dict()
    return {name: value for name, value in options.items() if isinstance(value, float) and "drop" in name}


def remove_dropout(config: PretrainedConfig) -> None:
    """Set all dropout rates of the text model to 0."""
    for name in dropout_options(config):
        setattr(text_config(config), name, 0.0)


def has_attention_dropout(config: PretrainedConfig) -> bool:
    """Return True if the config sets a dropout of attention weights: ``attention_dropout``, or ``attn_pdrop`` of GPT-2."""
    return any(name.startswith("att") and rate > 0 for name, rate in dropout_options(config).items())


def check_supported(config: PretrainedConfig) -> None:
    """Raise SaroError with the reason if packed training does not support a model of this type."""
    name = config.model_type

    def refusal(reason: str) -> SaroError:
        return SaroError(f"model type {name!r} is not supported: {reason}")

    if config.is_encoder_decoder:
        raise refusal("it is an encoder-decoder; use a decoder-only causal language model")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise refusal("it is an encoder, trained on masked tokens; use a decoder-only causal language model")
    text = text_config(config)
    if name not in WRAPPERS and _is_multimodal(config):
        raise refusal(
            f"it is multimodal, and its text model is trained in place only for {', '.join(sorted(WRAPPERS))}; "
            "extract the text model and save it as a folder of its own"
        )
    kind = text.model_type
    if kind in _UNFIT:
        raise refusal(_UNFIT[kind])
    scale_option, _ = _SCALES.get(kind, (None, 1))
    for key, value in _flat(text.to_dict()):
        if _counts_experts(key, value) and kind not in MIXTURES:
            raise refusal(
                f"it is a mixture of experts ({key}={value}); only {' and '.join(sorted(MIXTURES))} can be trained"
            )
        if key in _NEUTRAL and value not in _NEUTRAL[key] and key != scale_option:
            raise refusal(f"{key}={value} changes its scores in a way that is not computed here yet")
    layer_types = set(getattr(text, "layer_types", None) or ())
    for layer_type in sorted(layer_types):
        if layer_type not in LAYER_TYPES:
            raise refusal(f"layers of type {layer_type}; only {' and '.join(sorted(LAYER_TYPES))} can be packed")
    # transformers then makes the mask with the window of a layer's type, and tells attention that there is none.
    if "sliding_attention" in layer_types and getattr(text, "use_sliding_window", None) is False:
        raise refusal("its layer_types have sliding_attention, but use_sliding_window is false; correct its config")
    reason = _why_not_quantized(getattr(config, "quantization_config", None) or {})
    if reason is not None:
        raise refusal(reason)
    for rope in _ropes(getattr(text, "rope_parameters", None) or {}):
        if rope["rope_type"] in REFUSED_ROPE:
            raise refusal(f"its rotary embedding ({rope['rope_type']}) depends on the length of the input")
    model = _model_class(config)
    if model is not None and model._is_stateful and not layer_types:
        raise refusal("its layers carry a state from token to token, which a pack would carry between sequences")
    if model is not None and not model._supports_attention_backend:
        raise refusal("its attention cannot be replaced through transformers' attention interface")
    is_computed = has_sinks(config) or hasattr(text, "attn_logit_softcapping")
    if model is not None and not model._supports_sdpa and not is_computed:
        raise refusal("its attention is more than scaled_dot_product_attention computes, such as attention with sinks")


def _is_multimodal(config: PretrainedConfig) -> bool:
    """Return True if a config wraps that of a text model, or has a part for images or sound."""
    parts = [key for key in config.to_dict() if key.endswith("_config")]
    return text_config(config) is not config or any(key.startswith(_OTHER_MODALITIES) for key in parts)


def _why_not_quantized(quantization: Mapping[str, object]) -> str | None:
    """Return why the quantized weights in a model's files cannot be trained; None if they can, or are not quantized."""
    method = quantization.get("quant_method", "bitsandbytes")
    is_nf4 = method == "bitsandbytes" and quantization.get("bnb_4bit_quant_type") == "nf4"
    if not quantization or is_nf4 or method == "mxfp4":
        return None
    if method == "bitsandbytes":
        method = "bitsandbytes fp4" if quantization.get("load_in_4bit") else "bitsandbytes 8-bit"
    return (
        f"its weights are quantized ({method}), and only NF4 of bitsandbytes and MXFP4 can be read; "
        "give the original model, which --model.method qlora quantizes"
    )


def _model_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class that transformers loads for this config; None for a model that brings its own code."""
    classes = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if config.model_type in WRAPPERS else MODEL_FOR_CAUSAL_LM_MAPPING
    model_class = classes.get(type(config), None)
    return model_class[0] if isinstance(model_class, (tuple, list)) else model_class


def _flat(options: dict) -> Iterator[tuple[str, object]]:
    """Yield (name, value) of all options, including those of nested configs."""
    for key, value in options.items():
        yield str(key), value
        if isinstance(value, dict):
            yield from _flat(value)


def _ropes(parameters: dict) -> Iterator[dict]:
    """Yield the rotary parameters of a config: one set for all layers, or one for each layer type."""
    for value in parameters.values():
        if isinstance(value, dict):
            yield from _ropes(value)
    if "rope_type" in parameters:
        yield parameters


def fully_trained_parts(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Return what full fine-tuning trains: the model, or the text model and LM head of a multimodal one."""
    if model.config.model_type in WRAPPERS:
        return model.get_decoder(), model.get_output_embeddings()
    return (model,)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder's layers: the members of every module list that is as long as the decoder is deep."""
    num_layers = text_config(model.config).num_hidden_layers
    lists = [m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    return [layer for layers in lists for layer in layers]
