"""Tests of the benchmark of a training step and of that of a LoRA layer: each writes its figures on a tiny input."""

from __future__ import annotations

import json

import lora_linear
import pytest
import torch
import train_step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_yardstick(monkeypatch):
    monkeypatch.setattr("yardstick.GEMM_SIZE", {"cpu": 64})
    monkeypatch.setattr(train_step, "copy_per_second", lambda device: 1e9)


def test_a_tiny_step_writes_its_figures(tiny_model, tmp_path):
    file = tmp_path / "figures.json"
    small = {"pack_tokens": 64, "sequence_tokens": 16, "steps": 2, "warmup": 0}
    train_step.main(model=tiny_model(), peft=True, json_file=str(file), **small)
    result = json.loads(file.read_text())
    parts = ("forward", "head", "backward", "optimizer")
    assert all(result["seconds"][part] > 0 for part in (*parts, "step", "peft_step", "bare_step"))
    assert result["tokens"] == 64
    assert result["scored_rows"] == 48
    assert result["share_of_gemm_rate"] > 0
    assert result["peak_memory_gib"] > 0
    assert result["peak_reserved_gib"] is None  # on a CPU no allocator reserves memory


@pytest.mark.parametrize(("dtype", "computed"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_a_step_and_its_gemm_are_measured_in_the_dtype_that_was_asked_for(
    tiny_model, tmp_path, monkeypatch, dtype, computed
):
    gemms = []
    monkeypatch.setattr(train_step, "gemm_per_second", lambda device, dtype: gemms.append(dtype) or 1e9)
    file = tmp_path / "figures.json"
    small = {"pack_tokens": 64, "sequence_tokens": 16, "steps": 1, "warmup": 0}
    train_step.main(model=tiny_model(), dtype=dtype, json_file=str(file), **small)
    assert json.loads(file.read_text())["dtype"] == computed
    assert gemms == [getattr(torch, computed)]


def test_the_share_is_a_median_of_the_ratios_within_a_round(tiny_model, tmp_path, monkeypatch):
    """A slow round slows step and GEMM and does not change the share."""
    rounds = iter(
        [train_step.Times(s, s, s, s, gemm_rate=1e6 / s) for s in (1.0, 10.0, 1.0)],
    )
    monkeypatch.setattr(train_step, "time_round", lambda *_: next(rounds))
    file = tmp_path / "figures.json"
    small = {"pack_tokens": 64, "sequence_tokens": 16, "steps": 3, "warmup": 0}
    train_step.main(model=tiny_model(), json_file=str(file), **small)
    result = json.loads(file.read_text())
    assert result["share_of_gemm_rate"] == pytest.approx(sum(result["operations"].values()) / 4e6)


def test_a_lora_layer_is_compared_with_pefts_and_with_the_plain_one(tmp_path):
    file = tmp_path / "figures.json"
    lora_linear.main(rows=8, rank=2, rounds=2, layers=["SmolLM2-135M q"], json_file=str(file))
    (layer,) = json.loads(file.read_text())["layers"].values()
    assert set(layer["seconds"]) == {"plain", "peft", "saro"}
    assert set(layer["ratio_to_plain"]) == {"peft", "saro"}
