"""Which models packed training can be right for; the others are refused by name before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from saro.errors import SaroError
from saro.model.logits import SCALE_OPTIONS, scales_its_logits

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Rotary embeddings whose frequencies depend on the length of the input cannot be right for many sequences at once.
REFUSED_ROPE = frozenset({"dynamic", "longrope"})
# Options that change the logits, or the attention, in a way that the fused head or packed attention does not compute.
_NEUTRAL = {
    **dict.fromkeys((*SCALE_OPTIONS, "lm_head_multiplier", "logits_mup_width_multiplier"), (None, 1)),
    "use_bidirectional_attention": (None, False),
    "attention_chunk_size": (None,),
}
# Beginnings of the names of a multimodal model's other configs.
_OTHER_SENSES = ("vision", "audio", "vq")


def check_supported(config: PretrainedConfig) -> None:
    """Raise SaroError, naming the reason, for a model of a kind that packed training does not support."""
    name = config.model_type

    def refuse(reason: str) -> SaroError:
        return SaroError(f"model type {name!r} is not supported: {reason}")

    if config.is_encoder_decoder:
        raise refuse("it is an encoder-decoder; use a decoder-only causal language model")
    options = config.to_dict()
    wraps = config.get_text_config(decoder=True) is not config
    if wraps or any(key.endswith("_config") and key.startswith(_OTHER_SENSES) for key in options):
        raise refuse("it is multimodal; extract the text model and save it as a folder of its own")
    for key, value in _flat(options):
        if "expert" in key and isinstance(value, int) and not isinstance(value, bool) and value > 1:
            raise refuse(f"it is a mixture of experts ({key}={value})")
        if key in _NEUTRAL and value not in _NEUTRAL[key] and not scales_its_logits(config, key):
            raise refuse(f"{key}={value} changes its scores in a way that is not computed here yet")
    for layer_type in sorted(set(getattr(config, "layer_types", None) or ())):
        if layer_type not in LAYER_TYPES:
            raise refuse(f"layers of type {layer_type}; only {' and '.join(sorted(LAYER_TYPES))} can be packed")
    if options.get("quantization_config"):
        raise refuse("its weights are quantized already; give the original model, which --model.method qlora quantizes")
    for rope in _rope_types(getattr(config, "rope_parameters", None) or {}):
        if rope in REFUSED_ROPE:
            raise refuse(f"its rotary embedding ({rope}) depends on the length of the input")
    model = _model_class(config)
    if model is not None and model._is_stateful:
        raise refuse("its layers carry a state from token to token, which a pack would carry between sequences")
    if model is not None and not model._supports_attention_backend:
        raise refuse("its attention cannot be replaced through transformers' attention interface")


def _model_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class that transformers loads for this config; None for a model that brings its own code."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, (tuple, list)) else found


def _flat(options: dict) -> Iterator[tuple[str, object]]:
    """All options by name, those of the configs inside among them."""
    for key, value in options.items():
        yield str(key), value
        if isinstance(value, dict):
            yield from _flat(value)


def _rope_types(parameters: dict) -> Iterator[str]:
    """Rotary types of a config, which may be one for all layers or one for each layer type."""
    for value in parameters.values():
        if isinstance(value, dict):
            yield from _rope_types(value)
    if "rope_type" in parameters:
        yield parameters["rope_type"]


def sliding_window(config: PretrainedConfig) -> int | None:
    """The model's attention window in tokens, the token itself included; None without one."""
    types = getattr(config, "layer_types", None)
    if types and "sliding_attention" not in types:
        return None
    return getattr(config, "sliding_window", None)
