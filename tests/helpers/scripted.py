"""Generators without a server: one that says what a test wrote, and one that asks a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from saro.data.chat_format import ChatFormat
from saro.draws.request import Draw, Request
from saro.model.generate import generate
from saro.model.policy import Policy


class Scripted:
    """Says ``reply(prompt)`` to each prompt, as a model would: up to a stop text, the limit, or its end token.

    Attributes:
        asked: all requests, in the order in which they came.
    """

    def __init__(self, chat: ChatFormat, reply: Callable[[str], str | None], end: bool = True) -> None:
        self.identity = {"kind": "scripted"}
        self.chat = chat
        self.reply = reply
        self.end = end
        self.asked: list[Request] = []

    def order(self, requests: Sequence[Request]) -> list[int]:
        return [*range(len(requests))]

    def draw(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Draw]]]:
        self.asked += requests
        # The last first: callers must go by the index.
        for i in reversed(range(len(requests))):
            yield [(i, self._draw(requests[i]))]

    def _draw(self, request: Request) -> Draw:
        text = self.reply(self.chat.tokenizer.decode(request.ids))
        if text is None:
            return Draw(failure="http", detail="no connection")
        ends = [text.find(stop) + len(stop) for stop in request.sampling.stop if stop in text]
        ids = self.chat.tokenizer.encode(text[: min(ends, default=len(text))], add_special_tokens=False)
        if not ends and self.end:
            ids.append(min(self.chat.stop_ids))
        is_cut = len(ids) > request.sampling.max_tokens
        return Draw(ids=tuple(ids[: request.sampling.max_tokens]), finish="length" if is_cut else "stop")


class FromPolicy:
    """Draws greedy texts from a policy, by ``saro.model.generate``; stop texts do not end them."""

    def __init__(self, policy: Policy, chat: ChatFormat) -> None:
        self.identity = {"kind": "policy"}
        self.policy = policy
        self.chat = chat

    def draw(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Draw]]]:
        for i, request in enumerate(requests):
            (ids,) = generate(self.policy, [request.ids], self.chat.stop_ids, request.sampling.max_tokens)
            yield [(i, Draw(ids=tuple(ids), finish="stop" if ids[-1] in self.chat.stop_ids else "length"))]
