"""Inside ``unmodified`` transformers and PEFT compute everything; after it the policy is as before."""

from __future__ import annotations

import pytest
import torch
from loaded import a_pack, load
from tiny import KINDS_OF_MODEL
from transformers import AutoModelForCausalLM

from saro.model.fused_lora import FUSED_FORWARDS
from saro.model.liger import replaced_forward
from saro.model.unmodified import own_layers, unmodified

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(5, 25)[None]


def num_fused(policy) -> int:
    return sum(replaced_forward(module) in FUSED_FORWARDS for module in policy.modules())


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
@torch.no_grad()
def test_the_model_computes_what_transformers_computes(tiny_model, kind):
    policy = load(tiny_model(kind), "lora")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model(kind), attn_implementation="sdpa")
    with unmodified(policy):
        assert num_fused(policy) == 0
        assert torch.equal(policy.causal_lm(IDS).logits, plain(IDS).logits)


@torch.no_grad()
def test_everything_is_put_back_even_after_an_exception(tiny_model):
    policy = load(tiny_model(), "lora")
    before, fused = policy(a_pack()), num_fused(policy)
    assert fused > 0
    with pytest.raises(RuntimeError, match="inside"), unmodified(policy):
        raise RuntimeError("inside")
    assert num_fused(policy) == fused
    assert torch.equal(policy(a_pack()), before)


def test_own_layers_leaves_attention_packed(tiny_model):
    policy = load(tiny_model(), "lora")
    with own_layers(policy.causal_lm):
        assert num_fused(policy) == 0
        assert policy(a_pack()).shape == (a_pack().rows,)
