"""Intervals and tests of proportions: published examples, limits, and coverage in simulations."""

from __future__ import annotations

from math import inf, isnan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saro.evaluate.statistics import (
    effective_number,
    holm,
    mcnemar_p,
    newcombe_paired,
    restrict_lengths,
    smallest_effect,
    student_p,
    student_quantile,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_intervals_that_newcombe_tabulates(successes, n, low, high):
    """Newcombe 1998, Stat. Med. 17:857, table I, method 3."""
    interval = wilson_interval(successes / n, n)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


@given(n=st.integers(1, 5000), share=st.floats(0, 1))
def test_wilson_holds_the_share_within_0_and_1(n, share):
    value, low, high = wilson_interval(share, n)
    assert 0 <= low <= value <= high <= 1
    assert low < high


def test_without_observations_there_is_no_interval():
    assert all(isnan(x) for x in wilson_interval(0.0, 0))
    assert all(isnan(x) for x in newcombe_paired(0, 0, 0, 0))


@pytest.mark.parametrize(
    ("table", "low", "high", "digits"),
    [
        # Newcombe 1998, Stat. Med. 17:2635, table II, method 10.
        ((36, 12, 2, 0), 0.0569, 0.3404, 4),
        # Fagerland, Lydersen and Laake 2014, Stat. Med. 33:2850.
        ((1, 1, 7, 12), -0.507, -0.026, 3),
    ],
)
def test_the_paired_difference_has_its_published_intervals(table, low, high, digits):
    interval = newcombe_paired(*table)
    assert (round(interval.low, digits), round(interval.high, digits)) == (low, high)


@pytest.mark.parametrize(
    ("table", "phi"),
    [
        # Negative correlation counts as it is, a positive one less half a count per prompt, and as none below that.
        ((5, 20, 15, 4), (5 * 4 - 20 * 15) / (25 * 19 * 20 * 24) ** 0.5),
        ((14, 5, 0, 22), (14 * 22 - 41 / 2) / (19 * 22 * 14 * 27) ** 0.5),
        ((6, 5, 5, 6), 0.0),
    ],
)
def test_the_paired_difference_adds_the_distances_to_wilsons_limits_as_correlated_errors(table, phi):
    both, first, second, _ = table
    n = sum(table)
    p1, low1, high1 = wilson_interval((both + first) / n, n)
    p2, low2, high2 = wilson_interval((both + second) / n, n)
    value, low, high = newcombe_paired(*table)
    below, above = (p1 - low1, high2 - p2), (high1 - p1, p2 - low2)
    assert (value - low) ** 2 == pytest.approx(below[0] ** 2 + below[1] ** 2 - 2 * phi * below[0] * below[1])
    assert (high - value) ** 2 == pytest.approx(above[0] ** 2 + above[1] ** 2 - 2 * phi * above[0] * above[1])


@given(st.tuples(*[st.integers(0, 300)] * 4).filter(any))
def test_the_paired_difference_lies_in_its_interval_and_changes_sign_with_the_models(table):
    both, first, second, neither = table
    value, low, high = newcombe_paired(*table)
    assert -1 - 1e-12 <= low <= value <= high <= 1 + 1e-12
    assert newcombe_paired(both, second, first, neither) == pytest.approx((-value, -high, -low))


def test_two_equal_models_have_an_interval_of_some_width():
    assert newcombe_paired(20, 0, 0, 30).high > 0.03


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (120, 1.980), (1e6, 1.960)]
)
def test_students_quantiles_are_those_of_the_tables(freedom, t):
    assert student_quantile(0.05, freedom) == pytest.approx(t, abs=6e-4)
    assert student_p(student_quantile(0.05, freedom), freedom) == pytest.approx(0.05, abs=1e-6)


def test_mcnemar_gives_the_published_p():
    """Fagerland, Lydersen and Laake 2013, BMC Med. Res. Methodol. 13:91: 0.039, where the exact test gives 0.070."""
    assert round(mcnemar_p(1, 7), 3) == 0.039
    # Closed: without a lost prompt, p is half of the exact test's 2 / 2**n.
    assert mcnemar_p(0, 10) == 2**-10
    assert mcnemar_p(0, 0) == mcnemar_p(4, 4) == 1


@given(st.integers(0, 2000), st.integers(0, 2000))
def test_mcnemar_does_not_depend_on_the_order_of_the_models(gained, lost):
    assert mcnemar_p(gained, lost) == mcnemar_p(lost, gained)
    assert 0 <= mcnemar_p(gained, lost) <= 1


def test_holm_multiplies_by_the_number_of_hypotheses_that_are_left():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=30))
def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni(p_values):
    adjusted = holm(p_values)
    assert all(p <= a <= min(1, p * len(p_values)) + 1e-12 for p, a in zip(p_values, adjusted, strict=True))
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)


def test_independent_prompts_count_as_they_are():
    assert effective_number([0, 1, 1], ["a", "b", "c"]) == 3


