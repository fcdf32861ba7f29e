"""Before the first step, margins are zero and the loss has a known value; otherwise training does not start."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from loaded import examples_of, load

from saro.checks.noise import LayoutNoise
from saro.config import PreferenceConfig
from saro.data.dataset import PairSet
from saro.data.packs import PairLogps
from saro.data.records import CHOSEN, REJECTED
from saro.data.steps import Schedule, Steps
from saro.errors import SaroError
from saro.model.score import score_pairs
from saro.train import check_start as check_start_module
from saro.train.check_start import check_start
from saro.train.reference import load_reference
from saro.train.srpo_objective import SRPOObjective

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
    assert found.logps <= found.allowed_logps
    assert found.margin <= found.allowed_margin
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
    with pytest.raises(SaroError, match=r"before the first step the log-probs of p\d+ differ .* and rounding explains"):
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
    original = check_start_module.layout_noise

    def not_a_number(*args) -> LayoutNoise:
        noise = original(*args)
        return replace(noise, changes=noise.changes * np.nan)

    monkeypatch.setattr(check_start_module, "layout_noise", not_a_number)
    with pytest.raises(SaroError, match=r"^before the first step the log-probs of p\d+ .* rounding explains nan"):
        world_with_check()[3]()


# Long responses in bfloat16: the sum of many roundings is far less than their number times one rounding.


@pytest.fixture
def long_pairs(tiny_model, runtime):
    """Return a function that makes a policy with an adapter of some size, pairs of ``rows`` rows, and their check."""

    def make(rows, dtype, number=3, per_step=3, size=0.02):
        policy = load(tiny_model("qwen3"), "qlora", dtype=dtype)
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in policy.trainable().items():
                if "lora_B" in name:
                    parameter.normal_(std=size)
        chosen = examples_of(*[rows // 2 + 10] * number, seed=1)
        rejected = examples_of(*[rows // 2 + 10 + i for i in range(number)], seed=2)
        for i in range(number):
            rejected.sequence(i).tokens[:10] = chosen.sequence(i).tokens[:10]
        sides = [replace(side, prompt_tokens=np.full(number, 10, np.int32)) for side in (chosen, rejected)]
        pairs = PairSet(*sides, np.arange(number, dtype=np.int32))
        budget = 2 * rows + 100
        steps = Steps(pairs, Schedule(pairs.kinds, per_step, 0), budget)

        def score():
            # One pair at a time, which is another layout than that of the check.
            return score_pairs(policy, pairs, pairs.trees(range(number), budget), rows + 50)

        def check(reference):
            return check_start(
                runtime, policy, SRPOObjective(pairs.kinds, reference, PreferenceConfig()), steps[0], pairs, budget
            )

        return policy, score, check

    return make


@pytest.mark.parametrize("rows", [100, 350, 2000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_model_as_reference_of_an_adapter_fails_at_every_length(long_pairs, dtype, rows):
    policy, score, check = long_pairs(rows, dtype)
    own = score()
    with policy.model.disable_adapter():
        base = score()
    assert 0.02 < np.abs(base.logps - own.logps).mean() < 1.5  # as much as a stage 1 changes
    check(own)
    with pytest.raises(SaroError, match="the reference is not the model that training starts from"):
        check(base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_wrong_pair_fails(long_pairs, dtype):
    policy, score, check = long_pairs(100, dtype)
    reference = score()
    with policy.model.disable_adapter():
        base = score()
    part = slice(reference.offsets[2], reference.offsets[4])
    reference.logps[part] = base.logps[part]
    with pytest.raises(SaroError, match="the log-probs of r1 differ"):
        check(reference)


def test_small_errors_of_one_direction_fail_by_their_margin(long_pairs):
    """Each is less than a rounding in bfloat16, and over 2,000 rows they make a margin."""
    _, score, check = long_pairs(2000, "bfloat16")
    reference = score()
    found = check(reference)
    error = 0.8 * found.allowed_logps
    for pair in range(3):
        reference.side_logps(pair, CHOSEN)[:] += error
        reference.side_logps(pair, REJECTED)[:] -= error
    with pytest.raises(SaroError, match=r"the margin of r\d is .* nats, and rounding explains"):
        check(reference)


def test_a_step_of_one_pair_checks_another_pair_too(long_pairs):
    policy, score, check = long_pairs(100, "bfloat16", number=2, per_step=1)
    reference = score()
    with policy.model.disable_adapter():
        base = score()
    checked = Schedule(np.zeros(2, np.uint8), 1, 0).records(0)[0]
    other = 1 - checked
    part = slice(reference.offsets[2 * other], reference.offsets[2 * other + 2])
    reference.logps[part] = base.logps[part]
    with pytest.raises(SaroError, match=f"the log-probs of r{other} differ"):
        check(reference)


def test_a_single_pair_can_be_checked(long_pairs):
    _, score, check = long_pairs(100, "bfloat16", number=1, per_step=1)
    assert check(score()).logps < 0.1


def test_the_noise_of_very_short_responses_is_measured_on_more_than_two_pairs(world_with_check, monkeypatch):
    measured = []
    original = check_start_module.layout_noise

    def measure(policy, trees, pack_tokens):
        measured.append(sum(len(s.row_kinds) for tree in trees for s in tree.sequences))
        return original(policy, trees, pack_tokens)

    monkeypatch.setattr(check_start_module, "layout_noise", measure)
    _, data, _, check = world_with_check(divergent=True)
    check(scored="divergent")
    rows = [sum(len(s.row_kinds) for s in data.sequences(i)) for i in range(len(data))]
    assert max(rows) < 128
    # The step has four pairs, so all are measured.
    assert measured[0] > 2 * max(rows)
