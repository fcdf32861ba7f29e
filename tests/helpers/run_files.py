"""Reads the files and output lines of recipe runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
TIMING = ("tokens_per_second", "peak_memory_gib")


def metrics_of(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "final").glob("*.safetensors")
    return load_file(file)


def assert_same_run(a: Path, b: Path) -> None:
    """Check that weights in final/ and in the last checkpoint are bit-identical, and metrics equal."""
    x, y = weights_of(a), weights_of(b)
    assert x.keys() == y.keys()
    for name in x:
        assert torch.equal(x[name], y[name]), name
    last = [max((run / "checkpoints").iterdir()) for run in (a, b)]
    assert last[0].name == last[1].name
    assert (last[0] / "trainable.safetensors").read_bytes() == (last[1] / "trainable.safetensors").read_bytes()
    assert metrics_of(a) == metrics_of(b)


def wait_for(condition, process, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, process.err
        time.sleep(0.005)


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"grad_norm"') if path.exists() else 0


def scored_lines(err: str) -> list[str]:
    return [line.split(",")[0] for line in err.splitlines() if line.startswith("reference: ")]
