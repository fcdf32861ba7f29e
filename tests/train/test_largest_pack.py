"""The largest pack of a run is found from the lengths, and tried before the first step without changing anything."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from loaded import examples_of
from tiny import Training

from saro.config import DataConfig, PreferenceConfig, TrainConfig
from saro.data.packs import PairLogps
from saro.data.steps import Schedule, Share, Steps
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.model.recompute import count_recomputed
from saro.train import engine, largest_pack
from saro.train.largest_pack import LargestPack, find_largest_pack, recompute_as_needed, try_pack
from saro.train.srpo_objective import SRPOObjective


@pytest.fixture
def training(tiny_model, records_file, examples, tmp_path):
    file = records_file(examples)

    def make(output: str = "run", **options: object) -> Training:
        return Training.on(tiny_model(), file, tmp_path / output, **options)

    return make


def try_it(runtime: Runtime, run: Training, total_steps: int = 6) -> LargestPack:
    """Try the largest pack of a run as the recipes do."""
    optimizer = run.options.optimizer
    largest = find_largest_pack(run.steps, total_steps, runtime.processes)
    recompute_as_needed(runtime, run.policy, run.objective, largest, optimizer)
    try_pack(runtime, run.policy, run.objective, largest, run.steps, optimizer)
    return largest


# Finding it.


def steps_of(lengths: list[int], pack_tokens: int, records_per_step: int = 4) -> Steps:
    data = examples_of(*lengths)
    return Steps(data, Schedule(data.kinds, records_per_step, seed=0), pack_tokens)


def sizes(steps: Steps, total_steps: int, processes: int) -> list[int]:
    """Return tokens plus scored rows of all packs of a run, over all ranks."""
    ranks = [replace(steps, share=Share(rank, processes)) for rank in range(processes)]
    return [pack.tokens + pack.rows for i in range(total_steps) for rank in ranks for pack in rank[i].packs]


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("pack_tokens", [70, 150, 4096])
def test_it_is_the_largest_of_all_packs_of_the_run(pack_tokens, processes):
    lengths = random.Random(0).choices(range(5, 70), k=40)
    steps = steps_of(lengths, pack_tokens)
    for total_steps in (1, 7, 25):
        largest = find_largest_pack(steps, total_steps, processes)
        assert largest.pack.tokens + largest.pack.rows == max(sizes(steps, total_steps, processes))
        assert set(largest.step.records) <= set(steps.schedule.records(largest.number).tolist())


def test_it_is_one_of_pairs_with_their_shared_tokens_once(world):
    _, _, pairs = world()
    steps = Steps(pairs, Schedule.of(pairs, DataConfig(), TrainConfig(records_per_step=5)), 512)
    assert find_largest_pack(steps, 5, 1).pack.tokens == max(p.tokens for i in range(5) for p in steps[i].packs)


def test_only_the_steps_that_the_run_makes_count(training):
    run = training(records_per_step=1)
    order = [int(run.steps.schedule.records(i)[0]) for i in range(24)]
    first = find_largest_pack(run.steps, 1, 1)
    assert (first.number, first.step.records) == (0, (order[0],))


def test_of_many_records_only_some_are_laid_out(monkeypatch):
    """The largest pack is the one of the longest record, in whichever of 20,000 steps that is."""
    lengths = np.random.default_rng(0).integers(4, 9, 80_000).tolist()
    lengths[54_321] = 60
    steps = steps_of(lengths, pack_tokens=64)
    laid_out = 0
    original = largest_pack.lay_out

    def counting(trees):
        nonlocal laid_out
        laid_out += len(trees)
        return original(trees)

    monkeypatch.setattr(largest_pack, "lay_out", counting)
    assert 54_321 in find_largest_pack(steps, 20_000, 1).step.records
    assert laid_out <= 1024


# Trying it.


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_it_changes_nothing(training, runtime, method):
    run = training(model={"method": method} | ({} if method == "full" else {"lora_dropout": 0.5}))
    before = {name: p.clone() for name, p in run.policy.state_dict().items() if isinstance(p, torch.Tensor)}
    run.policy.eval()
    random_state = torch.get_rng_state()
    try_it(runtime, run)
    assert not run.policy.training
    assert all(p.grad is None for p in run.policy.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    after = run.policy.state_dict()
    assert all(torch.equal(p, after[name]) for name, p in before.items())


def test_a_run_after_it_has_the_same_bits_as_one_without_it(training, runtime):
    ends = []
    for name in ("tried", "not"):
        run = training(name, model={"lora_dropout": 0.3, "gradient_checkpointing": True})
        if name == "tried":
            try_it(runtime, run)
        run.fit(runtime, 3)
        ends.append(run.weights())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_it_runs_the_loss_and_its_gradient_on_the_pack(training, runtime, monkeypatch):
    run = training()
    seen = []
    monkeypatch.setattr(largest_pack, "add_gradients", lambda *a, **k: seen.append(engine.add_gradients(*a, **k)))
    gradients = []
    next(iter(run.policy.trainable().values())).register_hook(lambda g: gradients.append(g.norm().item()))
    largest = try_it(runtime, run)
    with torch.no_grad():
        expected = -run.policy.train()(largest.pack).mean()
    assert seen[0].item() == pytest.approx(expected.item(), rel=1e-6)
    assert len(gradients) == 1


def test_it_runs_the_loss_over_pairs_before_there_is_a_reference(world, runtime):
    _, policy, pairs = world()
    steps = Steps(pairs, Schedule.of(pairs, DataConfig(), TrainConfig(records_per_step=5)), 512)
    objective = SRPOObjective(pairs.kinds, PairLogps.zeros(pairs.scored_tokens), PreferenceConfig(nll=0.5))
    try_pack(runtime, policy, objective, find_largest_pack(steps, 5, 1), steps, "adamw")
    assert all(p.grad is None for p in policy.parameters())


def test_the_memory_of_gradients_and_optimizer_is_there_while_it_runs(training, runtime, monkeypatch):
    """They are allocated only in the first step, and would otherwise not count."""
    run = training(pack_tokens=160)
    allocated = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: allocated.append(a[0]) or empty(*a, **k))
    parameters = list(run.policy.trainable().values())
    has_gradients = []
    run.policy.register_forward_pre_hook(lambda *_: has_gradients.append(all(p.grad is not None for p in parameters)))
    largest = try_it(runtime, run)
    assert not largest.is_alone
    assert has_gradients == [True]
    assert sum(n for n in allocated if isinstance(n, int)) >= 8 * sum(p.numel() for p in parameters)


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA driver error: out of memory"),
        MemoryError(),
    ],
    ids=["gpu", "torch on a CPU", "driver", "host"],
)
def test_running_out_of_memory_is_one_line_that_names_the_pack_and_what_to_lower(training, runtime, error):
    run = training(records_per_step=8)

    def fail(*_: object) -> None:
        raise error

    next(iter(run.policy.trainable().values())).register_hook(fail)
    largest = find_largest_pack(run.steps, 3, 1)
    with pytest.raises(SaroError) as caught:
        try_pack(runtime, run.policy, run.objective, largest, run.steps, "adamw")
    text = str(caught.value)
    assert "\n" not in text
    assert re.match(r"out of memory \(.+\): the largest pack of the run does not fit \(", text)
    pack = largest.pack
    assert (
        f"({pack.tokens:,} tokens, {pack.rows:,} of them scored, {len(largest.step.records)} records, in step" in text
    )
    assert run.data.ids[largest.step.records[0]] in text
    longest = int(run.data.lengths.max())
    assert (
        f"lower --data.pack_tokens, now 256 and at least {longest} for the longest record, or set --model.grad" in text
    )
    assert all(p.grad is None for p in run.policy.parameters())


def test_any_other_error_is_not_hidden(training, runtime):
    run = training()

    def fail(*_: object) -> None:
        raise RuntimeError("shapes do not fit")

    next(iter(run.policy.trainable().values())).register_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        try_it(runtime, run)
    assert all(p.grad is None for p in run.policy.parameters())


def test_the_largest_pack_is_found_and_tried_on_a_cpu_too(training, runtime, capsys):
    run = training()
    largest = find_largest_pack(run.steps, 3, 1)
    packs = []
    run.policy.register_forward_pre_hook(lambda _, arguments: packs.append(arguments[0].tokens))
    try_it(runtime, run, 3)
    assert packs == [largest.pack.tokens]
    assert f"the largest pack fits ({largest.pack.tokens} tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, ", or set --model.gradient_checkpointing true"),
        ({"gradient_checkpointing": 1}, ", or set --model.gradient_checkpointing true"),
        ({"gradient_checkpointing": True}, ", or set --model.activation_offloading true"),
        ({"gradient_checkpointing": True, "activation_offloading": True}, " for the longest record"),
    ],
    ids=["none", "one layer", "all", "inputs on the host"],
)
def test_the_error_advises_what_is_not_done_yet(training, runtime, monkeypatch, options, advice):
    monkeypatch.setattr(largest_pack, "_usable_bytes", lambda device: 10**9)
    run = training(model=options)
    next(iter(run.policy.trainable().values())).register_hook(out_of_memory)
    with pytest.raises(SaroError) as caught:
        try_it(runtime, run)
    assert str(caught.value).endswith(advice)


def test_the_error_does_not_advise_a_cpu_to_keep_inputs_in_the_memory_that_ran_out(training, runtime):
    run = training(model={"gradient_checkpointing": True})
    next(iter(run.policy.trainable().values())).register_hook(out_of_memory)
    with pytest.raises(SaroError, match=r"for the longest record$"):
        try_it(runtime, run)


def test_the_error_does_not_advise_recomputation_to_a_model_without_it(training, runtime, monkeypatch):
    run = training()
    monkeypatch.setattr(type(run.policy.causal_lm), "supports_gradient_checkpointing", False)
    next(iter(run.policy.trainable().values())).register_hook(out_of_memory)
    with pytest.raises(SaroError, match=r"for the longest record$"):
        try_it(runtime, run)


# As many recomputed layers as memory needs.


class Gpu:
    """Stands for a GPU on which the tiny model's pack takes 100 bytes, and 10 more for each layer that is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, usable: int, memory: int = 10**9) -> None:
        self.memory = memory
        self.peaks: list[int] = []
        self.policy = None
        monkeypatch.setattr(largest_pack, "_usable_bytes", lambda device: usable)
        monkeypatch.setattr(largest_pack, "_peak_bytes", lambda device: self.peaks[-1])

    def watch(self, run: Training) -> None:
        """Let a run's packs take memory here."""
        lm = run.policy.causal_lm

        def allocate(*_: object) -> None:
            self.peaks.append(100 + 10 * (2 - count_recomputed(lm)))
            if self.peaks[-1] > self.memory:
                out_of_memory()

        run.policy.register_forward_pre_hook(allocate)


