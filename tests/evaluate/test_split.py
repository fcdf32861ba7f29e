"""Reasoning and answer are told apart by the tags' tokens, for every template, and every drawn token is counted once."""

from __future__ import annotations

import chat_cases
import pytest
import tokenizer_cases
from chat_cases import OPENS_THINK, QWEN3, STOP, TEMPLATES, chat_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, tiny_tokenizer

from saro.data.chat_format import ChatFormat, Prefill
from saro.data.records import Message
from saro.evaluate.answers import STATES
from saro.evaluate.split import Split, has_loop, split_answer, split_text

USER = (Message("user", "Why?"),)


def with_tag_tokens(template: str, special: bool) -> ChatFormat:
    tokenizer = tiny_tokenizer(template, chat_cases.TOKENS)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    return chat_of(template, tokenizer=tokenizer)


# Every template of the tests, with tags that are plain text, added tokens and special tokens; and every tokenizer.
CHATS = {
    **{f"{name}, plain": chat for name, chat in chat_cases.CHATS.items()},
    **{f"{name}, added": with_tag_tokens(template, False) for name, template in TEMPLATES.items()},
    **{f"{name}, special": with_tag_tokens(template, True) for name, template in TEMPLATES.items()},
    **{" ".join(names): chat for names, chat in tokenizer_cases.CHATS.items()},
    **{f"byte-level {name}": chat for name, chat in tokenizer_cases.BYTE_LEVEL_CHATS.items()},
}
every_chat = pytest.mark.parametrize("name", CHATS)


def opens(name: str) -> bool:
    return name.startswith("opens think")


def ids_of(chat: ChatFormat, text: str) -> list[int]:
    return chat.tokenizer(text, add_special_tokens=False).input_ids


def split(chat: ChatFormat, text: str, finish: str = "stop", prefill: Prefill | None = None) -> Split:
    """Split a text that the model drew, and check that each of its tokens is counted once."""
    drawn = ids_of(chat, text) + [min(chat.stop_ids)] * (finish == "stop")
    prompt = chat.prefill_ids(USER, prefill)
    result = split_answer(chat, prompt, drawn, finish)
    assert result.tokens["think"] + result.tokens["answer"] == len(drawn)
    assert result.tokens["prefill"] == prompt.prefilled
    assert result.state in STATES
    return result


def drawn_text(name: str, text: str) -> str:
    """Return the text as the model of a template writes it: without the opening tag that the template wrote."""
    return text.removeprefix("<think>\n") if opens(name) else text


def parts(result: Split) -> tuple[str, str, str]:
    return result.think, result.answer, result.state


@every_chat
def test_closed_reasoning(name):
    chat = CHATS[name]
    begun = drawn_text(name, "<think>\nBecause.\n</think>")
    result = split(chat, begun + "\n\nSo.")
    assert parts(result) == ("Because.", "So.", "finished")
    # The tags are reasoning, and the stop token is a part of the answer. A token may hold the end of a tag and more.
    assert result.tokens["think"] in (len(ids_of(chat, begun)), len(ids_of(chat, begun)) + 1)


@every_chat
def test_open_reasoning(name):
    chat = CHATS[name]
    text = drawn_text(name, "<think>\nBecause it")
    result = split(chat, text, "length")
    assert parts(result) == ("Because it", "", "unfinished")
    assert result.tokens["think"] == len(ids_of(chat, text))


@every_chat
def test_reasoning_that_the_model_ended_without_an_answer(name):
    result = split(CHATS[name], drawn_text(name, "<think>\nBecause."))
    assert parts(result) == ("Because.", "", "empty")
    assert result.tokens["answer"] == 0


@every_chat
def test_absent_reasoning(name):
    result = split(CHATS[name], "So.")
    # Text after a tag that the template opened is reasoning, until it is closed.
    assert parts(result) == (("So.", "", "empty") if opens(name) else ("", "So.", "no-think"))


@every_chat
def test_reasoning_twice(name):
    result = split(CHATS[name], drawn_text(name, "<think>\nA\n</think>\n\nB <think>C</think> D"))
    assert result.think == "A"
    # Tags that are special tokens have no text.
    assert result.answer in ("B <think>C</think> D", "B C D", "B  C D", "B C  D", "B  C  D")
    assert result.state == "finished"


