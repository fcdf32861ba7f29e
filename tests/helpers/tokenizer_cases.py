"""Tokenizers of several makes: those that put a space in front of every text, and byte-level ones; texts to encode with them."""

from __future__ import annotations

import inspect
from datetime import date

from hypothesis import strategies as st
from tiny import CHATML
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from saro.data.chat_format import ChatFormat

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
# Any text, often with what is special to these tokenizers. "▁" itself reads as a space.
pieces = st.sampled_from(
    [" ", "  ", "\n", "\n\n", "<", "So", "think", ".", "▁So".replace("▁", " "), "é", "\u2003", "☃"]
)
texts = st.lists(pieces | st.characters(exclude_categories=["Cs"], exclude_characters="▁\0"), min_size=1).map("".join)
written = texts.filter(lambda text: text.strip() and "think>" not in text)

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
