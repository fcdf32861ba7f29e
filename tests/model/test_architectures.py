"""Unsupported model types are refused before loading; windows, scales and softcaps of the others are known."""

from __future__ import annotations

import pytest
from loaded import DATA, load
from tiny import KINDS_OF_LOGITS, KINDS_OF_MODEL, tiny_config
from transformers import (
    BambaConfig,
    BertConfig,
    BertGenerationConfig,
    BloomConfig,
    CohereConfig,
    CTRLConfig,
    DbrxConfig,
    DeepseekV3Config,
    FalconConfig,
    FalconMambaConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    GraniteSWAConfig,
    JambaConfig,
    Lfm2Config,
    Llama4Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    MptConfig,
    NemotronConfig,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3NextConfig,
    Qwen3VLMoeConfig,
    RobertaConfig,
    RwkvConfig,
    SmolLM3Config,
    T5Config,
)
from transformers.models.emu3 import Emu3Config
from transformers.models.fuyu import FuyuConfig

from saro.checks.check_packs import check_packs
from saro.errors import SaroError
from saro.model.architectures import LogitOptions, check_supported, logit_options, sliding_window


def changed(config, **changes):
    for name, value in changes.items():
        setattr(config, name, value)
    return config


REFUSED = {
    "encoder-decoder": (lambda: T5Config(), "'t5' is not supported: it is an encoder-decoder"),
    "an encoder": (lambda: RobertaConfig(), "'roberta' is not supported: it is an encoder, trained on masked tokens"),
    "an encoder as a decoder": (lambda: BertConfig(is_decoder=True), "'bert' .* it is an encoder"),
    "an encoder for generation": (lambda: BertGenerationConfig(is_decoder=True), "'bert-generation' .* an encoder"),
    "layers before the head": (
        lambda: ModernBertDecoderConfig(),
        "'modernbert-decoder' .* its decoder and its LM head",
    ),
    "layers that drop arguments": (lambda: NemotronConfig(), "'nemotron' .* do not pass the layout of a pack on"),
    "weights read past their adapters": (lambda: Gemma3nTextConfig(), "'gemma3n_text' .* past the adapter"),
    "attention with sinks": (lambda: GraniteSWAConfig(), "'granite_swa' .* attention with sinks"),
    "windows on and off": (
        lambda: SmolLM3Config(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]),
        "'smollm3' .* layer_types have sliding_attention, but use_sliding_window is false",
    ),
    "experts of mixtral": (
        lambda: MixtralConfig(),
        "'mixtral' .* mixture of experts .*; only gpt_oss and qwen3_moe can be trained",
    ),
    "experts of deepseek": (lambda: DeepseekV3Config(), "'deepseek_v3' .* mixture of experts"),
    "experts of jamba": (lambda: JambaConfig(), "'jamba' .* mixture of experts"),
    "experts in a nested config": (lambda: DbrxConfig(), r"'dbrx' .* mixture of experts \(moe_num_experts=4\)"),
    "a logit scale of unknown meaning": (
        lambda: changed(LlamaConfig(), logit_scale=0.0625),
        "'llama' .* logit_scale=0.0625 changes its scores",
    ),
    "another model's scaling option": (
        lambda: changed(CohereConfig(), logits_scaling=8.0),
        "'cohere' .* logits_scaling=8.0 changes its scores",
    ),
    "a multiplier of the head": (
        lambda: changed(LlamaConfig(), lm_head_multiplier=0.5),
        "'llama' .* lm_head_multiplier=0.5 changes its scores",
    ),
    "attention in both directions": (
        lambda: tiny_config("gemma3", use_bidirectional_attention=True),
        "use_bidirectional_attention=True changes its scores",
    ),
    "chunked attention": (lambda: changed(LlamaConfig(), attention_chunk_size=64), "attention_chunk_size=64 changes"),
    "chunked layers": (
        lambda: tiny_config("qwen3", layer_types=["chunked_attention", "full_attention"]),
        "layers of type chunked_attention; only full_attention and sliding_attention can be packed",
    ),
    "llama 4 text": (lambda: Llama4TextConfig(), "'llama4_text' is not supported"),
    "dynamic rope": (
        lambda: tiny_config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        r"rotary embedding \(dynamic\) depends on the length",
    ),
    "dynamic rope in its old spelling": (
        lambda: tiny_config("llama", rope_scaling={"type": "dynamic", "factor": 2.0}),
        r"rotary embedding \(dynamic\) depends on the length",
    ),
    "dynamic rope of one layer type": (
        lambda: tiny_config(
            "gemma3",
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
            },
        ),
        r"rotary embedding \(dynamic\) depends on the length",
    ),
    "linear attention": (
        lambda: Qwen3NextConfig(num_experts=0, num_experts_per_tok=0, shared_expert_intermediate_size=0),
        "'qwen3_next' .* layers of type linear_attention",
    ),
    "linear attention set by hand": (
        lambda: changed(tiny_config("qwen3"), layer_types=["linear_attention", "full_attention"]),
        "layers of type linear_attention",
    ),
    "convolutions": (
        lambda: Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]),
        "layers of type conv",
    ),
    "state layers of a hybrid": (lambda: _hybrid(["mamba", "attention"]), "layers of type linear_attention"),
    "mamba": (lambda: MambaConfig(), "'mamba' is not supported"),
    "falcon mamba": (lambda: FalconMambaConfig(), "'falcon_mamba' is not supported"),
    "mamba and attention": (lambda: BambaConfig(), "'bamba' is not supported"),
    "recurrent": (lambda: RwkvConfig(), "'rwkv' .* carry a state from token to token"),
    "alibi of bloom": (lambda: BloomConfig(), "'bloom' .* attention interface"),
    "alibi of mpt": (lambda: MptConfig(), "'mpt' .* attention interface"),
    "attention of its own": (lambda: FalconConfig(), "'falcon' .* attention interface"),
    "vision of qwen2": (
        lambda: Qwen2VLConfig(),
        "'qwen2_vl' .* multimodal, .* only for gemma3, mistral3, qwen2_5_vl, qwen3_vl; extract the text model",
    ),
    "vision of llama 4": (lambda: Llama4Config(), "'llama4' .* multimodal"),
    "vision without a vision config": (lambda: FuyuConfig(), "'fuyu' .* multimodal"),
    "vision of emu3": (lambda: Emu3Config(), "'emu3' .* multimodal"),
    "weights of GPTQ": (
        lambda: changed(LlamaConfig(), quantization_config={"quant_method": "gptq", "bits": 4}),
        r"its weights are quantized \(gptq\), and only NF4 of bitsandbytes and MXFP4 can be read; give the original model",
    ),
    "weights of 8 bits": (
        lambda: changed(LlamaConfig(), quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        r"its weights are quantized \(bitsandbytes 8-bit\)",
    ),
    "weights of FP4": (
        lambda: changed(
            LlamaConfig(),
            quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "quant_method": "bitsandbytes"},
        ),
        r"its weights are quantized \(bitsandbytes fp4\)",
    ),
    "vision with a text model of experts": (lambda: Qwen3VLMoeConfig(), "'qwen3_vl_moe' .* multimodal"),
}


