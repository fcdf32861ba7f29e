"""Changes what a model is asked: rewritten prompts, system prompts, dialogues, and beginnings of the response.

A file of attacks is a YAML list. Each entry has an ``id`` and a ``kind``, and may have ``expect`` (only items that expect
this), ``control: true`` (it should change nothing), ``source`` and ``licence``:

    rewrite   template: text with {{prompt}}; or builtin: base64 | rot13 | leetspeak; or prompts: JSONL file of
              {"suite", "item", "prompt"}, rewordings of each item that were made elsewhere. inverse: base64 | rot13 if the
              answer comes in that code.
    system    template: the system prompt.
    turns     turns: list of {role, content}; the last one is the user's and holds {{prompt}}.
    prefill   think: beginning of the reasoning; or think: "" with closed: true, no reasoning at all; or answer: beginning
              of the answer; or chains: file of pairs with steps: k, the first k steps of the rejected chain on the item's
              prompt.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from saro.data.chat_format import Prefill
from saro.data.jsonl import decode, fault, open_data, parse_text, read_objects, shown
from saro.data.records import Message, read_pairs
from saro.errors import SaroError, nearest
from saro.evaluate.suite import EXPECTATIONS, Item, check_name

SHIPPED = Path(__file__).with_name("attack_files")
GAP = "{{prompt}}"
_KINDS: dict[str, tuple[str, ...]] = {
    "rewrite": ("template", "builtin", "prompts", "inverse"),
    "system": ("template",),
    "turns": ("turns",),
    "prefill": ("think", "closed", "answer", "chains", "steps"),
}
_COMMON = ("id", "kind", "expect", "control", "source", "licence")
# An inverse is checked on these: letters, digits, signs, line ends, and characters of one to four bytes.
_PROBES = tuple(
    f"{word}{sign} {i}"
    for i, (word, sign) in enumerate(
        (word, sign)
        for word in ("Bread", "zebra", "Crème", "日本", "🙂")
        for sign in ("", ".", "\nnext line", " = 1/2")
    )
)


def _to_base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _from_base64(text: str) -> str:
    return base64.b64decode("".join(text.split()), validate=True).decode()


def _rot13(text: str) -> str:
    return codecs.encode(text, "rot13")


@dataclass(frozen=True)
class Code:
    """A way to write a text in other characters.

    Attributes:
        encode: text -> code.
        decode: code -> text; None if the code cannot be undone. Raises ValueError for what is not in the code.
    """

    encode: Callable[[str], str]
    decode: Callable[[str], str] | None = None


CODES = {
    "base64": Code(_to_base64, _from_base64),
    "rot13": Code(_rot13, _rot13),
    "leetspeak": Code(lambda text: text.translate(str.maketrans("aeiostAEIOST", "431057431057"))),
}


@dataclass(frozen=True)
class Attack:
    """One way to ask.

    Attributes:
        id: its name; part of the keys of answers.
        kind: "none", or one of the kinds of the module's docstring.
        expect: only items that expect this are asked; None for all.
        control: True if it is the harmless counterpart of another attack.
        template, builtin, inverse, think, closed, answer, steps: as in the file.
        turns: the dialogue.
        prompts: "suite/item" -> reworded prompt.
        chains: prompt -> steps of its rejected chain.
    """

    id: str
    kind: Literal["none", "rewrite", "system", "turns", "prefill"]
    expect: str | None = None
    control: bool = False
    template: str | None = None
    builtin: str | None = None
    inverse: str | None = None
    turns: tuple[Message, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    think: str | None = None
    closed: bool = False
    answer: str | None = None
    steps: int | None = None
    chains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """The sha256 of all that decides what is asked."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return what scores say of this attack."""
        described: dict[str, Any] = {"id": self.id, "kind": self.kind}
        if self.control:
            described["control"] = True
        if self.steps is not None:
            described["step"] = self.steps
        return described


NO_ATTACK = Attack("none", "none")


@dataclass(frozen=True)
class Prompted:
    """What a model is asked.

    Attributes:
        messages: the conversation.
        prefill: the beginning of the response that it has to continue; None for none.
    """

    messages: tuple[Message, ...]
    prefill: Prefill | None = None


