"""Defines what is asked of a generator and what comes back: requests, draws, failures, and their keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from saro.data.records import Message

# Why a generator gave no text: the server refused the request, the prompt was too long, the connection or the server
# failed, the reply was not what the API promises, or the text is empty.
FAILURES = ("refused", "length", "http", "parse", "empty")
# Failures that another try would only repeat. All others are drawn again when the draw is next asked for.
FINAL_FAILURES = ("refused", "length")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and when a text ends.

    Attributes:
        max_tokens: longest text, in tokens.
        temperature: 0 takes the likeliest token each time.
        top_p: draw from the likeliest tokens that have this probability together; 1 draws from all.
        top_k: draw from this many likeliest tokens; 0 draws from all.
        stop: texts that end generation. Token ids that end it belong to the model.
        choices: texts of which one is wanted: their probabilities as the next token are returned, and nothing is drawn.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One text to generate.

    Exactly one of ``ids``, ``messages`` and ``text`` is given. A local model takes ids. A server takes messages at its
    chat endpoint, and ids or text, as they are, at its completions endpoint.

    Attributes:
        sampling: how tokens are drawn.
        ids: token ids of the prompt, with the beginning of the answer if the model is to continue one.
        messages: the conversation to answer.
        text: the prompt after the chat template.
        number: number of the draw, from 0: several draws of one prompt differ in it.
    """

    sampling: Sampling
    ids: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    number: int = 0

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.ids, self.messages, self.text)) != 1:
            raise ValueError("give a request either ids, messages or text")

    def key(self, model: Mapping[str, Any]) -> str:
        """Return the key of this request's draw from a model: 64 hex digits.

        It is the sha256 of the canonical JSON of both, so it changes with everything that decides the text, and with
        nothing else.

        Args:
            model: ``Generator.identity``.
        """
        # vars: asdict would copy each id of a long prompt.
        content = {"model": model, **vars(self)}
        text = json.dumps(content, default=asdict, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Draw:
    """One generated text, or the reason why there is none.

    Attributes:
        ids: the new token ids, with the stop id if one ended the text; None from a server that gives text only.
        text: the text, without special tokens; None from a local model, whose ids are decoded where they are used.
        finish: "stop" if the model ended the text, "length" if it was cut at ``max_tokens``; None for a failure.
        failure: one of ``FAILURES``, or None.
        detail: for a failure, one line for people, such as the server's status. Never the prompt, never a key.
        choices: log-prob of each of ``Sampling.choices`` as the next token, nats; empty without choices.
        usage: numbers of tokens, {"prompt": …, "completion": …}, as far as they are known.
        seconds: time that it took. For texts that were drawn together, their share by tokens.
        versions: versions of what drew it, such as {"torch": …} or {"server": …}.
    """

    ids: tuple[int, ...] | None = None
    text: str | None = None
    finish: Literal["stop", "length"] | None = None
    failure: str | None = None
    detail: str = ""
    choices: tuple[float, ...] = ()
    usage: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Number of new tokens; 0 if a server did not count them."""
        return len(self.ids) if self.ids is not None else self.usage.get("completion", 0)


class Generator(Protocol):
    """Makes draws: a model on this machine, or a server."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Plain JSON that distinguishes this model, and how it computes, from all others."""

    def order(self, requests: Sequence[Request]) -> list[int]:
        """Return the indices of the requests in the order in which they are to be drawn.

        ``draw`` gets those that are missing, in this order. By default the order is that of the requests.
        """
        return list(range(len(requests)))

    def draw(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Draw]]]:
        """Yield groups of (index of the request, its draw) until every request has one, each group when it is ready.

        What is yielded is stored at once, and a group is stored whole or not at all. A local model's greedy draws
        depend on which requests share a batch, if only by rounding: its groups are therefore those batches, cut from the
        requests in the order in which they come, which does not depend on which of them are missing.
        """
