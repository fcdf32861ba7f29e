"""Asks a model for replies of a strict form: what cannot be read is asked for once more, and after that there is none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from saro.data.records import Message
from saro.draws.request import Draw, Request, Sampling
from saro.errors import SaroError
from saro.evaluate.judge_model import JudgeModel

Reply = TypeVar("Reply")

# A greedy reply would be the same again, so the second one is drawn.
_SECOND = {"temperature": 0.7, "top_p": 0.95}


@dataclass(frozen=True)
class Strict:
    """One question.

    Attributes:
        messages: what the model is asked.
        max_tokens: longest reply, in tokens.
    """

    messages: tuple[Message, ...]
    max_tokens: int


def ask_strictly(
    model: JudgeModel,
    questions: Mapping[str, Strict],
    parse: Callable[[str, str], Reply | None],
    draw_all: Callable[[Sequence[Request]], Sequence[Draw | None]],
) -> dict[str, Reply | None]:
    """Return what the reply to each question says, by the question's key; None without a valid reply in two tries.

    Args:
        parse: (key, text of the reply) -> what it says; None if it cannot be read.
        draw_all: draws all requests and returns their draws in order; None for one that is not drawn, which is no reply.

    Raises SaroError like ``draw_all``. No reply raises an error.
    """
    replies: dict[str, Reply | None] = dict.fromkeys(questions)
    for number in (0, 1):
        requests: dict[str, Request] = {}
        for key, question in questions.items():
            if replies[key] is None and (request := _make_request(model, question, number)) is not None:
                requests[key] = request
        if requests:
            for key, draw in zip(requests, draw_all([*requests.values()]), strict=True):
                replies[key] = None if draw is None else parse(key, _read_text(model, draw))
    return replies


def read_objects_of(reply: str) -> list[dict[str, Any]] | None:
    """Return the JSON objects in a reply, one a line; None if anything else is in it. Never raises.

    Only the model's own reasoning may come before them, and empty lines and a fence be around them.
    """
    lines = [line.strip() for line in reply.rpartition("</think>")[2].strip().splitlines()]
    if lines and lines[0] in ("```", "```json", "```jsonl") and lines[-1] == "```":
        lines = lines[1:-1]
    objects = []
    for line in filter(None, lines):
        try:
            content = json.loads(line, object_pairs_hook=_make_object)
        except (ValueError, RecursionError):
            return None
        if not isinstance(content, dict):
            return None
        objects.append(content)
    return objects


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | None:
    """Return a JSON object as a dict; None if a key is there twice, of which json would drop one."""
    content = dict(pairs)
    return content if len(content) == len(pairs) else None


def _make_request(model: JudgeModel, question: Strict, number: int) -> Request | None:
    """Return the request for a reply; None if the model's chat template refuses it."""
    sampling = Sampling(question.max_tokens, **(_SECOND if number else {}))
    if model.chat is None:
        return Request(sampling, messages=question.messages, number=number)
    try:
        return Request(sampling, ids=tuple(model.chat.prompt_ids(question.messages)), number=number)
    except SaroError:
        return None


def _read_text(model: JudgeModel, draw: Draw) -> str:
    """Return the text of a reply; empty for a failure, or if it was cut."""
    if draw.failure is not None or draw.finish == "length":
        return ""
    if draw.text is not None:
        return draw.text
    chat = model.chat
    return chat.tokenizer.decode([i for i in draw.ids or () if i not in chat.stop_ids], skip_special_tokens=False)