def apply_attack(attack: Attack, item: Item) -> Prompted | None:
    """Return what a model is asked for an item; None if the attack does not apply to it."""
    if attack.expect not in (None, item.expect):
        return None
    if attack.kind == "prefill":
        prefill = _make_prefill(attack, item)
        return None if prefill is None else Prompted(item.prompt, prefill)
    if attack.kind == "system":
        without = tuple(turn for turn in item.prompt if turn.role != "system")
        return Prompted((Message("system", attack.template), *without))
    *before, last = item.prompt
    if attack.kind == "turns":
        turns = [Message(turn.role, turn.content.replace(GAP, last.content)) for turn in attack.turns]
        return Prompted((*before, *turns))
    if attack.kind == "rewrite":
        text = _rewrite(attack, item, last.content)
        return None if text is None else Prompted((*before, Message(last.role, text)))
    return Prompted(item.prompt)


def invert(attack: Attack, answer: str) -> str:
    """Return an answer after the attack's inverse. An answer that is not in its code is returned as it is."""
    if attack.inverse is None:
        return answer
    try:
        return CODES[attack.inverse].decode(answer)
    except (ValueError, binascii.Error):
        return answer


def _rewrite(attack: Attack, item: Item, text: str) -> str | None:
    if attack.builtin is not None:
        text = CODES[attack.builtin].encode(text)
    if attack.template is not None:
        return attack.template.replace(GAP, text)
    if attack.builtin is not None:
        return text
    return attack.prompts.get(f"{item.suite}/{item.id}")


def _make_prefill(attack: Attack, item: Item) -> Prefill | None:
    if attack.steps is not None:
        chain = attack.chains.get(item.prompt[-1].content)
        if chain is None or len(chain) < attack.steps:
            return None
        return Prefill(reasoning="\n".join(chain[: attack.steps])) if attack.steps else None
    return Prefill(reasoning=attack.think, closed=attack.closed, answer=attack.answer or "")


def read_attacks(names: Sequence[str]) -> list[Attack]:
    """Read files of attacks. A name without a suffix is that of a file that comes with saro.

    Raises:
        SaroError: a file does not exist or an entry is faulty, two have one id, an inverse is none, or a template has no
            place for the prompt.
    """
    attacks: dict[str, Attack] = {NO_ATTACK.id: NO_ATTACK}
    for name in names:
        shipped = {file.stem: file for file in SHIPPED.glob("*.yaml")}
        if Path(name).suffix == "" and name not in shipped:
            raise SaroError(f"--attacks: unknown attacks {shown(name)}{nearest(name, shipped)}")
        for attack in _read_file(str(shipped.get(name, name))):
            if attack.id in attacks:
                raise SaroError(f"{name}: attack {attack.id} is there already; give it another id")
            attacks[attack.id] = attack
    return [attack for attack in attacks.values() if attack != NO_ATTACK]


def _read_file(name: str) -> list[Attack]:
    with open_data(name) as file:
        text = decode(file.read(), name)
    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}" if mark else name
        raise SaroError(f"{place}: is not YAML; fix it there") from error
    if not isinstance(entries, list) or not entries:
        raise SaroError(f"{name}: holds no list of attacks; write one entry for each, - {{id: …, kind: …}}")
    attacks = [_parse_attack(entry, f"{name}: attack {i}", Path(name).parent) for i, entry in enumerate(entries, 1)]
    return [attack for several in attacks for attack in several]


def _parse_attack(entry: Any, where: str, folder: Path) -> list[Attack]:
    """Return the attacks of an entry: one, or one for each number of steps."""
    if not isinstance(entry, dict):
        fault(where, "is not a mapping", "write {id: …, kind: …}")
    for name in ("id", "kind"):
        if name not in entry:
            fault(where, f"{name} is missing", "add it")
    check_name(str(entry["id"]), "the id", where)
    where = f"{where} ({entry['id']})"
    kind = entry["kind"]
    if kind not in _KINDS:
        fault(where, f"unknown kind {shown(str(kind))}", nearest(str(kind), _KINDS))
    for name in entry:
        if name not in (*_COMMON, *_KINDS[kind]):
            fault(where, f"unknown key {shown(str(name))}", nearest(str(name), (*_COMMON, *_KINDS[kind])))
    expect = entry.get("expect")
    if expect is not None and expect not in EXPECTATIONS:
        fault(where, f"unknown expect {shown(str(expect))}", nearest(str(expect), EXPECTATIONS))
    common = {"id": str(entry["id"]), "kind": kind, "expect": expect, "control": entry.get("control") is True}
    parse = {"rewrite": _parse_rewrite, "system": _parse_system, "turns": _parse_turns, "prefill": _parse_prefill}
    return parse[kind](entry, where, folder, common)


