"""liger-kernel's layers are put in and taken out completely, refused with a reason, and part of the reference's key."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from loaded import a_pack, load
from tiny import save_tiny_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

import saro.model.liger as liger
import saro.model.load
from saro.config import ModelConfig
from saro.errors import SaroError
from saro.model.liger import choose_liger, use_liger, uses_liger
from saro.model.load import load_policy
from saro.model.source import find_model
from saro.model.unmodified import own_layers
from saro.train.reference import cache_key

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def own_rotary(tiny_model) -> Iterator[None]:
    from transformers.models.gemma3 import modeling_gemma3
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen3 import modeling_qwen3

    files = (modeling_llama, modeling_qwen3, modeling_gemma3)
    before = [file.apply_rotary_pos_emb for file in files]
    yield
    for file, rotary in zip(files, before, strict=True):
        file.apply_rotary_pos_emb = rotary


@pytest.fixture
def anywhere(monkeypatch) -> None:
    """Pretend that this is a GPU: the layers are put in, although they could not run here."""
    monkeypatch.setattr(liger, "why_not_liger", lambda model_type, device: None)


def rotary(model: PreTrainedModel) -> str:
    return sys.modules[type(model).__module__].apply_rotary_pos_emb.__module__


def ligers(model: torch.nn.Module) -> list[str]:
    return sorted({module._get_name() for module in model.modules() if liger.is_ligers(module)})


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("llama", ["LigerRMSNorm", "LigerSwiGLUMLP"]),
        ("qwen3", ["LigerRMSNorm", "LigerSwiGLUMLP"]),
        ("gemma3", ["LigerGEGLUMLP", "LigerRMSNorm"]),
    ],
)
def test_liger_replaces_norms_gated_mlp_and_rotary_embedding(tiny_model, anywhere, kind, layers):
    lm = load(tiny_model(kind), "full", liger=True).causal_lm
    assert ligers(lm) == layers
    assert rotary(lm).startswith("liger_kernel.")
    assert uses_liger(lm)


def test_the_loss_stays_ours(tiny_model, anywhere):
    lm = load(tiny_model(), "full", liger=True).causal_lm
    assert "forward" not in lm.__dict__
    assert type(lm).forward.__module__.startswith("transformers.")


def test_a_fused_mlp_is_ours_and_any_other_is_ligers(tiny_model, anywhere):
    policy = load(tiny_model(), liger=True)
    assert ligers(policy.model) == ["LigerRMSNorm"]
    for options in ({"fused_lora": False}, {"lora_dropout": 0.1}):
        assert ligers(load(tiny_model(), liger=True, **options).model) == ["LigerRMSNorm", "LigerSwiGLUMLP"]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_transformers_own_layers_compute_inside(tiny_model, anywhere, kind, method):
    expected = load(tiny_model(kind), method, fused_lora=False, liger=False)(a_pack())
    policy = load(tiny_model(kind), method, liger=True)
    lm, layers = policy.causal_lm, ligers(policy.model)
    with own_layers(lm):
        assert not uses_liger(lm)
        assert rotary(lm).startswith("transformers.")
        assert torch.equal(policy(a_pack()), expected)
    assert ligers(policy.model) == layers
    assert rotary(lm).startswith("liger_kernel.")


def test_another_model_of_the_same_type_keeps_its_own_norms_and_mlp(tiny_model, anywhere):
    load(tiny_model(), "full", liger=True)
    other = load(tiny_model(), "full", liger=False).causal_lm
    assert ligers(other) == []
    assert not any(type(module).__module__.startswith("liger_kernel.") for module in other.modules())


def test_ligers_layers_are_put_back_after_an_error(tiny_model, anywhere):
    lm = load(tiny_model(), "full", liger=True).causal_lm
    with pytest.raises(KeyError), own_layers(lm):
        raise KeyError
    assert uses_liger(lm)
    assert rotary(lm).startswith("liger_kernel.")


def test_it_nests_with_pefts_own_layers(tiny_model, anywhere):
    expected = load(tiny_model(), fused_lora=False, liger=False)(a_pack())
    policy = load(tiny_model(), liger=True)
    with own_layers(policy.causal_lm):
        assert torch.equal(policy(a_pack()), expected)


def test_a_model_without_ligers_layers_is_left_alone(tiny_model):
    policy = load(tiny_model(), "full")
    expected = policy(a_pack())
    with own_layers(policy.causal_lm):
        assert torch.equal(policy(a_pack()), expected)
    assert not uses_liger(policy.causal_lm)


def test_the_reference_is_scored_again_with_ligers_layers(tiny_model, anywhere):
    source = find_model(ModelConfig(name=tiny_model()))
    keys = [
        cache_key(load_policy(source, ModelConfig(name=tiny_model(), method="lora", liger=on), CPU, 0), source, CPU)
        for on in (False, True)
    ]
    assert "liger-kernel" in keys[1]["versions"]
    assert "liger-kernel" not in keys[0]["versions"]


def test_without_cuda_liger_is_refused_before_the_weights_are_read(tiny_model, monkeypatch):
    monkeypatch.setattr(saro.model.load, "_load_base", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(SaroError, match=r"CUDA only; leave --model.liger out"):
        load(tiny_model(), liger=True)


@pytest.mark.parametrize(("model_type", "device"), [("llama", CPU), ("gpt_neox", CUDA)])
def test_where_liger_cannot_run_it_is_left_out_unless_it_was_asked_for(model_type, device):
    assert not choose_liger(None, model_type, device)
    with pytest.raises(SaroError, match=r"leave --model\.liger out"):
        choose_liger(True, model_type, device)


def test_liger_is_left_out_if_the_user_says_so():
    assert not choose_liger(False, "llama", CUDA)


def test_without_an_answer_a_model_with_its_own_code_is_left_alone(tiny_model, anywhere, monkeypatch):
    monkeypatch.setattr(liger, "brings_own_code", lambda model: True)
    assert not uses_liger(load(tiny_model(), "full").causal_lm)


def test_without_an_answer_liger_is_used_where_it_can_be(tiny_model, anywhere):
    policy = load(tiny_model(), "full")
    assert uses_liger(policy.causal_lm)
    assert policy.summary().endswith(", layers of liger-kernel")


def test_if_liger_is_missing_the_error_says_how_to_install_it(monkeypatch):
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(liger, "version", missing)
    with pytest.raises(SaroError, match=r"pip install liger-kernel$"):
        choose_liger(True, "llama", CUDA)


def test_a_version_that_is_incompatible_with_transformers_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(SaroError, match=r"^--model.liger: .*liger_kernel"):
        choose_liger(True, "llama", CUDA)


def test_a_type_whose_layers_cannot_be_imported_is_left_alone_unless_liger_was_asked_for(
    tiny_model, anywhere, monkeypatch
):
    def broken(model: PreTrainedModel, **options: bool) -> None:
        raise ImportError("cannot import name 'LigerOutput'")

    monkeypatch.setattr("liger_kernel.transformers._apply_liger_kernel_to_instance", broken)
    lm = load(tiny_model(), "full").causal_lm
    assert not uses_liger(lm)
    assert rotary(lm).startswith("transformers.")
    with pytest.raises(SaroError, match=r"^--model\.liger: cannot import name 'LigerOutput'; leave it out$"):
        load(tiny_model(), "full", liger=True)


def test_a_model_with_its_own_code_is_refused_and_transformers_stays_unchanged(tiny_model):
    class OwnLlama(LlamaForCausalLM):
        pass

    before = dict(vars(modeling_llama))
    model = OwnLlama(LlamaConfig.from_pretrained(tiny_model()))
    with pytest.raises(SaroError, match=r"OwnLlama brings its own code; leave --model.liger out"):
        use_liger(model)
    assert vars(modeling_llama) == before


@pytest.mark.parametrize(("kind", "option"), [("llama", "hidden_act"), ("gemma3", "hidden_activation")])
def test_an_mlp_with_another_activation_keeps_transformers_forward(tmp_path, anywhere, kind, option):
    lm = load(str(save_tiny_model(tmp_path, kind, **{option: "gelu"})), "full", liger=True).causal_lm
    assert ligers(lm) == ["LigerRMSNorm"]
    mlp = lm.model.layers[0].mlp
    assert type(mlp).__name__ in repr(mlp)
    x = torch.randn(2, 32)
    assert torch.equal(mlp(x), mlp.down_proj(torch.nn.functional.gelu(mlp.gate_proj(x)) * mlp.up_proj(x)))


def test_a_model_type_that_liger_does_not_know_is_refused():
    with pytest.raises(SaroError, match="no layers for model type 'gpt_neox'"):
        choose_liger(True, "gpt_neox", CUDA)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_moe"])
def test_layers_of_multimodal_models_and_mixtures_stay_those_of_transformers(kind):
    assert not choose_liger(None, kind, CUDA)
    with pytest.raises(SaroError, match=f"not used for model type '{kind}'; leave --model.liger out"):
        choose_liger(True, kind, CUDA)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_model_types_that_liger_knows_are_accepted(kind):
    assert choose_liger(True, kind, CUDA)
    assert choose_liger(None, kind, CUDA)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="liger-kernel runs on CUDA only")
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_on_a_gpu_log_probs_and_gradients_equal_those_of_transformers(tiny_model, kind, method):
    runs = []
    for on in (False, True):
        options = ModelConfig(name=tiny_model(kind), method=method, dtype="float32", liger=on)
        policy = load_policy(find_model(options), options, CUDA, 0)
        logps = policy(a_pack().to(CUDA))
        logps.sum().backward()
        runs.append((logps.detach(), torch.cat([p.grad.flatten() for p in policy.trainable().values()])))
    (logps, gradients), (ligers_logps, ligers_gradients) = runs
    torch.testing.assert_close(ligers_logps, logps, rtol=1e-5, atol=1e-5)
    assert (ligers_gradients - gradients).norm() < 1e-4 * gradients.norm()
