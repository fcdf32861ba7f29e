"""Fake tensors take the memory that real ones take, and the committed predictions meet the project's goals."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import bitsandbytes.functional as bnb
import fake_memory
import pytest
import torch
from fake_memory import (
    LABELS,
    MARKERS,
    NF4_BYTES,
    PACKS,
    Meter,
    extend,
    fake_tensors,
    liger_stand_ins,
    make_policy,
    measure_step,
    measured_table,
    predict,
    read_found,
    render,
    run_layers,
    tokens_at,
)
from gpu_tables import insert
from run_files import ROOT
from tiny import tiny_config
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from saro.errors import SaroError
from saro.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")

GIB = 2**30
COMMITTED = ROOT / "benchmarks/results/fake_memory.json"
MEASURED = sorted((ROOT / "benchmarks/results/gpu").glob("*/results.json"))


def policy_of(recomputed: int, offload: bool, dtype: torch.dtype) -> Policy:
    config = tiny_config(num_hidden_layers=4)
    return make_policy(config, recomputed, offload, attention="sdpa", dtype=dtype)


def saved_bytes(policy: Policy, task: str) -> int:
    """Count the storages that autograd keeps between the forward and the backward of a step."""
    pack, gradient_rows = PACKS[task](256, 264)
    storages: dict[int, torch.UntypedStorage] = {}

    def pack_hook(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        policy(pack, gradient_rows=gradient_rows)
    return sum(storage.nbytes() for storage in storages.values())


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
RECOMPUTED = pytest.mark.parametrize("recomputed", [0, 3, 4])


@DTYPES
@RECOMPUTED
@pytest.mark.parametrize("task", PACKS)
def test_fake_tensors_that_autograd_saves_have_the_bytes_of_real_ones(task, recomputed, dtype):
    real = saved_bytes(policy_of(recomputed, False, dtype), task)
    with fake_tensors():
        assert saved_bytes(policy_of(recomputed, False, dtype), task) == real


@DTYPES
@RECOMPUTED
@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "on the host"])
@pytest.mark.parametrize("task", PACKS)
def test_a_step_of_fake_tensors_takes_the_memory_of_a_real_one(task, offload, recomputed, dtype):
    steps = []
    for context in (nullcontext(), fake_tensors()):
        with context:
            policy = policy_of(recomputed, offload, dtype)
            steps.append(measure_step(policy, *PACKS[task](256, 264)))
    real, fake = steps
    assert replace(fake, peak=real.peak) == real
    # The backward of attention on a CPU takes other intermediate tensors.
    assert fake.peak == pytest.approx(real.peak, rel=0.03)
    assert real.peak > real.model + real.trained + real.layers


def test_the_more_layers_are_recomputed_the_less_is_kept():
    kept = [measure_step(policy_of(n, False, torch.float32), *PACKS["rw"](256, 264)).layers for n in range(5)]
    assert kept == sorted(kept, reverse=True)
    gained = [left - right for left, right in pairwise(kept)]
    # The input of the first layer has no gradient, so that a layer that is kept keeps less of it.
    assert 0 < gained[0] < gained[1] == gained[2] == gained[3]


def test_all_inputs_but_two_are_on_the_host():
    on_device, on_host = (
        measure_step(policy_of(4, offload, torch.float32), *PACKS["rw"](256, 264)) for offload in (False, True)
    )
    bytes_of_input = 256 * tiny_config().hidden_size * 4
    assert on_device.layers - on_host.layers == 2 * bytes_of_input


@pytest.mark.parametrize("way", LABELS)
def test_all_figures_lie_on_a_line_over_the_number_of_layers(way):
    four, six, eight = (run_layers("tiny-qwen3", "srpo", [256], way, layers)[0] for layers in (4, 6, 8))
    for name in ("model", "trained", "layers", "head", "peak"):
        assert extend((4, 6), (getattr(four, name), getattr(six, name)), 8) == getattr(eight, name), name


def test_views_and_freed_tensors_do_not_count():
    known = torch.ones(1000)
    meter = Meter()
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


def test_pairs_fill_a_pack_and_share_their_beginning():
    pack, margin_rows = PACKS["srpo"](4096, 264)
    assert pack.tokens == 4096
    assert len(pack.pairs) == 2
    # Of each pair, 384 shared rows have no gradient. Of each side 705 have one: 704 tokens are read, and the last is not.
    assert (pack.rows, margin_rows) == (2 * (384 + 2 * 705), 2 * 2 * 705)


def test_a_number_in_nf4_takes_the_bytes_of_bitsandbytes():
    weight = torch.randn(1024, 512)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    scales = state.absmax.nbytes + state.state2.absmax.nbytes
    assert packed.nbytes + scales == NF4_BYTES * weight.numel()


def test_stand_ins_are_gone_afterwards():
    policy = policy_of(0, False, torch.float32)
    file = sys.modules[type(policy.causal_lm).__module__]
    own = file.apply_rotary_pos_emb
    with liger_stand_ins(policy.causal_lm):
        assert file.apply_rotary_pos_emb is not own
    assert file.apply_rotary_pos_emb is own
    assert not any("forward" in m.__dict__ for m in policy.causal_lm.modules() if type(m).__name__.endswith("RMSNorm"))
    predict("tiny-llama", "rw", [64], "all")
    assert torch.ones(1).sum().item() == 1
    assert nn.Linear(1, 1).to(torch.float64).weight.dtype == torch.float64


def test_predictions_that_the_file_has_are_kept_and_others_are_added(tmp_path, monkeypatch, capsys):
    file = tmp_path / "found.json"
    arguments = ["fake_memory.py", str(file), "--models", "tiny-qwen3", "--tasks", "srpo", "--tokens"]
    monkeypatch.setattr("sys.argv", [*arguments, "64"])
    fake_memory.main()
    made: list[tuple] = []

    def note(*args: object) -> list[fake_memory.Prediction]:
        made.append(args)
        return predict(*args)

    monkeypatch.setattr(fake_memory, "predict", note)
    monkeypatch.setattr("sys.argv", [*arguments, "64", "128"])
    fake_memory.main()
    assert made == [("tiny-qwen3", "srpo", [128], way) for way in LABELS]
    assert len(json.loads(file.read_text())) == 2 * len(LABELS)
    assert "| SRPO | 64 | 128 |" in capsys.readouterr().out


@pytest.mark.parametrize(("limit", "tokens"), [(5, 1000), (15, 2500), (30, 5000), (50, 9000)])
def test_the_tokens_at_a_limit_are_on_a_line_through_the_peaks(limit, tokens):
    assert tokens_at(limit, [2000, 3000, 5000], [10, 20, 30]) == pytest.approx(tokens, abs=501)


def test_a_document_without_markers_is_refused():
    begin, end = MARKERS
    assert insert(f"a\n{begin}\nold\n{end}\nb", "new", MARKERS) == f"a\n{begin}\n\nnew\n{end}\nb"
    with pytest.raises(SaroError, match="lacks the lines"):
        insert("a", "new", MARKERS)


# What is committed.


@pytest.mark.parametrize("shape", ["llama-8b", "qwen3-8b"])
@pytest.mark.parametrize("task", PACKS)
def test_8b_models_fit_into_10_gib_at_8k_tokens_and_into_24_gib_at_24k(shape, task):
    found = read_found(COMMITTED)
    assert found[shape, task, "all", 8192].peak <= 10.5 * GIB
    peaks = {key[-1]: value.peak for key, value in found.items() if key[:-1] == (shape, task, "all")}
    assert tokens_at(24 * GIB, sorted(peaks), [peaks[size] for size in sorted(peaks)]) >= 24_576


def test_predictions_are_within_five_per_cent_of_what_an_h100_measured():
    rows = [line for line in measured_table(read_found(COMMITTED), MEASURED).splitlines() if "H100" in line]
    assert len(rows) >= 6
    assert all(abs(float(row.split("|")[-2].strip(" %"))) < 5 for row in rows)


def test_the_tables_of_the_document_are_those_of_the_predictions():
    document = (ROOT / "benchmarks/README.md").read_text()
    assert insert(document, render(read_found(COMMITTED), MEASURED), MARKERS) == document


def test_the_script_names_files_that_exist():
    assert all(Path(file).exists() for file in MEASURED)
