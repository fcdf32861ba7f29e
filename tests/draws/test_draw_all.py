"""Drawing what a store lacks: nothing twice, in an order that is always the same, and never more lost than a group."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from draw_cases import Scripted, chat_request, name_of
from hypothesis import given, settings
from hypothesis import strategies as st

from saro.draws.draw_all import draw_missing, draw_on_all_ranks, iterate_on_all_ranks
from saro.draws.request import FAILURES, FINAL_FAILURES, Draw
from saro.draws.store import DrawStore
from saro.errors import SaroError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path):
    with DrawStore.open(tmp_path / "draws.sqlite3") as store:
        yield store


def requests_to(number: int) -> list:
    return [chat_request(f"{i}") for i in range(number)]


def texts(draws: list[Draw | None]) -> list[str | None]:
    return [draw and draw.text for draw in draws]


def test_draws_come_in_the_order_of_the_requests(store):
    assert texts(draw_missing(store, Scripted(), requests_to(7))) == [f"to {i}" for i in range(7)]


def test_nothing_is_drawn_twice(store):
    draw_missing(store, Scripted(), requests_to(4))
    again = Scripted()
    assert texts(draw_missing(store, again, requests_to(6))) == [f"to {i}" for i in range(6)]
    assert again.asked == [requests_to(6)[4:]]
    complete = Scripted()
    draw_missing(store, complete, requests_to(6))
    assert complete.asked == []


def test_a_request_that_occurs_twice_is_drawn_once(store):
    generator = Scripted()
    requests = [chat_request("a"), chat_request("b"), chat_request("a")]
    assert texts(draw_missing(store, generator, requests)) == ["to a", "to b", "to a"]
    assert generator.asked == [requests[:2]]


class Longest(Scripted):
    """Draws the last request first."""

    def order(self, requests):
        return sorted(range(len(requests)), key=lambda index: -int(name_of(requests[index])))


@settings(max_examples=20)  # Each writes to the disk.
@given(stored=st.sets(st.integers(0, 19)))
def test_the_order_does_not_depend_on_what_is_missing(tmp_path_factory, stored):
    generator, requests = Longest(), requests_to(20)
    with DrawStore.open(tmp_path_factory.mktemp("store") / "draws") as store:
        draw_missing(store, Scripted(), [requests[i] for i in stored])
        draw_missing(store, generator, requests)
    expected = [f"{i}" for i in range(19, -1, -1) if i not in stored]
    assert [name_of(request) for asked in generator.asked for request in asked] == expected


@settings(max_examples=20)  # Each writes to the disk.
@given(processes=st.integers(1, 5), number=st.integers(0, 17))
def test_processes_share_the_requests_without_a_gap(tmp_path_factory, processes, number):
    requests, asked = requests_to(number), []
    with DrawStore.open(tmp_path_factory.mktemp("store") / "draws") as store:
        for rank in range(processes):
            generator = Longest()
            draws = draw_missing(store, generator, requests, share=(rank, processes))
            asked += [name_of(request) for part in generator.asked for request in part]
            # Others' draws are there as far as they have come.
            assert [draw is not None for draw in draws] == [f"{i}" in asked for i in range(number)]
        assert sorted(asked) == sorted(f"{i}" for i in range(number))


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_a_draw_and_only_one_that_may_not_last_is_drawn_again(store, failure):
    failing = Scripted(lambda request: Draw(failure=failure, detail="why"))
    (draw,) = draw_missing(store, failing, requests_to(1))
    assert (draw.failure, draw.detail) == (failure, "why")
    again = Scripted()
    (draw,) = draw_missing(store, again, requests_to(1))
    assert bool(again.asked) == (failure not in FINAL_FAILURES)
    assert (draw.failure is None) == (failure not in FINAL_FAILURES)


def failing_from(start: int, kind: str = "http") -> Scripted:
    return Scripted(
        lambda r: Draw(failure=kind, detail="HTTP 503") if int(name_of(r)) >= start else Draw(text="t", finish="stop")
    )


def test_many_failures_end_the_run_with_one_line(store):
    with pytest.raises(SaroError) as caught:
        draw_missing(store, failing_from(30), [chat_request(f"{i:04}") for i in range(500)])
    message = str(caught.value)
    assert "21 of the last 40 draws failed (21 http; mostly: HTTP 503" in message
    assert chat_request("0030").key(Scripted.identity)[:12] in message
    assert "\n" not in message
    # 30 texts, 21 failures: the run ended there, and they are stored.
    (model,) = store.read_models()
    assert (model.texts, model.failures) == (30, {"http": 21})


def test_as_many_failures_as_texts_do_not_end_the_run(store):
    half = Scripted(lambda r: Draw(failure="parse") if int(name_of(r)) % 2 else Draw(text="t", finish="stop"), group=1)
    draws = draw_missing(store, half, requests_to(100))
    assert sum(draw.failure == "parse" for draw in draws) == 50


@pytest.mark.parametrize("kind", FINAL_FAILURES)
def test_a_model_that_refuses_everything_is_a_result(store, kind):
    draws = draw_missing(store, failing_from(0, kind), requests_to(100))
    assert {draw.failure for draw in draws} == {kind}


def test_offline_draws_nothing_and_counts_what_is_missing(store):
    generator = Scripted()
    draw_missing(store, Scripted(), requests_to(2))
    assert texts(draw_missing(store, generator, requests_to(2), offline=True)) == ["to 0", "to 1"]
    with pytest.raises(SaroError, match="3 of 5 draws are not in the store"):
        draw_missing(store, generator, [*requests_to(5), *requests_to(5)], offline=True)
    assert generator.asked == []


def test_offline_takes_a_failure_as_it_is(store):
    draw_missing(store, failing_from(0), requests_to(1))
    assert draw_missing(store, Scripted(), requests_to(1), offline=True)[0].failure == "http"


def test_an_interrupt_keeps_the_groups_before_it(store):
    def interrupt(request):
        if name_of(request) == "7":
            raise KeyboardInterrupt
        return Draw(text="t", finish="stop")

    with pytest.raises(KeyboardInterrupt):
        draw_missing(store, Scripted(interrupt), requests_to(12))
    again = Scripted()
    draw_missing(store, again, requests_to(12))
    assert again.asked == [requests_to(12)[6:]]


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests/helpers")
from draw_cases import Scripted, chat_request, name_of
from saro.draws.draw_all import draw_missing
from saro.draws.request import Draw
from saro.draws.store import DrawStore

def answer(request):
    if name_of(request) == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
    return Draw(text="before", finish="stop")

with DrawStore.open(sys.argv[1]) as store:
    draw_missing(store, Scripted(answer), [chat_request(f"{i}") for i in range(12)])
"""


