"""Resampled intervals and tests: means, ratios, d', kappa and rates corrected by labels."""

from __future__ import annotations

from math import isnan
from statistics import NormalDist

import numpy as np
import pytest

from saro.evaluate import bootstrap
from saro.evaluate.bootstrap import bootstrap_interval, cluster_sums, mean_difference, ratio, sign_flip_p
from saro.evaluate.discrimination import (
    compare_detection,
    criterion,
    d_prime,
    detection_interval,
    kappa,
    kappa_interval,
)
from saro.evaluate.predict_powered import predict_powered
from saro.evaluate.statistics import mcnemar_p, wilson_interval

pytestmark = pytest.mark.usefixtures("one_thread")


def test_sums_are_those_of_the_clusters_in_the_order_of_their_names():
    assert cluster_sums([[1, 2, 3], [1, 1, 1]], ["b", "a", "b"]).tolist() == [[2, 1], [4, 2]]


def test_the_same_sums_give_the_same_interval():
    sums = np.random.default_rng(0).integers(1, 100, (50, 2))
    assert bootstrap_interval(sums, ratio) == bootstrap_interval(sums, ratio)
    assert bootstrap_interval(sums, ratio) != bootstrap_interval(sums, ratio, seed=1)


def test_the_interval_of_a_mean_is_that_of_students_t():
    """For normal values, which have this closed case: 2.0096 standard errors with 50 of them."""
    values = np.array([NormalDist().inv_cdf((i + 0.5) / 50) for i in range(50)])
    interval = bootstrap_interval(np.stack([values, np.ones(50)], axis=1), ratio)
    error = values.std(ddof=1) / 50**0.5
    assert interval.high - interval.low == pytest.approx(2 * 2.0096 * error, rel=0.02)


def test_one_cluster_and_a_ratio_over_zero_have_no_interval():
    assert isnan(bootstrap_interval(np.array([[3.0, 2.0]]), ratio).low)
    assert isnan(bootstrap_interval(np.array([[3.0, 0.0], [1.0, 0.0]]), ratio).low)


def lengths(rng: np.random.Generator, n: int) -> np.ndarray:
    """Return skewed lengths of two models on n prompts, cut at 500: (n, 2)."""
    prompt = rng.normal(5, 0.5, (n, 1))
    return np.minimum(np.exp(prompt + rng.normal(0, 0.7, (n, 2))), 500)


@pytest.mark.parametrize("n", [40, 100])
def test_intervals_of_lengths_cover(n):
    rng = np.random.default_rng(4)
    truth = lengths(rng, 200_000).mean()
    covered = np.zeros(3)
    for _ in range(300):
        sums = np.concatenate([lengths(rng, n), np.ones((n, 1))], axis=1)
        intervals = (
            (bootstrap_interval(sums[:, [0, 2]], ratio), truth),
            (bootstrap_interval(sums[:, :2], ratio), 1.0),
            (bootstrap_interval(sums, mean_difference), 0.0),
        )
        covered += [low <= true <= high for (_, low, high), true in intervals]
    assert np.all((covered / 300 >= 0.92) & (covered / 300 <= 0.98)), covered / 300


def test_sign_flips_of_single_outcomes_are_the_exact_mcnemar_test():
    differences = np.array([1.0] * 3 + [-1.0] * 12 + [0.0] * 20)
    exact = mcnemar_p(3, 12) + 455 / 2**15  # mid-p and half of both tails' point probability
    assert sign_flip_p(differences) == pytest.approx(exact, abs=0.006)
    assert sign_flip_p(np.zeros(20)) == 1
    assert sign_flip_p(np.ones(1)) is None


def test_d_prime_and_criterion_have_their_textbook_values():
    """Macmillan and Creelman 2005, chapter 1: hits 0.8, false alarms 0.4 of 25 each: d' 1.095 and c -0.294."""
    counts = np.array([20.0, 5.0, 10.0, 15.0])
    assert d_prime(counts) == pytest.approx(1.095, abs=5e-4)
    assert criterion(counts) == pytest.approx(-0.294, abs=5e-4)


def twins(rng: np.random.Generator, n: int, hit: float, false_alarm: float, copied: float) -> np.ndarray:
    """Return counts of n twins whose two outcomes follow the same random number with probability ``copied``."""
    first = rng.random(n)
    second = np.where(rng.random(n) < copied, first, rng.random(n))
    hits, alarms = first < hit, second < false_alarm
    return np.stack([hits, ~hits, alarms, ~alarms], axis=1).astype(float)


@pytest.mark.parametrize(("n", "hit", "false_alarm"), [(40, 0.8, 0.3), (40, 0.95, 0.1), (100, 0.6, 0.5)])
def test_intervals_of_d_prime_and_criterion_cover(n, hit, false_alarm, monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 1000)
    rng = np.random.default_rng(5)
    z = NormalDist().inv_cdf
    truths = {d_prime: z(hit) - z(false_alarm), criterion: -(z(hit) + z(false_alarm)) / 2}
    covered = np.zeros(2)
    for _ in range(400):
        sums = twins(rng, n, hit, false_alarm, 0.5)
        intervals = [detection_interval(sums, statistic) for statistic in truths]
        covered += [low <= true <= high for (_, low, high), true in zip(intervals, truths.values(), strict=True)]
    assert np.all((covered / 400 >= 0.92) & (covered / 400 <= 0.98)), covered / 400


