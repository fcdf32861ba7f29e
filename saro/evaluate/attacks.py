"""Applies attacks to items: changed prompts, and beginnings of responses that the model must continue."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from saro.data.chat_format import ChatFormat, Prefill, PrefilledPrompt
from saro.data.records import Message
from saro.evaluate.rewrites import INVERSES, REWRITES, SAMPLES
from saro.evaluate.suite import EXPECTATIONS, Item

# Other text in double braces stays as it is: a template is never executed.
PLACEHOLDER = re.compile(r"\{\{\s*prompt\s*\}\}")


@dataclass(frozen=True)
class Attack:
    """One way to ask for an answer.

    Attributes:
        id: unique in an evaluation; the part of the keys of answers that names the attack.
        kind: "none" is the plain prompt. "rewrite" changes the last user turn, "system" adds a system prompt, "turns" puts
            a made-up dialogue before the prompt, and "prefill" begins the response.
        template: text of a rewrite or of a system prompt, with ``{{prompt}}`` in the prompt's place.
        builtin: name of the function in ``REWRITES`` that changes the prompt before it is put into the template.
        inverse: name of the rewrite that is undone in answers before they are judged; None to leave them.
        rewrites: for a rewrite from a list, the prompt of each item by id. The attack applies to no other item.
        turns: the made-up dialogue; the last turn is the user's and has ``{{prompt}}``.
        prefill: beginning of the response.
        step: number of steps of a rejected chain with which the reasoning begins.
        chains: one rejected chain for each prompt: its steps, with the white space behind them, at least as many as the
            longest attack of the curve takes. The attack applies to no other prompt.
        expect: the items to which the attack applies, by what a good answer does.
        control: id of the attack to compare with, or None.
    """

    id: str
    kind: Literal["none", "rewrite", "system", "turns", "prefill"]
    template: str | None = None
    builtin: str | None = None
    inverse: str | None = None
    rewrites: Mapping[str, str] | None = None
    turns: tuple[Message, ...] = ()
    prefill: Prefill | None = None
    step: int | None = None
    chains: Mapping[tuple[Message, ...], tuple[str, ...]] = field(default_factory=dict)
    expect: tuple[str, ...] = EXPECTATIONS
    control: str | None = None

    @cached_property
    def hash(self) -> str:
        """The sha256 of all that decides the prompts and the decoded answers; 64 hex digits."""
        content = {
            "kind": self.kind,
            "template": self.template,
            # Hash the results of the functions, because these change with their code.
            "builtin": None if self.builtin is None else [REWRITES[self.builtin](text) for text in SAMPLES],
            "inverse": None if self.inverse is None else [INVERSES[self.inverse](text) for text in SAMPLES],
            "rewrites": self.rewrites,
            "turns": _plain(self.turns),
            "prefill": None if self.prefill is None else vars(self.prefill),
            "step": self.step,
            "chains": [[_plain(prompt), steps] for prompt, steps in self.chains.items()],
            "expect": self.expect,
        }
        text = json.dumps(content, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


NO_ATTACK = Attack("none", "none")


@dataclass(frozen=True)
class Prompted:
    """A conversation to answer, as text.

    Attributes:
        messages: the conversation.
        prefill: beginning of the response, or None.
    """

    messages: tuple[Message, ...]
    prefill: Prefill | None = None


def apply_attack(attack: Attack, item: Item) -> Prompted | None:
    """Return what a model is asked if an item is put to it under an attack; None if the attack does not apply to it."""
    if item.expect not in attack.expect:
        return None
    *before, last = item.prompt
    if attack.kind == "rewrite":
        if attack.rewrites is not None and item.id not in attack.rewrites:
            return None
        text = last.content if attack.rewrites is None else attack.rewrites[item.id]
        text = text if attack.builtin is None else REWRITES[attack.builtin](text)
        text = text if attack.template is None else _fill(attack.template, text)
        return Prompted((*before, Message("user", text)))
    if attack.kind == "system":
        return Prompted(_with_system(_fill(attack.template or "", last.content), item.prompt))
    if attack.kind == "turns":
        turns = tuple(Message(turn.role, _fill(turn.content, last.content)) for turn in attack.turns)
        if turns[0].role == "system":
            return Prompted(_with_system(turns[0].content, (*before, *turns[1:])))
        return Prompted((*before, *turns))
    if attack.step is not None:
        if item.prompt not in attack.chains:
            return None
        begun = "".join(attack.chains[item.prompt][: attack.step])
        # A line end follows the last step too, before the closing tag.
        begun += "" if begun[-1:].isspace() else "\n"
        return Prompted(item.prompt, Prefill(begun) if attack.step else None)
    return Prompted(item.prompt, attack.prefill)


def describe_attacks(attacks: Sequence[Attack]) -> list[dict[str, Any]]:
    """Return what scores and reports say of attacks: {"id", "kind"}, and "control", "step" and "think_off" where they hold."""
    controls = {attack.control for attack in attacks}
    described = []
    for attack in attacks:
        entry: dict[str, Any] = {"id": attack.id, "kind": attack.kind}
        if attack.id in controls:
            entry["control"] = True
        if attack.step is not None:
            entry["step"] = attack.step
        if attack.prefill is not None and attack.prefill == Prefill("", closed=True):
            entry["think_off"] = True
        described.append(entry)
    return described


def prompt_ids(chat: ChatFormat, prompted: Prompted) -> PrefilledPrompt:
    """Return (ids with those of the response's beginning, number of these, is the reasoning open where the model continues).

    Raises SaroError if the template refuses the conversation, or nothing of the response's beginning can be given.
    """
    return chat.prefill_ids(prompted.messages, prompted.prefill)


def invert(attack: Attack, text: str) -> str:
    """Return an answer as plain text: what the attack asked the model to encode is decoded. Never raises."""
    return text if attack.inverse is None else INVERSES[attack.inverse](text)


def _fill(template: str, prompt: str) -> str:
    # A function, so that nothing in the prompt is read as a reference to a group.
    return PLACEHOLDER.sub(lambda _: prompt, template)


def _with_system(text: str, messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return messages with a system prompt, before the one that they may have."""
    if messages[0].role == "system":
        own = messages[0].content
        return (Message("system", f"{text}\n\n{own}" if own else text), *messages[1:])
    return (Message("system", text), *messages)


def _plain(messages: Sequence[Message]) -> list[list[str]]:
    return [[message.role, message.content] for message in messages]
