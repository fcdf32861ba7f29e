"""A completion has the ids that it would have as the rest of its prompt, also if the tokenizer puts a space in front.

SentencePiece tokenizers, such as those of Llama 2, Mistral, TinyLlama, Zephyr and Phi-3, put a space in front of every text
that they tokenize, and some of them also after each control token.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_cases import (
    BYTE_LEVEL,
    BYTE_LEVEL_CHATS,
    CHATS,
    SPACES,
    byte_level_chat,
    chat_of,
    space_tokenizer,
    texts,
    written,
)
from transformers import AutoTokenizer

from saro.data.chat_format import ChatFormat
from saro.data.records import Example, Message, Response, read_examples, read_pairs
from saro.data.tree import RowKind
from saro.demo import demo_file
from saro.demo.fetch_model import demo_model
from saro.errors import SaroError

every_chat = pytest.mark.parametrize(("space", "name"), CHATS, ids=str)


def ask(answer: str = "So.", reasoning: str | None = "Because.", prompt: str = "Why?") -> Example:
    return Example("a", "general", (Message("user", prompt),), Response(reasoning, answer), "data.jsonl:7")


def raw(prompt: str, completion: str) -> Example:
    return Example("a", "general", prompt, Response(None, completion), "data.jsonl:7")


def ids_of(chat: ChatFormat, text: str) -> list[int]:
    return chat.tokenizer(text, add_special_tokens=False).input_ids


def decode(chat: ChatFormat, ids) -> str:
    return chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def read(chat: ChatFormat, example: Example) -> str:
    """Return the text of the completion as it reads after its prompt."""
    sequence = chat.encode(example)
    prompt, whole = decode(chat, sequence.tokens[: sequence.scored_from]), decode(chat, sequence.tokens)
    assert whole.startswith(prompt)
    return whole.removeprefix(prompt)


def tokens_of(chat: ChatFormat, example: Example) -> list[str]:
    sequence = chat.encode(example)
    return chat.tokenizer.convert_ids_to_tokens(sequence.tokens[sequence.scored_from :].tolist())


# Conversations


@every_chat
def test_the_ids_are_those_of_the_turn_that_the_template_renders(space, name):
    chat, content = CHATS[space, name], "<think>\nBecause.\n</think>\n\nSo."
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": content}]
    stop = "<|end|>" if name == "phi 3" else "</s>"
    rendered = chat.tokenizer.apply_chat_template(turns, tokenize=False)
    assert chat.encode(ask()).tokens.tolist() == ids_of(chat, rendered[: rendered.rindex(stop)] + stop)


@pytest.mark.parametrize(
    ("space", "name", "first"),
    [
        ("normalizer", "zephyr", "<"),
        ("always", "zephyr", "<"),
        ("first", "zephyr", "<"),
        # The template writes a space after [/INST].
        ("normalizer", "llama 2", "▁<"),
        ("first", "llama 2", "▁<"),
        ("first", "mistral", "▁<"),
        # The control token takes the line end, so the response follows it, and these tokenizers put a space after it.
        ("normalizer", "phi 3", "▁<"),
        ("always", "phi 3", "▁<"),
        ("first", "phi 3", "<"),
    ],
)
def test_the_first_token_of_the_reasoning(space, name, first):
    assert tokens_of(CHATS[space, name], ask())[0] == first


@every_chat
@given(answer=written, reasoning=st.none() | written, prompt=written)
def test_a_completion_reads_after_its_prompt_as_it_was_written(space, name, answer, reasoning, prompt):
    chat = CHATS[space, name]
    text = answer if reasoning is None else f"<think>\n{reasoning}\n</think>\n\n{answer}"
    start = " " if name in ("llama 2", "mistral") else ""
    end = {"llama 2": " </s>", "phi 3": "<|end|>"}.get(name, "</s>")
    got = read(chat, ask(answer, reasoning, prompt))
    # Only after a control token may there be another space: the one that the tokenizer puts there in every text.
    spaces = ("", " ") if name in ("phi 3", "mistral") and space != "first" else ("",)
    assert got in [f"{extra}{start}{text}{end}" for extra in spaces]


@every_chat
@given(answer=written)
def test_the_prompt_keeps_the_ids_of_inference(space, name, answer):
    chat = CHATS[space, name]
    sequence = chat.encode(ask(answer, None))
    expected = chat.inference_prompt_ids((Message("user", "Why?"),))
    assert sequence.tokens[: sequence.scored_from].tolist() == expected


@every_chat
def test_rows_keep_their_kinds(space, name):
    chat = CHATS[space, name]
    sequence = chat.encode(ask())
    scored = sequence.tokens[sequence.scored_from :]
    stop = "<|end|>" if name == "phi 3" else "</s>"
    by_kind = {kind: decode(chat, scored[sequence.row_kinds == kind]) for kind in RowKind}
    assert by_kind[RowKind.THINK].strip() == "<think>\nBecause.\n</think>"
    assert by_kind[RowKind.ANSWER].strip() == "So."
    assert by_kind[RowKind.STOP] == stop


@pytest.mark.parametrize("space", SPACES)
def test_line_ends_that_a_control_token_would_take_are_trained_on(space):
    assert read(CHATS[space, "phi 3"], ask("\n\n So.", None)) == "\n\n So.<|end|>"


# Raw text


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(
    ("prompt", "completion", "tokens"),
    [
        ("Why?", " So.", ["▁So", ".", "</s>"]),
        ("Why?", "So.", ["So", ".", "</s>"]),
        ("Why? ", "So.", ["So", ".", "</s>"]),
        ("Why?\n", "So.", ["So", ".", "</s>"]),
        ("Why?", "\nSo.", ["<0x0A>", "So", ".", "</s>"]),
        ("Why? Be", "cause", ["cause", "</s>"]),
    ],
)
def test_raw_text_goes_on_where_its_prompt_ends(space, prompt, completion, tokens):
    assert tokens_of(chat_of(space_tokenizer(space, None)), raw(prompt, completion)) == tokens


RAW = {space: chat_of(space_tokenizer(space, None)) for space in SPACES}


@pytest.mark.parametrize("space", SPACES)
@given(prompt=texts.filter(str.strip), completion=texts.filter(str.strip))
def test_raw_text_reads_as_it_was_written(space, prompt, completion):
    assert read(RAW[space], raw(prompt, completion)) == completion + "</s>"


@pytest.mark.parametrize("space", SPACES)
def test_text_that_merges_with_the_end_of_its_prompt_keeps_the_prompts_ids(space):
    chat = chat_of(space_tokenizer(space, None, merged=("?S", "?So", "\nSo")))
    assert chat.tokenizer.convert_ids_to_tokens(ids_of(chat, "Why?So"))[-1] == "?So"
    sequence = chat.encode(raw("Why?", "So."))
    assert sequence.tokens[: sequence.scored_from].tolist() == ids_of(chat, "Why?")
    assert tokens_of(chat, raw("Why?", "So.")) == ["So", ".", "</s>"]


@pytest.mark.parametrize("space", SPACES)
def test_text_without_ids_of_its_own_after_the_prompt_is_refused(space):
    chat = chat_of(space_tokenizer(space, None, merged=("?So", "\nSo", ".So", "aSo")))
    with pytest.raises(SaroError) as caught:
        chat.encode(raw("Why?", "So."))
    assert str(caught.value) == (
        "data.jsonl:7: the tokenizer merges the beginning of the response with the end of the prompt; "
        "end the prompt or begin the response with another character"
    )


# Byte-level tokenizers put no space in front: their ids are those of the completion alone.


@pytest.mark.parametrize("name", BYTE_LEVEL)
@given(prompt=written, completion=written)
def test_byte_level_ids_are_those_of_the_completion_alone(name, prompt, completion):
    chat = BYTE_LEVEL_CHATS[name]
    for example in (ask(completion, None, prompt), raw(prompt, completion)):
        sequence = chat.encode(example)
        assert sequence.tokens[sequence.scored_from :].tolist() == ids_of(chat, completion + "<|im_end|>")


def test_a_byte_level_tokenizer_may_put_a_space_in_front_too():
    chat = byte_level_chat("gpt2", add_prefix_space=True)
    text = "<think>\nBecause.\n</think>\n\nSo.<|im_end|>"
    assert decode(chat, ids_of(chat, text)) == " " + text
    assert read(chat, ask()) == text
    assert read(chat, raw("Why?", "So.")) == "So.<|im_end|>"


@pytest.fixture(scope="module")
def demo_chat() -> ChatFormat:
    return chat_of(AutoTokenizer.from_pretrained(demo_model()), "<|im_end|>")


def test_the_demo_model_reads_its_examples_as_prompt_and_completion_alone(demo_chat):
    for name in ("rw_train", "rw_heldout"):
        for example in read_examples(demo_file(name)):
            text = f"<think>\n{example.response.reasoning}\n</think>\n\n{example.response.answer}<|im_end|>"
            expected = demo_chat.inference_prompt_ids(example.prompt) + ids_of(demo_chat, text)
            assert demo_chat.encode(example).tokens.tolist() == expected


def test_the_demo_model_reads_its_pairs_as_prompt_and_completion_alone(demo_chat):
    for name in ("srpo_train", "srpo_heldout"):
        for pair in read_pairs(demo_file(name)):
            prompt = demo_chat.inference_prompt_ids(pair.prompt)
            for side, sequence in zip((pair.chosen, pair.rejected), demo_chat.encode_pair(pair), strict=True):
                text = f"<think>\n{side.reasoning}\n</think>\n\n{side.answer}<|im_end|>"
                assert sequence.tokens.tolist() == prompt + ids_of(demo_chat, text)
