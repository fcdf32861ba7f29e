"""Tests of the resident memory that is measured while a function runs."""

from __future__ import annotations

import torch

from saro.train.resident_memory import give_freed_memory_back, resident_peak


def test_a_step_shorter_than_the_time_between_samples_has_a_peak():
    assert all(resident_peak(lambda: None) > 10 * 2**20 for _ in range(20))


def test_memory_that_a_step_has_freed_is_in_its_peak():
    give_freed_memory_back()
    before = resident_peak(lambda: None)
    peak = resident_peak(lambda: torch.ones(64, 2**20, dtype=torch.float32))
    assert peak - before > 200 * 2**20
