"""Optimizer groups and learning-rate schedules match values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from saro.config import TrainConfig
from saro.train.optim import make_optimizer, make_scheduler, optimizer_state_bytes, step_unless

OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")


def rates(total_steps: int, **options: object) -> list[float]:
    """Return the learning rate of each step, in units of the peak."""
    config = TrainConfig(lr=0.5, **options)
    optimizer = make_optimizer([nn.Parameter(torch.zeros(2, 2))], config)
    scheduler = make_scheduler(optimizer, config, total_steps)
    seen = []
    for _ in range(total_steps):
        seen.append(optimizer.param_groups[0]["lr"] / 0.5)
        assert scheduler.get_last_lr()[0] == optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
    return seen


def test_constant_stays_at_the_peak():
    assert rates(4, schedule="constant", warmup=0) == [1, 1, 1, 1]


def test_constant_stays_at_the_peak_for_many_steps():
    assert rates(30, schedule="constant", warmup=0.1) == pytest.approx([1 / 4, 2 / 4, 3 / 4] + [1] * 27)


def test_linear_falls_by_the_same_amount_and_would_reach_zero_after_the_last_step():
    assert rates(4, schedule="linear", warmup=0) == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4])


def test_cosine_falls_along_half_a_cosine():
    expected = [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert rates(4, schedule="cosine", warmup=0) == pytest.approx(expected)


def test_warmup_rises_in_equal_steps_and_the_decay_starts_at_the_peak():
    assert rates(5, schedule="linear", warmup=0.4) == pytest.approx([1 / 3, 2 / 3, 1, 2 / 3, 1 / 3])
    half = [(1 + math.cos(math.pi * i / 3)) / 2 for i in range(3)]
    assert rates(5, schedule="cosine", warmup=0.4) == pytest.approx([1 / 3, 2 / 3, *half])


def test_the_decay_ends_at_min_lr():
    linear = rates(4, schedule="linear", warmup=0, min_lr=0.1)
    assert linear == pytest.approx([0.2 + 0.8 * left for left in (1, 3 / 4, 2 / 4, 1 / 4)])
    cosine = rates(4, schedule="cosine", warmup=0, min_lr=0.1)
    assert cosine == pytest.approx([0.2 + 0.8 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)])
    assert rates(3, schedule="cosine", warmup=0, min_lr=0.5) == [1, 1, 1]


def test_warmup_steps_replace_the_share():
    assert rates(5, schedule="linear", warmup=0.9, warmup_steps=2) == rates(5, schedule="linear", warmup=0.4)
    assert rates(3, schedule="constant", warmup_steps=0) == [1, 1, 1]
    assert rates(2, schedule="constant", warmup_steps=9) == [1 / 2, 1]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total_steps", [1, 2, 3, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
def test_no_step_has_a_rate_of_zero_or_above_the_peak(schedule, total_steps, warmup):
    seen = rates(total_steps, schedule=schedule, warmup=warmup)
    assert min(seen) > 1e-5
    assert max(seen) <= 1 + 1e-12
    assert max(seen) == pytest.approx(1)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_schedule_that_is_continued_with_another_number_of_steps_is_that_of_the_new_number(schedule):
    config = TrainConfig(lr=0.5, schedule=schedule, warmup=0.2)

    def made(total_steps: int) -> tuple[torch.optim.Optimizer, object]:
        optimizer = make_optimizer([nn.Parameter(torch.zeros(2, 2))], config)
        return optimizer, make_scheduler(optimizer, config, total_steps)

    short_optimizer, short = made(10)
    long_optimizer, long = made(40)
    for optimizer, scheduler in ((short_optimizer, short), (long_optimizer, long)):
        for _ in range(10):
            optimizer.step()
            scheduler.step()
    resumed_optimizer, resumed = made(40)
    resumed.load_state_dict(short.state_dict())
    for _ in range(30):
        assert resumed_optimizer.param_groups[0]["lr"] == long_optimizer.param_groups[0]["lr"] > 0
        assert resumed.get_last_lr() == long.get_last_lr()
        for optimizer, scheduler in ((resumed_optimizer, resumed), (long_optimizer, long)):
            optimizer.step()
            scheduler.step()


def test_the_states_of_torchs_schedulers_in_older_checkpoints_are_continued():
    config = TrainConfig(lr=0.5, schedule="cosine", warmup=0.4)
    optimizer = make_optimizer([nn.Parameter(torch.zeros(2, 2))], config)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 3, total_iters=2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    old = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], milestones=[2])
    for _ in range(3):
        optimizer.step()
        old.step()
    resumed = make_scheduler(make_optimizer([nn.Parameter(torch.zeros(2, 2))], config), config, 5)
    resumed.load_state_dict(old.state_dict())
    assert resumed.get_last_lr() == pytest.approx(old.get_last_lr(), rel=1e-12)
    assert resumed.get_last_lr()[0] == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)) / 2)


def test_all_groups_follow_the_schedule():
    config = TrainConfig(lr=0.5, schedule="linear", warmup=0)
    optimizer = make_optimizer([nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))], config)
    scheduler = make_scheduler(optimizer, config, 2)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


# Weight decay.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_on_matrices_only(name):
    config = TrainConfig(optimizer=name, lr=0.1, weight_decay=0.5)
    matrix, vector = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([matrix, vector], config)
    for parameter in (matrix, vector):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # Decoupled: p * (1 - lr * weight_decay), and nothing from a gradient of zero.
    torch.testing.assert_close(matrix.detach(), torch.full((2, 3), 0.95))
    torch.testing.assert_close(vector.detach(), torch.ones(3), rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shapes", [[(2, 2)], [(2,)], [(2, 2), (2,)]])
def test_every_parameter_is_in_one_group(name, shapes):
    parameters = [nn.Parameter(torch.zeros(s)) for s in shapes]
    optimizer = make_optimizer(iter(parameters), TrainConfig(optimizer=name))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, parameters))


@pytest.mark.parametrize("name", OPTIMIZERS[:2])
@pytest.mark.parametrize("shape", [(3, 5), (4095,), (80, 60), (64, 64), (100, 300)])
def test_the_memory_of_an_optimizers_state_is_known_before_it_is_allocated(name, shape):
    parameter = nn.Parameter(torch.zeros(shape))
    optimizer = make_optimizer([parameter], TrainConfig(optimizer=name))
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter]
    shared = ("step", "qmap1", "qmap2")  # these are small, and the same for all parameters
    held = sum(v.nbytes for k, v in state.items() if isinstance(v, torch.Tensor) and k not in shared)
    assert optimizer_state_bytes(parameter, name) == held


def test_a_paged_state_does_not_count_because_it_makes_room():
    assert optimizer_state_bytes(nn.Parameter(torch.zeros(80, 60)), "paged_adamw8bit") == 0


# AdamW.


def test_the_first_two_steps_equal_adamw_by_hand():
    """The reference is Loshchilov & Hutter 2019, algorithm 2, in float64."""
    config = TrainConfig(lr=0.1, betas=(0.8, 0.9), weight_decay=0.2, schedule="constant", warmup=0)
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = make_optimizer([parameter], config)
    p, m, v = torch.tensor([[1.0, -2.0]], dtype=torch.float64), 0.0, 0.0
    for t, gradient in enumerate(([[0.5, -0.1]], [[-0.3, 0.4]]), start=1):
        g = torch.tensor(gradient, dtype=torch.float64)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        p = p - 0.1 * ((m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8) + 0.2 * p)
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    torch.testing.assert_close(parameter.detach().double(), p, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS[1:])
def test_the_8_bit_optimizers_take_nearly_the_same_steps(name):
    ends = []
    for optimizer_name in ("adamw", name):
        random = torch.Generator().manual_seed(0)
        parameter = nn.Parameter(torch.randn(100, 100, generator=random))
        optimizer = make_optimizer([parameter], TrainConfig(optimizer=optimizer_name, lr=1e-2))
        start = parameter.detach().clone()
        mean = torch.randn(100, 100, generator=random)
        for _ in range(10):
            parameter.grad = mean + 0.1 * torch.randn(100, 100, generator=random)
            optimizer.step()
        ends.append(parameter.detach() - start)
    assert (ends[1] - ends[0]).norm() < 0.1 * ends[0].norm()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_failed_changes_neither_weights_nor_state(optimizer):
    """Without it the optimizer would go on as if the gradients had never been."""
    ends = []
    for fails in (False, True):
        random = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(80, 60, generator=random)), nn.Parameter(torch.randn(5, generator=random))]
        made = make_optimizer(weights, TrainConfig(optimizer=optimizer, lr=1e-2, weight_decay=0.1))
        for failed in (False, *[True] * fails, False):
            for weight in weights:
                gradient = torch.randn(weight.shape, generator=random if not failed else None)
                weight.grad = gradient * float("nan") if failed else gradient
            step_unless(made, torch.tensor(failed))
        ends.append((weights, [made.state[weight] for weight in weights]))
    (plain, plain_state), (skipped, skipped_state) = ends
    assert all(torch.equal(a, b) for a, b in zip(plain, skipped, strict=True))
    for a, b in zip(plain_state, skipped_state, strict=True):
        assert torch.equal(torch.as_tensor(a["step"]), torch.as_tensor(b["step"]))
        moments = [name for name in a if name in ("exp_avg", "exp_avg_sq", "state1", "state2")]
        assert len(moments) == 2
        assert all(torch.equal(a[name], b[name]) for name in moments)