def test_copies_of_a_prompt_count_once():
    assert effective_number([0, 0, 1, 1, 0, 0, 1, 1], ["a", "a", "b", "b", "c", "c", "d", "d"]) == 4
    # All equal: they may be copies.
    assert effective_number([1] * 8, ["a", "a", "b", "b", "c", "c", "d", "d"]) == 4


def test_a_cluster_of_opposites_counts_as_independent_at_most():
    assert effective_number([0, 1] * 4, ["a", "a", "b", "b", "c", "c", "d", "d"]) == 8


def clustered_outcomes(rng: np.random.Generator, clusters: int, size: int) -> np.ndarray:
    """Return outcomes (clusters, size) with rate 0.3 and correlation 0.5 within clusters."""
    copied = np.repeat(rng.random((clusters, 1)) < 0.3, size, axis=1)
    return np.where(rng.random((clusters, size)) < 0.5**0.5, copied, rng.random((clusters, size)) < 0.3)


def test_wilson_covers_clustered_rates_at_the_effective_number_only():
    rng = np.random.default_rng(0)
    names = np.repeat([f"{i:02d}" for i in range(40)], 4)
    covered = naive = 0
    for _ in range(400):
        y = clustered_outcomes(rng, 40, 4).ravel()
        interval = wilson_interval(y.mean(), effective_number(y, names))
        covered += interval.low <= 0.3 <= interval.high
        interval = wilson_interval(y.mean(), len(y))
        naive += interval.low <= 0.3 <= interval.high
    assert 0.92 <= covered / 400 <= 0.98
    assert naive / 400 < 0.9


@pytest.mark.parametrize(("clusters", "size"), [(100, 1), (40, 3)])
def test_the_paired_interval_covers(clusters, size):
    """Also of clustered prompts, with counts scaled to the effective number."""
    rng = np.random.default_rng(1)
    names = np.repeat([f"{i:03d}" for i in range(clusters)], size)
    covered = 0
    for _ in range(600):
        base = clustered_outcomes(rng, clusters, size).ravel()
        # The model keeps half of the outcomes that the baseline has, and gains none.
        own = base & np.repeat(rng.random(clusters) < 0.5, size)
        scale = effective_number(own.astype(int) - base, names) / len(names)
        counts = ((own & base).sum(), 0, (base & ~own).sum(), (~own & ~base).sum())
        interval = newcombe_paired(*(scale * int(count) for count in counts))
        covered += interval.low <= -0.15 <= interval.high
    assert 0.92 <= covered / 600 <= 0.98


def test_mcnemar_errs_at_most_as_often_as_it_says():
    rng = np.random.default_rng(2)
    gained = rng.binomial(30, 0.5, 4000)
    assert 0.02 <= np.mean([mcnemar_p(int(k), 30 - int(k)) < 0.05 for k in gained]) <= 0.05


@pytest.mark.parametrize(("correlation", "n"), [(None, 100), (None, 400), (0.5, 100), (0.5, 400)])
def test_the_smallest_effect_is_seen_with_the_power_that_was_asked_for(correlation, n):
    """Simulated: two models whose outcomes on a prompt have the given correlation."""
    effect = smallest_effect(n, rate=0.3, correlation=correlation)
    rng = np.random.default_rng(3)
    rho = correlation or 0.0
    rates = (0.3, 0.3 + effect)
    shared = rho * np.sqrt(rates[0] * (1 - rates[0]) * rates[1] * (1 - rates[1]))
    both = rates[0] * rates[1] + shared
    cells = [both, rates[1] - both, rates[0] - both, 1 - rates[0] - rates[1] + both]
    counts = rng.multinomial(n, cells, size=1000)
    seen = np.mean([mcnemar_p(int(first), int(second)) < 0.05 for _, first, second, _ in counts])
    assert seen == pytest.approx(0.8, abs=0.05)


def test_the_smallest_effect_of_two_independent_halves_is_that_of_the_textbook():
    """Fleiss, Levin and Paik 2003: 0.5 against 0.7 needs 93 a group without a correction for continuity."""
    assert smallest_effect(93, rate=0.5) == pytest.approx(0.2, abs=0.001)


def test_pairing_shows_smaller_effects_and_too_few_prompts_show_none():
    assert smallest_effect(200, 0.2, correlation=0.5) < smallest_effect(200, 0.2)
    assert smallest_effect(3) == smallest_effect(0) == inf


@given(st.integers(0, 900), st.integers(0, 900), st.integers(1, 1000))
def test_a_shorter_limit_cuts_the_answer_before_the_reasoning(think, answer, limit):
    kept_think, kept_answer, is_cut = restrict_lengths(think, answer, limit)
    assert kept_think == min(think, limit)
    assert kept_think + kept_answer == min(think + answer, limit)
    assert is_cut == (think + answer > limit)
    assert restrict_lengths(think, answer, None) == (think, answer, False)
