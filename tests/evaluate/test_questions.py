"""Which items are chosen, and what becomes of a server's replies."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saro.data.records import Message
from saro.draws.request import Draw, Request, Sampling
from saro.errors import SaroError
from saro.evaluate.attacks import NO_ATTACK, Prompted
from saro.evaluate.questions import Asked, Question, choose_items, read_answer
from saro.evaluate.subjects import Subject
from saro.evaluate.suite import Item

TAGS = ("<think>", "</think>")


def item(id: str, expect: str = "comply", **more: str) -> Item:
    return Item(suite="s", id=id, prompt=(Message("user", f"Do {id}."),), expect=expect, **more)


TWINS = [
    item(f"{k}{i}", e, twin=f"{o}{i}") for i in range(5) for k, o, e in (("h", "s", "refuse"), ("s", "h", "comply"))
]
CLUSTERED = [item(f"c{i}", cluster=f"group{i % 2}") for i in range(6)]


def ids(items: list[Item]) -> list[str]:
    return [one.id for one in items]


@given(st.integers(2, 16), st.integers(0, 50))
def test_twins_and_clusters_stay_together(limit, seed):
    chosen = set(ids(choose_items(TWINS + CLUSTERED, limit, seed))) if limit >= 3 else set()
    assert all((f"h{i}" in chosen) == (f"s{i}" in chosen) for i in range(5))
    assert all(len(chosen & {f"c{i}" for i in group}) in (0, 3) for group in ((0, 2, 4), (1, 3, 5)))
    assert len(chosen) <= limit


@given(st.integers(3, 15), st.integers(0, 50))
def test_a_smaller_limit_chooses_a_part_of_what_a_larger_one_chooses(limit, seed):
    smaller, larger = (choose_items(TWINS + CLUSTERED, n, seed) for n in (limit, limit + 1))
    assert set(ids(smaller)) <= set(ids(larger))


def test_the_choice_keeps_the_order_and_does_not_depend_on_it():
    chosen = choose_items(TWINS, 4, 0)
    assert ids(chosen) == [one.id for one in TWINS if one in chosen]
    shuffled = random.Random(0).sample(TWINS, len(TWINS))
    assert set(ids(choose_items(shuffled, 4, 0))) == set(ids(chosen))


def test_a_limit_without_room_for_twins_is_one_line():
    with pytest.raises(SaroError, match="s: a limit of 1 has no room for twins"):
        choose_items(TWINS, 1, 0)


def reply(text: str, **usage: int):
    """Return the answer that a server's text makes."""
    subject = Subject("remote", "http://127.0.0.1#remote", TAGS, None)
    prompted = Prompted((Message("user", "Do a."),))
    asked = Asked(Question(item("a"), NO_ATTACK, 0, prompted), Request(Sampling(9), messages=prompted.messages), None)
    return read_answer(subject, asked, "key", Draw(text=text, finish="stop", usage=usage))


def test_reasoning_that_the_servers_template_opened_is_no_answer():
    answer = reply("I think I cannot help.\n</think>\n\nHere it is.")
    assert (answer.think, answer.answer, answer.state) == ("I think I cannot help.", "Here it is.", "finished")


def test_a_servers_tokens_are_those_that_it_counted():
    assert reply("So.", completion=9).tokens == {"think": 0, "answer": 9, "prefill": 0}
    assert reply("<think>\nA\n</think>\n\nSo.", completion=9, reasoning=6).tokens == {
        "think": 6,
        "answer": 3,
        "prefill": 0,
    }
    assert reply("<think>\naaaa\n</think>\n\nbbbb", completion=8).tokens == {"think": 4, "answer": 4, "prefill": 0}


def test_tokens_that_nobody_counted_are_unknown():
    assert reply("So.").tokens["answer"] == -1


def test_a_failure_is_an_answer_without_text():
    subject = Subject("remote", "http://127.0.0.1#remote", TAGS, None)
    prompted = Prompted((Message("user", "Do a."),))
    asked = Asked(Question(item("a"), NO_ATTACK, 0, prompted), Request(Sampling(9), messages=prompted.messages), None)
    answer = read_answer(subject, asked, "key", Draw(failure="refused", detail="content filter"))
    assert (answer.state, answer.failure, answer.has_answer) == ("failed", "refused", False)