@pytest.mark.parametrize(
    ("usable", "memory", "recomputed"),
    [(200, 200, 0), (134, 200, 0), (133, 200, 1), (122, 200, 2), (200, 115, 1)],
)
def test_as_few_layers_are_recomputed_as_memory_needs(
    training, runtime, monkeypatch, capsys, usable, memory, recomputed
):
    """A peak may take nine tenths of the memory: 120 bytes of 134, if no layer is recomputed."""
    run = training(model={"gradient_checkpointing": "auto"})
    assert count_recomputed(run.policy.causal_lm) == 2
    Gpu(monkeypatch, usable, memory).watch(run)
    try_it(runtime, run, 3)
    assert count_recomputed(run.policy.causal_lm) == recomputed
    said = capsys.readouterr().err
    assert f"{recomputed} of 2 layers are recomputed, for a peak within " in said
    assert "the largest pack fits (" in said


def test_a_peak_above_the_limit_with_all_layers_recomputed_is_not_said_to_be_within_it(
    training, runtime, monkeypatch, capsys
):
    run = training(model={"gradient_checkpointing": "auto"})
    Gpu(monkeypatch, usable=105, memory=200).watch(run)
    try_it(runtime, run, 3)
    assert count_recomputed(run.policy.causal_lm) == 2
    said = capsys.readouterr().err
    assert "all 2 layers are recomputed, and even so the peak is above " in said
    assert "within" not in said
    assert "the largest pack fits (" in said


