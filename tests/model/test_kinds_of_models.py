"""Multimodal models, mixtures of experts, LongRoPE and weights of 4 bits: trained exactly, exported whole, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from loaded import CPU, DATA, a_pack, examples_of, load, refused
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import (
    IM_END,
    KINDS_OF_MIXTURE,
    KINDS_OF_WRAPPER,
    Training,
    random_model,
    tiny_config,
    tiny_tokenizer,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CTRLConfig,
    GPT2Config,
    GPTBigCodeConfig,
    Mxfp4Config,
    OPTConfig,
)

from saro.checks.check_attention import check_attention
from saro.checks.check_masks import check_masks
from saro.checks.check_packs import check_packs
from saro.config import ModelConfig
from saro.data.dataset import ExampleSet
from saro.data.packs import lay_out
from saro.errors import SaroError
from saro.model.architectures import OUTSIDE_TEXT_MODEL, auto_class, most_positions, token_limits
from saro.model.cached_attention import KeyValueCache, continue_rows, generating, read_prompts
from saro.model.load import load_plain, load_policy
from saro.model.merge import merge
from saro.model.policy import Policy
from saro.model.score import score_natively, score_trees
from saro.model.source import find_model
from saro.runs.finish import save_final
from saro.tools.export import Options, export

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = (*KINDS_OF_WRAPPER, *KINDS_OF_MIXTURE, "phi4_mini")
IDS = torch.arange(5, 45)[None]
CHAT = SimpleNamespace(stop_ids=frozenset({IM_END}))


def ended_examples(*lengths: int) -> ExampleSet:
    """Make random records that end with their stop token."""
    data = examples_of(*lengths)
    data.tokens[data.offsets[1:] - 1] = IM_END
    return data


def quantized(double: bool, dtype: torch.dtype = torch.bfloat16, kind: str = "llama") -> BitsAndBytesConfig:
    """Return the config with which a repository of 4-bit weights was made."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", OUTSIDE_TEXT_MODEL] if kind in KINDS_OF_WRAPPER else None,
    )


def save_quantized(source: str, folder: Path, double: bool, kind: str = "llama") -> Path:
    """Save a tiny model as such repositories are: quantized by transformers, with its tokenizer."""
    config = AutoConfig.from_pretrained(source)
    model = auto_class(config).from_pretrained(
        source, quantization_config=quantized(double, kind=kind), dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def step(folder: str | Path, records: str, output: Path, runtime, method: str) -> Training:
    """Check packs as a run does, and train one step."""
    training = Training.on(str(folder), records, output, model={"method": method}, pack_tokens=512)
    check_packs(training.policy, training.data)
    training.fit(runtime, 1)
    assert any(p.any() for name, p in training.policy.trainable().items() if "lora_B" in name)
    return training


# One step with adapters, then the same model in PEFT and, merged, in transformers.


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_exact_packs_changes_only_the_text_model_and_is_exported_whole(
    tiny_model, records_file, examples, runtime, tmp_path, kind, method
):
    folder = Path(tiny_model(kind))
    config = AutoConfig.from_pretrained(folder)
    policy = step(folder, records_file(examples[:8]), tmp_path / "run", runtime, method).policy.eval()
    adapted = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in policy.trainable()}
    assert all(".self_attn." in name or kind not in KINDS_OF_MIXTURE for name in adapted)
    assert all(name.startswith("model.language_model.") or kind not in KINDS_OF_WRAPPER for name in adapted)
    trees = examples_of(30, 18).trees(range(2), 512)
    trained = score_trees(policy, trees, 512)
    # PEFT loads the adapter on the unmodified base.
    save_final(tmp_path / "final", policy.model, tiny_tokenizer())
    nf4 = {"quantization_config": quantized(True, torch.float32, kind)} if method == "qlora" else {}
    base = auto_class(config).from_pretrained(folder, dtype=torch.float32, **nf4)
    for layer in base.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    adapted_base = PeftModel.from_pretrained(base, tmp_path / "final")
    torch.testing.assert_close(score_natively(adapted_base, trees), trained, rtol=0, atol=1e-4)
    # transformers alone loads the merged model, as the class that it was.
    merged = merge(policy, find_model(ModelConfig(name=str(folder))).config, torch.float32)
    save_final(tmp_path / "merged", merged, tiny_tokenizer())
    whole, before = (auto_class(config).from_pretrained(f, dtype=torch.float32) for f in (tmp_path / "merged", folder))
    assert type(whole) is type(before)
    torch.testing.assert_close(score_natively(whole, trees), trained, rtol=0, atol=1e-4)
    quantized_too = "model.language_model." if kind in KINDS_OF_WRAPPER else "model."
    old = before.state_dict()
    for name, weight in whole.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in adapted:
            assert not torch.equal(weight, old[name]), name
        elif method == "lora" or not (name.startswith(quantized_too) and "_proj.weight" in name):
            assert torch.equal(weight, old[name]), name


