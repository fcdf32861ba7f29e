"""A completion has the ids that it would have as the rest of its prompt, also if the tokenizer puts a space in front.

SentencePiece tokenizers, such as those of Llama 2, Mistral, TinyLlama, Zephyr and Phi-3, put a space in front of every text
that they tokenize, and some of them also after each control token.
"""

from __future__ import annotations

import inspect
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CHATML
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from saro.data.chat_format import ChatFormat
from saro.data.records import Example, Message, Response, read_examples, read_pairs
from saro.data.tree import RowKind
from saro.demo import demo_file
from saro.demo.fetch_model import demo_model
from saro.errors import SaroError

DAY = date(1999, 7, 4)

# Templates in the style of published ones.
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = LLAMA2.replace("' ' + eos_token", "eos_token").replace("bos_token + ", "")
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Template, its control tokens, and whether these also take the white space after them, as Phi-3's do.
TEMPLATES = {
    "llama 2": (LLAMA2, (), False),
    "mistral": (MISTRAL, ("[INST]", "[/INST]"), False),
    "zephyr": (ZEPHYR, (), False),
    "phi 3": (PHI3, ("<|user|>", "<|assistant|>", "<|end|>"), True),
    "chatml": (CHATML.replace("<|im_end|>", "</s>"), ("<|im_start|>",), False),
}
# Where the space is put: by a normalizer or a pre-tokenizer, after each control token or only in front of the text.
SPACES = ("normalizer", "always", "first")

WORDS = ("think", "▁think", "▁<", "▁So", "So", "▁Why", "▁Be", "Be", "cause", "▁Hello", "</", "▁it", "is", "▁▁", "▁▁▁▁")


def space_tokenizer(space: str, template: str | None, control=(), strips=False, merged=()) -> PreTrainedTokenizerFast:
    """Make a BPE tokenizer that puts a space in front, with bytes for what its vocabulary lacks.

    ``merged`` are more words of the vocabulary.
    """
    pairs = [(word[:i], word[i]) for word in (*merged, *WORDS) for i in range(1, len(word))]
    letters = sorted({letter for word in (*WORDS, *merged) for letter in word} | set("abcdefghijklmnop.,:?<>/|[]"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *map("".join, pairs)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=list(dict.fromkeys(pairs)), unk_token="<unk>", byte_fallback=True)
    )
    if space == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=space, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    backend.add_special_tokens([AddedToken(token, normalized=False, rstrip=strips) for token in control])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def chat_of(tokenizer: PreTrainedTokenizerFast, stop: str = "</s>") -> ChatFormat:
    return ChatFormat(tokenizer, frozenset({tokenizer.convert_tokens_to_ids(stop)}), DAY)


def space_chat(space: str, name: str) -> ChatFormat:
    return chat_of(space_tokenizer(space, *TEMPLATES[name]), "<|end|>" if name == "phi 3" else "</s>")


CHATS = {(space, name): space_chat(space, name) for space in SPACES for name in TEMPLATES}
every_chat = pytest.mark.parametrize(("space", "name"), CHATS, ids=str)
# Any text, often with what is special to these tokenizers. "▁" itself reads as a space.
pieces = st.sampled_from(
    [" ", "  ", "\n", "\n\n", "<", "So", "think", ".", "▁So".replace("▁", " "), "é", "\u2003", "☃"]
)
texts = st.lists(pieces | st.characters(exclude_categories=["Cs"], exclude_characters="▁\0"), min_size=1).map("".join)
written = texts.filter(lambda text: text.strip() and "think>" not in text)


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

BYTE_LEVEL = {
    "gpt2": None,
    "llama 3": inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default,
    "qwen": PRETOKENIZE_REGEX,
}
# Merges of spaces, line ends and punctuation, as these vocabularies have.
CORPUS = [
    "Why? Because it is so.\n\n<think>\nHello there,\n</think>\n\nSo it is: 12345.  \n \n    Yes.\n" * 3,
    "\n\n\n \n  :So",
]


def byte_level_chat(name: str, add_prefix_space: bool = False) -> ChatFormat:
    pattern = BYTE_LEVEL[name]
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=pattern is None)
    backend.pre_tokenizer = byte_level
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if name == "qwen":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return chat_of(tokenizer, "<|im_end|>")


BYTE_LEVEL_CHATS = {name: byte_level_chat(name) for name in BYTE_LEVEL}


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
