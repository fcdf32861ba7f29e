"""check_layout runs packs on a small float32 model of the same class."""

from __future__ import annotations

import pytest
import torch
from loaded import DATA, examples_of, load
from tiny import KINDS_OF_LOGITS, KINDS_OF_MODEL, random_model, tiny_config
from transformers import GPT2Config
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from saro.checks.check_layout import check_layout
from saro.checks.check_packs import check_packs
from saro.checks.forwards import all_scored
from saro.data.tree import build_tree
from saro.errors import SaroError
from saro.model.architectures import sliding_window
from saro.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")

TREES = [build_tree([all_scored(DATA.sequence(i).tokens, i)]) for i in range(3)]


@pytest.mark.parametrize("kind", [*KINDS_OF_MODEL, *KINDS_OF_LOGITS])
def test_packs_are_exact_to_rounding_in_every_row(kind):
    policy = Policy(random_model(tiny_config(kind)))
    found = check_layout(policy, TREES, sliding_window(policy.causal_lm.config))
    assert found.logps < 5e-6
    assert found.gradients < 2e-4
    assert found.control > 0.01


@pytest.mark.parametrize("change", [{"num_hidden_layers": 1}, {"num_hidden_layers": 7}, {"vocab_size": 1000}])
def test_models_of_any_depth_and_vocabulary(change):
    assert check_layout(Policy(random_model(tiny_config("llama", **change))), TREES, None).control > 0.01


def made(monkeypatch):
    """Return the list of configs of the models that are made from now on."""
    configs, original = [], LlamaForCausalLM.__init__

    def init(self, config):
        configs.append(config)
        original(self, config)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", init)
    return configs


def test_the_small_model_is_small(tiny_model, monkeypatch):
    policy = Policy(random_model(tiny_config("llama", num_hidden_layers=9, intermediate_size=2048, vocab_size=5000)))
    configs = made(monkeypatch)
    check_layout(policy, TREES, None)
    (config,) = configs
    assert (config.num_hidden_layers, config.intermediate_size, config.vocab_size) == (2, 256, 251)
    assert config.hidden_size == policy.causal_lm.config.hidden_size
    assert policy.causal_lm.config.num_hidden_layers == 9


def test_every_type_of_layer_is_in_the_small_model():
    types = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"]
    policy = Policy(random_model(tiny_config("gemma3", num_hidden_layers=7, layer_types=types)))
    with pytest.MonkeyPatch.context() as patch:
        windows = []
        from saro.model import attention

        original = attention._sdpa
        patch.setattr(attention, "_sdpa", lambda *args: windows.append(args[6]) or original(*args))
        check_layout(policy, TREES, 8)
    assert {8, None} == set(windows)


def test_a_family_that_spells_its_options_in_another_way():
    config = GPT2Config(vocab_size=264, n_embd=32, n_layer=5, n_head=4, n_positions=128, n_inner=64)
    assert check_layout(Policy(random_model(config)), TREES, None).logps < 5e-6


def test_layers_that_share_keys_are_checked_without_sharing():
    types = ["sliding_attention", "full_attention"] * 3
    config = tiny_config("gemma4", num_hidden_layers=6, layer_types=types, num_kv_shared_layers=2)
    assert check_layout(Policy(random_model(config)), TREES, 8).logps < 1e-5


def test_records_of_two_tokens_can_notice_a_leak(tiny_model):
    data = examples_of(2, 2)
    assert check_packs(load(tiny_model(), "full"), data).layout.control > 0.01


def test_a_quantized_policy_is_checked_on_a_plain_small_model(tiny_model):
    assert check_layout(load(tiny_model(), "qlora", dtype="bfloat16"), TREES, None).logps < 5e-6


def test_a_model_of_which_no_small_one_can_be_made_is_refused(monkeypatch):
    policy = Policy(random_model(tiny_config("llama")))

    def init(self, config):
        raise ValueError("needs exactly 30 layers\nand more")

    monkeypatch.setattr(LlamaForCausalLM, "__init__", init)
    message = r"^cannot make a small LlamaForCausalLM, on which .* \(needs exactly 30 layers\); report it$"
    with pytest.raises(SaroError, match=message):
        check_layout(policy, TREES, None)


def test_it_is_repeatable_and_leaves_the_random_numbers_alone(tiny_model):
    policy = load(tiny_model())
    state = torch.get_rng_state()
    first = check_layout(policy, TREES, None)
    assert check_layout(policy, TREES, None) == first
    assert torch.equal(torch.get_rng_state(), state)
