"""The beginning of a response has the ids with which training encodes every response that goes on from it."""

from __future__ import annotations

import json
from functools import cache

import chat_cases
import pytest
from chat_cases import DAY, OPENS_THINK, QWEN3, chat_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from prefill_cases import CHATS, beginnings, continuations, joining
from tiny import CHATML, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from saro.data.chat_format import ChatFormat, Prefill
from saro.data.records import Example, Message, Response
from saro.demo.fetch_model import demo_model
from saro.errors import SaroError

USER = (Message("user", "Why?"),)
every_chat = pytest.mark.parametrize("name", CHATS)


def encode(chat: ChatFormat, response: Response) -> list[int]:
    """Return the ids that training has for a response. Cases that it refuses are left out."""
    try:
        return chat.encode(Example("a", "general", USER, response, "data.jsonl:7")).tokens.tolist()
    except SaroError:
        assume(False)


def prefilled(chat: ChatFormat, prefill: Prefill):
    """Return the beginning. Texts that are too short to keep anything of them are left out."""
    try:
        return chat.prefill_ids(USER, prefill)
    except SaroError:
        assume(False)


def text_of(chat: ChatFormat, ids) -> str:
    return chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@every_chat
@settings(max_examples=30)
@given(beginning=beginnings, continuation=continuations, answer=chat_cases.written)
def test_open_reasoning_begins_as_in_every_response_that_continues_it(name, beginning, continuation, answer):
    chat = CHATS[name]
    begun = prefilled(chat, Prefill(beginning))
    assume("think>" not in beginning + continuation)
    whole = encode(chat, Response(beginning + continuation, answer))
    assert whole[: len(begun.ids)] == list(begun.ids)


@every_chat
@settings(max_examples=30)
@given(beginning=beginnings, answer=chat_cases.written)
def test_reasoning_that_ends_where_the_beginning_does_begins_with_it_too(name, beginning, answer):
    chat = CHATS[name]
    begun = prefilled(chat, Prefill(beginning))
    assert encode(chat, Response(beginning, answer))[: len(begun.ids)] == list(begun.ids)


@every_chat
@settings(max_examples=30)
@given(reasoning=st.just("") | beginnings, beginning=st.just("") | beginnings, continuation=continuations)
def test_an_answer_begins_as_in_every_response_that_continues_it(name, reasoning, beginning, continuation):
    chat = CHATS[name]
    begun = prefilled(chat, Prefill(reasoning, closed=True, answer=beginning))
    assume("think>" not in beginning + continuation and (beginning + continuation).strip())
    whole = encode(chat, Response(reasoning, beginning + continuation))
    assert whole[: len(begun.ids)] == list(begun.ids)


@every_chat
@settings(max_examples=30)
@given(beginning=beginnings, continuation=continuations)
def test_an_answer_without_reasoning_begins_as_in_every_response_that_continues_it(name, beginning, continuation):
    chat = CHATS[name]
    begun = prefilled(chat, Prefill(answer=beginning))
    assume("think>" not in beginning + continuation)
    whole = encode(chat, Response(None, beginning + continuation))
    assert whole[: len(begun.ids)] == list(begun.ids)


# Words that a real vocabulary has in many lengths, so that almost every continuation changes the last token.
@settings(max_examples=200)
@given(
    beginning=st.text("aeinst .\n'1", min_size=1, max_size=30).filter(str.strip),
    continuation=st.sampled_from(["and", "s", "ing", " the", "\n", "\n\n", "'s", "2", "."]) | joining,
)
def test_the_demo_model_begins_as_in_every_response_that_continues_it(beginning, continuation):
    chat = demo_chat()
    begun = prefilled(chat, Prefill(beginning))
    whole = encode(chat, Response(beginning + continuation, "So."))
    assert whole[: len(begun.ids)] == list(begun.ids)


@cache
def demo_chat() -> ChatFormat:
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    return ChatFormat(tokenizer, frozenset({tokenizer.eos_token_id}), DAY)


def test_a_token_that_begins_inside_a_character_is_left_out():
    # The last byte of the e with an acute accent, and the letter after it, are one token.
    tokenizer = tiny_tokenizer(CHATML)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["\u00a9d"] = max(tokenizer.get_vocab().values()) + 1
    state["model"]["merges"] = [["\u00a9", "d"]]
    merging = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<|bos|>")
    merging.chat_template = CHATML
    chat = ChatFormat(merging, frozenset({merging.convert_tokens_to_ids("<|im_end|>")}), DAY)
    begun = chat.prefill_ids(USER, Prefill("Voil\u00e9"))
    assert encode(chat, Response("Voil\u00e9d", "So."))[: len(begun.ids)] == list(begun.ids)
    assert text_of(chat, begun.ids).endswith("Voi")


