"""Strict replies: read whole or not at all, asked for twice at most, and never an error."""

from __future__ import annotations

from datetime import date

import pytest
from chat_cases import CHATS
from hypothesis import given
from hypothesis import strategies as st
from tiny import IM_END, tiny_tokenizer

from saro.data.chat_format import ChatFormat
from saro.data.records import Message
from saro.draws.request import Draw
from saro.evaluate.judge_model import JudgeModel
from saro.synth.strict_replies import Strict, ask_strictly, read_objects_of

CHAT = CHATS["chatml"]
SERVER = JudgeModel(None, None)


def question(text: str) -> Strict:
    return Strict((Message("user", text),), max_tokens=9)


def ask(*texts: str, reply, model: JudgeModel = SERVER):
    """Ask about texts, and return what was read of each, with the texts and numbers of all requests."""
    asked = []

    def draw_all(requests):
        asked.extend(
            (request.messages[0].content if request.messages else None, request.number) for request in requests
        )
        return [reply(request) for request in requests]

    found = ask_strictly(model, {text: question(text) for text in texts}, lambda _, said: said or None, draw_all)
    return found, asked


def test_only_what_cannot_be_read_is_asked_for_again_and_no_more_than_once():
    def reply(request):
        is_good = request.messages[0].content == "good" or (request.messages[0].content == "late" and request.number)
        return Draw(text="yes" if is_good else "", finish="stop")

    found, asked = ask("good", "late", "bad", reply=reply)
    assert found == {"good": "yes", "late": "yes", "bad": None}
    assert asked == [("good", 0), ("late", 0), ("bad", 0), ("late", 1), ("bad", 1)]


@pytest.mark.parametrize(
    "draw", [None, Draw(failure="http", detail="no"), Draw(text="yes", finish="length")], ids=["none", "failed", "cut"]
)
def test_no_reply_a_failure_and_a_reply_that_was_cut_say_nothing(draw):
    found, _ = ask("a", reply=lambda _: draw)
    assert found == {"a": None}


def test_a_model_on_this_machine_gets_ids_and_its_reply_ends_before_the_stop_token():
    ids = (*CHAT.tokenizer.encode("yes", add_special_tokens=False), min(CHAT.stop_ids))
    requests = []
    found = ask_strictly(
        JudgeModel(None, CHAT),
        {"a": question("Well?")},
        lambda _, said: said or None,
        lambda asked: requests.extend(asked) or [Draw(ids=ids, finish="stop")],
    )
    assert found == {"a": "yes"}
    assert requests[0].ids == tuple(CHAT.prompt_ids([Message("user", "Well?")]))


def test_a_conversation_that_the_template_refuses_is_not_asked_about():
    strict = ChatFormat(tiny_tokenizer("{{ raise_exception('no') }}"), frozenset([IM_END]), date(2024, 7, 26))
    asked = []
    found = ask_strictly(JudgeModel(None, strict), {"a": question("Well?")}, lambda _, said: said, asked.extend)
    assert (found, asked) == ({"a": None}, [])


def test_nothing_is_asked_without_questions():
    assert ask(reply=None) == ({}, [])


@pytest.mark.parametrize(
    ("reply", "objects"),
    [
        ('{"a": 1}', [{"a": 1}]),
        ('I think.</think>\n```json\n{"a": 1}\n\n{"b": [2]}\n```', [{"a": 1}, {"b": [2]}]),
        ("", []),
        ('{"a": 1} {"b": 2}', None),
        ('{"a": 1, "a": 2}', None),
        ("Here: {}", None),
        ("[1]", None),
        ("null", None),
        ("[" * 100_000, None),
        ("9" * 5_000, None),
    ],
    ids=range(10),
)
def test_objects_are_read_one_a_line_and_nothing_beside_them(reply, objects):
    assert read_objects_of(reply) == objects


@given(st.text() | st.lists(st.sampled_from(["{", "}", '"a"', ":", "1", "\n", ",", "```", "</think>"])).map("".join))
def test_any_text_is_read_or_refused(reply):
    objects = read_objects_of(reply)
    assert objects is None or all(isinstance(one, dict) for one in objects)
