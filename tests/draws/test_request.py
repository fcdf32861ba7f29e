"""Keys of draws: they change with everything that decides the text, and with nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from draw_cases import Server, chat_reply

from saro.data.records import Message
from saro.draws.request import Request, Sampling

SAMPLING = Sampling(max_tokens=16)
REQUEST = Request(SAMPLING, messages=(Message("user", "Count."),))
MODEL = {"kind": "endpoint", "host": "h", "model": "m", "revision": None}


@pytest.mark.parametrize(
    "changed",
    [
        replace(REQUEST, number=1),
        replace(REQUEST, messages=(Message("user", "Count!"),)),
        replace(REQUEST, messages=(Message("system", "Count."),)),
        replace(REQUEST, messages=(Message("system", ""), Message("user", "Count."))),
        Request(SAMPLING, text="Count."),
        Request(SAMPLING, ids=(1, 2)),
        *[
            replace(REQUEST, sampling=replace(SAMPLING, **change))
            for change in (
                {"max_tokens": 17},
                {"temperature": 0.5},
                {"top_p": 0.9},
                {"top_k": 5},
                {"stop": ("\n",)},
                {"choices": ("yes", "no")},
            )
        ],
    ],
)
def test_a_key_changes_with_each_field_of_the_request(changed):
    assert changed.key(MODEL) != REQUEST.key(MODEL)


@pytest.mark.parametrize("change", [{"host": "i"}, {"model": "n"}, {"revision": "2"}, {"kind": "local"}])
def test_a_key_changes_with_each_part_of_the_model(change):
    assert REQUEST.key(MODEL | change) != REQUEST.key(MODEL)


def test_a_key_does_not_depend_on_the_order_of_the_identity():
    assert REQUEST.key(dict(reversed(MODEL.items()))) == REQUEST.key(MODEL)


@pytest.mark.parametrize(
    "change",
    [
        {"concurrency": 1},
        {"retries": 0},
        {"timeout": 3.0},
        {"key_env": "OTHER"},
        {"url": "https://llm.example.org/v1"},
        {"url": "https://llm.example.org:443/v1/chat/completions"},
    ],
)
def test_options_that_do_not_decide_the_text_keep_the_key(change):
    assert REQUEST.key(Server(chat_reply()).generator(**change).identity) == REQUEST.key(
        Server(chat_reply()).generator().identity
    )


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"revision": "awq"},
        {"url": "https://other.example.org"},
        {"url": "https://llm.example.org/a/v1"},
        {"url": "https://llm.example.org:8443"},
        {"think_tags": ("[", "]")},
        {"extra": {"reasoning_effort": "low"}},
    ],
)
def test_options_that_decide_the_text_change_the_key(change):
    assert REQUEST.key(Server(chat_reply()).generator(**change).identity) != REQUEST.key(
        Server(chat_reply()).generator().identity
    )


def test_a_request_has_one_kind_of_prompt():
    with pytest.raises(ValueError, match="either"):
        Request(SAMPLING, ids=(1,), text="one")
    with pytest.raises(ValueError, match="either"):
        Request(SAMPLING)