@every_chat
def test_a_closing_tag_in_the_answer_is_text(name):
    result = split(CHATS[name], drawn_text(name, "<think>\nA\n</think>\n\nThe tag </think> ends it."))
    assert result.think == "A"
    assert result.answer.startswith("The tag ")
    assert result.answer.endswith(" ends it.")


@pytest.mark.parametrize("name", [name for name in CHATS if not opens(name)])
def test_a_tag_after_other_text_opens_nothing(name):
    result = split(CHATS[name], "Yes. <think>A</think> So.")
    assert result.think == ""
    assert result.answer.startswith("Yes. ")
    assert result.answer.endswith(" So.")
    assert result.tokens["think"] == 0
    assert result.state == "no-think"


@every_chat
def test_a_closing_tag_without_an_opening_one_ends_the_reasoning(name):
    """As from a server, whose template is not known: some models leave the opening tag out."""
    text = "Because.</think> So. <think>no</think>"
    result = split(CHATS[name], text)
    assert (result.think, result.answer[:3], result.state) == ("Because.", "So.", "finished")
    served = split_text(("<think>", "</think>"), False, text, "stop")
    assert (served.think, served.answer[:3], served.state) == ("Because.", "So.", "finished")


@every_chat
def test_an_answer_that_was_cut(name):
    assert parts(split(CHATS[name], drawn_text(name, "<think>\nA\n</think>\n\nSo it"), "length")) == (
        "A",
        "So it",
        "cut",
    )


@every_chat
def test_no_answer_after_reasoning(name):
    text = drawn_text(name, "<think>\nA\n</think>\n\n")
    assert parts(split(CHATS[name], text)) == ("A", "", "empty")
    assert parts(split(CHATS[name], text, "length")) == ("A", "", "unfinished")


@every_chat
def test_no_text_at_all(name):
    assert parts(split(CHATS[name], "")) == ("", "", "empty")


@every_chat
@settings(max_examples=15)
@given(reasoning=chat_cases.written, answer=chat_cases.written, cut=st.integers(0, 200))
def test_tokens_are_counted_wherever_the_text_is_cut(name, reasoning, answer, cut):
    chat = CHATS[name]
    drawn = ids_of(chat, drawn_text(name, f"<think>\n{reasoning}\n</think>\n\n{answer}"))[:cut]
    result = split_answer(chat, chat.prefill_ids(USER), drawn, "length")
    assert result.tokens["think"] + result.tokens["answer"] == len(drawn)


@pytest.mark.parametrize("name", chat_cases.CHATS)
@given(reasoning=chat_cases.written, answer=chat_cases.written)
def test_what_training_encodes_is_split_into_what_was_written(name, reasoning, answer):
    result = split(chat_cases.CHATS[name], drawn_text(name, f"<think>\n{reasoning}\n</think>\n\n{answer}"))
    assert parts(result) == (reasoning.strip(), answer.strip(), "finished")


# Tags that are tokens


@pytest.mark.parametrize("special", [False, True], ids=["added", "special"])
def test_the_letters_of_a_tag_that_is_a_token_are_text(special):
    chat = with_tag_tokens(CHATML, special)
    opening, closing = chat.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    letters = [i for letter in "</think>" for i in ids_of(chat, letter)]
    drawn = [
        opening,
        *ids_of(chat, "A "),
        *letters,
        *ids_of(chat, " B"),
        closing,
        *ids_of(chat, "So."),
        min(chat.stop_ids),
    ]
    result = split_answer(chat, chat.prefill_ids(USER), drawn, "stop")
    assert parts(result) == ("A </think> B", "So.", "finished")
    assert result.tokens["think"] == 1 + 2 + 8 + 2 + 1


def test_one_tag_may_be_a_part_of_the_other():
    chat = chat_of(think_tags=("THINK", "UNTHINK"))
    assert parts(split(chat, "THINK\nA\nUNTHINK\n\nSo.")) == ("A", "So.", "finished")
    assert parts(split(chat, "A UNTHINK So.")) == ("A", "So.", "finished")


# Templates that close the reasoning, and beginnings that were given


def test_after_a_template_that_closed_the_reasoning_all_is_answer():
    chat = chat_of(QWEN3, template_variables={"enable_thinking": False})
    assert parts(split(chat, "So.")) == ("", "So.", "no-think")


