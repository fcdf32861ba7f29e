"""Tests that a predicted step takes the memory of a real one, for whole models and for ranks that share the weights."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import date
from itertools import pairwise

import bitsandbytes.functional as bnb
import pytest
import torch
from tiny import KINDS_OF_MIXTURE, KINDS_OF_WRAPPER, tiny_config
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from saro.config import DataConfig, ModelConfig, PreferenceConfig
from saro.data.packs import PairLogps, pack_trees
from saro.data.unpaired_set import encode_unpaired_files
from saro.model.architectures import text_config
from saro.model.fake_policy import NF4_SCALE_BYTES, MemoryMeter, fake_tensors, liger_stand_ins, make_policy
from saro.model.load import load_policy
from saro.model.policy import Policy
from saro.model.source import find_model
from saro.train import predict_memory
from saro.train.kto_objective import KTOObjective
from saro.train.predict_memory import Ranks, Setting, StepCost, Workload, measure_step, predict_costs

pytestmark = pytest.mark.usefixtures("one_thread")

WORKLOADS = {"rw": Workload("rw", 512), "srpo": Workload("srpo", 2048)}
TASKS = pytest.mark.parametrize("task", WORKLOADS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
RECOMPUTED = pytest.mark.parametrize("recomputed", [0, 3, 4])


def policy_of(recomputed: int, offload: bool = False, dtype=torch.float32, method: str = "lora") -> Policy:
    options = ModelConfig(
        method=method, gradient_checkpointing=recomputed, activation_offloading=offload and recomputed > 0
    )
    return make_policy(
        tiny_config(num_hidden_layers=4),
        options,
        recomputed=recomputed,
        dtype=dtype,
        attention="sdpa",
        head="tiled-torch",
    )


def saved_bytes(policy: Policy, task: str) -> int:
    """Count the storages that autograd keeps between the forward and the backward of a step."""
    pack, gradient_rows = WORKLOADS[task].pack(256, 264)
    storages: dict[int, torch.UntypedStorage] = {}

    def pack_hook(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        policy(pack, gradient_rows=gradient_rows)
    return sum(storage.nbytes() for storage in storages.values())


@DTYPES
@RECOMPUTED
@TASKS
def test_fake_tensors_that_autograd_saves_have_the_bytes_of_real_ones(task, recomputed, dtype):
    real = saved_bytes(policy_of(recomputed, dtype=dtype), task)
    with fake_tensors():
        assert saved_bytes(policy_of(recomputed, dtype=dtype), task) == real


def assert_fake_is_real(make, task: str, holds_gradients: bool) -> None:
    steps = []
    for context in (nullcontext(), fake_tensors()):
        with context:
            pack = WORKLOADS[task].pack(256, 264)
            steps.append(measure_step(make(), *pack, holds_gradients=holds_gradients))
    real, fake = steps
    assert replace(fake, phases=real.phases) == real
    # The backward of attention on a CPU takes other intermediate tensors.
    assert fake.peak == pytest.approx(real.peak, rel=0.03)
    assert real.working > real.layers


@DTYPES
@RECOMPUTED
@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "on the host"])
@TASKS
def test_a_step_of_fake_tensors_takes_the_memory_of_a_real_one(task, offload, recomputed, dtype):
    assert_fake_is_real(lambda: policy_of(recomputed, offload, dtype), task, holds_gradients=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
def test_so_does_one_of_full_fine_tuning_with_the_gradients_of_earlier_packs(dtype):
    assert_fake_is_real(lambda: policy_of(0, dtype=dtype, method="full"), "rw", holds_gradients=True)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *[(kind, method) for kind in KINDS_OF_WRAPPER for method in ("lora", "full")],
        *[(kind, "lora") for kind in KINDS_OF_MIXTURE],
    ],
)
def test_so_does_one_of_a_loaded_multimodal_model_or_mixture_of_experts(tiny_model, kind, method):
    options = ModelConfig(name=tiny_model(kind), method=method, head="tiled-torch", dtype="float32")
    pack = WORKLOADS["rw"].pack(256, 264)
    loaded = load_policy(find_model(options), options, torch.device("cpu"), seed=0).train()
    real = measure_step(loaded, *pack)
    with fake_tensors():
        made = make_policy(
            loaded.causal_lm.config,
            options,
            recomputed=0,
            dtype=torch.float32,
            attention="sdpa",
            head="tiled-torch",
        )
        fake = measure_step(made, *WORKLOADS["rw"].pack(256, 264))
    assert replace(fake, phases=real.phases, layers=real.layers, head=real.head) == real
    assert fake.phases == pytest.approx(real.phases, rel=0.05)
    assert fake.peak == pytest.approx(real.peak, rel=0.03)
    assert (real.trained < real.weights) == (method == "lora" or kind in KINDS_OF_WRAPPER)


def test_a_step_of_labelled_responses_takes_what_the_objective_of_kto_takes(world, records_file, pairs, runtime):
    """With the forwards for its reference point, which keep nothing."""
    source, policy, _ = world()
    options = DataConfig(pack_tokens=256)
    data = encode_unpaired_files([records_file(pairs)], source.chat_format(options, date(2024, 7, 26)), options)
    reference = PairLogps.zeros(data.as_pairs.scored_tokens)
    objective = KTOObjective(data, reference, PreferenceConfig("kto"), 256)
    records = range(len(data))
    (pack, *_) = pack_trees(data.trees(records, 256), 256)
    policy.head = "tiled-torch"
    policy.train()
    predicted = measure_step(policy, pack, objective.gradient_rows(pack), holds_gradients=False)
    meter = MemoryMeter()
    meter.ignore([*policy.parameters(), *policy.buffers()])
    with meter:
        objective.start_step(runtime, policy, records)
        sums = objective(policy(pack, gradient_rows=objective.gradient_rows(pack)), pack)
        sums.losses["records"].backward()
    assert predicted.working == pytest.approx(meter.take_peak(), rel=0.05)
    assert predicted.forward_operations <= predicted.operations / 2


def test_the_more_layers_are_recomputed_the_less_is_kept():
    kept = [measure_step(policy_of(n), *WORKLOADS["rw"].pack(256, 264)).layers for n in range(5)]
    assert kept == sorted(kept, reverse=True)
    gained = [left - right for left, right in pairwise(kept)]
    # The input of the first layer has no gradient, so that a layer that is kept keeps less of it.
    assert 0 < gained[0] < gained[1] == gained[2] == gained[3]


def test_all_inputs_but_two_are_on_the_host():
    on_device, on_host = (
        measure_step(policy_of(4, offload), *WORKLOADS["rw"].pack(256, 264)) for offload in (False, True)
    )
    bytes_of_input = 256 * tiny_config().hidden_size * 4
    assert on_device.layers - on_host.layers == 2 * bytes_of_input


def setting_of(layers: int = 2, method: str = "qlora", is_gpu: bool = True, **options: object) -> Setting:
    config = tiny_config("qwen3", num_hidden_layers=layers, hidden_size=64, intermediate_size=128)
    return Setting(config, ModelConfig(method=method, **options), torch.bfloat16, is_gpu)


@pytest.mark.parametrize(
    ("setting", "ranks"),
    [
        (setting_of(layers=6, gradient_checkpointing=True, activation_offloading=True), None),
        (setting_of(layers=10, method="full", is_gpu=False, gradient_checkpointing=5), None),
        (setting_of(layers=6, gradient_checkpointing=True), Ranks("full", 4)),
    ],
    ids=["on the host", "half", "shared"],
)
def test_all_figures_lie_on_a_plane_over_the_numbers_of_layers(setting, ranks, monkeypatch):
    monkeypatch.setattr(predict_memory, "_MORE", 1)
    costs = []
    for few in (4, 9):
        monkeypatch.setattr(predict_memory, "_FEW", few)
        costs += predict_costs(setting, WORKLOADS["srpo"], [256], ranks)
    extended, whole = costs
    assert extended.working == pytest.approx(whole.working, abs=4096)
    # Only the largest phase matters, and which one that is depends on the number of layers.
    # The scales of 4-bit weights are rounded to whole bytes.
    assert replace(extended, phases=whole.phases, weights=whole.weights, gaps=whole.gaps) == whole
    assert extended.weights == pytest.approx(whole.weights, abs=8)
    assert (extended.gaps > 0) == (not setting.is_gpu)


@pytest.mark.parametrize("kind", ["gemma3 with vision", "gpt_oss"])
def test_models_with_layers_of_two_types_are_extended_too(kind, monkeypatch):
    config = tiny_config(kind)
    text = text_config(config)
    text.num_hidden_layers, text.layer_types = 10, ["sliding_attention", "full_attention"] * 5
    setting = Setting(config, ModelConfig(method="lora"), torch.bfloat16, is_gpu=True)
    (extended,) = predict_costs(setting, WORKLOADS["rw"], [256])
    monkeypatch.setattr(predict_memory, "_FEW", 10)
    (whole,) = predict_costs(setting, WORKLOADS["rw"], [256])
    assert replace(extended, phases=whole.phases) == whole
    assert extended.working == pytest.approx(whole.working, rel=0.01)


def test_linear_layers_without_an_adapter_are_in_4_bits_too():
    every, one = (
        predict_costs(setting_of(**changes), WORKLOADS["rw"], [256])[0]
        for changes in ({}, {"lora_targets": ["q_proj"]})
    )
    assert one.weights == every.weights
    assert one.adapters < every.adapters


def shared_cost(method: str, ranks: Ranks | None) -> StepCost:
    setting = setting_of(method=method, gradient_checkpointing=True)
    (cost,) = predict_costs(setting, WORKLOADS["rw"], [256], ranks)
    return cost


@pytest.mark.parametrize("method", ["lora", "full"])
def test_ranks_hold_a_part_of_the_weights_and_gather_the_rest_layer_by_layer(method):
    alone = shared_cost(method, None)
    four = shared_cost(method, Ranks("full", 4))
    # Norms of fewer rows than ranks, and such, are not divided evenly.
    assert four.weights == pytest.approx(alone.weights / 4, rel=0.02)
    assert four.optimizer == pytest.approx(alone.optimizer / 4, rel=0.02)
    # Adapters add up whole gradients, full fine-tuning does not.
    assert four.gradients == (pytest.approx(alone.gradients / 4, rel=0.02) if method == "full" else alone.gradients)
    assert 0 < four.working - alone.working < alone.weights + alone.gradients
    assert four.operations == alone.operations


def test_a_machine_that_holds_all_weights_shares_them_among_its_own_ranks():
    hybrid = shared_cost("qlora", Ranks("hybrid", 8, per_machine=2))
    assert hybrid.weights == shared_cost("qlora", Ranks("full", 2)).weights


def test_views_and_freed_tensors_do_not_count():
    known = torch.ones(1000)
    meter = MemoryMeter()
    meter.ignore([known])
    with meter:
        known.view(10, 100)
        assert meter.now == 0
        made = known * 2
        view = made.view(10, 100)
        assert meter.now == 4096  # 4,000 bytes in blocks of 512
        del made
        assert meter.now == 4096
        del view
        assert meter.now == 0
    assert meter.take_peak() == 4096
    assert meter.take_peak() == 0


def test_a_storage_counts_with_the_size_that_it_has_now():
    meter = MemoryMeter()
    with meter:
        made = torch.ones(1000) * 2
        storage = made.untyped_storage()
        before = meter.now
        storage.resize_(0)
        assert before - meter.now == 4096
        storage.resize_(8000)
        assert meter.now - before == 4096
    storage.resize_(0)  # nobody counts any more
    assert meter.now - before == 4096


def test_pairs_fill_a_pack_and_share_their_beginning():
    pack, margin_rows = WORKLOADS["srpo"].pack(4096, 264)
    assert pack.tokens == 4096
    assert len(pack.pairs) == 2
    # Of each pair, 384 shared rows have no gradient. Of each side 705 have one: 704 tokens are read, and the last is not.
    assert (pack.rows, margin_rows) == (2 * (384 + 2 * 705), 2 * 2 * 705)


def test_a_number_in_nf4_takes_the_bytes_of_bitsandbytes():
    weight = torch.randn(1024, 512)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    scales = state.absmax.nbytes + state.state2.absmax.nbytes
    assert scales == NF4_SCALE_BYTES * weight.numel()
    dense, quantized = (shared_cost(method, None).weights for method in ("lora", "qlora"))
    numbers = 2 * (64 * (32 + 16 + 16) + 32 * 64 + 3 * 64 * 128)
    assert dense - quantized == pytest.approx(numbers * (2 - 0.5 - NF4_SCALE_BYTES), abs=1)
    assert packed.nbytes == weight.numel() / 2


@pytest.mark.parametrize("options", [{"fused_lora": False}, {"lora_dropout": 0.1}])
def test_peft_own_layers_take_more_than_the_fused_ones(options):
    fused, own = (predict_costs(setting_of(**changes), WORKLOADS["rw"], [256])[0] for changes in ({}, options))
    assert own.working > fused.working


def test_stand_ins_are_gone_afterwards():
    policy = policy_of(0)
    file = sys.modules[type(policy.causal_lm).__module__]
    own = file.apply_rotary_pos_emb
    with liger_stand_ins(policy.causal_lm):
        assert file.apply_rotary_pos_emb is not own
    assert file.apply_rotary_pos_emb is own
    assert not any("forward" in m.__dict__ for m in policy.causal_lm.modules() if type(m).__name__.endswith("RMSNorm"))
    predict_costs(setting_of(), WORKLOADS["rw"], [64], Ranks("full", 2))
    assert not torch.distributed.is_initialized()
    assert torch.ones(1).sum().item() == 1
    assert nn.Linear(1, 1).to(torch.float64).weight.dtype == torch.float64