def _hybrid(layer_types: list[str]) -> GraniteMoeHybridConfig:
    """Make the config of a Granite 4 without experts."""
    return GraniteMoeHybridConfig(
        num_hidden_layers=2,
        layer_types=layer_types,
        num_local_experts=0,
        num_experts_per_tok=0,
        logits_scaling=4.0,
    )


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_is_refused_by_name(config, message):
    with pytest.raises(SaroError, match=message) as caught:
        check_supported(config())
    assert str(caught.value).startswith("model type '")
    assert "\n" not in str(caught.value)


ACCEPTED = {
    **{kind: (lambda kind=kind: tiny_config(kind)) for kind in (*KINDS_OF_MODEL, *KINDS_OF_LOGITS)},
    "rope of llama 3": lambda: tiny_config(
        "llama",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ),
    "yarn": lambda: tiny_config(
        "llama",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ),
    "linear rope": lambda: tiny_config(
        "llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "no softcaps": lambda: changed(tiny_config("gemma3"), final_logit_softcapping=None, attn_logit_softcapping=None),
    "a scale of one": lambda: changed(LlamaConfig(), logit_scale=1.0, logits_scaling=1),
    "cohere": CohereConfig,
    "granite": lambda: GraniteConfig(logits_scaling=8.0),
    "zero experts": lambda: changed(LlamaConfig(), num_local_experts=0, num_experts_per_tok=0),
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "phi3": Phi3Config,
    "smollm3": SmolLM3Config,
    "olmo3": Olmo3Config,
    "gpt2": GPT2Config,
    "ctrl": CTRLConfig,
    "windows in the last layers": lambda: SmolLM3Config(use_sliding_window=True, sliding_window=8),
    "attention layers of a hybrid": lambda: _hybrid(["attention"] * 2),
    "gpt_neox": GPTNeoXConfig,
}


@pytest.mark.parametrize("config", ACCEPTED.values(), ids=ACCEPTED)
def test_is_accepted(config):
    check_supported(config())


def test_a_config_that_a_model_brings_as_code_is_judged_by_its_options():
    class TheirConfig(LlamaConfig):
        model_type = "theirs"

    check_supported(TheirConfig())
    with pytest.raises(SaroError, match=r"'theirs' .* mixture of experts"):
        check_supported(changed(TheirConfig(), n_routed_experts=8))


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (lambda: tiny_config("llama"), None),
        (lambda: tiny_config("mistral"), 8),
        (lambda: tiny_config("mistral", sliding_window=None), None),
        (lambda: tiny_config("gemma3"), 8),
        (lambda: tiny_config("gemma3", layer_types=["full_attention", "full_attention"]), None),
        (lambda: Qwen2Config(use_sliding_window=False, sliding_window=16), None),
        (lambda: Qwen2Config(use_sliding_window=True, sliding_window=16, max_window_layers=2), 16),
    ],
    ids=["llama", "mistral", "mistral without", "gemma3", "gemma3 full", "qwen2 off", "qwen2 on"],
)
def test_the_sliding_window_is_the_one_that_layers_use(config, window):
    assert sliding_window(config()) == window


