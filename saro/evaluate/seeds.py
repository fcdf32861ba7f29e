"""Adds the variation between training seeds to the intervals and tests of what several seeds were measured on."""

from __future__ import annotations

from math import inf, sqrt
from statistics import variance

import numpy as np

from saro.evaluate.statistics import ALPHA, Interval, normal_quantile, student_p, student_quantile


def widen(
    interval: Interval,
    by_seed: np.ndarray,
    clusters: int,
    within: tuple[float, float] = (-np.inf, np.inf),
    alpha: float = ALPHA,
) -> Interval:
    """Return an interval that holds the variation of prompts and of seeds, from one that holds that of prompts.

    All seeds answer the same prompts, so both are sampled, crossed. The variances of the mean over prompts and of the mean
    over seeds are added; with their degrees of freedom (Satterthwaite 1946, Biometrics Bull. 2:110) this is min F' of Clark
    (1973, J. Verb. Learn. Verb. Behav. 12:335). It counts what a seed does to single prompts twice, and so is cautious.

    Args:
        interval: of all answers together, by methods in which the answers to one prompt depend on each other.
        by_seed: the value of each seed: (seeds,). With one, or none, the interval is returned as it is.
        clusters: number of independent groups of prompts.
        within: the least and the largest possible value.
    """
    low, high = (_limit(interval, side, by_seed, clusters, alpha) for side in (interval.low, interval.high))
    return Interval(interval.value, max(low, within[0]), min(high, within[1]))


def widen_test(
    interval: Interval,
    p: float | None,
    by_seed: np.ndarray,
    clusters: int,
    within: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[Interval, float | None]:
    """Return the interval of a difference as ``widen`` does, and its two-sided p: at it the interval ends at 0.

    With one seed both are returned as they are.
    """
    if np.isfinite(by_seed).sum() < 2:
        return interval, p
    return widen(interval, by_seed, clusters, within), _find_p(interval, by_seed, clusters)


def _find_p(interval: Interval, by_seed: np.ndarray, clusters: int) -> float | None:
    if interval.value == 0:
        return 1.0
    side = interval.low if interval.value > 0 else interval.high
    if not np.isfinite(side):
        return None
    error, freedom = _error(interval.value - side, by_seed, clusters)
    return student_p(abs(interval.value) / error if error else inf, freedom)


def _limit(interval: Interval, side: float, by_seed: np.ndarray, clusters: int, alpha: float) -> float:
    if np.isfinite(by_seed).sum() < 2 or not np.isfinite(side):
        return side
    error, freedom = _error(interval.value - side, by_seed, clusters)
    return interval.value + (1 if side > interval.value else -1) * student_quantile(alpha, freedom) * error


def _error(distance: float, by_seed: np.ndarray, clusters: int) -> tuple[float, float]:
    """Return the standard error of a value and its degrees of freedom, from the distance of a 95 % limit over prompts."""
    # A seed without any judged answer has no value.
    by_seed = by_seed[np.isfinite(by_seed)]
    of_prompts = (distance / normal_quantile(ALPHA)) ** 2
    of_seeds = variance(by_seed.tolist()) / len(by_seed)
    total = of_prompts + of_seeds
    if total == 0:
        return 0.0, 1.0
    freedom = total**2 / (of_seeds**2 / (len(by_seed) - 1) + of_prompts**2 / max(clusters - 1, 1))
    return sqrt(total), freedom