# What the beginning reads


def read(chat: ChatFormat, prefill: Prefill) -> str:
    """Return the text of the beginning after its prompt."""
    begun = chat.prefill_ids(USER, prefill)
    return text_of(chat, begun.ids[len(begun.ids) - begun.prefilled :])


@pytest.mark.parametrize(
    ("name", "reasoning"),
    [(name, "<think>\nSure.") for name in ("chatml", "llama3", "drops think", "qwen3")] + [("opens think", "Sure.")],
)
def test_reasoning_is_opened_once(name, reasoning):
    assert read(chat_cases.CHATS[name], Prefill("Sure.")) == reasoning


def test_no_beginning_is_the_prompt_of_training():
    for chat in CHATS.values():
        begun = chat.prefill_ids(USER)
        assert (list(begun.ids), begun.prefilled) == (chat.prompt_ids(USER), 0)


def test_empty_reasoning_switches_thinking_off():
    off = Prefill("", closed=True)
    assert read(chat_cases.CHATS["chatml"], off) == "<think>\n\n</think>\n\n"
    assert read(chat_cases.CHATS["opens think"], off) == "\n</think>\n\n"


def test_empty_reasoning_that_the_template_wrote_is_not_written_again():
    chat = chat_of(QWEN3, template_variables={"enable_thinking": False})
    assert read(chat, Prefill("", closed=True)) == ""
    assert read(chat, Prefill("", closed=True, answer="Sure.")) == "Sure."


def test_an_answer_after_reasoning():
    chat = chat_of(OPENS_THINK)
    assert read(chat, Prefill("Because.", closed=True, answer="So.")) == "Because.\n</think>\n\nSo."


@pytest.mark.parametrize("special", [False, True], ids=["added", "special"])
def test_tags_that_are_tokens_are_these_tokens(special):
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    chat = chat_of(tokenizer=tokenizer)
    begun = chat.prefill_ids(USER, Prefill("Sure.", closed=True))
    assert [begun.ids.count(tag) for tag in tokenizer.convert_tokens_to_ids(["<think>", "</think>"])] == [1, 1]


def test_the_end_of_a_closing_tag_that_may_merge_with_the_answer_is_left_out():
    # "</think>" is plain text here, and ">" and line ends may merge.
    tokenizer = tiny_tokenizer(CHATML)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"][">\u010a"] = max(tokenizer.get_vocab().values()) + 1
    state["model"]["merges"] = [[">", "\u010a"]]
    state["pre_tokenizer"]["use_regex"] = False
    state["model"]["vocab"][">\u010a\u010a"] = max(tokenizer.get_vocab().values()) + 2
    state["model"]["vocab"][">\u010a\u010a\u010a"] = max(tokenizer.get_vocab().values()) + 3
    state["model"]["merges"] += [[">\u010a", "\u010a"], [">\u010a\u010a", "\u010a"]]
    merging = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<|bos|>")
    merging.chat_template = CHATML
    chat = ChatFormat(merging, frozenset({merging.convert_tokens_to_ids("<|im_end|>")}), DAY)
    begun = chat.prefill_ids(USER, Prefill("Sure.", closed=True))
    assert text_of(chat, begun.ids).endswith("Sure.\n</think")


# What cannot be begun


def refusal(chat: ChatFormat, prefill: Prefill) -> str:
    with pytest.raises(SaroError) as caught:
        chat.prefill_ids(USER, prefill)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_reasoning_after_a_template_that_closed_it_is_refused():
    chat = chat_of(QWEN3, template_variables={"enable_thinking": False})
    assert "set --data.template_variables.enable_thinking true" in refusal(chat, Prefill("Sure."))


@pytest.mark.parametrize("prefill", [Prefill("a</think>b"), Prefill(None, answer="So <think>")])
def test_text_with_tags_is_refused(prefill):
    assert "<think>" in refusal(chat_of(), prefill)


def test_a_text_of_which_nothing_is_left_is_refused():
    assert refusal(demo_chat(), Prefill("Sur")).startswith("the whole text to continue may merge with what follows it;")


def test_an_answer_after_open_reasoning_is_a_programming_error():
    with pytest.raises(ValueError, match="cannot follow reasoning that is not closed"):
        Prefill("Because", answer="So.")
