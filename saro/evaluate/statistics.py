"""Computes intervals and tests of proportions, and how large a difference must be to be seen."""

from __future__ import annotations

from collections.abc import Sequence
from math import atan, inf, pi, sqrt, tan
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

# All intervals of scores.json have this error: they are 95 % intervals.
ALPHA = 0.05
_NORMAL = NormalDist()
# Student's t with more degrees of freedom is normal to five digits, and too narrow for the grid that integrates it.
_MOST_FREEDOM = 1e5


class Interval(NamedTuple):
    """An estimate and its confidence limits; NaN where there is none."""

    value: float
    low: float
    high: float


NO_INTERVAL = Interval(np.nan, np.nan, np.nan)


def normal_quantile(alpha: float) -> float:
    """Return z so that a standard normal variable is beyond ±z with probability alpha."""
    return _NORMAL.inv_cdf(1 - alpha / 2)


def student_p(t: float, freedom: float) -> float:
    """Return the probability that Student's t is beyond ±t. ``freedom``, its degrees of freedom, is at least 1."""
    freedom = min(freedom, _MOST_FREEDOM)
    angles, shares = _student_shares(freedom)
    return 1 - float(np.interp(atan(t / sqrt(freedom)), angles, shares))


def student_quantile(alpha: float, freedom: float) -> float:
    """Return t so that Student's t is beyond ±t with probability alpha. ``freedom`` is at least 1."""
    freedom = min(freedom, _MOST_FREEDOM)
    angles, shares = _student_shares(freedom)
    return sqrt(freedom) * tan(float(np.interp(1 - alpha, shares, angles)))


