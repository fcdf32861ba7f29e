"""Tests of the comparison with TRL: the generated records, the checks, and the figures computed from rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import peers
import peers_worker
import pytest
import torch
from peers_data import (
    LENGTHS,
    InOrder,
    Part,
    PartLengths,
    Request,
    Result,
    generate_pairs,
    loaded_gib,
    memory_figures,
    unshared,
)

from saro.data.packs import lay_out
from saro.errors import SaroError

VOCABULARY, STOP = 5000, 2
TOLERANCE = peers.TOLERANCE["cpu"]
RESULT = Result(
    seconds=[1.0, 1.0],
    records=8,
    tokens=6000,
    read_tokens=5000,
    first={"loss": 2.0},
    loaded_gib=1.0,
    peak_gib=3.0,
    reference_seconds=4.0,
)


@pytest.fixture(scope="module")
def pairs():
    return generate_pairs(2000, VOCABULARY, STOP, seed=0)


@pytest.mark.parametrize("name", ["prompt", "shared", "chosen", "rejected"])
def test_lengths_are_log_normal_with_a_median_and_a_limit(name):
    part = getattr(LENGTHS, name)
    lengths = part.lengths(20_000, np.random.default_rng(0))
    assert np.median(lengths) == pytest.approx(part.median, rel=0.03)
    assert lengths.min() >= 1
    assert lengths.max() == part.most
    # The lower half of a normal distribution: its root mean square about the median is the standard deviation.
    below = np.log(lengths[lengths < part.median])
    assert np.sqrt(np.square(below - np.log(part.median)).mean()) == pytest.approx(part.sigma, rel=0.05)


def test_sides_of_a_generated_pair_share_prompt_and_reasoning_and_end_with_the_stop_token(pairs):
    for record in range(50):
        chosen, rejected = pairs.sequences(record)
        shared = chosen.scored_from + int(pairs.chosen.think_tokens[record])
        assert np.array_equal(chosen.tokens[:shared], rejected.tokens[:shared])
        assert chosen.scored_from == rejected.scored_from
        assert chosen.tokens[-1] == rejected.tokens[-1] == STOP


def test_the_same_seed_generates_the_same_pairs():
    first, second, other = (generate_pairs(4, VOCABULARY, STOP, seed) for seed in (3, 3, 4))
    assert np.array_equal(first.chosen.tokens, second.chosen.tokens)
    assert not np.array_equal(first.chosen.tokens, other.chosen.tokens)


def test_generated_pairs_have_the_lengths_asked_for():
    fixed = PartLengths(Part(5, 0.0, 9), Part(4, 0.0, 9), Part(30, 0.0, 7), Part(6, 0.0, 9))
    pairs = generate_pairs(3, VOCABULARY, STOP, seed=0, lengths=fixed)
    for record in range(3):
        chosen, rejected = pairs.sequences(record)
        assert chosen.scored_from == 5
        assert len(chosen.tokens) == 5 + 4 + 7 + 1  # 30 is cut to 7; the stop token
        assert len(rejected.tokens) == 5 + 4 + 6 + 1


def request_for(tmp_path, *arguments):
    return peers.make_request("srpo", "saro", str(tmp_path), peers.parse(["--device", "cpu", *arguments]))


def test_the_options_reach_the_measurement(tmp_path):
    lengths = ["--prompt_tokens", "256,0.5,1024", "--rejected_tokens", "600,0.6,2048"]
    options = ["--method", "qlora", "--gradient_checkpointing", "--records_per_step", "8", *lengths]
    request = request_for(tmp_path, *options)
    assert request.method == "qlora"
    assert request.gradient_checkpointing
    assert request.per_step == 8
    assert request.lengths.prompt == Part(256, 0.5, 1024)
    assert request.lengths.shared == LENGTHS.shared
    assert Request.parse(json.dumps(asdict(request))) == request


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_a_gpu_computes_in_bfloat16_and_a_cpu_in_float32(tmp_path, device, dtype):
    assert replace(request_for(tmp_path), device=device).dtype == dtype


def compare(tmp_path, monkeypatch, outcomes, *arguments):
    """Return what is written after each measurement; ``outcomes`` {side: result or error} stand for the processes."""

    def measure(request, limit):
        outcome = outcomes[request.side]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(peers, "measure", measure)
    options = peers.parse(["--task", "rw", "--device", "cpu", "--rounds", "2", *arguments])
    written = []
    entry = peers.compare_sides("rw", str(tmp_path), options, lambda e: written.append(json.loads(json.dumps(e))))
    assert json.loads(json.dumps(entry)) == written[-1]
    return written


def test_a_side_that_fails_is_left_out_with_its_error(tmp_path, monkeypatch):
    failed = peers.MeasurementFailed("torch.OutOfMemoryError: CUDA out of memory")
    outcomes = {"saro": RESULT, "trl, packed": RESULT, "trl, padded": failed}
    *_, last = compare(tmp_path, monkeypatch, outcomes)
    assert last["errors"] == {"trl, padded": "torch.OutOfMemoryError: CUDA out of memory"}
    assert list(last["figures"]) == ["saro", "trl, packed"]
    assert len(last["rounds"]["saro"]) == 2


def test_without_its_baseline_a_side_keeps_its_figures_and_has_no_ratio(tmp_path, monkeypatch):
    outcomes = {"saro": RESULT, "trl, packed": peers.MeasurementFailed("killed"), "trl, padded": RESULT}
    *_, last = compare(tmp_path, monkeypatch, outcomes)
    assert last["figures"]["saro"]["records_per_second"] == 4.0
    assert last["figures"]["saro"]["records_per_second_ratio"] is None


def test_results_are_written_after_each_measurement(tmp_path, monkeypatch):
    outcomes = dict.fromkeys(("saro", "trl, packed", "trl, padded"), RESULT)
    written = compare(tmp_path, monkeypatch, outcomes, "--side", "saro", "trl, packed")
    assert [sum(map(len, entry["rounds"].values())) for entry in written] == [1, 2, 3, 4]
    assert written[0]["figures"] == {}  # ratios need both sides
    assert written[1]["figures"]["saro"]["records_per_second_ratio"] == 1.0


def test_sides_are_measured_in_the_order_asked_for(tmp_path, monkeypatch):
    outcomes = dict.fromkeys(("saro", "trl, packed", "trl, padded"), RESULT)
    *_, last = compare(tmp_path, monkeypatch, outcomes, "--side", "trl, padded", "saro")
    assert list(last["figures"]) == ["trl, padded", "saro"]


def test_a_measurement_fails_with_the_last_line_of_its_process(tmp_path, capsys):
    with pytest.raises(peers.MeasurementFailed, match=r"^exit code 2: error: .*nowhere"):
        peers.measure(replace(request_for(tmp_path), model=str(tmp_path / "nowhere")), limit=None)
    assert "nowhere" in capsys.readouterr().err


def test_a_measurement_that_takes_too_long_is_stopped(tmp_path):
    with pytest.raises(peers.MeasurementFailed, match=r"stopped after 0\.001 s, its --limit"):
        peers.measure(request_for(tmp_path), limit=0.001)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_measurement_on_a_missing_gpu_fails(tmp_path):
    with pytest.raises(peers.MeasurementFailed, match="--device cuda: torch finds no GPU"):
        peers.measure(replace(request_for(tmp_path), device="cuda"), limit=None)


@pytest.mark.parametrize(
    ("device", "before", "after"), [("cpu", "0", ""), ("cuda", None, "0"), ("cuda", "3,1", "3"), ("cuda", "", "")]
)
def test_a_measurement_sees_one_gpu_or_none(monkeypatch, device, before, after):
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    peers_worker.use_only(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == after


def test_memory_on_a_gpu_is_that_of_the_allocator_after_loading(monkeypatch):
    done = []
    memory = {"memory_allocated": 2**30, "max_memory_allocated": 3 * 2**30, "max_memory_reserved": 4 * 2**30}
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: done.append(name))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert loaded_gib(torch.nn.Linear(2, 2), "cuda") == 1.0
    assert done == ["synchronize", "empty_cache", "reset_peak_memory_stats"]
    assert memory_figures("cuda") == {"peak_gib": 3.0, "reserved_gib": 4.0, "device": "a GPU"}


def test_memory_on_a_cpu_is_resident_memory():
    figures = memory_figures("cpu")
    assert list(figures) == ["peak_gib"]
    assert 0 < loaded_gib(torch.nn.Linear(2, 2), "cpu") <= figures["peak_gib"] * 1.01


def test_without_sharing_both_sides_are_read_completely_and_scored_the_same(pairs):
    pair = pairs.sequences(0)
    (shared,), separate = pairs.trees([0], 4096), unshared(pair)
    assert separate.tokens == sum(len(side.tokens) - 1 for side in pair)
    assert shared.tokens < separate.tokens
    packs = lay_out([shared]), lay_out([separate])
    assert torch.equal(*(pack.row_target[pack.entry_row] for pack in packs))
    assert torch.equal(*(pack.entry_sequence for pack in packs))


def test_steps_take_the_records_in_order_in_every_epoch():
    schedule = InOrder(12, 4)
    assert [schedule.records(step).tolist() for step in (0, 2, 3)] == [[0, 1, 2, 3], [8, 9, 10, 11], [0, 1, 2, 3]]


def test_sides_with_equal_first_metrics_pass():
    near = replace(RESULT, first={"loss": 2.00001})
    peers.check_same("rw", {"saro": [near, near], "trl, packed": [RESULT, RESULT]}, TOLERANCE)


@pytest.mark.parametrize("change", [{"first": {"loss": 2.001}}, {"tokens": 6001}, {"first": {"loss": float("nan")}}])
def test_sides_with_other_first_metrics_or_tokens_are_an_error(change):
    with pytest.raises(SaroError, match="they do not train on the same data or model"):
        peers.check_same(
            "rw", {"saro": [RESULT, replace(RESULT, **change)], "trl, packed": [RESULT, RESULT]}, TOLERANCE
        )


def test_ratios_are_medians_of_the_ratios_within_each_round():
    """A slow second round slows both sides and does not change the ratio."""
    slow = replace(RESULT, seconds=[8.0, 8.0])
    fast = [replace(r, seconds=[s / 2 for s in r.seconds], peak_gib=2.0) for r in (RESULT, slow, RESULT)]
    figures = peers.summary("rw", {"saro": fast, "trl, packed": [RESULT, slow, RESULT]})
    assert figures["saro"]["records_per_second"] == 8.0
    assert figures["saro"]["records_per_second_ratio"] == 2.0
    assert figures["saro"]["above_load_gib_ratio"] == 0.5
    assert figures["trl, packed"]["records_per_second_ratio"] == 1.0


def test_a_task_without_reference_has_no_reference_seconds():
    rounds = [replace(RESULT, reference_seconds=None)]
    figures = peers.summary("rw", {"saro": rounds, "trl, packed": rounds})
    assert figures["saro"]["reference_seconds"] is None
    assert figures["saro"]["reference_seconds_ratio"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "12"], "--pairs is 12; rw needs a multiple of 8"),
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--records_per_step", "3"], "--pairs is 32; srpo needs a multiple of 3"),
        (["--records_per_step", "0"], "--records_per_step is 0; it must be at least 1"),
        (["--task", "rw", "--side", "trl"], "--side names no side of rw; it has saro, trl, packed, trl, padded"),
        (["--data", "x.jsonl"], "name only the --task that it is for"),
    ],
)
def test_invalid_options_are_an_error(arguments, message):
    with pytest.raises(SaroError, match=message):
        peers.parse(arguments)


@pytest.mark.trl
def test_a_trl_batch_with_another_token_or_another_mask_is_an_error(pairs):
    pytest.importorskip("trl", reason="TRL is not installed: pip install -c constraints.txt -e '.[bench]'")
    from peers_trl import check_batch, pair_rows
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    batch = DataCollatorForPreference(pad_token_id=0)(list(pair_rows(pairs, 2)))
    records = np.arange(2)
    check_batch(batch, pairs, records)
    for name in ("input_ids", "completion_mask"):
        changed = torch.where(torch.arange(batch[name].shape[1]) == 7, 1 - batch[name], batch[name])
        with pytest.raises(ValueError, match="other tokens than we do"):
            check_batch(batch | {name: changed}, pairs, records)


@pytest.mark.trl
def test_every_side_of_both_tasks_is_measured_on_the_same_records(tiny_model, tmp_path, environment):
    pytest.importorskip("trl", reason="TRL is not installed: pip install -c constraints.txt -e '.[bench]'")
    file = tmp_path / "figures.json"
    small = ["--steps", "1", "--warmup", "1", "--rounds", "1", "--pairs", "8", "--threads", "1"]
    command = [sys.executable, peers.__file__, *small, "--model", tiny_model(), "--json", str(file)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    tasks = json.loads(file.read_text())["tasks"]
    for task, sides in peers.SIDES.items():
        assert set(tasks[task]["figures"]) == set(sides)
    shares = {side: values["read_share"] for side, values in tasks["srpo"]["figures"].items()}
    assert all(values["records_per_second_ratio"] > 0 for values in tasks["srpo"]["figures"].values())
    assert shares["saro"] < shares["saro, no sharing"] < 1 < shares["trl, one by one"] < shares["trl"]


@pytest.mark.trl
def test_qlora_with_gradient_checkpointing_is_measured_on_both_sides(tiny_model, tmp_path, environment):
    pytest.importorskip("trl", reason="TRL is not installed: pip install -c constraints.txt -e '.[bench]'")
    file = tmp_path / "figures.json"
    small = ["--task", "srpo", "--steps", "1", "--warmup", "0", "--rounds", "1", "--pairs", "4", "--threads", "1"]
    kind = ["--method", "qlora", "--gradient_checkpointing", "--device", "cpu", "--side", "saro", "trl, one by one"]
    lengths = [
        f"--{part}_tokens={n},0.5,40" for part, n in (("prompt", 8), ("shared", 12), ("chosen", 14), ("rejected", 13))
    ]
    command = [sys.executable, peers.__file__, *small, *kind, *lengths, "--model", tiny_model(), "--json", str(file)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    entry = json.loads(file.read_text())["tasks"]["srpo"]
    assert entry["errors"] == {}
    (ours,), (theirs,) = entry["rounds"]["saro"], entry["rounds"]["trl, one by one"]
    assert ours["tokens"] == theirs["tokens"] <= 4 * 2 * (3 * 40 + 1)
