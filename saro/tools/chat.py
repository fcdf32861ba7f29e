"""`saro chat`: a conversation with a run's model in the terminal, and with its base model if asked for."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Literal

import torch
from rich.console import Console
from tokenizers.decoders import DecodeStream
from transformers.generation.streamers import BaseStreamer

from saro.config import DataConfig, check_at_least
from saro.data.chat_format import ChatFormat
from saro.data.records import Message
from saro.errors import nearest
from saro.model.architectures import most_positions
from saro.model.generate import generate
from saro.model.policy import Policy
from saro.program import shown
from saro.runs.finished import FinishedRun, this_device

_COMMANDS = ("/reset", "/exit")


@dataclass(frozen=True)
class Options:
    """Options of `saro chat`.

    Attributes:
        run: Folder of a finished run.
        compare: With base, the model before training answers first; each model keeps its own history.
        max_tokens: Longest answer in tokens, including its reasoning.
        temperature: 0 takes the likeliest token each time; above 0 tokens are drawn at random.
        data: How the conversation becomes tokens.
    """

    run: str
    compare: Literal["base"] | None = None
    max_tokens: int = 2048
    temperature: float = 0.0
    data: DataConfig = field(default_factory=DataConfig, metadata=shown("think_tags"))

    def __post_init__(self) -> None:
        check_at_least(self, "--", 1, "max_tokens")
        check_at_least(self, "--", 0, "temperature")


def run(options: Options, console: Console) -> int:
    """Talk to the model of a run; its reasoning is dimmed.

    Answers the lines of stdin until they end.

    Raises:
        SaroError: there is no finished run, its base is not the one it was trained on, or the chat template refuses a
            conversation.
    """
    finished = FinishedRun.open(options.run)
    chat_format = finished.chat_format(options.data.think_tags)
    converse(load_speakers(finished, options.compare), chat_format, options, read_stdin(console), console)
    return 0


class ThinkSplitter:
    """Splits text, piece by piece, into reasoning (with its tags) and answer.

    Args:
        tags: opening and closing tag.
        thinking: the text begins inside the reasoning, because the template has opened it.
    """

    def __init__(self, tags: tuple[str, str], thinking: bool) -> None:
        self._tags = tags
        self._thinking = thinking
        self._held = ""

    def feed(self, text: str) -> list[tuple[str, bool]]:
        """Return the pieces that are certain by now as (text, is reasoning); hold back the beginning of a tag."""
        pieces: list[tuple[str, bool]] = []
        self._held += text
        while (at := self._held.find(self._next_tag)) >= 0:
            tag_end = at + len(self._next_tag)
            pieces += [(self._held[:at], self._thinking), (self._held[at:tag_end], True)]
            self._held = self._held[tag_end:]
            self._thinking = not self._thinking
        lengths = range(min(len(self._held), len(self._next_tag) - 1), 0, -1)
        certain = len(self._held) - next((n for n in lengths if self._next_tag.startswith(self._held[-n:])), 0)
        pieces.append((self._held[:certain], self._thinking))
        self._held = self._held[certain:]
        return [(piece, thinking) for piece, thinking in pieces if piece]

    def end(self) -> list[tuple[str, bool]]:
        """Return the text that was held back: it was not a tag."""
        held, self._held = self._held, ""
        return [(held, self._thinking)] if held else []

    @property
    def _next_tag(self) -> str:
        return self._tags[1] if self._thinking else self._tags[0]


class _Stream(BaseStreamer):
    """Prints the tokens of ``generate`` as they come, and keeps the answer."""

    def __init__(self, chat: ChatFormat, splitter: ThinkSplitter, console: Console) -> None:
        self._chat = chat
        self._splitter = splitter
        self._console = console
        # Returns complete characters only; one may take several tokens. Keep special tokens: the tags may be among them.
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._prompt_passed = False
        self.answer = ""

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        for token in value.flatten().tolist():
            if token not in self._chat.stop_ids:
                self._show(self._splitter.feed(self._decoder.step(self._chat.tokenizer.backend_tokenizer, token) or ""))

    def end(self) -> None:
        self._show(self._splitter.end())

    def _show(self, pieces: list[tuple[str, bool]]) -> None:
        for piece, thinking in pieces:
            self._console.out(piece, style="dim" if thinking else None, highlight=False, end="")
            self.answer += "" if thinking else piece


@dataclass
class Speaker:
    """One model in a conversation.

    Attributes:
        name: shown before its answers if several models speak.
        policy: the model.
        state: context in which it answers, such as with the adapter disabled.
        history: the turns so far; answers without their reasoning.
    """

    name: str
    policy: Policy
    state: Callable[[], AbstractContextManager] = nullcontext
    history: list[Message] = field(default_factory=list)


def load_speakers(run: FinishedRun, compare: str | None) -> list[Speaker]:
    """Load the trained model and, if ``compare`` asks for it, the base; the base speaks first."""
    policy = run.load(this_device())
    trained = Speaker("trained", policy)
    if compare is None:
        return [trained]
    if run.is_full:
        return [Speaker("base", run.load_base(this_device())), trained]
    return [Speaker("base", policy, policy.model.disable_adapter), trained]


def converse(
    speakers: list[Speaker],
    chat: ChatFormat,
    options: Options,
    read: Callable[[], str | None],
    console: Console,
) -> None:
    """Answer one line after the other.

    Args:
        read: returns the next line, or None at the end.

    Raises:
        SaroError: the chat template refuses the conversation.
    """
    while (line := read()) is not None:
        text = line.strip()
        if text == "/exit":
            return
        if text == "/reset":
            for speaker in speakers:
                speaker.history.clear()
        elif re.fullmatch(r"/\w+", text):
            _note(console, f"unknown command {text}{nearest(text, _COMMANDS)}")
        elif text:
            for speaker in speakers:
                if len(speakers) > 1:
                    console.out(f"{speaker.name}:", style="bold", highlight=False)
                _answer(speaker, chat, options, text, console)


def read_stdin(console: Console) -> Callable[[], str | None]:
    """Return a function that reads a line of stdin; on a terminal with a prompt and line editing."""
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if not (sys.stdin.isatty() and console.is_terminal):
        return lambda: sys.stdin.readline() or None
    with suppress(ImportError):
        import readline  # noqa: F401
    _note(console, f"{_COMMANDS[0]} forgets the conversation, {_COMMANDS[1]} or Ctrl-D ends, Ctrl-C stops an answer")

    def read() -> str | None:
        try:
            return console.input("[bold]> [/bold]")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return None

    return read


def _answer(speaker: Speaker, chat: ChatFormat, options: Options, question: str, console: Console) -> None:
    """Print the answer to a question; append both to the history if there is an answer."""
    turns = [*speaker.history, Message("user", question)]
    prompt = chat.prompt_ids(turns)
    room = (most_positions(speaker.policy.causal_lm.config) or sys.maxsize) - len(prompt)
    if room < 1:
        _note(
            console, f"the conversation is {len(prompt):,} tokens, more than the model reads; {_COMMANDS[0]} forgets it"
        )
        return
    thinking = chat.opens_reasoning(chat.render_prompt(turns))
    stream = _Stream(chat, ThinkSplitter(chat.think_tags, thinking), console)
    try:
        with speaker.state():
            (tokens,) = generate(
                speaker.policy,
                [prompt],
                chat.stop_ids,
                max_tokens=min(options.max_tokens, room),
                temperature=options.temperature,
                streamer=stream,
            )
        ended = tokens[-1] in chat.stop_ids
        cut = "" if ended else f"cut after {len(tokens):,} tokens"
    except KeyboardInterrupt:
        stream.end()
        cut = "stopped"
    console.out("")
    answer = stream.answer.strip()
    if cut:
        _note(console, cut if answer else f"{cut}, before an answer: this turn is forgotten")
    if answer:
        speaker.history = [*turns, Message("assistant", answer)]


def _note(console: Console, text: str) -> None:
    """Print a line that is not the model's."""
    console.out(f"[{text}]", style="dim", highlight=False)
