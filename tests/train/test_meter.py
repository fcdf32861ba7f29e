"""The meter averages over packs, steps and ranks, and never averages averages."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saro.train.objective import Meter, Metrics


def _metrics(**values: tuple[float, float]) -> Metrics:
    """Make metrics: name -> (sum, count)."""
    return Metrics.of({name: (torch.tensor(total), torch.tensor(count)) for name, (total, count) in values.items()})


def test_a_meter_divides_sums_by_counts_and_never_averages_averages(runtime):
    meter = Meter()
    meter.add(_metrics(loss=(10.0, 1.0)))
    meter.add(_metrics(loss=(2.0, 9.0)))
    assert meter.read(runtime) == {"loss": 1.2}


def test_reading_a_meter_resets_it(runtime):
    meter = Meter()
    meter.add(_metrics(loss=(10.0, 1.0)))
    meter.read(runtime)
    meter.add(_metrics(loss=(3.0, 2.0)))
    assert meter.read(runtime) == {"loss": 1.5}


def test_a_meter_leaves_out_metrics_with_a_count_of_zero(runtime):
    meter = Meter()
    meter.add(_metrics(loss=(4.0, 2.0), entropy=(0.0, 0.0)))
    assert meter.read(runtime) == {"loss": 2.0}


def test_an_empty_meter_returns_no_metrics(runtime):
    assert Meter().read(runtime) == {}


def test_a_meter_sums_in_float64(runtime):
    """2**24 + 1 is not a float32, so the sums of a long interval would stop growing."""
    meter = Meter()
    for _ in range(3):
        meter.add(_metrics(loss=(2.0**24, 1.0)))
        meter.add(_metrics(loss=(1.0, 0.0)))
    assert meter.read(runtime) == {"loss": 2.0**24 + 1}


def test_a_meter_keeps_no_graph(runtime):
    value = torch.ones((), requires_grad=True)
    meter = Meter()
    meter.add(Metrics.of({"loss": (value * 2, torch.tensor(1))}))
    assert not meter.take(runtime).table.requires_grad


def test_a_pack_with_other_metrics_than_those_before_is_refused():
    """Added up by place, they would pass as each other."""
    meter = Meter()
    meter.add(_metrics(loss=(1.0, 1.0), entropy=(2.0, 1.0)))
    with pytest.raises(ValueError, match="a pack has the metrics entropy, loss, and those before"):
        meter.add(_metrics(entropy=(2.0, 1.0), loss=(1.0, 1.0)))


def test_a_pack_is_added_with_one_operator_whatever_the_number_of_metrics():
    class Count(TorchDispatchMode):
        operators = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.operators += 1
            return function(*args, **(kwargs or {}))

    meter = Meter()
    packs = [_metrics(**{f"metric_{i}": (1.0, 2.0) for i in range(40)}) for _ in range(2)]
    with Count() as count:
        for metrics in packs:
            meter.add(metrics)
    assert count.operators == 1


def test_metrics_are_a_mapping_of_names_to_sum_and_count():
    metrics = _metrics(loss=(3.0, 2.0)).join(_metrics(entropy=(1.0, 4.0)))
    assert {name: tuple(values.tolist()) for name, values in metrics.items()} == {
        "loss": (3.0, 2.0),
        "entropy": (1.0, 4.0),
    }
    assert "accuracy" not in metrics
