"""Draws answers that end at stop strings, for lm-eval. A stop string in the reasoning ends nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from saro.data.chat_format import ChatFormat
from saro.draws.draw_all import draw_missing
from saro.draws.request import Draw, Generator, Request
from saro.draws.store import DrawStore
from saro.evaluate.split import find_parts


@dataclass(frozen=True)
class AnswerRequest:
    """A prompt whose answer is wanted.

    Attributes:
        request: the prompt, as ids, and how to draw; without stop strings.
        stop: texts before which the answer ends.
        may_think: the model is expected to reason before it answers.
    """

    request: Request
    stop: tuple[str, ...] = ()
    may_think: bool = True


@dataclass(frozen=True)
class StoppedAnswer:
    """The answer to a prompt.

    Attributes:
        text: the answer without its reasoning, up to the first stop string; empty unless the state is finished or cut.
        state: "finished"; "cut" at the limit of tokens; "unfinished" if the reasoning was; "failed" without a text.
    """

    text: str
    state: Literal["finished", "cut", "unfinished", "failed"]


def draw_answers(
    generator: Generator, chat: ChatFormat, wanted: Sequence[AnswerRequest], store: DrawStore | None = None
) -> list[StoppedAnswer]:
    """Return the answers to prompts, in order.

    A text that begins as an answer is drawn with the stop strings, so that it takes no longer than it must. If it turns
    out to begin with reasoning, it is drawn again without them. So is, from the start, what is expected to reason.

    Args:
        store: keeps every text as soon as it is drawn, and gives those that it has.

    Raises:
        SaroError: like ``draw_missing``, with a store.
    """
    stops = [() if one.may_think else (*one.stop, chat.think_tags[0]) for one in wanted]
    draws = _draw(store, generator, [_with_stop(one.request, stop) for one, stop in zip(wanted, stops, strict=True)])
    # Reasoning that nobody expected.
    again = [i for i, draw in enumerate(draws) if stops[i] and _has_reasoning(chat, wanted[i].request, draw)]
    for i, draw in zip(again, _draw(store, generator, [wanted[i].request for i in again]), strict=True):
        draws[i] = draw
    return [_read_answer(chat, one, draw) for one, draw in zip(wanted, draws, strict=True)]


def _read_answer(chat: ChatFormat, wanted: AnswerRequest, draw: Draw) -> StoppedAnswer:
    """Return the answer in a drawn text: what follows the reasoning, up to the first stop string."""
    if draw.ids is None:
        return StoppedAnswer("", "failed")
    parts = find_parts(chat, wanted.request.ids, draw.ids)
    if not parts.is_closed:
        return StoppedAnswer("", "unfinished")
    # Without reasoning the text stays as lm-eval's own class gives it, with white space at its beginning.
    text = parts.answer if parts.think is None else parts.answer.lstrip()
    ends = [at for at in map(text.find, filter(None, wanted.stop)) if at >= 0]
    state = "cut" if draw.finish == "length" and not ends else "finished"
    return StoppedAnswer(text[: min(ends, default=len(text))], state)


def _has_reasoning(chat: ChatFormat, request: Request, draw: Draw) -> bool:
    return draw.ids is not None and find_parts(chat, request.ids, draw.ids).think is not None


def _draw(store: DrawStore | None, generator: Generator, requests: Sequence[Request]) -> list[Draw]:
    if store is not None:
        return draw_missing(store, generator, requests)
    draws: dict[int, Draw] = {}
    if requests:
        for group in generator.draw(requests):
            draws.update(group)
    return [draws[i] for i in range(len(requests))]


def _with_stop(request: Request, stop: tuple[str, ...]) -> Request:
    return replace(request, sampling=replace(request.sampling, stop=stop))
