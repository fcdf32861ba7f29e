"""Requests, a scripted generator and a scripted server for tests of draws."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import httpx2

from saro.data.records import Message
from saro.draws.endpoint import EndpointGenerator, EndpointOptions
from saro.draws.request import Draw, Generator, Request, Sampling

KEY = "sk-secret-0123456789abcdef"
URL = "https://llm.example.org"


def chat_request(text: str = "Count to 3.", number: int = 0, **sampling: Any) -> Request:
    return Request(Sampling(**{"max_tokens": 16} | sampling), messages=(Message("user", text),), number=number)


class Scripted(Generator):
    """A generator that answers with each prompt's text, in groups, and keeps what it was asked for.

    Attributes:
        asked: the requests of each call of ``draw``.
    """

    identity: ClassVar[dict[str, str]] = {"kind": "scripted", "model": "m"}

    def __init__(self, answer: Callable[[Request], Draw] | None = None, group: int = 3) -> None:
        self.answer = answer or (lambda request: Draw(text=f"to {name_of(request)}", finish="stop"))
        self.group = group
        self.asked: list[list[Request]] = []

    def draw(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Draw]]]:
        self.asked.append(list(requests))
        for start in range(0, len(requests), self.group):
            part = range(start, min(start + self.group, len(requests)))
            yield [(index, self.answer(requests[index])) for index in part]


def name_of(request: Request) -> str:
    return request.messages[0].content


def chat_reply(text: str | None = "1 2 3", finish: str | None = "stop", **message: Any) -> dict[str, Any]:
    """Return what a chat endpoint answers."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "tiny",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text} | message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
    }


class Server:
    """A scripted server: gives its replies one after the other, the last one for ever.

    A reply is a status and a value (JSON, or bytes as they are), perhaps with headers; a JSON value alone, with status
    200; or an exception.

    Attributes:
        requests: (method, path, body) of each request that came.
        headers: headers of each request that came.
        waits: seconds that the generator waited between tries.
    """

    def __init__(self, *replies: Any) -> None:
        self.replies = list(replies)
        self.requests: list[tuple[str, str, Any]] = []
        self.headers: list[httpx2.Headers] = []
        self.waits: list[float] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content) if request.content else None
        self.requests.append((request.method, request.url.path, body))
        self.headers.append(request.headers)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if callable(reply):
            reply = reply(body)
        if isinstance(reply, Exception):
            raise reply
        if not isinstance(reply, tuple):
            reply = (200, reply)
        status, value, headers = (*reply, {})[:3]
        if isinstance(value, bytes):
            return httpx2.Response(status, content=value, headers=headers)
        return httpx2.Response(status, json=value, headers=headers)

    def generator(self, clock: Callable[[], float] = lambda: 0.0, **options: Any) -> EndpointGenerator:
        """Return a generator that asks this server and does not wait."""

        async def wait(seconds: float) -> None:
            self.waits.append(seconds)

        options = EndpointOptions(**{"url": URL, "model": "tiny"} | options)
        return EndpointGenerator(options, transport=httpx2.MockTransport(self), sleep=wait, clock=clock)


def draw_all(generator: Generator, *requests: Request) -> list[Draw]:
    """Return the draws in the order of the requests."""
    draws = dict(pair for group in generator.draw(requests) for pair in group)
    return [draws[index] for index in range(len(requests))]
