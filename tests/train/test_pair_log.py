"""PairLog keeps a row per pair and evaluation, and warns once when chosen responses lose probability."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saro.train.objective import Sums
from saro.train.pair_log import PairLog


@pytest.fixture
def runtime():
    """A runtime of one process that keeps the lines it was asked to print."""
    said: list[str] = []
    return SimpleNamespace(say=said.append, said=said, gather=lambda items: items)


def log_of(runtime, share=0.5, ids=("a", "b", "c", "d")) -> PairLog:
    pairs = SimpleNamespace(ids=ids, kinds=np.arange(len(ids)) % 2)
    return PairLog(runtime, pairs, "heldout", share)


def observe(log: PairLog, records: list[int], margins: list[float], fell: list[bool]) -> None:
    pack = SimpleNamespace(pairs=tuple(records))
    log.observe(pack, Sums({}, {}, {"margin": torch.tensor(margins), "chosen_fell": torch.tensor(fell)}))


def test_rows_have_id_and_kind_and_keep_the_order_of_the_files(runtime):
    log = log_of(runtime)
    observe(log, [2], [0.5], [False])
    observe(log, [3, 0], [1.5, -2.0], [False, False])
    assert log.take(7) == [
        {"step": 7, "id": "a", "kind": "op-cot", "margin": -2.0, "chosen_fell": False},
        {"step": 7, "id": "c", "kind": "op-cot", "margin": 0.5, "chosen_fell": False},
        {"step": 7, "id": "d", "kind": "pp-cot", "margin": 1.5, "chosen_fell": False},
    ]
    assert log.take(8) == []


def test_rows_of_all_ranks_are_gathered(runtime):
    runtime.gather = lambda items: [*items, (1, {"margin": 4.0})]
    log = log_of(runtime)
    observe(log, [2], [0.5], [False])
    assert [row["id"] for row in log.take(1)] == ["b", "c"]


def test_one_warning_names_the_pairs_whose_chosen_response_fell(runtime):
    log = log_of(runtime)
    observe(log, [0, 1, 2, 3], [1.0] * 4, [True, True, True, False])
    log.take(5)
    (line,) = runtime.said
    assert line.startswith(
        "warning: after step 5 the chosen response has lost probability in 3 of 4 heldout pairs (a, b, c); "
    )
    observe(log, [0, 1], [1.0] * 2, [True, True])
    log.take(6)
    assert len(runtime.said) == 1


@pytest.mark.parametrize(("share", "warned"), [(0.5, False), (0.49, True), (1.0, False), (0.0, True)])
def test_the_warning_comes_above_the_share_that_was_set(runtime, share, warned):
    log = log_of(runtime, share)
    observe(log, [0, 1], [1.0] * 2, [True, False])
    log.take(1)
    assert bool(runtime.said) == warned


class Unreadable:
    """A tensor that nobody may read."""


@pytest.mark.parametrize("means", [{"chosen_fell": 0.5}, {}], ids=["few have fallen", "not measured"])
def test_a_log_line_that_calls_for_no_warning_reads_nothing(runtime, means):
    log = log_of(runtime, share=0.5)
    log.observe(SimpleNamespace(pairs=(0,)), Sums({}, {}, {"chosen_fell": Unreadable()}))
    log.watch(3, means)
    assert log.take(4) == []
    assert not runtime.said


def test_a_log_line_that_calls_for_the_warning_gives_it_once(runtime):
    log = log_of(runtime, share=0.5)
    for step in (3, 4):
        observe(log, [0, 1, 2], [1.0] * 3, [True, True, False])
        log.watch(step, {"chosen_fell": 2 / 3})
    (line,) = runtime.said
    assert line.startswith(
        "warning: after step 3 the chosen response has lost probability in 2 of 3 heldout pairs (a, b)"
    )


def test_a_long_warning_stays_one_line(runtime):
    ids = tuple(f"pair-{i:03d}" for i in range(200))
    log = log_of(runtime, ids=ids)
    observe(log, list(range(200)), [0.0] * 200, [True] * 200)
    log.take(1)
    assert "pair-009 and 190 others)" in runtime.said[0]
    assert "\n" not in runtime.said[0]


def test_without_pairs_there_is_no_warning(runtime):
    log_of(runtime, share=0.0).take(1)
    assert not runtime.said
