"""Draws from a server with OpenAI's API: vLLM, SGLang, llama.cpp, `transformers serve`, or a hosted one."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any

import httpx2

from saro.draws.openai_api import (
    THINK_TAGS,
    is_quota_error,
    make_identity,
    parse_reply,
    render_body,
)
from saro.draws.request import FINAL_FAILURES, Draw, Generator, Request
from saro.errors import SaroError

# Statuses that another try may change: timeouts, conflicts, too many requests. So may all from 500.
_RETRIED = (408, 409, 429)
# Longest wait before another try, in seconds: our own, and one that the server asks for.
_LONGEST_BACKOFF, _LONGEST_RETRY_AFTER = 60.0, 300.0
# Seconds to wait for a connection. A server that is there accepts at once, even if it is busy.
_CONNECT_SECONDS = 10.0
# Shorter keys are words such as EMPTY, which are given to servers that want none. They may occur in answers.
_SHORTEST_SECRET = 12


@dataclass(frozen=True)
class EndpointOptions:
    """A server with OpenAI's API.

    Attributes:
        url: Address of the server, with or without /v1. Plain http only to this machine.
        model: Name of the model at the server. Default: the only one that it lists.
        key_env: Environment variable that holds the key. The key is never written anywhere.
        revision: Your label for what the server cannot tell, such as weights, quantization or chat template. Change it
            when they change, and everything is drawn again.
        concurrency: Requests that the server works on at once.
        timeout: Seconds within which a reply must be complete.
        retries: Further tries of a request that the server did not answer, or answered with 408, 409, 429 or 5xx.
        think_tags: Tags in which the reasoning is put if the server returns it apart from the answer.
        extra: Fields that are added to each request, such as {chat_template_kwargs: {enable_thinking: false}}; null
            removes a field.
    """

    url: str = ""
    model: str | None = None
    key_env: str = "SARO_API_KEY"
    revision: str | None = None
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 5
    think_tags: tuple[str, str] = THINK_TAGS
    extra: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.url:
            _parse_url(self.url)
        if self.concurrency < 1:
            raise SaroError(f"concurrency is {self.concurrency}; give at least 1")
        if not self.timeout > 0:
            raise SaroError(f"timeout is {self.timeout:g}; give more than 0 seconds")
        if self.retries < 0:
            raise SaroError(f"retries is {self.retries}; give 0 or more")


@dataclass(frozen=True)
class _Reply:
    """The server's reply after all tries: a status and a body, or the fault that came instead."""

    status: int = 0
    content: bytes = b""
    fault: str = ""

    @property
    def json(self) -> Any:
        """The body's JSON value, None if it has none."""
        try:
            return json.loads(self.content)
        except (ValueError, RecursionError):
            return None


