"""Reads attacks and applies them to items: changed prompts, and beginnings of responses that the model must continue."""

from __future__ import annotations

import base64
import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from saro.data.chat_format import ChatFormat, Prefill, PrefilledPrompt
from saro.data.jsonl import decode, fault, open_data, parse_text, read_objects, shown, type_name
from saro.data.records import Message, parse_messages, read_pairs
from saro.errors import nearest
from saro.evaluate.suite import EXPECTATIONS, Item, check_name

KINDS = ("rewrite", "system", "turns", "prefill")
_FOLDER = Path(__file__).parent / "attack_files"
_COMMON_FIELDS = ("id", "kind", "expect", "control", "source", "licence")
_FIELDS = {
    "rewrite": ("template", "builtin", "list", "inverse"),
    "system": ("template",),
    "turns": ("turns",),
    "prefill": ("think", "answer", "steps", "pairs"),
}
# Other text in double braces stays as it is: a template is never executed.
_PLACEHOLDER = re.compile(r"\{\{\s*prompt\s*\}\}")


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
        chains: the steps of one rejected chain for each prompt. The attack applies to no other prompt.
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
            "builtin": None if self.builtin is None else [REWRITES[self.builtin](text) for text in _SAMPLES],
            "inverse": None if self.inverse is None else [INVERSES[self.inverse](text) for text in _SAMPLES],
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
        steps = attack.chains.get(item.prompt, ())
        if not steps or len(steps) < attack.step:
            return None
        # A line end follows each step, whether another one or the closing tag comes next.
        begun = "".join(f"{step}\n" for step in steps[: attack.step])
        return Prompted(item.prompt, Prefill(begun) if begun else None)
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


def read_attacks(path: str | os.PathLike) -> list[Attack]:
    """Read the attacks of a YAML file, or of a file that comes with the project, such as "prefill" or "rewrites".

    The file is a list of mappings. Other files that it names lie beside it. An entry with ``steps`` gives one attack for
    each number of steps.

    Raises SaroError for the first fault: "file: attack 2: what is wrong; what to do".
    """
    name = os.fsdecode(path)
    file = _FOLDER / f"{name}.yaml"
    if not re.fullmatch(r"[\w-]+", name) or not file.is_file():
        file = Path(name)
        if not file.exists() and not file.suffix:
            fault(name, "is neither a file nor attacks that come with the project", nearest(name, shipped_attacks()))
    entries = _load_yaml(file)
    attacks: dict[str, Attack] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"{file}: attack {number}"
        for attack in _parse_entry(entry, file.parent, where):
            if attack.id in attacks or attack.id == NO_ATTACK.id:
                fault(where, f"id {shown(attack.id)} is already used", "give each attack its own id")
            attacks[attack.id] = attack
    for attack in attacks.values():
        if attack.control is not None and (attack.control == attack.id or attack.control not in attacks):
            wrong = f"control of {shown(attack.id)} is {shown(attack.control)}"
            fault(str(file), wrong, f"name another attack of this file{nearest(attack.control, attacks)}")
    return list(attacks.values())


def shipped_attacks() -> list[str]:
    """Return the names of the files of attacks that come with the project."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


# Rewrites


def _to_leetspeak(text: str) -> str:
    return text.translate(str.maketrans("aeiostAEIOST", "431057431057"))


def _to_base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _to_rot13(text: str) -> str:
    return codecs.encode(text, "rot13")


def _from_base64(text: str) -> str:
    """Decode a text that is base64, or each long run of base64 in it. Plain words around them stay."""
    whole = _decode_base64("".join(text.split()))
    if whole is not None:
        return whole
    return re.sub(r"[A-Za-z0-9+/]{16,}={0,2}", lambda run: _decode_base64(run[0]) or run[0], text)


def _decode_base64(text: str) -> str | None:
    """Return the text that base64 stands for, None if it stands for none. It may be cut at its end."""
    whole_groups = text[: len(text) // 4 * 4]
    try:
        # final=False: the last character may be cut.
        decoded = codecs.getincrementaldecoder("utf-8")().decode(base64.b64decode(whole_groups, validate=True))
    except ValueError:
        return None
    is_text = all(letter.isprintable() or letter.isspace() for letter in decoded)
    return decoded if is_text and (decoded or not text) else None


# Words that tell English from its rot13.
_COMMON = frozenset(
    [
        "the",
        "and",
        "of",
        "to",
        "a",
        "in",
        "is",
        "it",
        "you",
        "that",
        "for",
        "with",
        "as",
        "on",
        "are",
        "this",
        "i",
        "not",
        "can",
        "be",
        "have",
        "or",
        "from",
    ]
)


def _from_rot13(text: str) -> str:
    """Undo rot13, unless the text reads more like English as it is: a model may have answered in plain words."""
    decoded = _to_rot13(text)
    return text if _count_common(text) > _count_common(decoded) else decoded


def _count_common(text: str) -> int:
    return sum(word in _COMMON for word in re.findall(r"[a-z]+", text.lower()))


REWRITES: Mapping[str, Callable[[str], str]] = {
    "base64": _to_base64,
    "rot13": _to_rot13,
    "leetspeak": _to_leetspeak,
}
# Leetspeak has none: its digits may have been digits before.
INVERSES: Mapping[str, Callable[[str], str]] = {"base64": _from_base64, "rot13": _from_rot13}
# An inverse must bring back these.
_SAMPLES = (
    "What is the capital of France?",
    "I can't help with that, but here is what you can do instead.",
    "Yes.",
    "A",
    "No",
    "42",
    "3.14 is less than 22/7",
    "First line\nsecond line\n\nfourth line",
    "\tindented, and a trailing space ",
    "1. Mix the flour\n2. Add the eggs\n3. Bake at 180 °C",
    "Für Elise, à la carte, señor",
    "Привет, как дела?",
    "你好世界",
    "مرحبا",
    "🙂 fine 👍🏽",
    "print('hello, world')  # a comment",
    '{"key": [1, 2, null], "text": "a \\"quoted\\" word"}',
    "UPPER lower MiXeD",
    "the quick brown fox jumps over the lazy dog " * 5,
    "https://example.org/path?query=1&other=2#part",
)


# Parsing


def _fill(template: str, prompt: str) -> str:
    # A function, so that nothing in the prompt is read as a reference to a group.
    return _PLACEHOLDER.sub(lambda _: prompt, template)


def _with_system(text: str, messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return messages with a system prompt, before the one that they may have."""
    if messages[0].role == "system":
        own = messages[0].content
        return (Message("system", f"{text}\n\n{own}" if own else text), *messages[1:])
    return (Message("system", text), *messages)


