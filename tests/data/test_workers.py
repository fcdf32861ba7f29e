"""Worker processes give the results of one process, in its order, and read no more than they need."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest

from saro.data.workers import map_in_order
from saro.errors import SaroError


def numbers(count: int, read: list[int]) -> Iterator[tuple[int]]:
    for i in range(count):
        read.append(i)
        yield (i,)


@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (2, 5)])
def test_results_come_in_order_and_few_items_are_read_ahead(workers, ahead):
    read: list[int] = []
    results = map_in_order(math.isqrt, numbers(40, read), workers)
    assert next(results) == 0
    assert len(read) == ahead
    assert list(results) == [math.isqrt(i) for i in range(1, 40)]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_after_the_results_before_it(workers):
    results = map_in_order(math.isqrt, [(4,), (9,), (-1,), (16,)], workers)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ValueError, match="nonnegative"):
        next(results)


def test_a_worker_that_is_killed_is_one_line():
    with pytest.raises(SaroError, match=r"one of 2 processes .* was killed, .*; free some and start again$"):
        list(map_in_order(os._exit, [(1,)], 2))
