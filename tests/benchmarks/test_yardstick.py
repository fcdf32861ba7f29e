"""Tests of the yardstick: what a GPU does before and between the two events, and what a copy moves."""

from __future__ import annotations

import pytest
import torch
from yardstick import copy_bytes, gemm_per_second, seconds

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_gpu_sleeps_before_the_first_event_so_that_launches_do_not_count(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")

        def synchronize(self):
            done.append("synchronize")

        def elapsed_time(self, end):
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep"), raising=False)
    assert seconds(lambda: done.append("work"), CUDA) == 1.5
    assert done == ["sleep", "record", "work", "record", "synchronize"]


def test_on_a_cpu_the_work_runs_once():
    done = []
    assert seconds(lambda: done.append("work"), CPU) > 0
    assert done == ["work"]


def test_the_rate_of_a_gemm_counts_its_multiplications_and_additions(monkeypatch):
    monkeypatch.setattr("yardstick.seconds", lambda work, device: 0.5)
    assert gemm_per_second(CPU, torch.float32, size=8) == 2 * 8**3 / 0.5
    assert gemm_per_second(CPU, torch.float32) == 2 * 2048**3 / 0.5


def test_a_copy_moves_the_bytes_of_both_tensors():
    source, target, moved = copy_bytes(CPU)
    assert moved == source.nbytes + target.nbytes