def _parse_rewrite(entry: Mapping[str, Any], where: str, folder: Path, common: dict[str, Any]) -> list[Attack]:
    given = [name for name in ("template", "builtin", "prompts") if name in entry]
    if not given or ("prompts" in given and len(given) > 1):
        fault(where, "rewrites nothing, or in two ways", "give template, builtin or both, or prompts")
    template = entry.get("template")
    if template is not None and GAP not in parse_text(template, "template", where):
        fault(where, f"template has no {GAP}", f"write {GAP} where the prompt goes")
    builtin, inverse = entry.get("builtin"), entry.get("inverse")
    for name, code in (("builtin", builtin), ("inverse", inverse)):
        if code is not None and code not in CODES:
            fault(where, f"unknown {name} {shown(str(code))}", nearest(str(code), CODES))
    if inverse is not None:
        _check_inverse(builtin or inverse, inverse, where)
    prompts = _read_prompts(folder / str(entry["prompts"])) if "prompts" in entry else {}
    return [Attack(**common, template=template, builtin=builtin, inverse=inverse, prompts=prompts)]


def _check_inverse(builtin: str, inverse: str, where: str) -> None:
    """Raise SaroError unless the inverse gives back what the rewriting made."""
    undo = CODES[inverse].decode
    for probe in _PROBES:
        try:
            is_undone = undo is not None and undo(CODES[builtin].encode(probe)) == probe
        except (ValueError, binascii.Error):
            is_undone = False
        if not is_undone:
            fault(where, f"inverse {inverse} does not undo {builtin}", "name the one that does, or leave it out")


def _read_prompts(path: Path) -> dict[str, str]:
    prompts = {}
    for _, where, line in read_objects(path):
        suite, item, prompt = (parse_text(line.get(name), name, where) for name in ("suite", "item", "prompt"))
        prompts[f"{suite}/{item}"] = prompt
    return prompts


def _parse_system(entry: Mapping[str, Any], where: str, folder: Path, common: dict[str, Any]) -> list[Attack]:
    return [Attack(**common, template=parse_text(entry.get("template"), "template", where))]


def _parse_turns(entry: Mapping[str, Any], where: str, folder: Path, common: dict[str, Any]) -> list[Attack]:
    turns = entry.get("turns")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        fault(where, "turns is not a list of {role, content}", "write the dialogue")
    messages = []
    for i, turn in enumerate(turns):
        role = ("user", "assistant")[i % 2]
        if turn.get("role") != role:
            fault(where, f"turn {i + 1} is not the {role}'s", "user and assistant take turns; the user begins and ends")
        messages.append(Message(role, parse_text(turn.get("content"), f"turn {i + 1}", where)))
    if len(messages) % 2 == 0 or GAP not in messages[-1].content:
        fault(where, f"the last turn is not the user's with {GAP}", "end with the prompt")
    return [Attack(**common, turns=tuple(messages))]


def _parse_prefill(entry: Mapping[str, Any], where: str, folder: Path, common: dict[str, Any]) -> list[Attack]:
    given = [name for name in ("think", "answer", "chains") if name in entry]
    if len(given) != 1 and set(given) != {"think", "answer"}:
        fault(where, "begins the response in no way, or in several", "give think, answer or chains")
    closed = entry.get("closed", False) is True
    if "chains" in entry:
        return _parse_steps(entry, where, folder, common)
    think, answer = entry.get("think"), entry.get("answer")
    if think is not None:
        think = parse_text(think, "think", where, may_be_empty=closed)
    if answer is not None:
        answer = parse_text(answer, "answer", where)
        if think is not None and not closed:
            fault(where, "an answer follows reasoning that is not closed", "set closed: true")
    if closed and think is None:
        fault(where, "closed is given without think", "give think, which may be empty")
    return [Attack(**common, think=think, closed=closed, answer=answer)]


def _parse_steps(entry: Mapping[str, Any], where: str, folder: Path, common: dict[str, Any]) -> list[Attack]:
    steps = entry.get("steps")
    steps = [steps] if isinstance(steps, int) else steps
    is_valid = isinstance(steps, list) and steps and all(type(step) is int and step >= 0 for step in steps)
    if not is_valid or len(set(steps)) < len(steps):
        fault(where, "steps is not a list of different numbers of steps", "write such as [0, 1, 2, 4]")
    chains = {}
    for pair in read_pairs(str(folder / str(entry["chains"]))):
        text = pair.prompt if isinstance(pair.prompt, str) else pair.prompt[-1].content
        reasoning = pair.rejected.reasoning
        if reasoning:
            chains.setdefault(text, tuple(reasoning.split("\n")))
    if not chains:
        fault(where, "no pair of chains has a rejected chain", "name a file of pairs with reasoning")
    return [Attack(**common | {"id": f"{common['id']}-{step}"}, steps=step, chains=chains) for step in steps]
