"""The cases of ``model_sweep.py``: each causal LM of transformers as a tiny config, and its options one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from saro.model.architectures import WRAPPERS, text_config

# The class of each model type: all causal LMs, and the multimodal models whose text model is trained in place.
CLASSES = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | {
    name: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name] for name in sorted(WRAPPERS)
}

VOCABULARY = 96
LAYERS = 4
# The longest sequences are longer than the window. A pack is longer than the positions, no sequence is.
WINDOW, POSITIONS = 8, 64

# Sizes by their common name. A class that has another name for one of them maps it (`attribute_map`).
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "dff": 48,
    "num_hidden_layers": LAYERS,
    "num_layers_per_stack": 2,
    "num_kv_shared_layers": 0,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "sliding_window": WINDOW,
    # Multi-head latent attention.
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    # Embeddings that are narrower than the hidden states, or beside those of the tokens.
    "word_embed_proj_dim": 16,
    "moe_intermediate_size": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}
# The part of a multimodal model that reads images. Texts do not reach it.
_TINY_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_heads": 2,
    "head_dim": 8,
    "depth": 1,
    "num_hidden_layers": 1,
    "image_size": 16,
    "patch_size": 8,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
}
# Frequencies of a head of 8 that turn with time, height and width.
_TINY_MROPE = {"mrope_section": [2, 1, 1]}
_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_OTHER_TOKEN_ID = 3

_BOTH_LAYERS = ["sliding_attention", "full_attention"] * (LAYERS // 2)
_FULL_LAYERS = ["full_attention"] * LAYERS
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}
# What a class needs beyond the sizes, because its defaults alone or together with the sizes make no model.
_NEEDED: dict[str, dict[str, object]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _DEFAULT_ROPE, "sliding_attention": _DEFAULT_ROPE | {"rope_theta": 1e3}}
    },
    "diffllama": {"attention_dropout": 0.0},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "minicpm3": {"num_key_value_heads": 4},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": [1]},
    "youtu": {"num_key_value_heads": 4},
    "xmod": {"default_language": "en_XX"},
}

# Flags that change neither logits nor gradients here, or that need another model beside this one. float64 does not fit
# reorder_and_upcast_attn, which casts to float32.
_SKIPPED_FLAGS = frozenset(
    {"use_cache", "output_router_logits", "add_cross_attention", "reorder_and_upcast_attn", "enable_moe_block"}
)
# Values of options, each tried alone in every class that has the option.
_VALUES: tuple[tuple[str, object], ...] = (
    ("num_key_value_heads", 1),
    ("clip_qkv", 0.5),
    ("final_logit_softcapping", 3.0),
    ("final_logit_softcapping", None),
    ("attn_logit_softcapping", 1.5),
    ("attn_logit_softcapping", None),
    ("logit_scale", 0.25),
    ("logits_scaling", 4.0),
    ("embedding_multiplier", 3.0),
    ("residual_multiplier", 0.5),
    ("attention_multiplier", 0.2),
    ("num_kv_shared_layers", 2),
    ("sliding_window", WINDOW),
    ("sliding_window", None),
    ("use_bidirectional_attention", False),
    ("use_bidirectional_attention", True),
)
# Sets of options, each tried in every class that has all of them.
_SETS: dict[str, dict[str, object]] = {
    "sliding window in the last layers": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 2,
        "layer_types": None,
    },
    "layers: sliding, full": {"sliding_window": WINDOW, "layer_types": _BOTH_LAYERS},
    "layers: full": {"layer_types": _FULL_LAYERS},
}
# Rotary embeddings, for every class that has one.
_ROPES: dict[str, dict[str, object]] = {
    "rope: half of each head": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "rope: linear": {"rope_type": "linear", "factor": 2.0},
    "rope: dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "rope: yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "rope: llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "rope: longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "factor": 4.0,
        # No sequence is longer: beyond this length, training refuses it.
        "original_max_position_embeddings": 48,
    },
}
# Rotary parameters that mean the same in every type.
_KEPT_OF_ROPE = (
    "rope_theta",
    "partial_rotary_factor",
    "llama_4_scaling_beta",
    "original_max_position_embeddings",
    "max_position_embeddings",
)
# Options with which a class that is refused by its defaults may be trained.
_ALLOWED: dict[str, dict[str, dict[str, object]]] = {
    "beam": {"dense layers": {"mlp_layer_types": ["dense"] * LAYERS, "num_experts": 1, "num_experts_per_tok": 1}},
    "gemma4_unified_text": {"attention in one direction": {"use_bidirectional_attention": None}},
    "granitemoehybrid": {
        "attention layers, no experts": {
            "layer_types": _FULL_LAYERS,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "logits_scaling": 4.0,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        }
    },
    "qwen3_5_text": {"attention layers": {"layer_types": _FULL_LAYERS}},
    "lfm3": {"attention layers": {"layer_types": _FULL_LAYERS}},
    "qwen2_moe": {
        "no experts": {"num_experts": 0, "num_experts_per_tok": 0, "shared_expert_intermediate_size": 0},
    },
    "qwen3_moe": {"no experts": {"num_experts": 0, "num_experts_per_tok": 0}},
}


@dataclass(frozen=True)
class Case:
    """One tiny model.

    Attributes:
        model_type: key of ``CLASSES``.
        option: what differs from the defaults of its class; empty for the defaults.
        changes: the options of the config that differ.
    """

    model_type: str
    option: str = ""
    changes: dict[str, object] = field(default_factory=dict, compare=False)


def default_config(model_type: str) -> PreTrainedConfig:
    """Return the config with the defaults of its class."""
    needed = _NEEDED.get(model_type, {})
    return CONFIG_MAPPING[model_type](**{name: value for name, value in needed.items() if name.endswith("_config")})


def tiny_config(case: Case) -> PreTrainedConfig:
    """Return the case's config: the defaults of its class, with few and small layers of every type that they have.

    Dropout is on, as in many published configs, so that a rate that training does not turn off shows.
    """
    default = default_config(case.model_type)
    if text_config(default) is default or case.model_type not in WRAPPERS:
        changes = _tiny_options(default) | _NEEDED.get(case.model_type, {})
        return CONFIG_MAPPING[case.model_type](**changes | case.changes)
    parts = {name: getattr(default, name).to_dict() for name in default.sub_configs}
    for name, part in parts.items():
        config = getattr(default, name)
        if config is text_config(default):
            part |= _tiny_options(config) | case.changes
            if case.model_type.startswith("qwen"):
                part["rope_parameters"] = part["rope_parameters"] | _TINY_MROPE
        else:
            part |= _TINY_VISION
    return CONFIG_MAPPING[case.model_type](**parts | _TOKEN_IDS)


def _tiny_options(default: PreTrainedConfig) -> dict[str, object]:
    """Return the options that make a config tiny."""
    options = default.to_dict()
    changes: dict[str, object] = {}
    for name, size in _SIZES.items():
        own_name = default.attribute_map.get(name, name)
        # Without a head size, some classes divide by None.
        if options.get(own_name) is not None or (name == "head_dim" and name in options):
            changes[own_name] = size
    for name, value in options.items():
        if isinstance(value, list) and len(value) == getattr(default, "num_hidden_layers", None):
            distinct = list(dict.fromkeys(value))
            changes[name] = [distinct[i % len(distinct)] for i in range(LAYERS)]
        elif isinstance(value, float) and "drop" in name:
            changes[name] = 0.1
        elif name.endswith("_token_id"):
            changes[name] = _TOKEN_IDS.get(name, _OTHER_TOKEN_ID)
        elif name == "rope_parameters" and value:
            changes[name] = _shrink_rope(value)
    return changes


def _shrink_rope(parameters: dict[str, object]) -> dict[str, object]:
    """Return rotary parameters in which the sequences are longer than the length that they extend."""
    shrunk = dict(parameters)
    for name, value in parameters.items():
        if isinstance(value, dict):
            shrunk[name] = _shrink_rope(value)
        elif name == "original_max_position_embeddings":
            shrunk[name] = 16
    return shrunk


def option_cases(model_type: str) -> Iterator[Case]:
    """Yield a case for each option of a class whose defaults are supported: flags, values, layers, ropes."""
    options = text_config(tiny_config(Case(model_type))).to_dict()
    known_to_all = PreTrainedConfig().to_dict().keys() - {"tie_word_embeddings"}
    for name, value in options.items():
        if isinstance(value, bool) and name not in known_to_all and name not in _SKIPPED_FLAGS:
            yield Case(model_type, f"{name}={not value}", {name: not value})
    for name, value in _VALUES:
        if name in options and options[name] != value:
            yield Case(model_type, f"{name}={value}", {name: value})
    for option, changes in _SETS.items():
        if changes.keys() <= options.keys() and options["layer_types"] not in (None, changes["layer_types"]):
            yield Case(model_type, option, changes)
    if rope := options.get("rope_parameters"):
        for option, parameters in _ROPES.items():
            yield Case(model_type, option, {"rope_parameters": _with_rope(rope, parameters)})


def allowed_cases(model_type: str) -> Iterator[Case]:
    """Yield the cases of a class whose defaults are refused, with options that are not."""
    for option, changes in _ALLOWED.get(model_type, {}).items():
        yield Case(model_type, option, changes)


def _with_rope(rope: dict[str, object], parameters: dict[str, object]) -> dict[str, object]:
    """Return the rotary parameters with another type, in every type of layer that has its own."""
    if "rope_type" not in rope:
        return {layer_type: _with_rope(part, parameters) for layer_type, part in rope.items()}
    return {name: rope[name] for name in _KEPT_OF_ROPE if name in rope} | parameters