def test_a_pack_that_does_not_fit_with_all_layers_recomputed_is_refused(training, runtime, monkeypatch):
    run = training(model={"gradient_checkpointing": "auto"})
    Gpu(monkeypatch, usable=90, memory=99).watch(run)
    with pytest.raises(
        SaroError, match=r"the largest pack of the run does not fit .* --model.activation_offloading true$"
    ):
        try_it(runtime, run, 3)
    assert count_recomputed(run.policy.causal_lm) == 2


def test_a_number_of_layers_is_not_changed(training, runtime, monkeypatch):
    run = training(model={"gradient_checkpointing": 1})
    gpu = Gpu(monkeypatch, usable=10**9)
    gpu.watch(run)
    try_it(runtime, run, 3)
    assert gpu.peaks == [110]


def test_on_a_cpu_no_layer_is_recomputed_and_one_line_says_why(training, runtime, capsys):
    run = training(model={"gradient_checkpointing": "auto"})
    capsys.readouterr()
    try_it(runtime, run, 3)
    assert count_recomputed(run.policy.causal_lm) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("--model.gradient_checkpointing auto recomputes no layer here: it needs CUDA")
    assert second.startswith("the largest pack fits (")


def test_ranks_that_share_the_weights_recompute_all_layers_and_one_line_says_why(
    training, runtime, monkeypatch, capsys
):
    run = training(model={"gradient_checkpointing": "auto"})
    gpu = Gpu(monkeypatch, usable=10**9)
    gpu.watch(run)
    capsys.readouterr()
    sharing = replace(runtime, mesh=SimpleNamespace())  # packs are run on this rank alone, which never asks the mesh
    try_it(sharing, run, 3)
    assert count_recomputed(run.policy.causal_lm) == 2
    assert len(gpu.peaks) == 1
    assert capsys.readouterr().err.startswith("--model.gradient_checkpointing auto recomputes all layers here: ")