@pytest.mark.parametrize("kind", ["gemma3 with vision", "qwen3_moe", "gpt_oss"])
def test_recomputed_layers_change_no_bit_of_a_gradient(tiny_model, kind):
    gradients = []
    for asked in (False, True):
        policy = load(tiny_model(kind), gradient_checkpointing=asked).train()
        assert "2 of 2 layers recomputed" in policy.summary() or not asked
        policy(a_pack()).sum().backward()
        gradients.append({name: p.grad for name, p in policy.trainable().items()})
    plain, recomputed = gradients
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


# Multimodal models.


@pytest.mark.parametrize("kind", KINDS_OF_WRAPPER)
def test_full_fine_tuning_trains_the_text_model_and_the_head_only(tiny_model, kind):
    policy = load(tiny_model(kind), "full")
    text = {f"model.language_model.{name}" for name, _ in policy.causal_lm.get_decoder().named_parameters()}
    names = {name for name, _ in policy.causal_lm.named_parameters()}
    assert set(policy.trainable()) == text | ({"lm_head.weight"} & names)
    check_packs(policy, DATA)


def test_gemma_3_reads_a_text_as_with_token_types_of_text(tiny_model):
    """Its image tokens see each other in both directions. A text has none, so that token types change nothing."""
    model = auto_class(tiny_config("gemma3 with vision")).from_pretrained(tiny_model("gemma3 with vision"))
    with torch.no_grad():
        plain, typed = (model(IDS, token_type_ids=types).logits for types in (None, torch.zeros_like(IDS)))
    assert torch.equal(plain, typed)


def test_the_logits_of_a_multimodal_model_are_not_capped_as_transformers_does_not(tmp_path):
    config = tiny_config("gemma3 with vision")
    config.text_config.final_logit_softcapping = 3.0
    random_model(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    check_packs(load(tmp_path), DATA)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_in_time_height_and_width_are_those_of_the_text(tiny_model, kind):
    model = auto_class(tiny_config(kind)).from_pretrained(tiny_model(kind))
    with torch.no_grad():
        own = model(IDS).logits
        plain = model(IDS, position_ids=torch.arange(IDS.shape[1])[None]).logits
    assert torch.equal(own, plain)


@pytest.mark.parametrize("kind", KINDS_OF_WRAPPER)
def test_a_record_with_the_token_of_an_image_is_refused(tiny_model, kind):
    limits = token_limits(AutoConfig.from_pretrained(tiny_model(kind)))
    assert 263 in limits.placeholders
    data = ended_examples(12, 20)
    data.tokens[15] = 263
    with pytest.raises(
        SaroError, match=r"record r1: holds the token 263, which stands for an image or a video; .* text only"
    ):
        check_masks(data, CHAT, [], limits)


def test_an_export_of_a_multimodal_run_has_the_processor_and_loads_as_the_class_that_it_was(
    finished_run, tiny_model, tmp_path
):
    base = Path(tiny_model("qwen3_vl"))
    (base / "preprocessor_config.json").write_text('{"patch_size": 8}')
    line = export(Options(str(finished_run("lora", "qwen3_vl")), merge=True, output=str(tmp_path / "out")), print)
    assert "AutoModelForImageTextToText.from_pretrained" in line
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"patch_size": 8}'
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        "Qwen3VLForConditionalGeneration"
    ]
    line = export(Options(str(finished_run("lora", "qwen3_vl")), output=str(tmp_path / "adapter")), print)
    assert f"PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained({str(base)!r}), " in line


# LongRoPE.


def test_a_pack_may_be_longer_than_the_length_up_to_which_longrope_has_its_short_factors(tiny_model):
    limits = token_limits(AutoConfig.from_pretrained(tiny_model("phi4_mini")))
    data = ended_examples(limits.longest, limits.longest - 1)
    check_masks(data, CHAT, [], limits)
    policy = load(tiny_model("phi4_mini")).eval()
    trees = data.trees(range(2), 2 * limits.longest)
    assert lay_out(trees).tokens > limits.longest
    plain = AutoModelForCausalLM.from_pretrained(tiny_model("phi4_mini"))
    own = score_natively(plain, trees)
    torch.testing.assert_close(score_trees(policy, trees, 2 * limits.longest), own, rtol=0, atol=1e-4)
    plain.config.rope_parameters["long_factor"] = plain.config.rope_parameters["short_factor"]
    assert torch.equal(score_natively(plain, trees), own)


