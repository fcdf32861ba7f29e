"""Makes the tiny models and the byte-level tokenizer that most tests train."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    MiniCPM3Config,
    Mistral3Config,
    MistralConfig,
    NanoChatConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    VaultGemmaConfig,
)

from saro.config import DataConfig, ModelConfig, TrainConfig
from saro.data.dataset import ExampleSet
from saro.data.encode_files import encode_files
from saro.data.packs import Share
from saro.data.steps import Schedule, Steps
from saro.distributed.runtime import Runtime
from saro.distributed.shard import DeviceMesh
from saro.model.architectures import auto_class
from saro.model.load import load_policy
from saro.model.source import find_model
from saro.train.engine import Outcome, fit
from saro.train.objective import Objective
from saro.train.rw_objective import RWObjective

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|bos|>")
PAD, IM_START, IM_END, BOS = range(4)

_SHAPE = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": IM_END,
}


def tiny_tokenizer(template: str | None = CHATML, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte and the special tokens; ``extra`` adds more special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*SPECIAL, *extra])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_config(kind: str = "llama", **changes: object) -> PreTrainedConfig:
    """Make the config of a tiny model: "llama", "qwen3", "mistral" (window of 8 tokens) or "gemma3" (both layer types).

    The kinds in ``KINDS_OF_LOGITS`` scale or cap their logits or their attention scores.
    """
    if kind == "llama":
        return LlamaConfig(**_SHAPE | {"tie_word_embeddings": True} | changes)
    if kind == "qwen3":
        return Qwen3Config(**_SHAPE | changes)
    if kind == "mistral":
        return MistralConfig(**_SHAPE | {"sliding_window": 8} | changes)
    if kind == "gemma3":
        both = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
        return Gemma3TextConfig(**_SHAPE | {"query_pre_attn_scalar": 8} | both | changes)
    if kind in _KINDS_OF_LOGITS | _OTHER_KINDS:
        config, options = (_KINDS_OF_LOGITS | _OTHER_KINDS)[kind]
        return config(**_SHAPE | options | changes)
    if kind in _WRAPPERS:
        config, text, options = _WRAPPERS[kind]
        return config(text_config=_SHAPE | text, **{"eos_token_id": IM_END} | options | changes)
    raise ValueError(kind)


_KINDS_OF_LOGITS = {
    "cohere": (CohereConfig, {"logit_scale": 0.25}),
    "cohere2": (Cohere2Config, {"logit_scale": 0.25, "sliding_window": 8}),
    "granite": (
        GraniteConfig,
        {
            "logits_scaling": 4.0,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "hyperclovax": (HyperCLOVAXConfig, {"logits_scaling": 0.25}),
    "minicpm3": (MiniCPM3Config, {"dim_model_base": 8, "num_key_value_heads": 4}),
    "gemma3 with a softcap": (Gemma3TextConfig, {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
    "gemma2": (
        Gemma2Config,
        {
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 1.5,
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "vaultgemma": (VaultGemmaConfig, {"attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "gemma4": (
        Gemma4TextConfig,
        {
            "final_logit_softcapping": 3.0,
            "sliding_window": 8,
            "vocab_size_per_layer_input": 264,
            "hidden_size_per_layer_input": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "nanochat": (NanoChatConfig, {"final_logit_softcapping": 3.0}),
}

_OTHER_KINDS = {
    "phi4_mini": (
        Phi3Config,
        {
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 200,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.2, 1.4],
                "long_factor": [3.0, 5.0, 9.0],
                "original_max_position_embeddings": 200,
            },
        },
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
    ),
    "gpt_oss": (
        GptOssConfig,
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "depth": 2,
    "num_hidden_layers": 2,
}
# Multimodal models: class, options of the text model, options of the whole.
_WRAPPERS = {
    "gemma3 with vision": (
        Gemma3Config,
        {
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": True,
        },
        {
            "vision_config": {"model_type": "siglip_vision_model"} | _VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 263,
        },
    ),
    "mistral3": (
        Mistral3Config,
        {"model_type": "mistral", "sliding_window": None},
        {"vision_config": {"model_type": "pixtral"} | _VISION, "image_token_index": 263},
    ),
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        {
            "vision_config": _VISION | {"out_hidden_size": 32, "num_heads": 2, "fullatt_block_indexes": [1]},
            "image_token_id": 262,
            "video_token_id": 263,
        },
    ),
    "qwen3_vl": (
        Qwen3VLConfig,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        {
            "vision_config": _VISION | {"out_hidden_size": 32, "num_heads": 2, "deepstack_visual_indexes": [0]},
            "image_token_id": 262,
            "video_token_id": 263,
        },
    ),
}

KINDS_OF_MODEL = ("llama", "qwen3", "mistral", "gemma3")
KINDS_OF_LOGITS = tuple(_KINDS_OF_LOGITS)
KINDS_OF_WRAPPER = tuple(_WRAPPERS)
KINDS_OF_MIXTURE = ("qwen3_moe", "gpt_oss")


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Make a model with large, fixed weights. With default ones all logits are alike and a wrong mask goes unseen."""
    torch.manual_seed(0)
    model = auto_class(config).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2)
    return model


def save_tiny_model(folder: Path, kind: str = "llama", **changes: object) -> Path:
    """Save a model that ``find_model`` and ``load_policy`` accept: random weights, tokenizer, chat template."""
    random_model(tiny_config(kind, **changes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@dataclass
class Training:
    """The arguments of ``fit``, for a run in this process. Change some of them, then call ``fit``."""

    policy: torch.nn.Module
    data: ExampleSet
    objective: Objective
    steps: Steps
    options: TrainConfig

    @classmethod
    def on(
        cls,
        folder: str,
        records: str,
        output: Path,
        *,
        pack_tokens: int = 256,
        model: dict[str, object] | None = None,
        policy: torch.nn.Module | None = None,
        rank: int = 0,
        processes: int = 1,
        mesh: DeviceMesh | None = None,
        **train: object,
    ) -> Training:
        """Set up training of a model's folder on a records file, LoRA by default. ``train``: options of TrainConfig."""
        model_options = ModelConfig(**{"name": folder, "method": "lora"} | (model or {}))
        source = find_model(model_options)
        chat = source.chat_format(DataConfig(), date(2024, 7, 26))
        data = encode_files([records], chat, DataConfig(pack_tokens=pack_tokens))
        defaults = {"output": str(output), "records_per_step": 4, "lr": 1e-2, "save_every": 0, "epochs": 100}
        options = TrainConfig(**defaults | train)
        if policy is None:
            policy = load_policy(source, model_options, torch.device("cpu"), options.seed, mesh)
        output.mkdir(parents=True, exist_ok=True)
        schedule = Schedule(data.kinds, options.records_per_step, options.seed)
        steps = Steps(data, schedule, pack_tokens, Share(rank, processes, is_even=mesh is not None))
        return cls(policy, data, RWObjective(data.kinds), steps, options)

    def fit(self, runtime: Runtime, total_steps: int, **options: object) -> Outcome:
        """Train."""
        train = {k: options.pop(k) for k in list(options) if k in TrainConfig.__dataclass_fields__}
        return fit(
            runtime,
            self.policy,
            self.objective,
            self.steps,
            total_steps,
            replace(self.options, **train),
            ids=self.data.ids,
            **options,
        )

    def weights(self) -> dict[str, torch.Tensor]:
        """Return copies of the trainable weights."""
        return {name: p.detach().clone() for name, p in self.policy.trainable().items()}
