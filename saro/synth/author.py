"""Lets a model write texts for data construction: tasks -> requests -> draws from the store -> texts in parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from saro.data.chat_format import Prefill
from saro.data.records import Message
from saro.distributed.runtime import Runtime
from saro.draws.draw_all import iterate_on_all_ranks
from saro.draws.request import Generator, Sampling
from saro.draws.store import DrawStore
from saro.evaluate.answers import Answer
from saro.evaluate.attacks import Attack, Prompted
from saro.evaluate.questions import Asked, Question, ask, read_answer
from saro.evaluate.subjects import Subject
from saro.synth.prompts import Prompt


@dataclass(frozen=True)
class Task:
    """One text to write for a prompt.

    Attributes:
        prompt: the prompt that data is made from.
        role: what the text is for, such as "guided", "plain", "turn" or "rollout"; ASCII, without a slash.
        messages: the conversation that the model sees, which may hold more than the prompt, such as the policy.
        prefill: beginning of the response that the model is to continue, or None.
        number: number of the draw, from 0.
    """

    prompt: Prompt
    role: str
    messages: tuple[Message, ...]
    prefill: Prefill | None = None
    number: int = 0


@dataclass(frozen=True)
class Drawn:
    """One text that a model wrote. Its ids and its request are in the store, and not here: there may be many texts.

    Attributes:
        task: what was asked.
        answer: the text in parts. ``think`` and ``answer`` begin with what was prefilled, ``answer.key`` and
            ``answer.draw`` are the key of the draw, and ``answer.state`` says how it ended.
    """

    task: Task
    answer: Answer

    @property
    def key(self) -> str:
        """Key of the draw in the store."""
        return self.answer.draw


@dataclass(frozen=True)
class Author:
    """A model that writes, with the store that keeps what it wrote.

    Attributes:
        subject: the model with its chat format.
        generator: draws from it.
        store: keeps the draws.
        runtime: the ranks, which share the work.
        offline: draw nothing: a missing draw is an error.
    """

    subject: Subject
    generator: Generator
    store: DrawStore
    runtime: Runtime
    offline: bool = False

    def ask(self, tasks: Sequence[Task], sampling: Sampling) -> list[Asked]:
        """Return the tasks as requests; nothing is drawn.

        Raises:
            SaroError: the chat template refuses a conversation, or a server has to continue text and its tokenizer is
                not known.
        """
        return ask(self.subject, [_question(task) for task in tasks], sampling)

    def write(self, tasks: Sequence[Task], sampling: Sampling) -> list[Drawn]:
        """Return a text for each task, in order, after drawing those that the store lacks.

        Raises SaroError like ``ask`` and ``iterate_on_all_ranks``.
        """
        asked = self.ask(tasks, sampling)
        requests = [one.request for one in asked]
        draws = iterate_on_all_ranks(self.runtime, self.store, self.generator, requests, offline=self.offline)
        drawn = []
        # One draw after the other: the ids of all would take several times the memory of their texts.
        for task, one, draw in zip(tasks, asked, draws, strict=True):
            key = one.request.key(self.generator.identity)
            # Tasks that ask the same share a draw, and so a verdict.
            answer = replace(read_answer(self.subject, one, key, draw), key=key)
            drawn.append(Drawn(task, answer))
        return drawn


def _question(task: Task) -> Question:
    return Question(task.prompt.item, Attack(task.role, "none"), task.number, Prompted(task.messages, task.prefill))
