"""Compares models on the same prompts: differences with intervals, p-values and Holm's adjustment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from saro.evaluate.bootstrap import bootstrap_interval, cluster_sums, mean_difference, ratio, sign_flip_p
from saro.evaluate.cells import (
    LENGTHS,
    RATES,
    Cell,
    Cells,
    detection_counts,
    group_rows,
    has_lengths,
    seeds_of_pairs,
    units_of,
)
from saro.evaluate.discrimination import CORRECTION, compare_detection, criterion, d_prime
from saro.evaluate.outcomes import COUNTED, Row
from saro.evaluate.seeds import widen_test
from saro.evaluate.statistics import ALPHA, Interval, effective_number, holm, mcnemar_p, newcombe_paired
from saro.evaluate.suite import EXPECTATIONS

# The report shows the differences of one family together, and they are adjusted together.
FAMILIES = {
    **dict.fromkeys(RATES.values(), "behaviour"),
    **dict.fromkeys(("d_prime", "criterion"), "discrimination"),
    **dict.fromkeys((f"{part}_tokens" for part in LENGTHS), "cost"),
}

Difference = dict[str, Any]
Pairs = Sequence[tuple[Row, Row]]


def make_differences(cells: Cells) -> list[Difference]:
    """Return the differences of each model against the first one, and against the one before it.

    Each has p, p_holm (adjusted within its family) and within_noise: true unless p_holm is below 0.05 and, for a rate, the
    difference keeps its sign whatever the missing answers were. The lowest and highest difference that they allow are
    differences too, ``*_bounds_low`` and ``*_bounds_high``, without a p.
    """
    differences = [difference for cell in cells.rows for difference in _compare_cell(cells, cell)]
    adjusted: dict[str, float] = {}
    for members in group_rows(differences, lambda d: d["family"]).values():
        known = [d for d in members if d["p"] is not None]
        adjusted |= zip([d["id"] for d in known], holm([d["p"] for d in known]), strict=True)
    values = {d["id"]: d["value"] for d in differences}
    return [
        d
        | {
            "p_holm": adjusted.get(d["id"]),
            "within_noise": adjusted.get(d["id"], 1.0) >= ALPHA or not _keeps_sign(d, values),
        }
        for d in differences
    ]


def _keeps_sign(difference: Difference, values: Mapping[str, float]) -> bool:
    """Return False if missing answers could have turned the sign of a difference."""
    metric = difference["metric"]
    bounds = [values.get(difference["id"].replace(metric, f"{metric}_bounds_{end}", 1)) for end in ("low", "high")]
    return None in bounds or min(bounds) > 0 or max(bounds) < 0


def _compare_cell(cells: Cells, cell: Cell) -> Iterator[Difference]:
    models = cells.context.models
    index = models.index(cell.model)
    for baseline in dict.fromkeys((models[0], models[index - 1])) if index else ():
        judged = cells.match_rows(cell, baseline, lambda row: row.is_judged)
        for expect, pairs in group_rows(judged, lambda pair: pair[0].item.expect).items():
            own, other = (_has_counted([pair[side] for pair in pairs]) for side in (0, 1))
            yield _compare_rates(RATES[expect], cell, baseline, pairs, own, other)
        everything = cells.match_rows(cell, baseline, lambda _: True)
        for expect, pairs in group_rows(everything, lambda pair: pair[0].item.expect).items():
            yield from _bound_rates(cell, baseline, expect, pairs)
        yield from _compare_detection(cells, cell, baseline, judged)
        measured = cells.match_rows(cell, baseline, has_lengths)
        by_expect = group_rows(measured, lambda pair: pair[0].item.expect)
        for expect in EXPECTATIONS:
            if expect in by_expect:
                yield from _compare_tokens(cells, cell, baseline, expect, by_expect[expect])


def _has_counted(rows: Sequence[Row], missing: bool = False) -> np.ndarray:
    """Return True for each row with the outcome that its rate counts, ``missing`` for those that are in no rate."""
    return np.array([row.outcome == COUNTED[row.item.expect][0] if row.is_judged else missing for row in rows])


def _bound_rates(cell: Cell, baseline: str, expect: str, pairs: Pairs) -> Iterator[Difference]:
    """Yield the lowest and the highest difference that answers without an outcome allow."""
    for end, is_high in (("low", False), ("high", True)):
        own = _has_counted([pair[0] for pair in pairs], missing=is_high)
        other = _has_counted([pair[1] for pair in pairs], missing=not is_high)
        bound = _compare_rates(f"{RATES[expect]}_bounds_{end}", cell, baseline, pairs, own, other)
        yield bound | {"p": None}


def _compare_rates(
    metric: str, cell: Cell, baseline: str, pairs: Pairs, own: np.ndarray, other: np.ndarray
) -> Difference:
    counts = [int(n) for n in ((own & other).sum(), (own & ~other).sum(), (~own & other).sum(), (~own & ~other).sum())]
    units = units_of(pair[0] for pair in pairs)
    differences = own.astype(np.int64) - other
    if len({*units}) == len(units):
        method = "newcombe paired + mcnemar mid-p"
        interval, p = newcombe_paired(*counts), mcnemar_p(counts[1], counts[2])
    else:
        method = "newcombe paired, effective n + sign flips"
        scale = effective_number(differences, units) / len(units)
        interval = newcombe_paired(*(scale * count for count in counts))
        p = sign_flip_p(cluster_sums([differences], units)[:, 0])
    by_seed = ratio(cluster_sums([differences, np.ones(len(pairs))], seeds_of_pairs(pairs)))
    interval, p = widen_test(interval, p, by_seed, len({*units}), within=(-1, 1))
    return _difference(metric, cell, baseline, interval, p, len(pairs), method)


def _compare_detection(cells: Cells, cell: Cell, baseline: str, judged: Pairs) -> Iterator[Difference]:
    own, other = (cells.detection_rows([pair[side] for pair in judged]) for side in (0, 1))
    if not own:
        return
    units = units_of(own)
    seeds = seeds_of_pairs(zip(own, other, strict=True))
    own_sums, other_sums = (cluster_sums(detection_counts(rows), units) for rows in (own, other))
    own_seeds, other_seeds = (cluster_sums(detection_counts(rows), seeds) + CORRECTION for rows in (own, other))
    for metric, statistic in (("d_prime", d_prime), ("criterion", criterion)):
        by_seed = statistic(own_seeds) - statistic(other_seeds)
        interval, p = widen_test(*compare_detection(own_sums, other_sums, statistic), by_seed, len(own_sums))
        yield _difference(metric, cell, baseline, interval, p, len(own), "bayesian cluster bootstrap")


def _compare_tokens(cells: Cells, cell: Cell, baseline: str, expect: str, pairs: Pairs) -> Iterator[Difference]:
    own, other = (cells.lengths([pair[side] for pair in pairs], [cell.model, baseline]) for side in (0, 1))
    units = units_of(pair[0] for pair in pairs)
    for column, part in enumerate(LENGTHS):
        columns = [own[:, column], other[:, column], np.ones(len(own))]
        sums = cluster_sums(columns, units)
        by_seed = mean_difference(cluster_sums(columns, seeds_of_pairs(pairs)))
        interval, p = bootstrap_interval(sums, mean_difference), sign_flip_p(sums[:, 0] - sums[:, 1])
        interval, p = widen_test(interval, p, by_seed, len(sums))
        method = "cluster bootstrap + sign flips"
        yield _difference(f"{part}_tokens", cell, baseline, interval, p, len(own), method, group=expect)


def _difference(
    metric: str,
    cell: Cell,
    baseline: str,
    interval: Interval,
    p: float | None,
    n: int,
    method: str,
    *,
    group: str | None = None,
) -> Difference:
    return {
        "id": "/".join(["difference", metric, *cell, f"against {baseline}", *([] if group is None else [group])]),
        "metric": metric,
        **cell._asdict(),
        "baseline": baseline,
        "group": group,
        **interval._asdict(),
        "p": p,
        "n": n,
        "method": method,
        "family": FAMILIES.get(metric),
    }
