"""Prompts, a subject and a generator that knows how its texts go on, for tests of chains and process pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from saro.data.chat_format import ChatFormat
from saro.data.records import Message
from saro.draws.request import Draw, Generator, Request, Sampling
from saro.evaluate.subjects import Subject
from saro.evaluate.suite import Item
from saro.synth.prompts import Prompt

EXPECT = {"harmful": "refuse", "harmless": "comply", "general": "answer"}
LEVEL = {"harmful": "high", "harmless": "low", "general": "none"}


def synth_prompt(id: str, kind: str = "harmful", text: str | None = None) -> Prompt:
    """Return a prompt whose text says its id, unless another is given."""
    item = Item(
        "made",
        id,
        (Message("user", text or f"Request {id}"),),
        EXPECT[kind],
        target="42" if kind == "general" else None,
        match="number" if kind == "general" else None,
        source="made up",
        licence="CC0-1.0",
    )
    hazard = ("ncr",) if kind == "harmful" else ()
    return Prompt(item, kind, LEVEL[kind], hazard, "made.jsonl:1")


def subject_of(chat: ChatFormat) -> Subject:
    return Subject("model", "model", chat.think_tags, chat)


class Speaker(Generator):
    """Says ``reply(prompt, begun, number)``: the user's last turn, what the response begins with, and the draw's number.

    The reply is what follows the beginning. It ends with the stop token, or is cut at the limit.

    Attributes:
        asked: the requests of each call of ``draw``.
    """

    identity: ClassVar[dict[str, str]] = {"kind": "speaker"}

    def __init__(self, chat: ChatFormat, reply: Callable[[str, str, int], str]) -> None:
        self.chat = chat
        self.reply = reply
        self.asked: list[list[Request]] = []

    def draw(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Draw]]]:
        self.asked.append(list(requests))
        # The last first: callers must go by the index.
        for i in reversed(range(len(requests))):
            yield [(i, self._draw(requests[i]))]

    def _draw(self, request: Request) -> Draw:
        text = self.chat.tokenizer.decode(request.ids)
        before, _, begun = text.rpartition("<|im_start|>assistant\n")
        user = before.rpartition("<|im_start|>user\n")[2].removesuffix("<|im_end|>\n")
        ids = self.chat.tokenizer.encode(self.reply(user, begun, request.number), add_special_tokens=False)
        ids.append(min(self.chat.stop_ids))
        limit = request.sampling.max_tokens
        return Draw(ids=tuple(ids[:limit]), finish="length" if len(ids) > limit else "stop")


SAMPLING = Sampling(2000, 1.0)
