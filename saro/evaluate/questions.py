"""Makes what is asked of a model: suites x attacks x draws, as requests; and answers from what was drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from saro.data.chat_format import ChatFormat, PrefilledPrompt
from saro.draws.request import Draw, Request, Sampling
from saro.errors import SaroError
from saro.evaluate.answers import Answer
from saro.evaluate.attacks import NO_ATTACK, Attack, Prompted, apply_attack, invert, prompt_ids
from saro.evaluate.outcomes import find_units
from saro.evaluate.split import Split, split_answer, split_text
from saro.evaluate.suite import Item

if TYPE_CHECKING:
    # It imports torch, and `saro convert`, which imports this file, needs none.
    from saro.evaluate.subjects import Subject


@dataclass(frozen=True)
class Question:
    """One prompt that a model is asked.

    Attributes:
        item, attack: what is asked, and how it is changed.
        number: number of the draw, from 0.
        prompted: the conversation after the attack, and the beginning of the answer if the attack gives one.
    """

    item: Item
    attack: Attack
    number: int
    prompted: Prompted


@dataclass(frozen=True)
class Asked:
    """A question as one model is asked it.

    Attributes:
        question: the question.
        request: what the generator gets.
        prompt: the ids of the prompt and of what was prefilled; None if the generator gets messages.
    """

    question: Question
    request: Request
    prompt: PrefilledPrompt | None


def choose_items(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """Return at most ``limit`` items in their order, the same ones for the same seed; twins and clusters stay together.

    A smaller limit chooses a part of what a larger one chooses.

    Raises:
        SaroError: the first twins or cluster are more than ``limit`` items.
    """
    if limit is None or limit >= len(items):
        return list(items)
    unit_of = find_units(items)
    units: dict[str, list[str]] = {}
    for name, unit in unit_of.items():
        units.setdefault(unit, []).append(name)
    chosen: set[str] = set()
    for unit in sorted(units, key=lambda unit: hashlib.sha256(f"{seed}/{unit}".encode()).digest()):
        if len(chosen) + len(units[unit]) > limit:
            break
        chosen.update(units[unit])
    if not chosen:
        raise SaroError(
            f"{items[0].suite}: a limit of {limit} has no room for twins or a cluster of it, which stay together; raise it"
        )
    return [item for item in items if f"{item.suite}/{item.id}" in chosen]


def make_questions(
    suites: Iterable[Sequence[Item]], attacks: Sequence[Attack], draws: int, attack_items: int | None, seed: int
) -> list[Question]:
    """Return all questions: every item plainly, and the chosen items under each attack that applies to them."""
    questions = []
    for items in suites:
        attacked = choose_items(items, attack_items, seed)
        for attack in (NO_ATTACK, *attacks):
            for item in items if attack == NO_ATTACK else attacked:
                prompted = apply_attack(attack, item)
                if prompted is not None:
                    questions += [Question(item, attack, number, prompted) for number in range(draws)]
    return questions


def ask(subject: Subject, questions: Sequence[Question], sampling: Sampling) -> list[Asked]:
    """Return the questions as requests of one model.

    Raises:
        SaroError: an attack prefills, and the server's tokenizer is not known; or the chat template refuses a prompt.
    """
    asked = []
    for question in questions:
        prefills = question.prompted.prefill is not None
        if subject.server is None or (prefills and subject.chat is not None):
            prompt = _encode(subject.chat, question)
            asked.append(Asked(question, Request(sampling, ids=prompt.ids, number=question.number), prompt))
        elif prefills:
            raise SaroError(
                f"attack {question.attack.id} begins the answer, and a server's chat endpoint cannot continue one; "
                "give --server.tokenizer, so that token ids go to its completions endpoint"
            )
        else:
            messages = question.prompted.messages
            asked.append(Asked(question, Request(sampling, messages=messages, number=question.number), None))
    return asked


def _encode(chat: ChatFormat, question: Question) -> PrefilledPrompt:
    try:
        return prompt_ids(chat, question.prompted)
    except SaroError as error:
        item = question.item
        raise SaroError(f"{item.suite}: item {item.id} under attack {question.attack.id}: {error}") from error


def read_answer(subject: Subject, asked: Asked, key: str, draw: Draw) -> Answer:
    """Return the answer that a draw holds.

    Args:
        key: key of the draw in the store.
    """
    question = asked.question
    if draw.failure is not None:
        split = Split("", "", {"think": 0, "answer": 0, "prefill": 0}, "failed")
    elif draw.ids is not None:
        split = split_answer(subject.chat, asked.prompt, draw.ids, draw.finish)
    else:
        split = _split_reply(subject, asked, draw)
    item = question.item
    return Answer(
        key=answer_key(subject.name, item, question.attack.id, question.number),
        model=subject.name,
        suite=item.suite,
        attack=question.attack.id,
        item=item.id,
        number=question.number,
        draw=key,
        think=split.think,
        answer=invert(question.attack, split.answer),
        tokens=split.tokens,
        state=split.state,
        failure=draw.failure,
        seconds=draw.seconds,
    )


def _split_reply(subject: Subject, asked: Asked, draw: Draw) -> Split:
    """Split a server's text, after what was prefilled. Tokens are counted by the server, and shared out by characters."""
    opened, begun, prefilled = False, "", 0
    if asked.prompt is not None:
        prefilled = asked.prompt.prefilled
        begun_ids = asked.prompt.ids[len(asked.prompt.ids) - prefilled :]
        begun = subject.chat.tokenizer.backend_tokenizer.decode(list(begun_ids), skip_special_tokens=False)
        opened = subject.chat.opens_reasoning(subject.chat.render_prompt(asked.question.prompted.messages))
    split = split_text(subject.think_tags, opened, begun + draw.text, draw.finish)
    total, reasoning = draw.usage.get("completion"), draw.usage.get("reasoning")
    state = "empty" if not draw.text.strip() and draw.finish == "stop" else split.state
    if total is None:
        return replace(split, state=state)
    if reasoning is None:
        characters = len(split.think) + len(split.answer)
        reasoning = round(total * len(split.think) / characters) if characters else 0
    tokens = {"think": reasoning, "answer": max(total - reasoning, 0), "prefill": prefilled}
    return replace(split, tokens=tokens, state=state)


def answer_key(model: str, item: Item, attack: str, number: int) -> str:
    """Return the key by which verdicts and scores name an answer."""
    return f"{model}/{item.suite}/{attack}/{item.id}/{number}"
