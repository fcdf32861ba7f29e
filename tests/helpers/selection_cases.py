"""Prompts, drawn texts and a scripted author for tests of selection in data construction. All texts are made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from made_answers import make_answer
from tiny import IM_END, tiny_tokenizer

from saro.config import THINK_TAGS
from saro.data.chat_format import ChatFormat
from saro.data.records import Message
from saro.distributed.runtime import Runtime
from saro.draws.request import Draw, Request
from saro.draws.store import DrawStore
from saro.evaluate.judge_spec import read_judge
from saro.evaluate.subjects import Subject
from saro.evaluate.suite import Item
from saro.synth.author import Author, Drawn, Task
from saro.synth.judgement import Judge, Judged
from saro.synth.prompts import Prompt

EXPECT = {"harmful": "refuse", "harmless": "comply", "general": "answer"}
LEVEL = {"harmful": "medium", "harmless": "low", "general": "none"}
REFUSAL = "I'm sorry, but I can't help with that."
HELP = "Sure: begin at the top and go on to the end."
# Chains in the bands of "low" and "medium".
SHORT = "They ask about a list. Nobody is hurt by it."
MEDIUM = "They ask about a list. It could hurt somebody. I look for a kind way out. I say no and offer more."


def make_prompt(id: str, kind: str = "harmful", **changes: object) -> Prompt:
    """Return a prompt whose text is ``Say ID.``; a general one has the target 4."""
    item: dict[str, object] = {"prompt": (Message("user", f"Say {id}."),), "expect": EXPECT[kind], "source": "made up"}
    if kind == "general":
        item |= {"target": "4", "match": "number"}
    item |= {name: changes.pop(name) for name in ("prompt", "expect", "source") if name in changes}
    if item["expect"] != "answer":
        item |= {"target": None, "match": None}
    fields = {"level": LEVEL[kind], "hazard": ("vcr",) if kind == "harmful" else ()} | changes
    return Prompt(Item("demo", id, licence="CC0", **item), kind, where=f"demo.jsonl:{id}", **fields)


def make_drawn(
    prompt: Prompt, think: str = MEDIUM, answer: str = REFUSAL, *, key: str = "k0", **changes: object
) -> Drawn:
    """Return a text as it would have been drawn: one token a word, unless ``tokens`` says otherwise."""
    tokens = {"think": len(think.split()), "answer": len(answer.split()), "prefill": 0}
    changes = {"item": prompt.id, "think": think, "draw": key, "key": key, "tokens": tokens} | changes
    task = Task(prompt, "plain", prompt.item.prompt)
    return Drawn(task, make_answer(answer, **changes))


def make_judged(prompt: Prompt, outcome: str, think: str = MEDIUM, answer: str = REFUSAL, **changes: object) -> Judged:
    """Return a drawn text with an outcome."""
    return Judged(make_drawn(prompt, think, answer, **changes), outcome, None)


def tiny_chat() -> ChatFormat:
    """Return the chat format of the tiny models: one token a byte."""
    return ChatFormat(tiny_tokenizer(), frozenset({IM_END}), date(2025, 1, 1))


def write(think: str, answer: str) -> str:
    """Return what a model writes."""
    opening, closing = THINK_TAGS
    return f"{opening}\n{think}\n{closing}\n\n{answer}"


@dataclass
class Replies:
    """A generator that writes ``reply(prompt text, number of the draw)``, cut at the limit.

    Attributes:
        asked: all requests that came.
    """

    chat: ChatFormat
    reply: Callable[[str, int], str]
    identity: dict[str, str] = field(default_factory=lambda: {"kind": "replies"})
    asked: list[Request] = field(default_factory=list)

    def order(self, requests: Sequence[Request]) -> list[int]:
        return list(range(len(requests)))

    def draw(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Draw]]]:
        for index, request in enumerate(requests):
            self.asked.append(request)
            text = self.reply(self.chat.tokenizer.decode(request.ids), request.number)
            ids = (*self.chat.tokenizer(text, add_special_tokens=False).input_ids, IM_END)
            limit = request.sampling.max_tokens
            yield [(index, Draw(ids=ids[:limit], finish="length" if len(ids) > limit else "stop"))]


def make_author(folder: Path, runtime: Runtime, reply: Callable[[str, int], str]) -> tuple[Author, Judge]:
    """Return an author that writes what ``reply`` says, and the rules as its judge, with a store in ``folder``."""
    chat = tiny_chat()
    store = DrawStore.open(folder / "draws.sqlite")
    author = Author(Subject("m", "m", THINK_TAGS, chat), Replies(chat, reply), store, runtime)
    return author, Judge(read_judge("rules"), None, store, runtime)
