"""Answers end at stop strings and hold no reasoning, however the reasoning was opened."""

from __future__ import annotations

from datetime import date

import pytest
from scripted import Scripted
from tiny import IM_END, tiny_tokenizer

from saro.data.chat_format import ChatFormat
from saro.draws.request import Request, Sampling
from saro.evaluate.stopped_answers import AnswerRequest, draw_answers

TAGS = ("<think>", "</think>")
STOP = ("\n\n", "Question:")


@pytest.fixture(params=["plain tags", "special tags", "added tags"])
def chat(request) -> ChatFormat:
    tokenizer = tiny_tokenizer(extra=TAGS if request.param == "special tags" else ())
    if request.param == "added tags":
        tokenizer.add_tokens(list(TAGS))
    return ChatFormat(tokenizer, frozenset({IM_END}), date(2024, 7, 26), TAGS)


def ask(chat: ChatFormat, prompt: str = "Why?", max_tokens: int = 200, may_think: bool = True) -> AnswerRequest:
    ids = tuple(chat.tokenizer.encode(prompt, add_special_tokens=False))
    return AnswerRequest(Request(Sampling(max_tokens), ids=ids), STOP, may_think)


def as_text(chat: ChatFormat, reply: str) -> str:
    """Return a reply without special tokens, which have no text."""
    return chat.tokenizer.decode(chat.tokenizer.encode(reply, add_special_tokens=False), skip_special_tokens=True)


def answer(chat: ChatFormat, reply: str | None, end: bool = True, **how) -> tuple[str, str]:
    (found,) = draw_answers(Scripted(chat, lambda _: reply, end), chat, [ask(chat, **how)])
    return found.text, found.state


@pytest.mark.parametrize("may_think", [True, False])
def test_reasoning_is_left_out_and_its_stop_strings_end_nothing(chat, may_think):
    reply = "<think>\nOne.\n\nQuestion: two?\n</think>\n\nIt is 4.\n\nQuestion: more?"
    assert answer(chat, reply, may_think=may_think) == ("It is 4.", "finished")


def test_reasoning_that_the_template_opened_is_left_out(chat):
    assert answer(chat, "One.\n\nTwo.</think>\nIt is 4.", prompt="Why?<think>\n") == ("It is 4.", "finished")


@pytest.mark.parametrize("may_think", [True, False])
def test_an_answer_without_reasoning_ends_at_the_first_stop_string(chat, may_think):
    reply = " It is 4. Question: more?\n\nNo."
    assert answer(chat, reply, may_think=may_think) == (" It is 4. ", "finished")


def test_reasoning_without_an_end_is_no_answer(chat):
    assert answer(chat, "<think>\nIt is 4.", end=False, max_tokens=12) == ("", "unfinished")
    assert answer(chat, "It is 4.", prompt="Why?<think>\n") == ("", "unfinished")


def test_a_second_closing_tag_belongs_to_the_answer(chat):
    assert answer(chat, "<think>a</think>The tag </think> ends.") == (
        as_text(chat, "The tag </think> ends."),
        "finished",
    )


def test_a_closing_tag_without_an_opening_one_ends_reasoning(chat):
    assert answer(chat, "One and one.</think>It is 2.") == ("It is 2.", "finished")


def test_an_answer_at_the_limit_is_cut_unless_a_stop_string_ended_it(chat):
    assert answer(chat, "It is four.", end=False, max_tokens=5) == ("It is", "cut")
    assert answer(chat, "It is four. Question: more?", end=False, max_tokens=24) == ("It is four. ", "finished")


def test_a_text_that_could_not_be_drawn_is_an_empty_answer(chat):
    assert answer(chat, None) == ("", "failed")


def test_only_what_begins_as_an_answer_is_drawn_with_stop_strings(chat):
    generator = Scripted(chat, lambda prompt: "<think>a</think>b" if "Think" in prompt else "b")
    wanted = [
        ask(chat, "Think!", may_think=False),
        ask(chat, "Say it.", may_think=False),
        ask(chat, "Think too!"),
        ask(chat, "Open.<think>"),
    ]
    assert [a.state for a in draw_answers(generator, chat, wanted)] == [*["finished"] * 3, "unfinished"]
    stops = [request.sampling.stop for request in generator.asked]
    # The opening tag ends a text, which is then drawn again.
    assert stops == [(*STOP, "<think>"), (*STOP, "<think>"), (), (), ()]
    assert generator.asked[4] == wanted[0].request


def test_no_prompt_asks_nothing(chat):
    generator = Scripted(chat, lambda _: "")
    assert draw_answers(generator, chat, []) == []
    assert generator.asked == []


def test_special_tokens_are_no_text(chat):
    assert answer(chat, "<think>a</think>b<|im_start|>c") == ("bc", "finished")