def test_a_perfect_score_on_few_twins_is_not_certain():
    sums = np.array([[1.0, 0.0, 0.0, 1.0]] * 20)
    value, low, high = detection_interval(sums, d_prime)
    assert value == pytest.approx(2 * NormalDist().inv_cdf(20.5 / 21))
    assert low < 3 < value < high


def test_moving_the_threshold_changes_the_criterion_only():
    rng = np.random.default_rng(6)
    z, phi = NormalDist().inv_cdf, NormalDist().cdf
    own, base = (twins(rng, 300, phi(0.5 - c), phi(-0.5 - c), 0.0) for c in (-0.6, 0.6))
    assert z(phi(0.5)) == pytest.approx(0.5)
    discrimination, p_discrimination = compare_detection(own, base, d_prime)
    threshold, p_threshold = compare_detection(own, base, criterion)
    assert discrimination.low < 0 < discrimination.high
    assert p_discrimination > 0.05
    assert threshold.high < -0.8
    assert p_threshold < 0.001


def test_kappa_has_its_textbook_value():
    """Cohen's definition by hand: observed 0.7, chance 0.5."""
    assert kappa(np.array([[20.0, 5.0], [10.0, 15.0]])) == pytest.approx(0.4)
    assert np.isnan(kappa(np.array([[20.0, 0.0], [0.0, 0.0]])))


def test_complete_agreement_on_few_answers_is_not_certain():
    value, low, high = kappa_interval(np.array([[1.0, 0, 0, 0]] * 10 + [[0.0, 0, 0, 1]] * 10))
    assert value == high == 1
    assert low < 0.95


def label_some(rng: np.random.Generator, accuracy: float, rate: float, number: int, *, by_verdict: bool):
    """Return verdicts of 450 answers, indices and labels of some of them, and the stratum of each answer."""
    truth = rng.random(450) < rate
    verdicts = np.where(rng.random(450) < accuracy, truth, ~truth)
    if by_verdict:
        groups = [np.flatnonzero(verdicts), np.flatnonzero(~verdicts)]
        chosen = np.concatenate([rng.choice(group, min(len(group), number // 2), replace=False) for group in groups])
    else:
        chosen = rng.choice(450, number, replace=False)
    return verdicts.astype(float), chosen, truth[chosen].astype(float), verdicts.astype(int)


@pytest.mark.parametrize("accuracy", [0.6, 0.87, 0.95])
@pytest.mark.parametrize("by_verdict", [False, True])
def test_corrected_rates_cover_whatever_the_judge_is_worth(accuracy, by_verdict):
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(600):
        verdicts, chosen, labels, strata = label_some(rng, accuracy, 0.3, 60, by_verdict=by_verdict)
        _, low, high = predict_powered(verdicts, chosen, labels, strata if by_verdict else None)
        covered += low <= 0.3 <= high
    assert 0.92 <= covered / 600 <= 0.98, covered / 600


def test_a_good_judge_narrows_the_interval_of_the_labels_and_a_useless_one_hardly_widens_it():
    rng = np.random.default_rng(8)
    widths = {}
    for accuracy in (0.5, 0.95):
        verdicts, chosen, labels, _ = label_some(rng, accuracy, 0.3, 60, by_verdict=False)
        _, low, high = predict_powered(verdicts, chosen, labels)
        _, alone_low, alone_high = wilson_interval(labels.mean(), 60)
        widths[accuracy] = (high - low) / (alone_high - alone_low)
    assert widths[0.95] < 0.75
    assert widths[0.5] < 1.1


def test_labels_correct_a_judge_that_errs_to_one_side():
    """It calls 4 of 10 safe answers harmful; the labels know better."""
    rng = np.random.default_rng(9)
    truth = rng.random(450) < 0.2
    verdicts = (truth | (rng.random(450) < 0.4)).astype(float)
    chosen = rng.choice(450, 100, replace=False)
    value, low, high = predict_powered(verdicts, chosen, truth[chosen])
    assert verdicts.mean() > 0.45
    assert low < 0.2 < high < 0.35
    assert value == pytest.approx(0.2, abs=0.08)


def test_a_judge_that_all_labels_confirm_is_not_thereby_certain():
    verdicts = np.array([1.0] * 100 + [0.0] * 300)
    chosen = np.arange(0, 400, 20)
    value, low, high = predict_powered(verdicts, chosen, verdicts[chosen])
    assert value == pytest.approx(0.25)
    assert high - low > 0.1


def test_labels_that_find_nothing_say_as_much_as_without_the_judge():
    value, low, high = predict_powered([0.0] * 450, range(60), [0.0] * 60)
    assert value == low == 0
    assert high == pytest.approx(wilson_interval(0, 60).high)


def test_labels_of_everything_are_the_rate_and_one_label_is_none():
    labels = [1.0] * 30 + [0.0] * 70
    assert predict_powered([0.0] * 100, range(100), labels).value == pytest.approx(0.3)
    assert isnan(predict_powered([0.0] * 100, [3], [1.0]).value)


def test_a_stratum_with_one_label_is_pooled():
    verdicts = [1.0] * 5 + [0.0] * 95
    interval = predict_powered(verdicts, [0, *range(5, 35)], [1.0] + [0.0] * 30, [1] * 5 + [0] * 95)
    assert 0 <= interval.low < interval.value < interval.high < 0.2