@pytest.mark.parametrize("config", [GPT2Config, GPTBigCodeConfig, OPTConfig, CTRLConfig])
def test_a_record_longer_than_a_table_of_positions_is_refused_by_its_name(config):
    sizes = {"hidden_size": 32, "ffn_dim": 32, "dff": 32, "word_embed_proj_dim": 32}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4}
    config = config(vocab_size=264, max_position_embeddings=64, **sizes)
    limits = token_limits(config)
    policy = Policy(AutoModelForCausalLM.from_config(config)).eval()
    # The last token of a sequence is not read.
    data = ended_examples(12, limits.longest)
    check_masks(data, CHAT, [], limits)
    policy(a_pack((12, limits.longest + 1)))
    message = "65 tokens, and beyond 64 this model's table of positions has no entry; leave "
    with pytest.raises(SaroError, match=f"^record r1: has {message}out longer records$"):
        check_masks(ended_examples(12, limits.longest + 1), CHAT, [], limits)
    with pytest.raises(SaroError, match=f"^a sequence has {message}it out$"):
        policy(a_pack((12, limits.longest + 2)))


def test_a_record_beyond_that_length_is_refused_by_its_name(tiny_model):
    config = AutoConfig.from_pretrained(tiny_model("phi4_mini"))
    limits = token_limits(config)
    with pytest.raises(
        SaroError, match=rf"record r1: has {limits.longest + 1} tokens, and beyond {limits.longest} .*longrope"
    ):
        check_masks(ended_examples(12, limits.longest + 1), CHAT, [], limits)
    assert most_positions(config) == limits.longest
    policy = load(tiny_model("phi4_mini"))
    with pytest.raises(SaroError, match=rf"a sequence has {limits.longest + 1} tokens, and beyond {limits.longest} "):
        policy(a_pack((12, limits.longest + 2)))


# Mixtures of experts.


@pytest.mark.parametrize("kind", KINDS_OF_MIXTURE)
def test_a_mixture_says_what_is_frozen_and_is_not_trained_as_a_whole(tiny_model, kind):
    assert "experts and router frozen and without their auxiliary loss" in load(tiny_model(kind)).summary()
    refused(
        tiny_model(kind), "mixture of experts, whose router needs an auxiliary loss .* set --model.method lora", "full"
    )
    refused(tiny_model(kind), "no linear layer 'gate_proj'", lora_targets=["gate_proj"])


