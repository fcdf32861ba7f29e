"""saro_kernels gives the numbers of PEFT's layers, and PEFT's own forward runs wherever ours would not be exact."""

from __future__ import annotations

import pytest
import torch
from loaded import a_pack, load
from peft import LoraConfig, get_peft_model
from tiny import KINDS_OF_MODEL, tiny_config
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import saro.model.fused_lora
from saro.model.architectures import GATED_MLPS, QKV_ATTENTIONS, WITH_LAST_NORM
from saro.model.fused_lora import fuse_lora

pytestmark = pytest.mark.usefixtures("one_thread")


def wake(policy):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return policy


def outcome(policy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    policy.train()
    policy.zero_grad(set_to_none=True)
    logps = policy(a_pack())
    logps.sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in policy.trainable().items()}


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Record the names of our functions as they are called."""
    found: list[str] = []
    for function in ("lora_linear", "lora_linears", "lora_gated_mlp"):
        original = getattr(saro.model.fused_lora, function)

        def counting(*arguments, function=function, original=original, **options):
            found.append(function)
            return original(*arguments, **options)

        monkeypatch.setattr(saro.model.fused_lora, function, counting)
    return found


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_log_probs_and_gradients_equal_those_of_pefts_layers(tiny_model, kind, method, calls):
    logps, gradients = outcome(wake(load(tiny_model(kind), method)))
    assert calls == ["lora_linears", "lora_linear", "lora_gated_mlp"] * 2  # q, k and v; o; the MLP
    expected_logps, expected = outcome(wake(load(tiny_model(kind), method, fused_lora=False)))
    assert len(calls) == 6
    torch.testing.assert_close(logps, expected_logps, rtol=1e-5, atol=1e-5)
    whole, theirs = (torch.cat([g.flatten() for g in of.values()]) for of in (gradients, expected))
    assert (whole - theirs).norm() < 1e-5 * theirs.norm()


def test_in_float64_both_agree_to_the_last_digits(tiny_model):
    runs = [outcome(wake(load(tiny_model("qwen3"), fused_lora=fused)).double()) for fused in (True, False)]
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-11, atol=1e-11)
    for name, gradient in runs[0][1].items():
        torch.testing.assert_close(gradient, runs[1][1][name], rtol=1e-7, atol=1e-9)


FAMILIES = {
    "Llama": LlamaConfig,
    "Mistral": MistralConfig,
    "Qwen2": Qwen2Config,
    "Qwen3": Qwen3Config,
    "SmolLM3": SmolLM3Config,
    "Gemma": GemmaConfig,
    "Gemma2": Gemma2Config,
    "Gemma3": Gemma3TextConfig,
}


def test_the_families_are_those_that_are_computed_in_one_piece():
    assert {name + "MLP" for name in FAMILIES} == GATED_MLPS
    assert {name + "Attention" for name in FAMILIES} == QKV_ATTENTIONS
    assert {name + "MLP" for name in FAMILIES if hasattr(decoder_layer(name), "post_feedforward_layernorm")} == (
        WITH_LAST_NORM
    )


def decoder_layer(family: str) -> torch.nn.Module:
    config = FAMILIES[family](
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config).get_decoder().layers[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_projects_its_input_to_queries_keys_and_values_once_each(family):
    layer = decoder_layer(family)
    assert type(layer.self_attn).__name__ == f"{family}Attention"
    inputs = []
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(layer.self_attn, name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.append((name, *args))
        )
    x = torch.randn(1, 3, 16)
    layer.self_attn(x, position_embeddings=(torch.ones(1, 3, 8), torch.zeros(1, 3, 8)), attention_mask=None)
    assert sorted(name for name, _ in inputs) == ["k_proj", "q_proj", "v_proj"]
    assert all(seen is x for _, seen in inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gated_mlp_is_its_activation_times_up_through_down(family):
    mlp = decoder_layer(family).mlp
    assert type(mlp).__name__ == f"{family}MLP"
    x = torch.randn(3, 16)
    assert torch.equal(mlp(x), mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)))


def test_a_projection_that_attention_asks_for_another_input_computes_that_one(tiny_model, calls):
    """What was computed for the input is dropped, also if attention fails."""
    policy = wake(load(tiny_model()))
    attention = policy.causal_lm.get_decoder().layers[0].self_attn
    x, other = torch.randn(1, 30, 32), torch.randn(1, 30, 32)
    asked = {}

    def forward(self, hidden_states):
        asked["k"] = self.k_proj(other)
        asked["q"] = self.q_proj(hidden_states)
        raise KeyError

    plain = type(attention).forward
    type(attention).forward = forward
    try:
        with pytest.raises(KeyError):
            attention(x)
    finally:
        type(attention).forward = plain
    assert calls == ["lora_linears", "lora_linear"]
    assert torch.equal(asked["k"], attention.k_proj(other))
    assert torch.equal(asked["q"], attention.q_proj(x))
    assert not any("saro_projected" in module.__dict__ for module in policy.modules())


def test_projections_are_computed_one_by_one_if_one_of_them_has_no_adapter(tiny_model, calls):
    outcome(load(tiny_model(), lora_targets=["q_proj", "v_proj"]))
    assert calls == ["lora_linear"] * 4


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_recomputed_mlp_is_computed_by_chunks(tiny_model, kind, monkeypatch):
    """In a layer with a norm after the MLP it is recomputed as a whole: chunks would then compute it three times."""
    options = []
    original = saro.model.fused_lora.lora_gated_mlp

    def recording(*arguments, chunk_rows, **others):
        options.append(chunk_rows)
        return original(*arguments, chunk_rows=chunk_rows, **others)

    monkeypatch.setattr(saro.model.fused_lora, "lora_gated_mlp", recording)
    # 27 tokens, 5 tensors of 64 numbers of 4 bytes: three chunks of at most 10 rows, and of equal size.
    monkeypatch.setattr(saro.model.fused_lora, "_CHUNK_BYTES", 10 * 64 * 4 * 5)
    expected = outcome(wake(load(tiny_model(kind))))
    assert options == [None, None]
    logps, gradients = outcome(wake(load(tiny_model(kind), gradient_checkpointing=True)))
    assert options[2:] == ([9] * 4 if kind == "llama" else [None] * 4)
    torch.testing.assert_close(logps, expected[0], rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-4, atol=1e-4)


def test_a_layer_is_fused_even_if_its_neighbours_have_no_adapter(tiny_model, calls):
    outcome(load(tiny_model(), lora_targets=["q_proj", "down_proj"]))
    assert calls == ["lora_linear"] * 4


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_disabled_adapter_gives_the_base(tiny_model, method, calls):
    policy = wake(load(tiny_model(), method))
    with torch.no_grad(), policy.model.disable_adapter():
        base = policy(a_pack())
    assert not calls
    plain = load(tiny_model(), method, fused_lora=False)
    with torch.no_grad():
        torch.testing.assert_close(base, plain(a_pack()), rtol=1e-5, atol=1e-5)


def test_a_merged_adapter_is_not_added_twice(tiny_model, calls):
    policy = wake(load(tiny_model()))
    with torch.no_grad():
        apart = policy(a_pack())
        calls.clear()
        policy.model.merge_adapter()
        merged = policy(a_pack())
    assert not calls
    torch.testing.assert_close(merged, apart, rtol=1e-4, atol=1e-4)


def test_dropout_is_left_to_peft_while_training(tiny_model, calls):
    policy = load(tiny_model(), lora_dropout=0.5)
    outcome(policy)
    assert not calls
    with torch.no_grad():
        policy.eval()(a_pack())
    assert calls


def test_a_generation_step_is_left_to_peft(tiny_model, calls):
    policy = load(tiny_model()).eval()
    layer = policy.causal_lm.get_decoder().layers[0].mlp
    with torch.no_grad():
        layer(torch.zeros(1, 3, 32))
        assert not calls
        layer(torch.zeros(1, 30, 32))
    assert calls == ["lora_gated_mlp"]


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=lambda o: next(iter(o)))
def test_adapters_that_are_not_plain_lora_are_left_to_peft(options):
    model = AutoModelForCausalLM.from_config(tiny_config())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **options))
    assert fuse_lora(adapted) == 0


def test_two_active_adapters_are_left_to_peft(tiny_model, calls):
    policy = load(tiny_model())
    policy.model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    policy.model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        policy.causal_lm.get_decoder().layers[0].self_attn.q_proj(torch.zeros(1, 30, 32))
    assert not calls


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_model, method):
    plain = outcome(wake(load(tiny_model(), method)))[1]
    again = outcome(wake(load(tiny_model(), method, gradient_checkpointing=True)))[1]
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_bfloat16_stays_within_the_error_budget(tiny_model):
    """The error against the same weights in float64 is at most twice that of PEFT's layers."""
    truth, errors = None, []
    for options in ({"fused_lora": False, "dtype": "float32"}, {}, {"fused_lora": False}):
        policy = wake(load(tiny_model("qwen3"), **{"dtype": "bfloat16"} | options))
        if truth is None:
            with torch.no_grad():
                for parameter in policy.causal_lm.parameters():
                    if not parameter.requires_grad:
                        parameter.copy_(parameter.bfloat16())
            policy = policy.double()
        gradients = torch.cat([g.double().flatten() for g in outcome(policy)[1].values()])
        truth = gradients if truth is None else truth
        errors.append(((gradients - truth).norm() / truth.norm()).item())
    _, ours, theirs = errors
    assert ours <= 2 * theirs
