"""Before the first step, margins are zero and the loss has a known value; otherwise training does not start."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saro.checks.noise import Noise
from saro.config import PreferenceConfig
from saro.data.packs import PairLogps
from saro.data.steps import Schedule, Steps
from saro.errors import SaroError
from saro.model.score import score_pairs
from saro.train import check_start as check_start_module
from saro.train.check_start import check_start
from saro.train.objective import SRPOObjective
from saro.train.reference import load_reference

pytestmark = pytest.mark.usefixtures("cache", "one_thread")


@pytest.fixture
def world_with_check(world, runtime):
    """Return a function that makes policy, pairs, their reference, and a function that checks the first step."""

    def make(divergent=False, **options):
        source, policy, data = world(**options)
        data = data.divergent() if divergent else data
        reference = load_reference(runtime, policy, source, data, 256)
        steps = Steps(data, Schedule(data.kinds, 4, 0), 256)

        def check(reference=reference, **preference):
            objective = SRPOObjective(data.kinds, reference, PreferenceConfig(**preference))
            return check_start(runtime, policy, objective, steps[0], data, 256)

        return policy, data, reference, check

    return make


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_policy_is_its_own_reference(world_with_check, method, dtype):
    found = world_with_check(method=method, dtype=dtype)[3]()
    assert found.margin <= found.allowed
    assert found.loss == pytest.approx(np.log(2), abs=1e-3 if dtype == "float32" else 0.2)


@pytest.mark.parametrize(
    "preference",
    [
        {"loss": "hinge"},
        {"loss": "ipo", "length_normalize": True},
        {"loss": "robust", "label_smoothing": 0.2},
        {"nll": 1.0},
    ],
    ids=lambda p: "-".join(p),
)
def test_it_passes_with_every_loss(world_with_check, preference):
    world_with_check()[3](**preference)


def test_it_passes_if_only_divergent_tokens_are_scored(world_with_check):
    world_with_check(divergent=True)[3](scored="divergent")


def move(policy) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.normal_(std=0.2)


def test_dropout_does_not_affect_it_and_stays_on(world_with_check):
    policy, data, _, check = world_with_check(lora_dropout=0.5)
    move(policy)
    policy.train()
    check(score_pairs(policy, data, data.trees(range(len(data)), 256), 256))
    assert policy.training


def test_a_policy_that_has_changed_since_fails(world_with_check):
    policy, _, _, check = world_with_check()
    move(policy)
    with pytest.raises(SaroError, match="the reference is not the model that training starts from"):
        check()


def wrong_reference(reference: PairLogps, change) -> PairLogps:
    logps = reference.logps.copy()
    change(logps, reference.offsets)
    return PairLogps(logps, reference.offsets)


@pytest.mark.parametrize(
    "change",
    [
        lambda logps, offsets: logps.__iadd__(np.where(np.arange(len(logps)) % 2, 0.01, -0.02)),
        lambda logps, offsets: np.multiply(logps, 1.001, out=logps),
        lambda logps, offsets: logps.__setitem__(slice(0, len(logps)), np.roll(logps, 1)),
        lambda logps, offsets: logps.fill(np.nan),
    ],
    ids=["noise", "scale", "shifted by a token", "NaN"],
)
def test_a_wrong_reference_stops_before_the_first_step(world_with_check, change):
    _, _, reference, check = world_with_check()
    with pytest.raises(SaroError, match=r"before the first step the margin of p\d+ is .* nats, and rounding explains"):
        check(wrong_reference(reference, change))


def test_a_reference_without_the_adapter_of_stage_1_fails(world_with_check):
    """hiyouga/LLaMA-Factory#8459 and #8974: the reference was the base model, without the SFT adapter."""
    policy, data, _, check = world_with_check()
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    with policy.model.disable_adapter():
        without = score_pairs(policy, data, data.trees(range(len(data)), 256), 256)
    with pytest.raises(SaroError, match="the reference is not the model that training starts from"):
        check(without)
    check(score_pairs(policy, data, data.trees(range(len(data)), 256), 256))


def test_a_loss_that_differs_from_its_value_at_margin_zero_fails(world_with_check, monkeypatch):
    check = world_with_check()[3]
    original = SRPOObjective.loss_of
    monkeypatch.setattr(SRPOObjective, "loss_of", lambda self, margin: original(self, margin) + 0.01)
    with pytest.raises(SaroError, match=r"the loss is 0\.693\d+, and 0\.703\d+ at margins of zero"):
        check()


def test_noise_that_is_not_a_number_allows_nothing(world_with_check, monkeypatch):
    """NaN compares as neither larger nor smaller: it must not let every margin pass."""
    nan = float("nan")
    monkeypatch.setattr(check_start_module, "layout_noise", lambda *_: (None, Noise(nan, nan)))
    with pytest.raises(SaroError, match=r"^before the first step the margin of p\d+ is .* rounding explains nan"):
        world_with_check()[3]()
