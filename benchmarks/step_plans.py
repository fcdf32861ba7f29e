"""Simulate how long ranks wait for each other in a step, on records of long-tailed lengths.

    PYTHONPATH=benchmarks/gpu python benchmarks/step_plans.py [--ranks 64] [--into benchmarks/README.md]

Lengths are lognormal, cut at the pack's budget. Work is counted as `saro.data.packs.record_cost` does. Dealt: records go to ranks in
turn. Before: to the rank with the fewest tokens, packs as they were filled. Now: `plan_step`. Under DDP ranks wait at the end of the
step, under FSDP2 in each pack, and a rank that has fewer packs runs empty ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

import numpy as np
from gpu_tables import publish, table

from saro.data.packs import balance, best_fit_decreasing, plan_step, record_cost

MARKERS = ("<!-- step plans: begin -->", "<!-- step plans: end -->")
# Median and sigma of the lengths: those of STAR-1's questions and answers (4.2 characters a token), and long chains of reasoning.
LENGTHS = {"STAR-1": (434, 0.34), "long chains": (2000, 1.0)}
BUDGETS = {"STAR-1": (2048, 4096), "long chains": (8192, 16384, 32768)}
PER_RANK = (4, 8, 16)
STEPS = 16

Plan = list[list[list[int]]]


def deal_in_turn(tokens: Sequence[int], budget: int, ranks: int, is_even: bool) -> Plan:
    return pack_each([list(range(rank, len(tokens), ranks)) for rank in range(ranks)], tokens, budget)


def deal_by_tokens(tokens: Sequence[int], budget: int, ranks: int, is_even: bool) -> Plan:
    return pack_each(balance(tokens, ranks), tokens, budget)


def pack_each(dealt: Sequence[Sequence[int]], tokens: Sequence[int], budget: int) -> Plan:
    packed = [(items, best_fit_decreasing([tokens[i] for i in items], budget)) for items in dealt]
    return [[[items[i] for i in pack] for pack in packs] or [[]] for items, packs in packed]


PLANS: dict[str, Callable[[Sequence[int], int, int, bool], Plan]] = {
    "dealt": deal_in_turn,
    "before": deal_by_tokens,
    "now": plan_step,
}


def waiting(plan: Plan, tokens: Sequence[int], is_even: bool) -> float:
    """Return the share of the ranks' time in which they wait for others."""
    loads = [[sum(record_cost(tokens[i]) for i in items) for items in packs] for packs in plan]
    longest = max(map(sum, loads))
    if is_even:
        longest = sum(max(slot) for slot in zip_longest(*loads, fillvalue=1))
    return 1 - sum(map(record_cost, tokens)) / (len(plan) * longest)


def simulate(median: float, sigma: float, budget: int, ranks: int, per_rank: int) -> list[float]:
    """Return the average waiting share of some steps: DDP then FSDP2, by the plans in order."""
    rng = np.random.default_rng(0)
    steps = [
        np.clip(rng.lognormal(np.log(median), sigma, ranks * per_rank), 16, budget).astype(int).tolist()
        for _ in range(STEPS)
    ]
    return [
        fmean(waiting(plan(tokens, budget, ranks, is_even), tokens, is_even) for tokens in steps)
        for is_even in (False, True)
        for plan in PLANS.values()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=64, help="Number of ranks.")
    parser.add_argument("--into", type=Path, help="Document whose table is replaced; without it, it is printed.")
    options = parser.parse_args()
    rows = []
    for name, (median, sigma) in LENGTHS.items():
        for budget in BUDGETS[name]:
            for per_rank in PER_RANK:
                shares = simulate(median, sigma, budget, options.ranks, per_rank)
                label = f"{name}, {per_rank} records a rank, packs of {budget:,}"
                rows.append([label, *(f"{share:.1%}" for share in shares)])
    header = [f"{options.ranks} ranks", *(f"{way}, {plan}" for way in ("DDP", "FSDP2") for plan in PLANS)]
    publish(table(header, rows), options.into, MARKERS)


if __name__ == "__main__":
    main()