def test_a_run_may_be_resumed_with_another_number_of_recomputed_layers(training, runtime, monkeypatch):
    """Memory may be another on the machine that resumes it. No bit of the weights changes."""
    same_rates = {"schedule": "constant", "warmup": 0}
    whole = training("whole", **same_rates)
    whole.fit(runtime, 4)
    training("parts", model={"gradient_checkpointing": 1}, **same_rates).fit(runtime, 2)
    run = training("parts", model={"gradient_checkpointing": "auto"}, **same_rates)
    Gpu(monkeypatch, usable=100).watch(run)
    try_it(runtime, run, 4)
    assert count_recomputed(run.policy.causal_lm) == 2
    assert run.fit(runtime, 4, resume=True).step == 4
    assert all(torch.equal(weight, run.weights()[name]) for name, weight in whole.weights().items())


def two_ranks(records: str, folder: str, output: str) -> int:
    """Try the largest pack on two ranks, of which the second runs out of memory if ``output`` ends in "out"."""
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    runtime = Runtime(accelerator, accelerator.process_index, accelerator.num_processes, 1)
    run = Training.on(folder, records, Path(output), rank=runtime.rank, processes=runtime.processes)
    if output.endswith("out") and runtime.rank == 1:
        next(iter(run.policy.trainable().values())).register_hook(out_of_memory)
    try:
        largest = try_it(runtime, run)
        said = [largest.number, list(largest.step.records)]
    except SaroError as error:
        said = str(error)
    (Path(output) / f"rank{runtime.rank}.json").write_text(json.dumps(said))
    runtime.end()
    return 0


@pytest.mark.parametrize("name", ["fits", "out"])
def test_all_ranks_try_the_same_pack_and_all_end_if_one_runs_out_of_memory(
    recipes, records_file, examples, tiny_model, tmp_path, name
):
    out = tmp_path / name
    ranks = recipes.run_ranks(2, records_file(examples), tiny_model(), out, call=f"{__file__}:two_ranks")
    assert [p.code for p in ranks] == [0, 0], ranks[0].err + ranks[1].err
    said = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]
    if name == "fits":
        assert said[0] == said[1]
        assert ranks[0].err.count("the largest pack fits (") == 1
    else:
        assert said[0].startswith("out of memory (on another rank): the largest pack of the run does not fit (")
        assert said[1].startswith("out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.): the largest pack")