# Scales and softcaps of logits.


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (CohereConfig(), LogitOptions(scale=0.0625)),
        (GraniteConfig(logits_scaling=8.0), LogitOptions(scale=0.125)),
        (_hybrid(["attention"] * 2), LogitOptions(scale=0.25)),
        (Gemma2Config(), LogitOptions(softcap=30.0)),
        (tiny_config("hyperclovax", logits_scaling=0.125), LogitOptions(scale=0.125)),
        (tiny_config("minicpm3", dim_model_base=4), LogitOptions(scale=0.125)),
        (tiny_config("gemma3 with a softcap", final_logit_softcapping=None), LogitOptions()),
        *((tiny_config(kind), LogitOptions()) for kind in KINDS_OF_MODEL),
    ],
    ids=lambda x: x.model_type if hasattr(x, "model_type") else "",
)
def test_options_of_a_config(config, want):
    assert logit_options(config) == want


@pytest.mark.parametrize("kind", KINDS_OF_LOGITS)
@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("head", ["reference", "tiled-torch"])
def test_packs_equal_the_unmodified_model(tiny_model, kind, method, head):
    policy = load(tiny_model(kind), method)
    policy.head = head
    result = check_packs(policy, DATA)
    assert result.logps < 1e-6
    assert result.layout.control > 1e-2


@pytest.mark.parametrize("kind", KINDS_OF_LOGITS)
def test_without_scale_and_softcap_the_check_fails(tiny_model, kind):
    policy = load(tiny_model(kind))
    policy.logits = LogitOptions()
    with pytest.raises(SaroError, match=r"^packed log-probs differ"):
        check_packs(policy, DATA)


@pytest.mark.parametrize("kind", ["granite", "cohere"])
def test_multiplying_by_a_factor_that_should_divide_fails_the_check(tiny_model, kind):
    policy = load(tiny_model(kind))
    policy.logits = LogitOptions(scale=1 / policy.logits.scale)
    with pytest.raises(SaroError, match=r"^packed log-probs differ"):
        check_packs(policy, DATA)
