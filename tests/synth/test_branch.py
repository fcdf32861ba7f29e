"""Chains are cut in token ids: sides that were made from one fork share its tokens, whatever the tokenizer."""

from __future__ import annotations

import random

import chat_cases
import pytest
import tokenizer_cases
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizer_cases import texts

from saro.data.records import Message, parse_pair
from saro.errors import SaroError
from saro.synth.branch import cut_after, find_fork, measure_pair

CHATS = {
    **{f"bytes, {name}": chat for name, chat in chat_cases.CHATS.items()},
    **{" ".join(names): chat for names, chat in tokenizer_cases.CHATS.items()},
    **{f"byte-level {name}": chat for name, chat in tokenizer_cases.BYTE_LEVEL_CHATS.items()},
}
PROMPT = (Message("user", "Why?"),)
CHAT = CHATS["byte-level llama 3"]

names = st.sampled_from(sorted(CHATS))
without_tags = texts.filter(lambda text: "think>" not in text)


def pair_record(chosen: str, rejected: str, is_open: bool = False) -> dict:
    rejected_side = {"reasoning": rejected, "open": True} if is_open else {"reasoning": rejected, "answer": "No."}
    return {
        "id": "r",
        "kind": "pp-cot",
        "prompt": "Why?",
        "chosen": {"reasoning": chosen, "answer": "Because."},
        "rejected": rejected_side,
    }


def find_or_skip(chat, prefix):
    try:
        return find_fork(chat, PROMPT, prefix)
    except SaroError:
        assume(False)


def encodes(chat, record) -> bool:
    try:
        chat.encode_pair(parse_pair(record, "r", "r"))
    except SaroError:
        return False
    return True


@settings(max_examples=300)
@given(names, without_tags, without_tags, without_tags, st.booleans())
def test_sides_that_begin_with_the_text_of_a_fork_share_its_tokens(name, prefix, first, second, is_open):
    chat = CHATS[name]
    assume(prefix.strip())
    fork = find_or_skip(chat, prefix)
    record = pair_record(prefix + first, prefix + second, is_open)
    if encodes(chat, record):
        assert measure_pair(chat, record, fork).shared >= len(fork.ids)


@settings(max_examples=300)
@given(names, without_tags, without_tags, st.integers(0, 2**32))
def test_what_a_model_draws_from_a_fork_shares_its_tokens_or_is_refused(name, prefix, rest, seed):
    # The drawn ids may be any, so that text behind the fork may merge with the text before it.
    chat = CHATS[name]
    assume(prefix.strip())
    fork = find_or_skip(chat, prefix)
    prompt = len(chat.prefill_ids(PROMPT).ids)
    vocabulary = [i for i in range(len(chat.tokenizer)) if i not in chat.tokenizer.added_tokens_decoder]
    drawn = random.Random(seed).choices(vocabulary, k=3)
    decode = chat.tokenizer.backend_tokenizer.decode
    written = decode([*fork.ids[prompt:], *drawn], skip_special_tokens=False)
    chosen = written.replace("<think>", "").strip().replace("\ufffd", "?")
    assume(chosen)
    lengths = measure_pair(chat, pair_record(chosen, prefix + rest), fork)
    if lengths is not None:
        assert lengths.shared >= len(fork.ids) - 1
        assert lengths.shared > prompt


def test_a_fork_holds_the_prompt_and_the_opened_reasoning():
    fork = find_fork(CHAT, PROMPT, "Hello there,")
    text = CHAT.tokenizer.decode(fork.ids)
    assert text.startswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\nHello there")
    assert fork.text == fork.prefill.reasoning == "Hello there,"
    assert not fork.prefill.closed


def test_a_fork_without_text_is_where_the_reasoning_opens():
    chat = CHATS["bytes, chatml"]
    fork = find_fork(chat, PROMPT, "")
    assert chat.tokenizer.decode(fork.ids).endswith("assistant\n<think>\n")
    assert measure_pair(chat, pair_record("Yes", "No"), fork).shared == len(fork.ids)