def _student_shares(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Return angles from 0 to pi / 2, and the probability that |t| is below sqrt(freedom) * tan(angle)."""
    angles = np.linspace(0, pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    sums = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return angles, sums / sums[-1]


def wilson_interval(share: float, n: float, alpha: float = ALPHA) -> Interval:
    """Return the score interval of a proportion (Wilson 1927; Newcombe 1998, Stat. Med. 17:857, method 3).

    It stays within [0, 1] and has a width at shares of 0 and 1.

    Args:
        share: observed proportion, 0 to 1.
        n: number of observations, or their effective number, which need not be whole.
    """
    if n <= 0:
        return NO_INTERVAL
    z2 = normal_quantile(alpha) ** 2
    middle = 2 * n * share + z2
    spread = sqrt(z2 * (z2 + 4 * n * share * (1 - share)))
    # Rounding must not put the share outside: at 0 and 1 it is a limit itself.
    low, high = ((middle - spread) / (2 * (n + z2)), (middle + spread) / (2 * (n + z2)))
    return Interval(share, max(0.0, min(share, low)), min(1.0, max(share, high)))


def effective_number(values: Sequence[float], clusters: Sequence[str]) -> float:
    """Return how many independent observations the clustered ones are worth.

    It is n / (1 + (m - 1) r) (Kish 1965, Survey Sampling, section 5.4), where m = sum of squared cluster sizes / n, and r
    is the analysis of variance's estimate of the correlation within clusters, 0 to 1 (Donner 1986, Int. Stat. Rev. 54:67).
    Wilson's interval with this number is among the best of those that Saha, Miller and Wang compare (2016, Int. J.
    Biostat. 12). If all values are equal, r is unknown and taken as 1.
    """
    y = np.asarray(values, dtype=np.float64)
    _, cluster, sizes = np.unique(np.asarray(clusters, dtype=str), return_inverse=True, return_counts=True)
    n, k = len(y), len(sizes)
    if k == n:
        return float(n)
    mean_size = float((sizes.astype(np.float64) ** 2).sum() / n)
    correlation = 1.0
    if k > 1 and np.ptp(y) > 0:
        means = np.bincount(cluster, y) / sizes
        between = float((sizes * (means - y.mean()) ** 2).sum()) / (k - 1)
        within = float(((y - means[cluster]) ** 2).sum()) / (n - k)
        usual_size = (n - mean_size) / (k - 1)
        correlation = (between - within) / (between + (usual_size - 1) * within)
    return n / (1 + (mean_size - 1) * min(max(correlation, 0.0), 1.0))


def mcnemar_p(gained: int, lost: int) -> float:
    """Return McNemar's two-sided mid-p value for two models on the same prompts.

    The mid-p test counts half of the probability of what was observed (Fagerland, Lydersen and Laake 2013, BMC Med. Res.
    Methodol. 13:91, supplement, eq. 2; for gained = lost it is 1 here, as the definition gives). It kept the nominal error
    in all of their 9,595 scenarios, whereas the exact test wastes power and the asymptotic one errs too often.

    Args:
        gained, lost: prompts of which only the first model, or only the second, has the outcome.
    """
    n, fewer = gained + lost, min(gained, lost)
    # Whole numbers up to the division: no rounding even for thousands of prompts.
    below, ways = 0, 1
    for i in range(fewer):
        below += ways
        ways = ways * (n - i) // (i + 1)
    return min(1.0, (2 * below + ways) / 2**n)


def newcombe_paired(both: float, first: float, second: float, neither: float, alpha: float = ALPHA) -> Interval:
    """Return the difference of two proportions on the same prompts, first minus second.

    Newcombe 1998 (Stat. Med. 17:2635), method 10: Wilson's limits of both proportions, combined with their correlation,
    from which half a count is taken per prompt where it is positive.

    Args:
        both, first, second, neither: prompts where both models, only the first, only the second, or neither has the
            outcome. They need not be whole: for clustered prompts, counts times effective over actual number.
    """
    n = both + first + second + neither
    if n == 0:
        return NO_INTERVAL
    p1, low1, high1 = wilson_interval((both + first) / n, n, alpha)
    p2, low2, high2 = wilson_interval((both + second) / n, n, alpha)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    product = both * neither - first * second
    corrected = max(product - n / 2, 0) if product > 0 else product
    phi = corrected / sqrt(margins) if margins else 0.0

    def combine(a: float, b: float) -> float:
        return sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    value = (first - second) / n
    low = value - combine(p1 - low1, high2 - p2)
    high = value + combine(high1 - p1, p2 - low2)
    return Interval(value, low, high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted so that all errors of the family together stay below alpha (Holm 1979, section 2)."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def smallest_effect(
    n: int, rate: float = 0.5, power: float = 0.8, alpha: float = ALPHA, correlation: float | None = None
) -> float:
    """Return the smallest change of a rate that n prompts show with the given power; inf if they show none.

    The change goes towards the farther end of [0, 1], where there is more room. Unpaired: n prompts a model (Fleiss,
    Levin and Paik 2003, Statistical Methods for Rates and Proportions, section 4.2). Paired: both models on the same
    prompts, by McNemar's test (Connor 1987, Biometrics 43:207, p. 209); the share of prompts on which they differ follows
    from the correlation.

    Args:
        rate: rate of the baseline.
        correlation: of the two models' outcomes on one prompt, such as 0.5 for stages of one model; None for unpaired.
    """
    direction = 1.0 if rate <= 0.5 else -1.0
    z_alpha, z_power = normal_quantile(alpha), _NORMAL.inv_cdf(power)

    def is_shown(change: float) -> bool:
        other = rate + direction * change
        own_variance, other_variance = rate * (1 - rate), max(other * (1 - other), 0.0)
        if correlation is None:
            mean = (rate + other) / 2
            needed = z_alpha * sqrt(2 * mean * (1 - mean)) + z_power * sqrt(own_variance + other_variance)
        else:
            differing = (
                own_variance + other_variance + change**2 - 2 * correlation * sqrt(own_variance * other_variance)
            )
            differing = max(differing, change)
            needed = z_alpha * sqrt(differing) + z_power * sqrt(max(differing - change**2, 0.0))
        return change * sqrt(n) >= needed

    low, high = 0.0, max(rate, 1 - rate)
    if n < 1 or not is_shown(high):
        return inf
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if is_shown(middle) else (middle, high)
    return high


def restrict_lengths(think: int, answer: int, limit: int | None) -> tuple[int, int, bool]:
    """Return the tokens that an answer would have had under a limit, and True if it would be cut.

    A text cut at its limit has no known length: the mean of such lengths says nothing about uncut ones. The mean up to a
    common limit is known, and is what a user of that limit pays: a restricted mean (Irwin 1949, J. Hygiene 47:188; Royston
    and Parmar 2013, BMC Med. Res. Methodol. 13:152). Models with different limits are compared at the smallest one.

    Args:
        think, answer: tokens drawn in each part, reasoning first.
        limit: the common limit of both together; None if it is not known: nothing is cut then.
    """
    if limit is None:
        return think, answer, False
    kept = min(think, limit)
    return kept, min(answer, limit - kept), think + answer > limit
