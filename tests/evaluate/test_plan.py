"""Plans of evaluations: what would be asked, and how long that takes by what the store has of each attack."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from draw_cases import Scripted, chat_request, name_of

from saro.draws.draw_all import draw_missing
from saro.draws.request import Draw
from saro.draws.store import DrawStore
from saro.evaluate.plan import describe_plan, plan_model

# Tokens of a text under each attack; a text takes a second.
LENGTHS = {"none": 400, "think-off": 20}


@pytest.fixture
def store(tmp_path):
    with DrawStore.open(tmp_path / "draws.sqlite3") as store:
        yield store


def asked(attack: str, *numbers: int) -> list:
    question = SimpleNamespace(attack=SimpleNamespace(id=attack))
    return [SimpleNamespace(question=question, request=chat_request(f"{attack} {n}")) for n in numbers]


def write(store, *questions) -> None:
    def draw(request):
        return Draw(text="t", finish="stop", usage={"completion": LENGTHS[name_of(request).split()[0]]}, seconds=1.0)

    draw_missing(store, Scripted(draw), [one.request for one in questions])


def plan(store, *questions, **options):
    return plan_model(store, "m", Scripted.identity, questions, **options)


def test_without_stored_texts_no_time_is_known(store):
    found = plan(store, *asked("none", 0, 1))
    assert (found.asked, found.stored, found.most_tokens) == (2, 0, 32)
    assert (found.expected_tokens, found.seconds) == (None, None)
    assert describe_plan([found], []) == [
        "m: 2 requests, 0 of them in the store; at most 32 tokens to draw; no speed is known yet"
    ]


def test_texts_are_expected_to_be_as_long_as_those_under_their_attack(store):
    """A beginning that closes the reasoning makes short texts."""
    write(store, *asked("none", 0, 1), *asked("think-off", 0))
    found = plan(store, *asked("none", 0, 1, 2), *asked("think-off", 0, 1, 2, 3))
    assert (found.asked, found.stored) == (7, 3)
    assert found.expected_tokens == 400 + 3 * 20
    assert found.seconds == pytest.approx(460 / (820 / 3))


def test_an_attack_without_stored_texts_is_expected_to_be_like_the_others(store):
    write(store, *asked("none", 0), *asked("think-off", 0))
    found = plan(store, *asked("none", 0), *asked("think-off", 0), *asked("rot13", 0, 1))
    assert found.expected_tokens == 2 * 210


def test_texts_that_a_server_writes_together_share_their_time(store):
    write(store, *asked("none", 0))
    assert plan(store, *asked("none", 0, 1), concurrency=4).seconds == pytest.approx(0.25)


def test_with_all_texts_in_the_store_nothing_takes_time(store):
    write(store, *asked("none", 0, 1))
    found = plan(store, *asked("none", 0, 1))
    assert (found.expected_tokens, found.seconds) == (0, 0)
    assert describe_plan([found], []) == ["m: 2 requests, 2 of them in the store"]


def test_a_failure_says_nothing_of_time(store):
    draw_missing(store, Scripted(lambda _: Draw(failure="refused", seconds=99.0)), [asked("none", 0)[0].request])
    assert plan(store, *asked("none", 0, 1)).seconds is None