def test_the_end_of_a_text_is_left_to_the_model_if_it_may_merge_with_what_follows():
    # "thinking" has tokens other than "think" has, if the vocabulary holds a longer one.
    ends = [len(find_fork(CHAT, PROMPT, "So it is" + end).ids) for end in (":", ": 12345.  ")]
    whole = len(CHAT.prompt_ids(PROMPT)) + len(CHAT.tokenizer("<think>\nSo it is: 12345.  ").input_ids)
    assert ends[0] < ends[1] < whole


def test_a_side_that_leaves_the_fork_is_refused():
    chat = CHATS["bytes, chatml"]
    fork = find_fork(chat, PROMPT, "One two three.")
    assert measure_pair(chat, pair_record("One two three. Four.", "One two three. Five."), fork) is not None
    assert measure_pair(chat, pair_record("One two three. Four.", "One two thr"), fork) is None


def test_a_side_may_leave_the_fork_by_its_last_token():
    chat = CHATS["bytes, chatml"]
    fork = find_fork(chat, PROMPT, "One two three")
    assert measure_pair(chat, pair_record("One two three.", "One two thre."), fork).shared == len(fork.ids) - 1


def test_sides_that_part_where_the_template_opens_the_reasoning_share_the_prompt():
    chat = CHATS["bytes, opens think"]
    # The template has written the tag: behind it there is nothing to share.
    fork = find_fork(chat, PROMPT, "")
    assert fork.ids == tuple(chat.prompt_ids(PROMPT))
    assert measure_pair(chat, pair_record("Yes", "No"), fork).shared == len(fork.ids)


@pytest.mark.parametrize("name", ["bytes, chatml", "bytes, opens think"])
def test_sides_that_share_only_the_prompt_are_refused_behind_a_text(name):
    chat = CHATS[name]
    assert measure_pair(chat, pair_record("Yes", "No"), find_fork(chat, PROMPT, "One.")) is None


@pytest.mark.parametrize("text", ["<|im_end|>", "a </think> b"])
def test_a_side_that_training_refuses_is_refused(text):
    chat = CHATS["bytes, chatml"]
    fork = find_fork(chat, PROMPT, "One.")
    assert measure_pair(chat, pair_record(f"One. {text}", "One. Two."), fork) is None


def test_lengths_count_the_tokens_of_each_response():
    chat = CHATS["bytes, chatml"]
    lengths = measure_pair(chat, pair_record("One. Two.", "One. 3"), find_fork(chat, PROMPT, "One."))
    chosen, rejected = b"<think>\nOne. Two.\n</think>\n\nBecause.", b"<think>\nOne. 3\n</think>\n\nNo."
    # And the stop token.
    assert (lengths.chosen, lengths.rejected) == (len(chosen) + 1, len(rejected) + 1)
    assert lengths.shared - lengths.prompt == len(b"<think>\nOne. ")


@given(names, without_tags, st.integers(0, 30), st.data())
def test_a_text_is_cut_before_more_tokens_than_asked_for(name, text, tokens, data):
    chat = CHATS[name]
    place = data.draw(st.integers(0, len(text)))
    cut = cut_after(chat, text, place, tokens)
    assert text.startswith(cut)
    assert len(cut) >= place
    spans = chat.tokenizer(text[place:], add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    assert sum(start < len(cut) - place for start, _ in spans) <= tokens


@pytest.mark.parametrize(("tokens", "kept"), [(0, "One."), (3, "One. Tw"), (5, "One. Two"), (99, "One. Two")])
def test_a_text_is_kept_up_to_as_many_tokens_as_asked_for(tokens, kept):
    # One token is one letter here.
    assert cut_after(CHATS["bytes, chatml"], "One. Two", 4, tokens) == kept
