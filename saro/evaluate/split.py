"""Splits what a model wrote into reasoning and answer, by the positions of the tags' tokens.

The reasoning begins where the template opened it, or with an opening tag before any other text. It ends at the first
closing tag after that. A closing tag that comes before any opening one ends reasoning that began with the text: some models
leave the opening tag out. All other tags are text. An opening tag after other text opens nothing, so that all of it is the
answer, which a judge reads.

A tag that the tokenizer has as one added token is that token, and nothing else is: the same letters in other tokens are
text. Other tags are found in the decoded text, and their position is that of the token that completes them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from saro.data.chat_format import ChatFormat, PrefilledPrompt

Finish = Literal["stop", "length"]

# A text loops if it ends in three or more repeats of one period, which together have at least this many tokens. Shorter
# repetitions are common: rows of dots, digits and rules of tables.
_REPEATS = 3
_LOOP_TOKENS = 32
# The same for text without ids, in characters: about four a token.
_LOOP_CHARACTERS = 128
# The template's opening tag is within the last tokens of the prompt.
_TAIL_TOKENS = 64


@dataclass(frozen=True)
class Split:
    """The parts of one generated text.

    Attributes:
        think: text of the reasoning, without its tags and the white space around it; with what was prefilled.
        answer: text after the reasoning, without the white space around it and special tokens; with what was prefilled.
        tokens: {"think", "answer", "prefill"}. "think" and "answer" are drawn tokens, and their sum is the number of
            drawn ids: tags are in "think", and the stop token is in the part that it ends. "prefill" are the ids that the
            model was given of its response. -1 if tokens cannot be counted.
        state: one of ``STATES`` of saro.evaluate.answers, but "failed".
    """

    think: str
    answer: str
    tokens: Mapping[str, int]
    state: str


@dataclass(frozen=True)
class Parts:
    """The two parts of a response, as they were written: nothing is stripped but the tags.

    Attributes:
        think: text of the reasoning; None if the response has none.
        answer: text after the reasoning, without special tokens; empty if the reasoning is not closed.
        is_closed: False if there is reasoning without an end.
        think_tokens: number of the response's ids up to the end of the closing tag; of all its ids if there is no such tag.
    """

    think: str | None
    answer: str
    is_closed: bool
    think_tokens: int


def find_parts(chat: ChatFormat, prompt: Sequence[int], ids: Sequence[int]) -> Parts:
    """Find reasoning and answer in a response.

    Args:
        chat: tokenizer, stop ids and tags of the model.
        prompt: ids of the prompt, up to where the response begins.
        ids: ids of the response, with the stop id if one ended it.
    """
    has_stop = len(ids) > 0 and ids[-1] in chat.stop_ids
    response = _Response(chat, list(ids[:-1] if has_stop else ids))
    opening, closing = chat.think_tags
    begin = _Place(chat.count_start(response.ids), 0)
    start: _Place | None = begin
    # Decoded apart from the response: the template's tag is complete in the prompt.
    if not chat.opens_reasoning(_decode(chat, prompt[-_TAIL_TOKENS:], special=True)):
        tag, end = response.find(opening, begin), response.find(closing, begin)
        if tag is not None and not tag.before.strip():
            start = tag.after
        elif end is None or (tag is not None and tag.end < end.end):
            start = None
    if start is None:
        return Parts(None, response.text(begin), is_closed=True, think_tokens=0)
    tag = response.find(closing, start)
    if tag is None:
        return Parts(response.text(start), "", is_closed=False, think_tokens=len(ids))
    return Parts(tag.before, response.text(tag.after), is_closed=True, think_tokens=tag.end)


def split_answer(chat: ChatFormat, prompt: PrefilledPrompt, ids: Sequence[int], finish: Finish) -> Split:
    """Split the ids that a model drew after a prompt.

    Args:
        chat: tokenizer, stop ids and tags of the model.
        prompt: what the model read, with its response's beginning, if it was given one.
        ids: the drawn ids, with the stop id if one ended them.
        finish: "stop" if the model ended the text, "length" if it was cut.
    """
    drawn = list(ids)
    before_response = len(prompt.ids) - prompt.prefilled
    parts = find_parts(chat, prompt.ids[:before_response], [*prompt.ids[before_response:], *drawn])
    num_think = max(parts.think_tokens - prompt.prefilled, 0)
    tokens = {"think": num_think, "answer": len(drawn) - num_think, "prefill": prompt.prefilled}
    think = parts.think or ""
    state = _state(think, parts.answer, parts.is_closed, finish, has_loop(drawn))
    if chat.stop_ids.issuperset(drawn) and finish == "stop":
        # What was prefilled is not the model's answer.
        state = "empty"
    return Split(think.strip(), parts.answer.strip(), tokens, state)


def split_text(
    tags: tuple[str, str], opened: bool, text: str, finish: Finish, tokenizer: PreTrainedTokenizerBase | None = None
) -> Split:
    """Split a text whose ids are not known, such as a server's.

    Args:
        tags: opening and closing tag of the reasoning.
        opened: True if the template opened the reasoning, so that the text has only the closing tag. A closing tag without
            an opening one before it says the same.
        text: what the model wrote, without the prompt.
        finish: as in ``split_answer``.
        tokenizer: counts the tokens of each part, as near as a text tells; None for counts of -1.
    """
    opening, closing = tags
    before_closing, has_closing, _ = text.partition(closing)
    start: int | None = None
    if text.lstrip().startswith(opening):
        start = text.index(opening) + len(opening)
    elif opened or (has_closing and opening not in before_closing):
        start = 0
    think, answer, end = "", text, 0
    is_closed = True
    if start is not None:
        stop = text.find(closing, start)
        is_closed = stop >= 0
        end = stop + len(closing) if is_closed else len(text)
        think, answer = text[start : stop if is_closed else end], text[end:]
    tokens = {"think": -1, "answer": -1, "prefill": 0}
    if tokenizer is not None:
        tokens["think"] = len(tokenizer(text[:end], add_special_tokens=False).input_ids)
        tokens["answer"] = len(tokenizer(text[end:], add_special_tokens=False).input_ids)
    state = _state(think, answer, is_closed, finish, has_loop(text, _LOOP_CHARACTERS))
    return Split(think.strip(), answer.strip(), tokens, state)


def has_loop(units: Sequence[int] | str, least: int = _LOOP_TOKENS) -> bool:
    """Return True if token ids, or the characters of a text, end in at least three repeats of one period.

    The repeats must cover ``least`` units together. The last repeat may be cut anywhere, since every phase of a period is
    one.
    """
    for period in range(1, len(units) // _REPEATS + 1):
        length = max(_REPEATS * period, least)
        if length <= len(units) and units[-length:-period] == units[period - length :]:
            return True
    return False


def _state(think: str, answer: str, is_closed: bool, finish: Finish, loops: bool) -> str:
    """Return the state of an answer.

    Only text that was cut is unfinished or loops: more tokens could have brought an answer. A model that ended its text
    inside the reasoning gave none: that is "empty".
    """
    has_answer = bool(answer.strip())
    if finish == "length":
        if loops:
            return "looped"
        return "cut" if has_answer else "unfinished"
    if not is_closed or not has_answer:
        return "empty"
    return "finished" if think.strip() else "no-think"


@dataclass(frozen=True)
class _Place:
    """A place in a response: this many characters after the beginning of this token."""

    token: int
    characters: int


@dataclass(frozen=True)
class _Tag:
    """A tag in a response: the text before it, the place after it, and the number of tokens up to its end."""

    before: str
    after: _Place
    end: int


@dataclass(frozen=True)
class _Response:
    """The ids of a response, without the stop token."""

    chat: ChatFormat
    ids: list[int]

    def text(self, start: _Place) -> str:
        """Return the text from a place on, without special tokens."""
        return _decode(self.chat, self.ids[start.token :])[start.characters :]

    def find(self, tag: str, start: _Place) -> _Tag | None:
        """Return the first tag from a place on, or None."""
        tag_id = self.chat.tokenizer.added_tokens_encoder.get(tag)
        if tag_id is not None:
            if tag_id not in self.ids[start.token :]:
                return None
            i = self.ids.index(tag_id, start.token)
            before = _decode(self.chat, self.ids[start.token : i])[start.characters :]
            return _Tag(before, _Place(i + 1, 0), i + 1)
        text = self.text(_Place(start.token, 0))
        at = text.find(tag, start.characters)
        if at < 0:
            return None
        # The tag ends in the last token of the shortest beginning that has it.
        ends = range(start.token, len(self.ids) + 1)
        end = ends[bisect_left(ends, True, key=lambda end: self._has_tag(tag, start, end))]
        return _Tag(text[start.characters : at], _Place(start.token, at + len(tag)), end)

    def _has_tag(self, tag: str, start: _Place, end: int) -> bool:
        return tag in _decode(self.chat, self.ids[start.token : end])[start.characters :]


def _decode(chat: ChatFormat, ids: Sequence[int], special: bool = False) -> str:
    # The backend's text: transformers' may leave out spaces before punctuation.
    return chat.tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=not special)
