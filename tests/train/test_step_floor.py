"""Tests of the floor of a training step: its operations match torch's counter, its bytes the sizes of the tensors."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from loaded import a_pack, load
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from saro.data.packs import lay_out
from saro.data.tree import ScoredSequence, build_tree
from saro.train.step_floor import Work, _attention, _product, floor_of_step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_operations_of_products_match_the_counter_of_torch(tiny_model, kind):
    # The reference head computes no logits twice, and with all weights trained every gradient is computed.
    policy, pack = load(tiny_model(kind), "full", head="reference"), a_pack()
    with FlopCounterMode(display=False) as counter:
        policy(pack).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "mm" in str(op))
    floor = floor_of_step(policy, pack)
    assert floor["linear layers"].operations + floor["head"].operations == products


def test_attention_operations_count_the_scores_of_each_path():
    config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=3)
    # A prompt of 10 tokens with two children of 4 and 6. Each token attends to its ancestors and to the tokens before it.
    # The last token of each sequence is only a target and not counted.
    prompt = list(range(10))
    sequences = [(*prompt, *[20] * 5), (*prompt, *[30] * 7)]
    pack = lay_out(
        [build_tree([ScoredSequence(np.array(s, np.int32), 10, np.zeros(len(s) - 10, np.uint8), 0) for s in sequences])]
    )
    assert pack.segments == ((0, 10, -1), (10, 14, 0), (14, 20, 0))
    scores = 10 * 10 / 2 + (4 * 4 / 2 + 4 * 10) + (6 * 6 / 2 + 6 * 10)
    assert _attention(config, pack, 4).operations == 3 * 4 * scores * 4 * 8 * 3


@pytest.mark.parametrize(("trained", "products"), [(False, 2), (True, 3)])
def test_each_product_moves_each_of_its_tensors_once(trained, products):
    layer = nn.Linear(32, 48, bias=False).requires_grad_(trained)
    product_bytes = 4 * (10 * 32 + 32 * 48 + 10 * 48)
    assert _product(layer, 10, 4).bytes == products * product_bytes
    assert _product(layer, 10, 4, logits=False).bytes == products * (product_bytes - 4 * 10 * 48)


def test_a_4_bit_weight_has_fewer_bytes_and_as_many_operations(tiny_model):
    pack = a_pack()
    dense, packed = (floor_of_step(load(tiny_model(), method), pack) for method in ("lora", "qlora"))
    assert packed["linear layers"].operations == dense["linear layers"].operations
    assert packed["linear layers"].bytes < dense["linear layers"].bytes


def test_the_floor_is_the_longer_of_the_two_times():
    assert Work(100.0, 10.0).seconds(10.0, 10.0) == 10.0
    assert Work(10.0, 100.0).seconds(10.0, 10.0) == 10.0


def test_each_token_is_multiplied_by_the_experts_that_it_chooses(tiny_model):
    policy, pack = load(tiny_model("gpt_oss"), "lora"), a_pack()
    operations = floor_of_step(policy, pack)["linear layers"].operations
    dense = sum(_product(m, pack.tokens, 4).operations for m in policy.modules() if isinstance(m, nn.Linear))
    dense -= _product(policy.causal_lm.lm_head, pack.tokens, 4).operations
    # Two layers, in each two of four experts with 64 x 32 numbers for gate, up and down; forward and gradient of the input.
    assert operations - dense == 2 * 2 * (3 * 64 * 32) * pack.tokens * 2 * 2