@pytest.mark.parametrize("last", [0, 5, 6, 11])
def test_a_kill_loses_at_most_the_group_under_way(tmp_path, last):
    path = tmp_path / "draws.sqlite3"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), f"{last}"], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    stored = last // 3 * 3
    with DrawStore.open(path) as store:
        generator = Scripted(lambda request: Draw(text="after", finish="stop"))
        draws = draw_missing(store, generator, requests_to(12))
    assert texts(draws) == ["before"] * stored + ["after"] * (12 - stored)
    assert generator.asked == [requests_to(12)[stored:]]


def test_a_generator_that_leaves_a_request_out_is_a_fault(store):
    class Short(Scripted):
        def draw(self, requests):
            yield from super().draw(requests[:-1])

    with pytest.raises(RuntimeError, match="gave 2 of 3 draws"):
        draw_missing(store, Short(), requests_to(3))


def test_on_one_rank_the_draws_come_in_the_order_of_the_requests_too(store, runtime):
    requests = [*requests_to(7), chat_request("2")]
    draws = draw_on_all_ranks(runtime, store, Scripted(), requests)
    assert texts(draws) == [*(f"to {i}" for i in range(7)), "to 2"]
    with pytest.raises(SaroError, match="1 of 8 draws are not in the store"):
        draw_on_all_ranks(runtime, store, Scripted(), [*requests, chat_request("new")], offline=True)


def test_all_is_drawn_before_the_first_draw_is_read_and_few_are_read_at_a_time(store, runtime, monkeypatch):
    read, get = [], DrawStore.get
    monkeypatch.setattr(DrawStore, "get", lambda self, keys: read.append(len(keys)) or get(self, keys))
    generator = Scripted(group=100)
    draws = iterate_on_all_ranks(runtime, store, generator, requests_to(1100))
    assert next(draws).text == "to 0"
    assert [len(asked) for asked in generator.asked] == [1100]
    assert read == [500]
    assert texts([*draws]) == [f"to {i}" for i in range(1, 1100)]
    assert read == [500, 500, 100]


def test_no_progress_is_shown_off_a_terminal(store, capfd):
    draw_missing(store, Scripted(), requests_to(3))
    assert capfd.readouterr() == ("", "")