class EndpointGenerator(Generator):
    """Draws from a model at a server.

    What one request meets is a value: a ``Draw`` with a failure. What all requests would meet ends the run with a
    SaroError: a key that the server refuses, a model or an endpoint that it does not have, no server at all.
    """

    def __init__(
        self,
        options: EndpointOptions,
        *,
        transport: Any = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Take the options. The server is asked only if they name no model: which ones does it have?

        Args:
            transport: httpx2 transport in place of the network.
            sleep: waits between tries, seconds.
            clock: seconds since the epoch, for a Retry-After that is a date.

        Raises:
            SaroError: there is no url, or no model is named and the server has none or several.
        """
        if not options.url:
            raise SaroError("the address of the server is missing; give its url")
        self.options = options
        self._url = _parse_url(options.url)
        self._transport, self._sleep, self._clock = transport, sleep, clock
        self._has_answered = False
        self._model = options.model or asyncio.run(self._find_only_model())

    @property
    def identity(self) -> Mapping[str, Any]:
        """The server's host, the model, and what else decides the text."""
        options = self.options
        return make_identity(_host(self._url), self._model, options.revision, options.think_tags, options.extra)

    def order(self, requests: Sequence[Request]) -> list[int]:
        """Return the order of the trie of their prompts: those that begin alike follow each other.

        The prefix caches of vLLM, SGLang and llama.cpp then have what they share, however small they are.
        """
        return sorted(range(len(requests)), key=lambda index: _trie_key(requests[index]))

    def draw(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Draw]]]:
        """Yield groups of (index of the request, its draw), each reply when it has come.

        Raises:
            SaroError: for what would meet all requests, as the class says.
        """
        tasks: dict[asyncio.Task[Draw], int] = {}
        waiting = iter(enumerate(requests))
        identity = self.identity
        with asyncio.Runner() as runner:
            client = self._make_client()
            try:
                while group := runner.run(self._finish_some(client, waiting, tasks, identity)):
                    yield group
            finally:
                runner.run(_end(client, tasks))

    async def _finish_some(
        self,
        client: httpx2.AsyncClient,
        waiting: Iterator[tuple[int, Request]],
        tasks: dict[asyncio.Task[Draw], int],
        identity: Mapping[str, Any],
    ) -> list[tuple[int, Draw]]:
        """Keep ``concurrency`` requests under way until one or more are done; return those. Empty: all are done."""
        for index, request in islice(waiting, self.options.concurrency - len(tasks)):
            tasks[asyncio.create_task(self._draw_one(client, request, identity))] = index
        if not tasks:
            return []
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        # First those that came, so that they are stored before a task's error ends the run.
        came = [task for task in done if task.exception() is None]
        return [(tasks.pop(task), task.result()) for task in came or done]

    async def _draw_one(self, client: httpx2.AsyncClient, request: Request, identity: Mapping[str, Any]) -> Draw:
        path, body = render_body(request, identity)
        started = time.monotonic()
        reply = await self._send(client, "POST", path, body, request)
        seconds = time.monotonic() - started
        if reply.fault:
            return Draw(failure="http", detail=reply.fault, seconds=seconds)
        value = reply.json
        if reply.status == 200 and value is None:
            return Draw(failure="parse", detail="the reply is not JSON", seconds=seconds)
        draw = parse_reply(request, identity, reply.status, value)
        self._check_reply(reply, draw)
        return replace(draw, seconds=seconds)

    async def _send(
        self,
        client: httpx2.AsyncClient,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        request: Request | None = None,
    ) -> _Reply:
        """Send a request until it is answered or the tries are used up. Raises SaroError if no server is there."""
        reply = _Reply(fault="not sent")
        for attempt in range(self.options.retries + 1):
            retry_after = None
            try:
                async with asyncio.timeout(self.options.timeout):
                    response = await client.request(method, path, json=body)
            except (TimeoutError, httpx2.TimeoutException):
                reply = _Reply(fault=f"no reply within {self.options.timeout:g} seconds")
            except (httpx2.TransportError, httpx2.DecodingError) as error:
                reply = _Reply(fault=f"the connection failed ({type(error).__name__})")
                if isinstance(error, httpx2.ConnectError) and attempt == self.options.retries:
                    self._check_has_answered()
            else:
                self._has_answered = True
                reply = _Reply(response.status_code, self._without_key(response.content))
                if not self._is_worth_another_try(reply, request):
                    return reply
                retry_after = response.headers.get("retry-after")
            if attempt < self.options.retries:
                await self._sleep(self._find_delay(attempt, retry_after))
        return reply

    def _is_worth_another_try(self, reply: _Reply, request: Request | None) -> bool:
        if reply.status not in _RETRIED and reply.status < 500:
            return False
        if is_quota_error(reply.json):
            return False
        # Some servers answer a prompt that is too long with 500.
        return request is None or parse_reply(request, self.identity, reply.status, reply.json).failure == "http"

    def _find_delay(self, attempt: int, retry_after: str | None) -> float:
        """Return the seconds to wait before another try: what the server asks for, or twice as long each time."""
        if retry_after is not None and (asked := self._parse_retry_after(retry_after)) is not None:
            return min(max(asked, 0.0), _LONGEST_RETRY_AFTER)
        # Jitter, so that requests which failed together do not come back together.
        return min(2.0**attempt, _LONGEST_BACKOFF) * random.uniform(0.5, 1.0)

    def _parse_retry_after(self, value: str) -> float | None:
        """Return the seconds of a Retry-After header, which holds seconds or a date; None if it is neither."""
        if re.fullmatch(r"\d{1,9}(\.\d*)?", value.strip()):
            return float(value)
        try:
            return parsedate_to_datetime(value).timestamp() - self._clock()
        except (ValueError, TypeError, OverflowError):
            return None

    def _check_reply(self, reply: _Reply, draw: Draw) -> None:
        """Raise SaroError for a reply that all requests would get."""
        status, url = reply.status, self.options.url
        if draw.failure in FINAL_FAILURES:
            return  # A hosted server's filter may answer 403; that is about this prompt.
        if status in (401, 403):
            self._raise_for_key(status)
        if status == 402 or is_quota_error(reply.json):
            raise SaroError(f"{url}: the account has no credit left (HTTP {status}); add some, then start again")
        if status == 404:
            raise SaroError(
                f"{url}: the server has no model {self._model}, or no such endpoint (HTTP 404); "
                "check model and url against its /v1/models"
            )
        if status in (405, 501):
            raise SaroError(f"{url}: the server does not offer this endpoint (HTTP {status}); use another server")
        if 300 <= status < 400:
            raise SaroError(f"{url}: the server is at another address (HTTP {status}); give that one")

    def _raise_for_key(self, status: int) -> None:
        name, url = self.options.key_env, self.options.url
        if self._read_key():
            raise SaroError(f"{url}: the server refuses the key in ${name} (HTTP {status}); check it")
        raise SaroError(f"{url}: the server wants a key (HTTP {status}); put it in the environment variable {name}")

    def _check_has_answered(self) -> None:
        """Raise SaroError if the server has never answered. One that has may be starting again."""
        if not self._has_answered:
            raise SaroError(f"{self.options.url}: no server answers there; start it, or check the url")

    async def _find_only_model(self) -> str:
        models = await self._list_models()
        if len(models) == 1:
            return models[0]
        names = f"{', '.join(models[:12])}{', ...' if len(models) > 12 else ''}" if models else "no model"
        raise SaroError(f"{self.options.url}: the server lists {names}; say which one with model")

    async def _list_models(self) -> list[str]:
        async with self._make_client() as client:
            reply = await self._send(client, "GET", "models")
        if reply.fault:
            raise SaroError(f"{self.options.url}: {reply.fault}; check the server")
        if reply.status in (401, 403):
            self._raise_for_key(reply.status)
        rows = reply.json.get("data") if isinstance(reply.json, dict) else None
        if reply.status != 200 or not isinstance(rows, list):
            raise SaroError(
                f"{self.options.url}: /v1/models gives no list (HTTP {reply.status}); check that the url is an OpenAI API"
            )
        names = [row.get("id") for row in rows if isinstance(row, dict)]
        return [name for name in names if isinstance(name, str) and name]

    def _make_client(self) -> httpx2.AsyncClient:
        """Return a client of the server. Raises SaroError if the server is elsewhere and there is no key."""
        key, is_here = self._read_key(), _is_loopback(self._url.host)
        if not key and not is_here:
            raise SaroError(
                f"{self.options.url}: there is no key; put it in the environment variable {self.options.key_env}"
            )
        return httpx2.AsyncClient(
            base_url=self._url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # ``_send`` limits the whole exchange; a server may think long between two bytes.
            timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx2.Limits(
                max_connections=self.options.concurrency, max_keepalive_connections=self.options.concurrency
            ),
            transport=self._transport,
            # A proxy must not see what is meant for this machine.
            trust_env=not is_here,
        )

    def _read_key(self) -> str:
        """Return the key, empty if there is none. It is read where it is used and kept in no object of ours."""
        key = os.environ.get(self.options.key_env, "").strip()
        if not re.fullmatch(r"[\x21-\x7e]*", key):
            raise SaroError(f"{self.options.key_env} holds characters that no key has; set it to the key alone")
        return key

    def _without_key(self, content: bytes) -> bytes:
        """Return a body without the key: a server may repeat what it was sent."""
        key = self._read_key()
        return content.replace(key.encode(), b"***") if len(key) >= _SHORTEST_SECRET else content


