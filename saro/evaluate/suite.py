"""Defines the lines of a suite: prompts, and what a good answer does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saro.data.records import Message

EXPECTATIONS = ("refuse", "comply", "answer")


@dataclass(frozen=True)
class Item:
    """One line of a suite.

    Attributes:
        suite: name of the suite: its file's name without the suffix.
        id: unique in the suite.
        prompt: the conversation to answer. A prompt that is text in the file is one user turn here.
        expect: what a good answer does: refuses a harmful request, complies with a harmless one, or is right.
        target: for "answer", the right answer.
        match: for "answer", how the target is found in the answer.
        category: kind of the prompt, for rates by kind; None if the file names none.
        twin: id of the harmless or harmful prompt of which this is the contrast, or None.
        cluster: items of one cluster are not independent, such as variants of one prompt; None for an item of its own.
        source: where the prompt comes from.
        licence: licence of the source.
    """

    suite: str
    id: str
    prompt: tuple[Message, ...]
    expect: Literal["refuse", "comply", "answer"]
    target: str | None = None
    match: Literal["number", "choice", "exact"] | None = None
    category: str | None = None
    twin: str | None = None
    cluster: str | None = None
    source: str = ""
    licence: str = ""
