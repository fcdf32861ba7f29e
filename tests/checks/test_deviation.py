"""How far an export may be from the trained model."""

from __future__ import annotations

import pytest
import torch

from saro.checks.deviation import Deviation

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_deviation_of_nan_is_not_allowed():
    nan = torch.tensor([float("nan")])
    assert not Deviation.of(nan, torch.tensor([1.0]), torch.tensor([2.0]), 0.1, 1).is_allowed


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_deviation_is_allowed_up_to_a_tenth_of_the_change_and_one_and_a_half_times_the_rounding(noise):
    trained, base = torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -4.0])
    exact, over = (Deviation.of(trained + d + 1.5 * noise, trained, base, noise, 1) for d in (0.199, 0.201))
    assert (exact.is_allowed, over.is_allowed) == (True, False)


def test_a_deviation_says_what_it_is_measured_against():
    trained, base = torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -4.0])
    assert str(Deviation.of(trained + 0.201, trained, base, 1e-6, 1)) == (
        "0.2 nats per token from the trained model, 10.05% of the 2 that training changed; rounding explains 1e-06 "
        "(2 tokens of 1 records)"
    )
