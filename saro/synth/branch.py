"""Cuts chains in token ids, so that both sides of a pair share exactly the tokens up to the fork.

A cut in text is no cut in tokens: the last token before it may be another one when other text follows. So a fork is the
ids that no continuation can change, the generator continues from these ids, and a record that is made of the two sides is
encoded as in training before it is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saro.data.chat_format import ChatFormat, Prefill
from saro.data.records import Message, parse_pair
from saro.data.tree import common_prefix
from saro.errors import SaroError


@dataclass(frozen=True)
class Fork:
    """A place in the reasoning from which a model continues.

    Attributes:
        prefill: the beginning of the response, for a task.
        ids: ids of the prompt and of the beginning, as far as no continuation can change them.
        text: the beginning of the reasoning. Its last characters may be missing from the ids, and then the model writes
            them anew.
    """

    prefill: Prefill
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class PairLengths:
    """Numbers of tokens of an encoded pair.

    Attributes:
        shared: tokens that both sides begin with, with those of the prompt.
        prompt: tokens of the prompt.
        chosen, rejected: tokens of each response, with the shared ones and the stop token if it has one.
    """

    shared: int
    prompt: int
    chosen: int
    rejected: int


def find_fork(chat: ChatFormat, prompt: Sequence[Message], prefix_text: str) -> Fork:
    """Return the fork behind the beginning of a chain, which may be empty: then the reasoning has just been opened.

    Raises:
        SaroError: as ``ChatFormat.prefill_ids`` does; for example, nothing of the text is safe from what follows it.
    """
    prefill = Prefill(reasoning=prefix_text)
    return Fork(prefill, chat.prefill_ids(prompt, prefill).ids, prefix_text)


def measure_pair(chat: ChatFormat, record: Mapping[str, Any], fork: Fork) -> PairLengths | None:
    """Return the lengths of a record's sides in tokens, as training encodes them, or None if they do not share the fork.

    They must share at least the fork, or one token less, and more than the prompt. A model may continue with text that
    merges with the last token before the fork; the cut is then one token earlier. A fork without text needs only the
    prompt if the template ends it with the opening tag. A record that cannot be encoded has None too.
    """
    try:
        pair = parse_pair(dict(record), record["id"], record["id"])
        chosen, rejected = chat.encode_pair(pair)
    except SaroError:
        return None
    shared = common_prefix([chosen.tokens, rejected.tokens])
    prompt = chosen.scored_from
    # Ids of a fork without text are the opening tag, or the prompt itself if that ends with the tag.
    least = prompt if len(fork.ids) == prompt and not fork.text else prompt + 1
    if shared < max(len(fork.ids) - 1, least):
        return None
    return PairLengths(shared, prompt, len(chosen.tokens) - prompt, len(rejected.tokens) - prompt)


def cut_after(chat: ChatFormat, text: str, place: int, tokens: int) -> str:
    """Return a text up to a number of tokens behind a place in it; all of it if it has fewer."""
    rest = text[place:]
    spans = chat.tokenizer(rest, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    if len(spans) <= tokens:
        return text
    return text[: place + spans[tokens][0]]
