"""Loading for full, LoRA and QLoRA training: what is trainable, in which dtype, and one-line errors."""

from __future__ import annotations

import json
import shutil
import time
from datetime import date
from pathlib import Path

import bitsandbytes as bnb
import huggingface_hub
import pytest
import torch
from loaded import CPU, a_pack, load, refused
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import BOS, IM_END, KINDS_OF_MODEL, PAD, random_model, save_tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, CTRLConfig, GPT2Config

from saro.config import DataConfig, ModelConfig
from saro.errors import SaroError
from saro.model.adapter import linear_layers
from saro.model.architectures import dropout_options
from saro.model.attention import native_attention
from saro.model.load import load_policy, resolve_dtype
from saro.model.source import ModelSource, find_model
from saro.runs.finish import save_final

METHODS = ("full", "lora", "qlora")
LINEARS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny Llama's folder, for tests that damage it."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def spoil_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def gradients(policy):
    policy.train()
    policy.zero_grad(set_to_none=True)
    policy(a_pack()).sum().backward()
    return {name: p.grad.clone() for name, p in policy.trainable().items()}


# Trainable parameters.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_trainable_parameters_are_fp32(tiny_model, method, dtype):
    trainable = load(tiny_model("llama"), method, dtype=dtype).trainable()
    assert trainable
    assert {p.dtype for p in trainable.values()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_full_trains_all_parameters(tiny_model, kind):
    policy = load(tiny_model(kind), "full")
    assert set(policy.trainable()) == {name for name, _ in policy.model.named_parameters()}


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_only_adapters_train_and_every_linear_layer_but_the_head_has_one(tiny_model, kind, method):
    policy = load(tiny_model(kind), method)
    expected = {
        f"base_model.model.model.layers.{layer}.{block}.{name}.lora_{matrix}.default.weight"
        for layer in range(2)
        for name in LINEARS
        for block in ["self_attn" if name[0] in "qkvo" else "mlp"]
        for matrix in "AB"
    }
    assert set(policy.trainable()) == expected
    assert sorted(policy.model.peft_config["default"].target_modules) == LINEARS


def test_linear_layers_lists_last_name_parts_without_the_head(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3"))
    assert linear_layers(model) == LINEARS


def test_a_linear_layer_whose_name_is_a_number_has_an_adapter_too(tmp_path):
    """CTRL's MLP is a Sequential. PEFT would find "0" as the first decoder layer too."""
    shape = {"vocab_size": 264, "n_positions": 64, "n_embd": 32, "dff": 64, "n_layer": 2, "n_head": 4}
    random_model(CTRLConfig(**shape)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    policy = load(tmp_path)
    adapted = {name.split(".lora_")[0].split(".h.")[1] for name in policy.trainable()}
    attention = {f"multi_head_attention.{name}" for name in ("Wq", "Wk", "Wv", "dense")}
    assert adapted == {f"{layer}.{name}" for layer in range(2) for name in attention | {"ffn.0", "ffn.2"}}


def test_adapters_have_the_requested_rank_and_alpha(tiny_model):
    policy = load(tiny_model("llama"), lora_rank=3, lora_alpha=12, lora_dropout=0.25)
    config = policy.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (3, 12, 0.25, "none")
    assert {min(p.shape) for p in policy.trainable().values()} == {3}
    assert not any([config.use_dora, config.use_rslora, config.modules_to_save])


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_new_adapters_change_nothing(tiny_model, method):
    policy = load(tiny_model("llama"), method)
    logps = policy(a_pack()).detach()
    with policy.model.disable_adapter():
        assert torch.equal(policy(a_pack()), logps)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_depend_only_on_the_seed(tiny_model, method):
    runs = []
    for seed, noise in ((5, 1), (5, 2), (6, 1)):
        torch.manual_seed(noise)
        runs.append(load(tiny_model("llama"), method, seed).trainable())
    for name, parameter in runs[0].items():
        assert torch.equal(parameter, runs[1][name])
        assert torch.equal(parameter, runs[2][name]) == ("lora_B" in name)


# LoRA targets.


def test_a_target_may_name_one_layer_or_several(tiny_model):
    policy = load(tiny_model("llama"), lora_targets=["q_proj", "mlp.up_proj", "layers.1.mlp.down_proj"])
    adapted = {name.split(".lora_")[0].split(".layers.")[1] for name in policy.trainable()}
    assert adapted == {
        "0.self_attn.q_proj",
        "1.self_attn.q_proj",
        "0.mlp.up_proj",
        "1.mlp.up_proj",
        "1.mlp.down_proj",
    }


@pytest.mark.parametrize("kind", ["llama", "qwen3"], ids=["tied", "untied"])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_embedding_and_head_are_refused_as_targets(tiny_model, kind, target):
    message = refused(tiny_model(kind), "leave it out", lora_targets=["q_proj", target])
    assert message.startswith(f"model.lora_targets: {target} is the embedding or the LM head")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_porj"], r"no linear layer 'q_porj'; did you mean q_proj\?"),
        (["mlp"], "no linear layer 'mlp'"),
        (["input_layernorm"], "no linear layer 'input_layernorm'"),
        (["xyz"], f"no linear layer 'xyz'; valid are {', '.join(LINEARS)}"),
        (["encoder.q_proj"], "no linear layer's name ends with 'encoder.q_proj'"),
        (["layers.2.mlp.up_proj"], "no linear layer's name ends with 'layers.2.mlp.up_proj'"),
        ([], "lora_targets is empty"),
    ],
)
def test_targets_that_match_nothing_are_refused(tiny_model, targets, message):
    assert refused(tiny_model("llama"), message, lora_targets=targets).startswith("model.lora_targets")


def test_adapters_on_a_model_without_linear_layers_are_refused(tmp_path):
    config = GPT2Config(vocab_size=264, n_embd=32, n_layer=1, n_head=4, bos_token_id=BOS, eos_token_id=IM_END)
    save_tiny_model(tmp_path)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert load(tmp_path, "full").trainable()
    refused(tmp_path, "no linear layers for adapters; set --model.method full")


# QLoRA.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_qlora_quantizes_the_decoders_linear_layers_and_nothing_else(tiny_model, kind, dtype):
    lm = load(tiny_model(kind), "qlora", dtype=dtype).causal_lm
    dtype = getattr(torch, dtype)
    quantized = {name for name, layer in lm.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}
    assert {name.replace(".base_layer", "").rpartition(".")[2] for name in quantized} == set(LINEARS)
    assert len(quantized) == 2 * len(LINEARS)
    for name, parameter in lm.named_parameters():
        if name.removesuffix(".weight") in quantized:
            assert parameter.dtype == torch.uint8
            state = parameter.quant_state
            assert (state.quant_type, state.nested, state.dtype) == ("nf4", True, dtype), name
        elif "lora_" not in name:  # embeddings, norms, head: neither quantized nor cast up
            assert parameter.dtype == dtype, name
            assert not parameter.requires_grad
    assert type(lm.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_qlora_computes_in_the_compute_dtype(tiny_model, dtype):
    lm = load(tiny_model("llama"), "qlora", dtype=dtype).causal_lm
    layers = [layer for layer in lm.modules() if isinstance(layer, bnb.nn.Linear4bit)]
    assert {layer.compute_dtype for layer in layers} == {getattr(torch, dtype)}


def test_qlora_keeps_the_tied_head_tied(tiny_model):
    lm = load(tiny_model("llama"), "qlora").causal_lm
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


def test_qlora_is_close_to_the_unquantized_model(tiny_model):
    """NF4 rounds a weight by about a tenth of its spread. A wrong layer would be off by nats in every row."""
    with torch.no_grad():
        exact, rounded = (load(tiny_model("llama"), method)(a_pack()) for method in ("lora", "qlora"))
    assert 1e-3 < (exact - rounded).abs().mean() < 1.0


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_no_layer_repacks_its_weight_for_avx512_bf16(tiny_model, kind):
    modules = list(load(tiny_model(kind), "qlora").modules())
    flags = [m.support_avx512bf16_for_cpu for m in modules if isinstance(m, bnb.nn.Linear4bit)]
    assert flags == [False] * 2 * len(LINEARS)


def evaluate_and_generate(policy):
    policy.eval()
    lm = policy.causal_lm
    with torch.no_grad():
        policy(a_pack((30, 12)))
        policy(a_pack((4,)))
        with native_attention(lm):
            ids = torch.tensor([[60, 61, 62]])
            lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=PAD)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """A model with matrices that are large enough for bitsandbytes to repack them."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    return save_tiny_model(folder, "llama", hidden_size=256, intermediate_size=256, head_dim=64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_bit_equal_before_and_after_evaluation_and_generation(wide_model, method, dtype):
    policy = load(wide_model, method, dtype=dtype)
    before = gradients(policy)
    evaluate_and_generate(policy)
    after = gradients(policy)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="the CPU has no AVX512-BF16")
@pytest.mark.filterwarnings("ignore:bitsandbytes")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_that_flag_bitsandbytes_does_repack(wide_model, dtype):
    """The control for the test above. If this fails, bitsandbytes has fixed it and we can drop the flag."""
    policy = load(wide_model, "qlora", dtype=dtype)
    before = gradients(policy)
    for layer in policy.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = True
    evaluate_and_generate(policy)
    after = gradients(policy)
    errors = [((after[n] - before[n]).norm() / before[n].norm()).item() for n in before if before[n].any()]
    assert max(errors) > 0.01


# Dropout and checkpointing.


@pytest.mark.parametrize(("asked", "rate"), [(False, 0.0), (True, 0.5)])
def test_the_configs_dropout_is_off_unless_asked_for(tmp_path, monkeypatch, asked, rate):
    rates = []
    monkeypatch.setattr(
        "saro.model.load.choose_backend",
        lambda name, device, dtype, config: rates.append(config.attention_dropout) or "sdpa",
    )
    policy = load(save_tiny_model(tmp_path, "llama", attention_dropout=0.5), dropout=asked)
    assert rates == [rate]  # the backend is chosen for the model as it is loaded
    assert {layer.self_attn.attention_dropout for layer in policy.causal_lm.model.layers} == {rate}


@pytest.mark.parametrize("asked", [False, True])
def test_dropout_is_found_under_every_name(tmp_path, asked):
    names = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    config = GPT2Config(vocab_size=264, n_embd=32, n_layer=1, n_head=4, bos_token_id=BOS, eos_token_id=IM_END, **names)
    save_tiny_model(tmp_path)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    rates = [m.p for m in load(tmp_path, "full", dropout=asked).modules() if isinstance(m, nn.Dropout)]
    assert rates
    assert set(rates) == {0.5 if asked else 0.0}


def test_the_adapters_dropout_stays(tiny_model):
    policy = load(tiny_model("llama"), lora_dropout=0.5)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.fill_(0.1)
        policy.train()
        assert not torch.equal(policy(a_pack()), policy(a_pack()))
        policy.eval()
        assert torch.equal(policy(a_pack()), policy(a_pack()))


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_is_on_only_if_asked_for(tiny_model, method, asked):
    lm = load(tiny_model("llama"), method, gradient_checkpointing=asked).causal_lm
    assert lm.is_gradient_checkpointing == asked
    assert all(layer.gradient_checkpointing == asked for layer in lm.model.layers)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_no_bit_of_a_gradient(tiny_model, method):
    plain, recomputed = (
        gradients(load(tiny_model("llama"), method, gradient_checkpointing=asked)) for asked in (False, True)
    )
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


# Precision.


@pytest.mark.parametrize(
    ("method", "dtype", "base", "autocast"),
    [
        ("full", "auto", torch.float32, None),
        ("full", "bfloat16", torch.float32, torch.bfloat16),
        ("lora", "auto", torch.float32, None),
        ("lora", "bfloat16", torch.bfloat16, None),
        ("qlora", "bfloat16", torch.bfloat16, None),
    ],
)
def test_base_and_autocast_have_the_right_dtypes(tiny_model, method, dtype, base, autocast):
    policy = load(tiny_model("llama"), method, dtype=dtype)
    assert policy.causal_lm.get_input_embeddings().weight.dtype == base
    assert policy.autocast == autocast


def test_auto_dtype_is_fp32_on_a_cpu_and_bf16_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("float32", torch.device("cuda")) == torch.float32
    assert resolve_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize("name", ["auto", "bfloat16"])
def test_a_gpu_that_only_emulates_bf16_is_refused(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(
        SaroError,
        match=r"Tesla T4 has no bfloat16, and .* overflow; set --model.dtype float32, which .* tensor cores, .* qlora",
    ) as error:
        resolve_dtype(name, torch.device("cuda"))
    assert "\n" not in str(error.value)


def test_varlen_attention_is_refused_on_a_cpu(tiny_model):
    refused(tiny_model("llama"), "varlen attention needs CUDA and bfloat16", attention="varlen")


# ModelSource.


def test_a_source_knows_the_stop_ids(folder):
    def stop_ids(generation=None, **config):
        path = folder / "generation_config.json"
        path.unlink(missing_ok=True)
        if generation is not None:
            path.write_text(json.dumps(generation))
        saved = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(saved | config))
        return find_model(ModelConfig(name=str(folder))).stop_ids

    assert stop_ids({"eos_token_id": [BOS, IM_END]}) == {BOS, IM_END}
    assert stop_ids({"eos_token_id": BOS}) == {BOS}
    assert stop_ids(None, eos_token_id=BOS) == {BOS}  # from the model's config
    assert stop_ids({"eos_token_id": PAD}, eos_token_id=BOS) == {PAD}  # the one that generate() uses
    assert stop_ids(None, eos_token_id=None) == {IM_END}  # from the tokenizer


def test_finding_a_model_reads_no_weights(folder):
    (folder / "model.safetensors").write_bytes(b"not weights")
    source = find_model(ModelConfig(name=str(folder)))
    assert (source.path, source.config.model_type) == (str(folder), "llama")


def test_the_users_chat_template_replaces_the_models(folder, tmp_path):
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    source = find_model(ModelConfig(name=str(folder)))
    chat = source.chat_format(DataConfig(chat_template=str(tmp_path / "mine.jinja")), date(2026, 1, 2))
    assert chat.tokenizer.chat_template.startswith("{% for m in messages %}[")
    (tmp_path / "marked.jinja").write_text(chat.tokenizer.chat_template, encoding="utf-8-sig")
    marked = source.chat_format(DataConfig(chat_template=str(tmp_path / "marked.jinja")), date(2026, 1, 2))
    assert marked.tokenizer.chat_template.startswith("{% for m in messages %}[")
    (tmp_path / "utf16.jinja").write_text("{{ x }}", encoding="utf-16")
    with pytest.raises(SaroError, match=r"utf16.jinja: is not UTF-8; save it as UTF-8"):
        source.chat_format(DataConfig(chat_template=str(tmp_path / "utf16.jinja")), date(2026, 1, 2))
    with pytest.raises(SaroError, match=r"nowhere.jinja: No such file or directory; give the file of a Jinja template"):
        source.chat_format(DataConfig(chat_template=str(tmp_path / "nowhere.jinja")), date(2026, 1, 2))


# Each thing that can be wrong with a folder gives one line.


def test_a_missing_folder_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "nowhere: no such folder; give a model's folder or its hub name")


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").touch()
    refused(tmp_path / "model.gguf", "model.gguf: no such folder")


def test_a_folder_without_a_model_is_refused(tmp_path):
    refused(tmp_path, r"holds no model \(no config.json\)")


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights; save the model with transformers as safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused(folder, name):
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()
    refused(folder, rf"only pickled weights \({name}\), which can run code; save the model .* as safetensors")


def test_pickled_weights_beside_safetensors_are_not_read(folder):
    (folder / "pytorch_model.bin").write_bytes(b"would not unpickle")
    assert load(folder).trainable()


def test_an_adapter_on_another_adapter_is_refused(folder):
    load(folder).model.save_pretrained(folder)
    refused(folder, "the base of an adapter holds an adapter itself; give the plain model")


def test_a_missing_tokenizer_is_refused(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert refused(folder, r"no tokenizer of this model loads; save it .* \(tokenizer.json, ").startswith(str(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not a valid JSON file"),
        ("{}", "Unrecognized model"),
        ('{"model_type": "lamma"}', "model type `lamma`"),
        ('{"model_type": "llama", "hidden_size": "big"}', "'hidden_size': .*expected int"),
        ('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}', "not a multiple"),
        ('{"model_type": "mixtral"}', "mixture of experts"),
    ],
)
def test_a_wrong_config_is_refused(folder, config, message):
    (folder / "config.json").write_text(config)
    refused(folder, message)


@pytest.mark.parametrize("method", METHODS)
def test_files_with_a_missing_weight_are_refused(folder, method):
    # transformers would fill it with random numbers and continue.
    missing = "model.layers.1.self_attn.q_proj.weight"
    spoil_weights(folder, lambda weights: weights.pop(missing))
    refused(folder, f"no weight of the right shape for {missing}; they are incomplete", method)


@pytest.mark.parametrize("method", ["full", "lora"])  # bitsandbytes takes its shapes from the file
def test_weights_of_another_shape_are_refused(folder, method):
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"intermediate_size": 48}))
    refused(folder, "no weight of the right shape for model.layers.0.mlp.down_proj.weight and 5 others", method)


def test_a_tied_head_need_not_be_in_the_files(folder):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert load(folder, "full").trainable()


@pytest.mark.parametrize("kept", [0, 5, 1000], ids=["empty", "no header", "half"])
def test_a_truncated_file_is_refused(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert refused(folder, "[Ss]afetensors|[Hh]eader|metadata").startswith(str(folder))


@pytest.mark.parametrize("name", ["no-such-org/no-such-model", "no-such-model", "not a name?"])
def test_a_hub_name_without_a_network_is_refused_at_once(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    start = time.perf_counter()
    assert refused(name, "couldn't|Can't|Repo id|offline").startswith(f"{name}: ")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", ["./model", "../model", "~/no-such-model", "/no/such/model", "a/b/c"])
def test_a_name_that_can_only_be_a_path_is_never_looked_up_on_the_hub(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("asked the hub"))
    refused(name, "no such folder")


def test_a_model_without_a_plain_head_is_refused(tiny_model, monkeypatch):
    options = ModelConfig(name=tiny_model("llama"), method="full")
    source = find_model(options)
    assert isinstance(source, ModelSource)
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: nn.Sequential(self.lm_head))
    with pytest.raises(SaroError, match="LM head is a Sequential, not a linear layer"):
        load_policy(source, options, CPU, 0)


def test_peft_itself_loads_what_was_trained(tiny_model, tmp_path):
    policy = load(tiny_model("llama"))
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.normal_(std=0.1)
    policy.model.save_pretrained(tmp_path, save_embedding_layers=False)
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    loaded = PeftModel.from_pretrained(base, tmp_path)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad(), native_attention(policy.causal_lm):
        assert torch.equal(loaded(ids).logits, policy.causal_lm(ids).logits)


def test_the_saved_config_has_the_models_own_dropout_again(tiny_model, tmp_path):
    folder = tmp_path / "model"
    save_tiny_model(folder, attention_dropout=0.25)
    options = ModelConfig(name=str(folder), method="full")
    source = find_model(options)
    policy = load_policy(source, options, torch.device("cpu"), seed=0)
    assert policy.causal_lm.config.attention_dropout == 0
    assert dropout_options(source.config) == {"attention_dropout": 0.25}
    save_final(tmp_path / "final", policy.model, source.tokenizer, dropout_options(source.config))
    assert find_model(ModelConfig(name=str(tmp_path / "final"))).config.attention_dropout == 0.25
