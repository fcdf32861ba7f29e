"""`saro chat`: talk to the model of a run in the terminal, its reasoning dimmed, beside its base if asked for."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field

import torch
from rich.console import Console
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from saro.data.chat_format import ChatFormat
from saro.data.records import Message
from saro.errors import nearest
from saro.model.attention import native_attention
from saro.model.policy import Policy
from saro.runs.finished import FinishedRun, this_device
from saro.tool_config import ChatConfig

COMMANDS = ("/reset", "/exit")


class ThinkSplitter:
    """Splits text, as it comes, into reasoning (its tags included) and answer.

    Args:
        tags: opening and closing tag.
        thinking: the text begins inside the reasoning, because the template has opened it.
    """

    def __init__(self, tags: tuple[str, str], thinking: bool) -> None:
        self._tags = tags
        self._thinking = thinking
        self._held = ""

    def feed(self, text: str) -> list[tuple[str, bool]]:
        """What is certain by now: pieces of text, and whether each is reasoning. The beginning of a tag is held back."""
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
        """What was held back: it was no tag after all."""
        held, self._held = self._held, ""
        return [(held, self._thinking)] if held else []

    @property
    def _next_tag(self) -> str:
        return self._tags[1] if self._thinking else self._tags[0]


class _Stream(BaseStreamer):
    """Takes the tokens of ``generate`` as they come, prints them, and keeps the answer."""

    def __init__(self, chat: ChatFormat, splitter: ThinkSplitter, console: Console) -> None:
        self._chat = chat
        self._splitter = splitter
        self._console = console
        # Gives whole characters alone, which may take several tokens. The tags are to be seen, special tokens or not.
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
        name: shown before its answers where there are several.
        policy: the model.
        state: the context in which it answers, such as with the adapter off.
        history: the turns so far; answers without their reasoning.
    """

    name: str
    policy: Policy
    state: Callable[[], AbstractContextManager] = nullcontext
    history: list[Message] = field(default_factory=list)


def chat(folder: str, options: ChatConfig, console: Console) -> None:
    """Answer the lines of stdin with the model of the run in ``folder``, until they end.

    Raises:
        SaroError: there is no finished run, its base is not the trained one, or the chat template refuses a conversation.
    """
    run = FinishedRun.open(folder)
    chat_format = run.chat_format(options.think_tags)
    converse(speakers_of(run, options.compare), chat_format, options, read_stdin(console), console)


def speakers_of(run: FinishedRun, compare: str | None) -> list[Speaker]:
    """The trained model and, before it, the base where ``compare`` asks for it, both loaded."""
    policy = run.load(this_device())
    trained = Speaker("trained", policy)
    if compare is None:
        return [trained]
    if run.full:
        return [Speaker("base", run.load_base(this_device())), trained]
    return [Speaker("base", policy, policy.model.disable_adapter), trained]


def converse(
    speakers: list[Speaker],
    chat: ChatFormat,
    options: ChatConfig,
    read: Callable[[], str | None],
    console: Console,
) -> None:
    """Answer line after line.

    Args:
        read: the next line, or None at the end.

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
            _note(console, f"unknown command {text}{nearest(text, COMMANDS)}")
        elif text:
            for speaker in speakers:
                if len(speakers) > 1:
                    console.out(f"{speaker.name}:", style="bold", highlight=False)
                _answer(speaker, chat, options, text, console)


def read_stdin(console: Console) -> Callable[[], str | None]:
    """Reads lines from stdin, with a prompt and line editing where both ends are a terminal."""
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if not (sys.stdin.isatty() and console.is_terminal):
        return lambda: sys.stdin.readline() or None
    with suppress(ImportError):
        import readline  # noqa: F401
    _note(console, f"{COMMANDS[0]} forgets the conversation, {COMMANDS[1]} or Ctrl-D ends, Ctrl-C stops an answer")

    def read() -> str | None:
        try:
            return console.input("[bold]> [/bold]")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return None

    return read


@torch.no_grad()
def _answer(speaker: Speaker, chat: ChatFormat, options: ChatConfig, question: str, console: Console) -> None:
    """Print the answer to a question; both join the history where there is an answer."""
    turns = [*speaker.history, Message("user", question)]
    prompt = chat.prompt_ids(turns)
    lm = speaker.policy.causal_lm
    room = (getattr(lm.config, "max_position_embeddings", None) or sys.maxsize) - len(prompt)
    if room < 1:
        _note(
            console, f"the conversation is {len(prompt):,} tokens, more than the model reads; {COMMANDS[0]} forgets it"
        )
        return
    thinking = chat.render_prompt(turns).rstrip().endswith(chat.think_tags[0])
    stream = _Stream(chat, ThinkSplitter(chat.think_tags, thinking), console)
    sampling = {"temperature": options.temperature, "top_k": 0, "top_p": 1.0} if options.temperature else {}
    ids = torch.tensor([prompt], device=lm.device)
    try:
        with speaker.state(), native_attention(lm), speaker.policy.precision():
            output = lm.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(
                    max_new_tokens=min(options.max_tokens, room),
                    do_sample=bool(options.temperature),
                    pad_token_id=min(chat.stop_ids),
                    eos_token_id=sorted(chat.stop_ids),
                    **sampling,
                ),
                streamer=stream,
            )
        ended = output[0, -1].item() in chat.stop_ids
        cut = "" if ended else f"cut after {output.shape[1] - len(prompt):,} tokens"
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
    """A line that is not the model's."""
    console.out(f"[{text}]", style="dim", highlight=False)