@every_chat
def test_given_reasoning_is_a_part_of_the_reasoning_and_not_drawn(name):
    chat = CHATS[name]
    prompt = chat.prefill_ids(USER, Prefill("Hello. Sure."))
    rest = ids_of(chat, " It is.\n</think>\n\nSo.")
    result = split_answer(chat, prompt, [*rest, min(chat.stop_ids)], "stop")
    assert result.think.startswith("Hello")
    assert result.think.endswith("It is.")
    assert result.answer == "So."
    assert result.tokens["prefill"] == prompt.prefilled
    assert 0 < result.tokens["think"] < len(rest)


@pytest.mark.parametrize("template", [CHATML, OPENS_THINK])
def test_with_thinking_switched_off_all_that_is_drawn_is_answer(template):
    result = split(chat_of(template), "So.", prefill=Prefill("", closed=True))
    assert parts(result) == ("", "So.", "no-think")
    assert result.tokens == {
        "think": 0,
        "answer": 4,
        "prefill": len("<think>\n\n</think>\n\n") - 8 * (template == OPENS_THINK),
    }


def test_a_given_answer_is_a_part_of_the_answer():
    result = split(chat_of(), " It is.", prefill=Prefill("Because.", closed=True, answer="Sure."))
    assert parts(result) == ("Because.", "Sure. It is.", "finished")
    assert result.tokens["think"] == 0


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_stop_token_is_no_text(template):
    chat = chat_of(template)
    assert STOP.get(template, "<|im_end|>") not in str(parts(split(chat, drawn_text("", "So."))))


# Loops


@pytest.mark.parametrize("period", [1, 2, 7, 40])
def test_a_text_that_ends_in_a_repetition_loops_wherever_it_is_cut(period):
    start, once = [1000, 1001, 1000], list(range(period))
    repeated = start + once * (100 // period + 3)
    assert all(has_loop(repeated[: len(repeated) - cut]) for cut in range(min(period, 3)))


def test_short_repetitions_and_two_repeats_are_no_loop():
    assert not has_loop([1, 2, *[3] * 31])
    assert has_loop([1, 2, *[3] * 32])
    assert not has_loop([*range(100), *range(100)])
    assert not has_loop(list(range(500)))
    assert not has_loop([])


def test_a_repetition_before_the_end_is_no_loop():
    assert not has_loop([*[3] * 100, 4, 5])


@pytest.mark.parametrize("text", ["<think>\n" + "I see. " * 20, "<think>\nA\n</think>\n\n" + "I see. " * 20])
def test_only_a_text_that_was_cut_is_looped(text):
    assert split(chat_of(), text, "length").state == "looped"
    assert split(chat_of(), text).state != "looped"


# Text without ids


@pytest.mark.parametrize(
    ("text", "opened", "finish", "expected"),
    [
        ("<think>\nA\n</think>\n\nSo.", False, "stop", ("A", "So.", "finished")),
        ("\n<think>A</think>So.", False, "stop", ("A", "So.", "finished")),
        ("A\n</think>\n\nSo.", True, "stop", ("A", "So.", "finished")),
        ("A\n</think>\n\nSo.", False, "stop", ("A", "So.", "finished")),
        ("<think>\nA", False, "length", ("A", "", "unfinished")),
        ("<think>\nA", False, "stop", ("A", "", "empty")),
        ("A", True, "length", ("A", "", "unfinished")),
        ("So.", False, "stop", ("", "So.", "no-think")),
        ("So", False, "length", ("", "So", "cut")),
        ("<think></think>So.", False, "stop", ("", "So.", "no-think")),
        ("<think>A</think>B<think>C</think>", False, "stop", ("A", "B<think>C</think>", "finished")),
        ("<think>A" + " and so on" * 20, False, "length", ("A" + " and so on" * 20, "", "looped")),
        (" ", False, "stop", ("", "", "empty")),
    ],
)
def test_a_servers_text(text, opened, finish, expected):
    result = split_text(("<think>", "</think>"), opened, text, finish)
    assert parts(result) == expected
    assert result.tokens == {"think": -1, "answer": -1, "prefill": 0}


def test_the_tokens_of_a_servers_text_are_counted_if_a_tokenizer_is_given():
    result = split_text(("<think>", "</think>"), False, "<think>A</think>So.", "stop", tiny_tokenizer())
    assert result.tokens == {"think": 16, "answer": 3, "prefill": 0}
