"""Tests that the records of a step depend only on seed and epoch."""

import random
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, reject
from hypothesis import strategies as st
from sets import by_hand, pairs_by_hand

from saro.config import DataConfig, TrainConfig
from saro.data.packs import Share, plan_step
from saro.data.steps import Schedule, Steps, count_steps
from saro.errors import SaroError


def epoch_of(schedule: Schedule, epoch: int) -> list[np.ndarray]:
    first = epoch * schedule.steps_per_epoch
    return [schedule.records(step) for step in range(first, first + schedule.steps_per_epoch)]


def draws(schedule: Schedule, epoch: int) -> Counter[int]:
    """Count how often each record is drawn in an epoch."""
    return Counter(np.concatenate(epoch_of(schedule, epoch)).tolist())


def drawable(*args) -> Schedule:
    """Make a schedule. If the weights leave no record, hypothesis tries other ones."""
    try:
        return Schedule(*args)
    except SaroError:
        reject()


kind_lists = st.lists(st.integers(0, 1), min_size=1, max_size=40)
weightings = st.dictionaries(st.integers(0, 1), st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0]))
seeds = st.integers(0, 2**31)


# A pure function


@given(kind_lists, st.integers(1, 9), seeds, weightings, st.booleans(), st.data())
def test_a_fresh_schedule_gives_any_step_like_one_that_ran_up_to_it(kinds, per_step, seed, weights, in_groups, data):
    # A resumed run needs this: in accelerate#4233 a sampler started its epoch again after a resume.
    groups = [i // 3 for i in range(len(kinds))] if in_groups else None
    ran = drawable(kinds, per_step, seed, weights, groups)
    steps = [ran.records(step).tolist() for step in range(3 * ran.steps_per_epoch)]
    start = data.draw(st.integers(0, len(steps) - 1))
    fresh = Schedule(kinds, per_step, seed, weights, groups)
    assert [fresh.records(step).tolist() for step in range(start, len(steps))] == steps[start:]


def test_steps_may_be_asked_for_in_any_order_and_again():
    schedule = Schedule([0] * 20, 3, seed=1)
    forward = {step: schedule.records(step).tolist() for step in range(21)}
    for step in (20, 0, 8, 8, 7, 19, 0):
        assert schedule.records(step).tolist() == forward[step]


def test_only_the_seed_decides_the_order():
    before = [records.tolist() for records in epoch_of(Schedule([0, 1] * 20, 4, seed=3), 0)]
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        assert [records.tolist() for records in epoch_of(Schedule([0, 1] * 20, 4, seed=3), 0)] == before


def test_the_type_of_the_kinds_does_not_matter():
    listed, array = Schedule([0, 1] * 10, 4, seed=0), Schedule(np.array([0, 1] * 10, np.uint8), 4, seed=0)
    assert all(listed.records(step).tolist() == array.records(step).tolist() for step in range(10))


def test_writing_into_a_step_changes_no_step():
    schedule, untouched = Schedule([0] * 9, 3, seed=0), Schedule([0] * 9, 3, seed=0)
    schedule.records(0).fill(0)
    assert [schedule.records(step).tolist() for step in range(3)] == [untouched.records(s).tolist() for s in range(3)]


def test_records_per_step_cuts_one_order_into_steps():
    orders = [np.concatenate(epoch_of(Schedule([0, 1] * 15, n, seed=5), 2)).tolist() for n in (1, 4, 7, 30, 99)]
    assert all(order == orders[0] for order in orders)


def test_the_order_is_the_same_on_every_machine():
    # If this fails, the algorithm changed, and resumed runs would silently train on other records.
    schedule = Schedule([0, 0, 1, 1, 1, 0, 1], 3, seed=0, weights={1: 0.5})
    assert [schedule.records(step).tolist() for step in range(4)] == [[4, 1], [5, 0, 6], [1, 3], [4, 5, 0]]


def test_epochs_differ():
    schedule = Schedule([0] * 50, 50, seed=0)
    orders = {tuple(schedule.records(epoch).tolist()) for epoch in range(5)}
    assert len(orders) == 5


def test_seeds_differ():
    orders = {tuple(Schedule([0] * 50, 50, seed).records(0).tolist()) for seed in range(5)}
    assert len(orders) == 5


def test_an_epoch_differs_from_the_epochs_of_the_next_seed():
    # They would be equal if seed and epoch were added.
    assert Schedule([0] * 50, 50, seed=0).records(1).tolist() != Schedule([0] * 50, 50, seed=1).records(0).tolist()


def test_kinds_are_mixed():
    first = np.concatenate(epoch_of(Schedule([0] * 100 + [1] * 100, 10, seed=0), 0))[:100]
    assert 30 < (first < 100).sum() < 70


# Steps of an epoch


@given(kind_lists, st.integers(1, 9), seeds, st.integers(0, 3))
def test_every_record_comes_once_in_an_epoch(kinds, per_step, seed, epoch):
    schedule = Schedule(kinds, per_step, seed)
    assert draws(schedule, epoch) == dict.fromkeys(range(len(kinds)), 1)


@given(kind_lists, st.integers(1, 9), weightings, st.integers(0, 3))
def test_steps_differ_by_at_most_one_record_and_are_as_few_as_possible(kinds, per_step, weights, epoch):
    schedule = drawable(kinds, per_step, 0, weights)
    lengths = [len(records) for records in epoch_of(schedule, epoch)]
    assert sum(lengths) == schedule.records_per_epoch
    assert 1 <= max(lengths) <= per_step
    assert max(lengths) - min(lengths) <= 1
    assert len(lengths) == -(-schedule.records_per_epoch // per_step)


def test_no_step_is_much_smaller_than_the_others():
    # 17 records in steps of 16 are 9 and 8, not 16 and 1.
    assert sorted(len(records) for records in epoch_of(Schedule([0] * 17, 16, seed=0), 0)) == [8, 9]


# Weights


def test_weight_0_leaves_a_kind_out():
    assert draws(Schedule([0, 1, 0, 1], 2, 0, {1: 0.0}), 0) == {0: 1, 2: 1}


def test_weight_2_draws_each_record_twice():
    assert draws(Schedule([0, 1, 0, 1], 2, 0, {1: 2}), 0) == {0: 1, 1: 2, 2: 1, 3: 2}


def test_weight_one_half_draws_half_of_the_records_once():
    schedule = Schedule([0] * 10 + [1] * 40, 8, 0, {1: 0.5})
    drawn = draws(schedule, 0)
    assert schedule.records_per_epoch == 30
    assert set(range(10)) < set(drawn)
    assert set(drawn.values()) == {1}
    assert len(drawn) == 30


def test_weight_one_half_draws_another_half_in_each_epoch():
    schedule = Schedule([0] * 40, 8, 0, {0: 0.5})
    halves = [frozenset(draws(schedule, epoch)) for epoch in range(20)]
    assert len(set(halves)) == 20
    assert frozenset().union(*halves) == set(range(40))


def test_weight_one_and_a_half_draws_all_and_half_of_them_again():
    counts = Counter(draws(Schedule([0] * 40, 8, 0, {0: 1.5}), 0).values())
    assert counts == {1: 20, 2: 20}


@given(kind_lists, weightings, st.integers(0, 3))
def test_a_kind_is_drawn_weight_times_its_records(kinds, weights, epoch):
    schedule = drawable(kinds, 4, 0, weights)
    drawn = draws(schedule, epoch)
    for kind in set(kinds):
        members = [i for i, k in enumerate(kinds) if k == kind]
        weight = weights.get(kind, 1.0)
        assert sum(drawn[i] for i in members) == round(weight * len(members))
        assert {drawn[i] for i in members} <= {int(weight), int(np.ceil(weight))}


def test_a_weight_of_a_kind_that_does_not_occur_changes_nothing():
    assert draws(Schedule([0] * 4, 2, 0, {1: 5.0}), 0) == dict.fromkeys(range(4), 1)


@pytest.mark.parametrize("kinds", [[0, 0, 0], [0]])
def test_weights_that_leave_no_record_are_an_error(kinds):
    with pytest.raises(SaroError, match="weights leave no record to draw; "):
        Schedule(kinds, 2, 0, {0: 0.0})


# Groups


def spans(order: list[int], groups: list[int]) -> dict[int, int]:
    """Return, for each group, the number of places from its first draw to its last."""
    places: dict[int, list[int]] = {}
    for place, record in enumerate(order):
        places.setdefault(groups[record], []).append(place)
    return {group: max(of) - min(of) + 1 for group, of in places.items()}


grouped = st.lists(st.tuples(st.integers(0, 1), st.integers(-1, 6)), min_size=1, max_size=40)


@given(kind_lists, st.integers(1, 9), seeds, weightings, st.integers(0, 2), st.randoms())
def test_groups_of_one_record_change_nothing(kinds, per_step, seed, weights, epoch, rng):
    numbers = rng.sample(range(1000), len(kinds))
    plain, in_groups = drawable(kinds, per_step, seed, weights), drawable(kinds, per_step, seed, weights, numbers)
    expected = [records.tolist() for records in epoch_of(plain, epoch)]
    assert [records.tolist() for records in epoch_of(in_groups, epoch)] == expected


@given(grouped, st.integers(1, 9), seeds, st.integers(0, 2))
def test_a_group_is_drawn_without_a_gap(records, per_step, seed, epoch):
    kinds, groups = map(list, zip(*records, strict=True))
    order = np.concatenate(epoch_of(Schedule(kinds, per_step, seed, groups=groups), epoch)).tolist()
    assert spans(order, groups) == Counter(groups)


@given(grouped, st.integers(1, 9), seeds, weightings, st.integers(0, 2))
def test_groups_change_neither_draws_nor_sizes_of_steps(records, per_step, seed, weights, epoch):
    kinds, groups = map(list, zip(*records, strict=True))
    plain, in_groups = drawable(kinds, per_step, seed, weights), drawable(kinds, per_step, seed, weights, groups)
    assert draws(in_groups, epoch) == draws(plain, epoch)
    assert [len(step) for step in epoch_of(in_groups, epoch)] == [len(step) for step in epoch_of(plain, epoch)]


@given(grouped, seeds, st.integers(2, 3))
def test_copies_of_a_record_are_in_different_runs_of_its_group(records, seed, weight):
    kinds, groups = map(list, zip(*records, strict=True))
    schedule = Schedule(kinds, 1, seed, {0: weight, 1: weight}, groups)
    left = np.concatenate(epoch_of(schedule, 0)).tolist()
    size = Counter(groups)
    while left:
        run = left[: size[groups[left[0]]]]
        assert sorted(run) == [r for r, group in enumerate(groups) if group == groups[run[0]]]
        left = left[len(run) :]


def test_copies_are_no_closer_together_than_without_groups():
    def twice_in_a_step(groups: list[int] | None) -> int:
        schedules = [Schedule([0] * 96, 16, seed, {0: 2}, groups) for seed in range(50)]
        steps = [step for schedule in schedules for step in epoch_of(schedule, 0)]
        return sum(len(step) - len(set(step.tolist())) for step in steps)

    assert twice_in_a_step([i // 6 for i in range(96)]) <= twice_in_a_step(None)


def test_a_group_larger_than_a_step_fills_consecutive_ones():
    groups = [7] * 12 + list(range(100, 112))
    steps = [step.tolist() for step in epoch_of(Schedule([0] * 24, 4, seed=1, groups=groups), 0)]
    held = [sum(record < 12 for record in step) for step in steps]
    assert sum(held) == 12
    first, last = np.flatnonzero(held)[[0, -1]]
    assert all(n == 4 for n in held[first + 1 : last])


def test_large_groups_are_neither_early_nor_late():
    # They would be early if a group were placed where the first of its records was drawn.
    groups = [0] * 20 + list(range(1, 81))
    orders = (Schedule([0] * 100, 100, seed, groups=groups).records(0) for seed in range(400))
    starts = np.array([np.flatnonzero(order < 20)[0] for order in orders])
    # Starts are uniform on 0..80: the mean is 40, with a standard error of 23.4 / 20.
    assert abs(starts.mean() - 40) < 4 * 23.4 / 20


def test_the_order_within_a_group_and_of_the_groups_differs_by_epoch():
    schedule = Schedule([0] * 24, 24, seed=0, groups=[i // 4 for i in range(24)])
    orders = [schedule.records(epoch).tolist() for epoch in range(6)]
    assert len({tuple(record // 4 for record in order) for order in orders}) == 6
    assert len({tuple(record for record in order if record < 4) for order in orders}) > 1


def test_the_order_with_groups_is_the_same_on_every_machine():
    # If this fails, the algorithm changed, and resumed runs would silently train on other records.
    schedule = Schedule([0, 0, 1, 1, 1, 0, 1], 3, seed=0, weights={1: 2}, groups=[5, 5, 5, 2, 2, 9, 9])
    assert [schedule.records(step).tolist() for step in range(4)] == [[5, 6], [2, 0, 1], [4, 3, 2], [4, 3, 6]]


def test_a_number_of_groups_other_than_of_records_is_an_error():
    with pytest.raises(ValueError, match="2 groups for 3 records"):
        Schedule([0, 0, 0], 2, 0, groups=[1, 1])


# A million records


@pytest.fixture(scope="module")
def million() -> tuple[np.ndarray, np.ndarray]:
    """Return lengths in tokens, (n,), and kinds, (n,)."""
    rng = np.random.default_rng(0)
    return rng.integers(20, 2049, 1_000_000), rng.integers(0, 2, 1_000_000).astype(np.uint8)


def test_an_epoch_of_a_million_records_is_planned_from_lengths_only(million):
    lengths, kinds = million
    schedule = Schedule(kinds, 64, seed=0)
    times_drawn = np.zeros(len(kinds), np.uint8)
    for step in range(schedule.steps_per_epoch):
        records = schedule.records(step)
        tokens = lengths[records].tolist()
        (packs,) = plan_step(tokens, 2048)
        assert max(sum(tokens[i] for i in pack) for pack in packs) <= 2048
        times_drawn[records[[i for pack in packs for i in pack]]] += 1
    assert (times_drawn == 1).all()


def test_a_million_records_take_less_than_100_mb_to_plan(million):
    lengths, kinds = million
    tracemalloc.start()
    try:
        schedule = Schedule(kinds, 64, seed=0)
        # Steps of two epochs, so that the second order is drawn while the first is in memory.
        for step in range(schedule.steps_per_epoch - 500, schedule.steps_per_epoch + 500):
            plan_step(lengths[schedule.records(step)].tolist(), 2048, 2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100e6


# The options of a run


def test_a_run_of_examples_draws_each_kind_by_its_weight():
    data_options = DataConfig(weights={"safety": 2})
    schedule = Schedule.of(by_hand(), data_options, TrainConfig(records_per_step=3, seed=5))
    assert draws(schedule, 0) == {0: 1, 1: 2, 2: 1, 3: 1, 4: 1}  # record 1 is the one of kind safety
    same = Schedule([0, 1, 0, 0, 0], 3, 5, {1: 2})
    assert [r.tolist() for r in epoch_of(schedule, 1)] == [r.tolist() for r in epoch_of(same, 1)]


def test_a_weight_of_a_kind_that_no_record_has_is_an_error():
    general = replace(by_hand(), kinds=np.zeros(5, np.uint8))
    with pytest.raises(SaroError, match=r"^data\.weights: no record is of kind safety; leave it out, or add records$"):
        Schedule.of(general, DataConfig(weights={"safety": 2}), TrainConfig())


@pytest.mark.parametrize(("grouped", "groups"), [(True, [0, 1, 0]), (False, None)])
def test_a_run_of_pairs_groups_them_by_prompt_if_the_option_is_set(grouped, groups):
    pairs = replace(pairs_by_hand(), prompts=np.array([0, 1, 0], np.int32))
    schedule = Schedule.of(pairs, DataConfig(group_by_prompt=grouped), TrainConfig(records_per_step=2))
    assert (None if schedule.groups is None else schedule.groups.tolist()) == groups
    assert schedule.kinds.tolist() == pairs.kinds.tolist()


@pytest.mark.parametrize(
    ("epochs", "max_steps", "num_steps"), [(1, None, 2), (1.25, None, 3), (3, 4, 4), (1, 100, 2), (0.1, None, 1)]
)
def test_the_number_of_steps_is_that_of_the_epochs_or_the_limit(epochs, max_steps, num_steps):
    train = TrainConfig(records_per_step=4, epochs=epochs, max_steps=max_steps)
    assert Schedule.of(by_hand(), DataConfig(), train).num_steps(train) == num_steps


@given(st.integers(1, 1000), st.integers(1, 2000))
@example(110, 10)  # in floats, 1.1 * 10 is above 11
def test_epochs_of_two_decimals_make_the_steps_that_they_make_on_paper(hundredths, steps_per_epoch):
    train = TrainConfig(epochs=hundredths / 100)
    assert count_steps(train, steps_per_epoch) == -(-hundredths * steps_per_epoch // 100)


def test_a_step_holds_all_of_its_trees_and_the_packs_of_one_rank():
    data = replace(by_hand(), tokens=np.arange(38, dtype=np.int32))
    schedule = Schedule(data.kinds, 5, seed=0)
    ranks = [Steps(data, schedule, 16, Share(rank, 2))[0] for rank in range(2)]
    assert sorted(ranks[0].records) == [0, 1, 2, 3, 4]
    assert ranks[0].records == ranks[1].records
    assert ranks[0].tokens == ranks[1].tokens == 38 - 5  # the last token of a sequence is not read
    packs = [*ranks[0].packs, *ranks[1].packs]
    packed = [record for pack in packs for record in pack.records]
    assert sorted(packed) == [0, 1, 2, 3, 4]
    assert all(pack.tokens <= 16 for pack in packs)