def _plain(messages: Sequence[Message]) -> list[list[str]]:
    return [[message.role, message.content] for message in messages]


class _StrictLoader(yaml.SafeLoader):
    """Loads YAML, and refuses a mapping with the same key twice, of which PyYAML would drop one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem="a field is given twice", problem_mark=key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def _load_yaml(file: Path) -> list[Any]:
    with open_data(file) as stream:
        text = decode(stream.read(), str(file))
    try:
        entries = yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        fault(f"{file}{line}", f"broken YAML ({error.problem})", "fix it there")
    except (yaml.YAMLError, ValueError, RecursionError):
        fault(str(file), "broken YAML", "check how it was written")
    if not isinstance(entries, list) or not entries:
        fault(str(file), "holds no list of attacks", "begin each attack with a dash: - id: NAME")
    return entries


def _parse_entry(entry: Any, folder: Path, where: str) -> list[Attack]:
    if not isinstance(entry, dict):
        fault(where, f"is {type_name(entry)}", "write an attack as a mapping with id and kind")
    id, kind = entry.get("id"), entry.get("kind")
    if not isinstance(id, str):
        wrong = "has no id" if id is None else f"id is {type_name(id)}"
        fault(where, wrong, "give a string, in quotes if YAML reads it as something else")
    check_name(id, "id", where)
    where = f"{where} ({id})"
    if not isinstance(kind, str) or kind not in KINDS:
        wrong = f"kind is {shown(kind) if isinstance(kind, str) else type_name(kind)}"
        fault(where, wrong, nearest(str(kind), KINDS))
    valid = (*_COMMON_FIELDS, *_FIELDS[kind])
    for name, value in entry.items():
        if name not in valid:
            fault(where, f"unknown field {shown(str(name))} for kind {kind}", nearest(str(name), valid))
        if value is None:
            fault(where, f"{name} is null", "fill it or leave it out")
    for name in ("source", "licence", "control"):
        if name in entry:
            parse_text(entry[name], name, where)
    attack = Attack(id, kind, expect=_parse_expect(entry, where), control=entry.get("control"))
    parse = {"rewrite": _parse_rewrite, "system": _parse_system, "turns": _parse_turns, "prefill": _parse_prefill}
    return parse[kind](attack, entry, folder, where)


def _parse_expect(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    value = entry.get("expect", list(EXPECTATIONS))
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names:
        fault(where, f"expect is {type_name(value)}", f"give one or more of {', '.join(EXPECTATIONS)}")
    for name in names:
        if name not in EXPECTATIONS:
            fault(where, f"expect is {shown(str(name))}", nearest(str(name), EXPECTATIONS))
    return tuple(names)


def _parse_rewrite(attack: Attack, entry: Mapping[str, Any], folder: Path, where: str) -> list[Attack]:
    if not entry.keys() & {"template", "builtin", "list"}:
        fault(where, "a rewrite has neither template nor builtin nor list", "add one")
    builtin, inverse, template = entry.get("builtin"), entry.get("inverse"), None
    if "template" in entry:
        template = _parse_template(entry["template"], "template", where)
    if builtin is not None and builtin not in REWRITES:
        fault(where, f"builtin is {shown(str(builtin))}", nearest(str(builtin), REWRITES))
    if inverse is not None:
        if inverse not in INVERSES:
            fault(where, f"{shown(str(inverse))} has no inverse", nearest(str(inverse), INVERSES))
        check_inverse(REWRITES[builtin or inverse], INVERSES[inverse], f"{where}: inverse {inverse}")
    rewrites = None
    if "list" in entry:
        rewrites = _read_list(folder / parse_text(entry["list"], "list", where))
    return [replace(attack, template=template, builtin=builtin, inverse=inverse, rewrites=rewrites)]


def check_inverse(rewrite: Callable[[str], str], inverse: Callable[[str], str], where: str) -> None:
    """Raise SaroError at ``where`` unless ``inverse`` brings back 20 fixed strings from what ``rewrite`` made of them."""
    failed = sum(inverse(rewrite(text)) != text for text in _SAMPLES)
    if failed:
        wrong = f"does not bring back {failed} of {len(_SAMPLES)} test strings"
        fault(where, wrong, "name the rewrite that it undoes, or leave the inverse out")


def _parse_template(value: Any, name: str, where: str) -> str:
    text = parse_text(value, name, where)
    if not _PLACEHOLDER.search(text):
        fault(where, f"{name} has no {{{{prompt}}}}", "write {{prompt}} where the prompt belongs")
    return text


def _read_list(file: Path) -> dict[str, str]:
    """Read a list of rewritten prompts: one {"id": id of the item, "prompt": text} a line."""
    rewrites: dict[str, str] = {}
    for _, where, fields in read_objects(file):
        for name in fields:
            if name not in ("id", "prompt"):
                fault(where, f"unknown field {shown(name)}", nearest(name, ("id", "prompt")))
        for name in ("id", "prompt"):
            parse_text(fields.get(name), name, where)
        if fields["id"] in rewrites:
            fault(where, f"id {shown(fields['id'])} is already used", "give one prompt for each item")
        rewrites[fields["id"]] = fields["prompt"]
    return rewrites


def _parse_system(attack: Attack, entry: Mapping[str, Any], folder: Path, where: str) -> list[Attack]:
    if "template" not in entry:
        fault(where, "a system attack has no template", "add the text of the system prompt")
    return [replace(attack, template=parse_text(entry["template"], "template", where))]


def _parse_turns(attack: Attack, entry: Mapping[str, Any], folder: Path, where: str) -> list[Attack]:
    if "turns" not in entry:
        fault(where, "has no turns", "add a list of messages, the last one the user's with {{prompt}}")
    turns = tuple(parse_messages(entry["turns"], "turns", where))
    if turns[-1].role != "user":
        fault(where, f"the last of the turns is the {turns[-1].role}'s", "end with the user's, with {{prompt}}")
    if any(turn.role == "system" for turn in turns[1:]):
        fault(where, "a turn after the first is a system turn", "move it to the beginning")
    _parse_template(turns[-1].content, "the last of the turns", where)
    return [replace(attack, turns=turns)]


def _parse_prefill(attack: Attack, entry: Mapping[str, Any], folder: Path, where: str) -> list[Attack]:
    if "steps" in entry or "pairs" in entry:
        return _parse_steps(attack, entry, folder, where)
    if not entry.keys() & {"think", "answer"}:
        fault(where, "a prefill has neither think nor answer nor steps", "add one")
    think = answer = None
    if "think" in entry:
        # Empty reasoning switches thinking off.
        think = parse_text(entry["think"], "think", where, may_be_empty=entry["think"] == "")
    if "answer" in entry:
        answer = parse_text(entry["answer"], "answer", where)
    is_closed = answer is not None or think == ""
    return [replace(attack, prefill=Prefill(think, closed=is_closed, answer=answer or ""))]


def _parse_steps(attack: Attack, entry: Mapping[str, Any], folder: Path, where: str) -> list[Attack]:
    for name in ("steps", "pairs"):
        if name not in entry:
            fault(where, f"has no {name}", "give steps, a list of numbers, and pairs, a file of held-out pairs")
    for name in ("think", "answer"):
        if name in entry:
            fault(where, f"has both steps and {name}", "make two attacks of them")
    steps = entry["steps"]
    are_numbers = isinstance(steps, list) and all(type(step) is int and step >= 0 for step in steps)
    if not are_numbers or not steps or len(set(steps)) < len(steps):
        fault(where, "steps is not a list of different whole numbers from 0", "write for example [0, 1, 2, 4]")
    file = folder / parse_text(entry["pairs"], "pairs", where)
    chains = read_chains(file)
    longest = max(map(len, chains.values()), default=0)
    if max(steps) > longest:
        fault(where, f"steps has {max(steps)}, and no rejected chain of {file} has more than {longest}", "lower it")
    return [replace(attack, id=f"{attack.id}-{step}", step=step, chains=chains) for step in steps]


def read_chains(file: Path) -> dict[tuple[Message, ...], tuple[str, ...]]:
    """Return the steps of the rejected chain of the first pair on each prompt. Pairs without a chain are left out."""
    chains: dict[tuple[Message, ...], tuple[str, ...]] = {}
    for pair in read_pairs(file):
        if pair.rejected.reasoning is not None and not isinstance(pair.prompt, str):
            chains.setdefault(pair.prompt, tuple(pair.rejected.reasoning.split("\n")))
    return chains
