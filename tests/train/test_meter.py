"""The meter averages over packs, steps and ranks, and never averages averages."""

from __future__ import annotations

import torch

from saro.train.objective import Meter


def _pair(total: float, count: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(total), torch.tensor(count)


def test_a_meter_divides_sums_by_counts_and_never_averages_averages(runtime):
    meter = Meter()
    meter.add({"loss": _pair(10.0, 1.0)})
    meter.add({"loss": _pair(2.0, 9.0)})
    assert meter.read(runtime) == {"loss": 1.2}


def test_reading_a_meter_resets_it(runtime):
    meter = Meter()
    meter.add({"loss": _pair(10.0, 1.0)})
    meter.read(runtime)
    meter.add({"loss": _pair(3.0, 2.0)})
    assert meter.read(runtime) == {"loss": 1.5}


def test_a_meter_leaves_out_metrics_with_a_count_of_zero(runtime):
    meter = Meter()
    meter.add({"loss": _pair(4.0, 2.0), "loss/safety": _pair(0.0, 0.0)})
    assert meter.read(runtime) == {"loss": 2.0}


def test_an_empty_meter_returns_no_metrics(runtime):
    assert Meter().read(runtime) == {}


def test_a_meter_sums_in_float64(runtime):
    """2**24 + 1 is not a float32, so the sums of a long interval would stop growing."""
    meter = Meter()
    for _ in range(3):
        meter.add({"loss": _pair(2.0**24, 1.0)})
        meter.add({"loss": _pair(1.0, 0.0)})
    assert meter.read(runtime) == {"loss": 2.0**24 + 1}


def test_a_meter_keeps_no_graph(runtime):
    value = torch.ones((), requires_grad=True)
    meter = Meter()
    meter.add({"loss": (value * 2, torch.tensor(1))})
    assert not any(t.requires_grad for t in meter._sums.values())
