"""A merged model is the dequantized base plus the adapter, rounded once."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from loaded import CPU, load
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from saro.errors import SaroError
from saro.model.merge import merge
from saro.model.policy import Policy
from saro.runs.finished import FinishedRun

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_merged_weight_is_the_dequantized_one_plus_the_adapter_rounded_once(finished_run):
    """huggingface/peft#2321: a merge into the 4-bit layer quantizes the sum again."""
    run = FinishedRun.open(str(finished_run("qlora")))
    name = "model.layers.1.mlp.down_proj"
    layer = run.load(CPU).causal_lm.get_submodule(name)
    a, b = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
    stored = layer.get_base_layer().weight
    expected = dequantize_4bit(stored.data, stored.quant_state).float() + 2 * b @ a
    merged = merge(run.load(CPU), run.source.config, torch.bfloat16).get_submodule(name).weight
    assert torch.equal(merged, expected.bfloat16())


def test_layers_without_an_adapter_are_dequantized_too(tiny_model):
    policy = load(tiny_model(), "qlora", lora_targets=["q_proj"])
    model = merge(policy, policy.causal_lm.config, torch.float32)
    assert not [n for n, layer in model.named_modules() if isinstance(layer, (LoraLayer, Linear4bit))]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True}])
def test_an_adapter_that_is_not_plain_lora_is_refused(tiny_model, changes):
    base = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3"))
    if "lora_bias" in changes:
        base.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(32))
    config = LoraConfig(target_modules=["layers.0.self_attn.q_proj"], **changes)
    policy = Policy(get_peft_model(base, config))
    with pytest.raises(SaroError, match=r"q_proj: the adapter is not plain LoRA"):
        merge(policy, base.config, torch.float32)