def _trie_key(request: Request) -> tuple[Any, ...]:
    """Return a sort key that begins with the prompt. One kind of prompt has one type, so keys can be compared."""
    messages = tuple((message.role, message.content) for message in request.messages or ())
    return messages, request.text or "", request.ids or (), astuple(request.sampling), request.number


async def _end(client: httpx2.AsyncClient, tasks: Mapping[asyncio.Task[Draw], int]) -> None:
    """Cancel what is under way and close the connections."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.aclose()


def _parse_url(url: str) -> httpx2.URL:
    """Return a server's address with its version, such as https://host/v1/. Raises SaroError."""
    try:
        parsed = httpx2.URL(url.strip())
    except httpx2.InvalidURL as error:
        raise SaroError("url is no address; give one such as http://localhost:8000") from error
    if parsed.userinfo or parsed.query or parsed.fragment:
        # Not shown: it may hold a key.
        raise SaroError("url holds a user, a query or a fragment; give the address alone, and the key by key_env")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise SaroError(f"{url}: is no address of a server; give one such as http://localhost:8000")
    if parsed.scheme == "http" and not _is_loopback(parsed.host):
        raise SaroError(f"{url}: plain http to another machine shows key and texts to the network; use https")
    path = re.sub(r"/(chat/completions|completions|models)$", "", parsed.path.rstrip("/"))
    # As v1, v4 or v1beta anywhere in the path.
    if not re.search(r"/v\d+\w*(/|$)", path):
        path += "/v1"
    return parsed.copy_with(path=f"{path}/")


def _host(url: httpx2.URL) -> str:
    """Return what distinguishes a server: host, port, and a path before /v1. This machine has one name."""
    host = "localhost" if _is_loopback(url.host) else url.host
    port = f":{url.port}" if url.port else ""
    return host + port + url.path.rstrip("/").removesuffix("/v1")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