@pytest.mark.parametrize("kind", KINDS_OF_MIXTURE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packs_of_a_mixture_are_exact_in_half_precision_too_where_roundings_choose_experts(tiny_model, kind, dtype):
    policy = load(tiny_model(kind), dtype=dtype)
    routers = [module.top_k for module in policy.modules() if hasattr(module, "top_k")]
    check_packs(policy, examples_of(61, 42, 64))
    assert [module.top_k for module in policy.modules() if hasattr(module, "top_k")] == routers


def test_a_sink_that_is_left_out_or_too_large_is_noticed(tiny_model, monkeypatch):
    policy = load(tiny_model("gpt_oss"))
    check_attention(policy, DATA.trees(range(2), 512))
    import saro.model.attention as attention

    exact = attention._attend_with_sinks
    for change in (1e-3, -torch.inf):
        monkeypatch.setattr(
            attention, "_attend_with_sinks", lambda *x, sinks, change=change, **y: exact(*x, sinks=sinks + change, **y)
        )
        with pytest.raises(SaroError, match="attention of packs is wrong on this machine"):
            check_attention(policy, DATA.trees(range(2), 512))


def test_experts_in_mxfp4_are_dequantized_as_by_transformers_and_exported_so(
    tiny_model, records_file, examples, runtime, tmp_path
):
    folder = Path(shutil.copytree(tiny_model("gpt_oss"), tmp_path / "base"))
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = weights.pop(name).shape
        blocks = (experts, outer, inner // 32, 16)
        weights[f"{name}_blocks"] = torch.randint(256, blocks, generator=generator, dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.randint(122, 126, blocks[:3], generator=generator, dtype=torch.uint8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "experts in MXFP4, .* set --model.method lora", "qlora")
    policy = step(folder, records_file(examples[:8]), tmp_path / "run", runtime, "lora").policy.eval()
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    ours = policy.causal_lm.state_dict()
    experts = {name: weight for name, weight in theirs.state_dict().items() if ".experts." in name}
    assert len(experts) == 8
    assert all(torch.equal(ours[name], weight) for name, weight in experts.items())
    trees = examples_of(30, 18).trees(range(2), 512)
    trained = score_trees(policy, trees, 512)
    merged = merge(policy, find_model(ModelConfig(name=str(folder))).config, torch.float32)
    save_final(tmp_path / "merged", merged, tiny_tokenizer())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(score_natively(plain, trees), trained, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen2_5_vl"])
def test_text_is_continued_with_the_models_own_log_probs(tiny_model, kind):
    source = find_model(ModelConfig(name=tiny_model(kind)))
    policy = load_plain(source, ModelConfig(name=tiny_model(kind)), CPU, torch.float32)
    model = auto_class(source.config).from_pretrained(
        tiny_model(kind), dtype=torch.float32, attn_implementation="eager"
    )
    prompts = [IDS[0, :20].tolist(), IDS[0, 10:22].tolist()]
    cache = KeyValueCache(2, torch.float32)
    with generating(policy):
        logits = [read_prompts(policy, prompts, cache, range(2)), continue_rows(policy, cache, [50, 51], [20, 12])]
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            own = model(torch.tensor([[*prompt, 50 + row]])).logits[0, -2:]
        torch.testing.assert_close(torch.stack([x[row] for x in logits]), own, rtol=0, atol=1e-4)


# Weights of 4 bits.


@pytest.fixture(scope="module")
def four_bits(tiny_model, tmp_path_factory):
    """Return a function that gives the folder of a model that was saved in 4 bits. Each is made once."""
    made: dict[tuple[str, bool], Path] = {}

    def get(kind: str = "llama", double: bool = True) -> Path:
        if (kind, double) not in made:
            folder = tmp_path_factory.mktemp("four_bits") / "model"
            made[kind, double] = save_quantized(tiny_model(kind), folder, double, kind)
        return made[kind, double]

    return get


@pytest.mark.parametrize("kind", ["llama", "gemma3 with vision"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_saved_4_bit_weights_are_those_that_transformers_loads(four_bits, kind, double):
    folder = four_bits(kind, double)
    names = set(load_file(folder / "model.safetensors"))
    assert any(name.endswith("q_proj.weight.quant_state.bitsandbytes__nf4") for name in names)
    assert any(name.endswith(".nested_absmax") for name in names) == double
    ours = load(folder, "qlora", dtype="bfloat16").causal_lm
    others = {p.dtype for p in ours.parameters() if not isinstance(p, bnb.nn.Params4bit)}
    assert others == {torch.bfloat16, torch.float32}  # the base's, and the adapters'
    theirs = auto_class(ours.config).from_pretrained(folder, device_map={"": "cpu"})
    found = 0
    for name, layer in theirs.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            own = ours.get_submodule(name)
            own = getattr(own, "base_layer", own)
            assert own.compute_dtype == torch.bfloat16
            expected = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert torch.equal(dequantize_4bit(own.weight.data, own.weight.quant_state), expected)
            found += 1
    assert found == 14


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_training_on_saved_4_bit_weights_is_merged_into_them_dequantized(
    four_bits, records_file, examples, runtime, tmp_path, double
):
    folder = four_bits("llama", double)
    policy = step(folder, records_file(examples[:8]), tmp_path / "run", runtime, "qlora").policy.eval()
    trees = examples_of(30, 18).trees(range(2), 512)
    trained = score_trees(policy, trees, 512)
    merged = merge(policy, find_model(ModelConfig(name=str(folder))).config, torch.float32)
    save_final(tmp_path / "merged", merged, tiny_tokenizer())
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(score_natively(plain, trees), trained, rtol=0, atol=1e-4)


def test_an_export_of_a_run_on_4_bit_weights_is_dequantized_and_never_original(
    four_bits, recipes, rw_arguments, tmp_path
):
    done = recipes.run(*rw_arguments(model_name=four_bits(), model_method="qlora"))
    assert done.code == 0, done.err
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    with pytest.raises(SaroError, match="was saved in 4 bits and holds no original weights; leave --into original out"):
        export(Options(run, merge=True, into="original", output=out), print)
    assert "model in bfloat16" in export(Options(run, merge=True, output=out), print)
    assert type(AutoModelForCausalLM.from_pretrained(out).model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_ranks_cannot_share_4_bit_weights_that_are_stored_as_integers(four_bits):
    options = ModelConfig(name=str(four_bits()), method="qlora")
    with pytest.raises(SaroError, match=r"stored as uint8, which ranks cannot share; set --train.shard none, or give"):
        load_policy(find_model(options), options, CPU, 0, mesh=SimpleNamespace())


def test_4_bit_weights_are_not_trained_as_a_whole(four_bits):
    refused(four_bits(), "holds 4-bit weights, which only adapters can be trained on; set --model.method qlora", "full")
