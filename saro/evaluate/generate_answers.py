"""Generates answers that end at stop strings. Only the answer ends there: a stop string in the reasoning does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from saro.data.chat_format import ChatFormat
from saro.draws.request import Draw, Generator, Request


@dataclass(frozen=True)
class Question:
    """A prompt whose answer is wanted.

    Attributes:
        request: the prompt, as ids, and how to draw; without stop strings.
        stop: texts before which the answer ends.
        is_open: the prompt ends within the reasoning, which its template has opened.
        may_think: the model is expected to reason before it answers.
    """

    request: Request
    stop: tuple[str, ...] = ()
    is_open: bool = False
    may_think: bool = True


@dataclass(frozen=True)
class StoppedAnswer:
    """The answer to a question.

    Attributes:
        text: the answer without its reasoning, up to the first stop string; empty unless the state is finished or cut.
        state: "finished"; "cut" at the limit of tokens; "unfinished" if the reasoning was; "failed" without a text.
    """

    text: str
    state: Literal["finished", "cut", "unfinished", "failed"]


def generate_answers(generator: Generator, chat: ChatFormat, questions: Sequence[Question]) -> list[StoppedAnswer]:
    """Return the answers to questions.

    A text that begins as an answer is drawn with the stop strings, so that it takes no longer than it must. If it turns
    out to begin with reasoning, it is drawn again without them. So is, from the start, what is expected to reason.
    """
    opening = chat.think_tags[0]
    stops = [() if q.is_open or q.may_think else (*q.stop, opening) for q in questions]
    draws = _draw(generator, [_with_stop(q.request, stop) for q, stop in zip(questions, stops, strict=True)])
    # Reasoning that nobody expected.
    again = [
        i
        for i, draw in enumerate(draws)
        if stops[i] and draw.ids is not None and read_text(chat, draw.ids).lstrip().startswith(opening)
    ]
    for i, draw in zip(again, _draw(generator, [questions[i].request for i in again]), strict=True):
        draws[i] = draw
    return [read_stopped_answer(chat, question, draw) for question, draw in zip(questions, draws, strict=True)]


def read_stopped_answer(chat: ChatFormat, question: Question, draw: Draw) -> StoppedAnswer:
    """Return the answer in a drawn text: what follows the reasoning, up to the first stop string."""
    if draw.ids is None:
        return StoppedAnswer("", "failed")
    opening, closing = chat.think_tags
    text = read_text(chat, draw.ids)
    if question.is_open or text.lstrip().startswith(opening):
        # The first closing tag ends the reasoning; another one belongs to the answer.
        _, is_closed, text = text.partition(closing)
        if not is_closed:
            return StoppedAnswer("", "unfinished")
        text = text.lstrip()
    ends = [at for at in map(text.find, filter(None, question.stop)) if at >= 0]
    state = "cut" if draw.finish == "length" and not ends else "finished"
    return StoppedAnswer(text[: min(ends, default=len(text))], state)


def read_text(chat: ChatFormat, ids: Sequence[int]) -> str:
    """Return the text of drawn ids without special tokens, but with the think tags, which may be special tokens."""
    tokenizer = chat.tokenizer
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {*tokenizer.all_special_ids, *chat.stop_ids}
    tags = {tokenizer.convert_tokens_to_ids(tag) for tag in chat.think_tags} - {tokenizer.unk_token_id}
    return tokenizer.decode([i for i in ids if i not in special - tags], skip_special_tokens=False)


def _draw(generator: Generator, requests: Sequence[Request]) -> list[Draw]:
    draws: dict[int, Draw] = {}
    if requests:
        for group in generator.draw(requests):
            draws.update(group)
    return [draws[i] for i in range(len(requests))]


def _with_stop(request: Request, stop: tuple[str, ...]) -> Request:
    return replace(request, sampling=replace(request.sampling, stop=stop))
