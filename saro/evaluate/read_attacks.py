"""Reads attacks from YAML files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from saro.data.chain import split_steps
from saro.data.chat_format import Prefill
from saro.data.jsonl import fault, parse_text, read_objects, shown, type_name
from saro.data.messages import Message, parse_messages
from saro.data.records import read_pairs
from saro.data.yaml_files import read_yaml
from saro.errors import nearest
from saro.evaluate.attacks import NO_ATTACK, PLACEHOLDER, Attack
from saro.evaluate.rewrites import INVERSES, REWRITES, check_inverse
from saro.evaluate.suite import EXPECTATIONS, check_name

KINDS = ("rewrite", "system", "turns", "prefill")
# Forms of pairs whose rejected side ends well too, only later or longer (``saro.synth``): nothing to recover from.
_ENDS_WELL = ("earlier", "shorter")
_FOLDER = Path(__file__).parent / "attack_files"
_COMMON_FIELDS = ("id", "kind", "expect", "control", "source", "licence")
_FIELDS = {
    "rewrite": ("template", "builtin", "list", "inverse"),
    "system": ("template",),
    "turns": ("turns",),
    "prefill": ("think", "answer", "steps", "pairs"),
}


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


def _load_yaml(file: Path) -> list[Any]:
    entries = read_yaml(file)
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


def _parse_template(value: Any, name: str, where: str) -> str:
    text = parse_text(value, name, where)
    if not PLACEHOLDER.search(text):
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
    # Every point of a curve is over the same chains: otherwise it would compare short chains with long ones.
    long_enough = {prompt: chain for prompt, chain in chains.items() if len(chain) >= max(steps)}
    if not long_enough:
        longest = max(map(len, chains.values()), default=0)
        fault(where, f"steps has {max(steps)}, and no rejected chain of {file} has more than {longest}", "lower it")
    return [replace(attack, id=f"{attack.id}-{step}", step=step, chains=long_enough) for step in steps]


def read_chains(file: Path) -> dict[tuple[Message, ...], tuple[str, ...]]:
    """Return the longest rejected chain on each prompt, as its steps with the white space behind them.

    Chains that end well are left out. So is the last step of an open side, which is cut anywhere.
    """
    chains: dict[tuple[Message, ...], tuple[str, ...]] = {}
    for pair in read_pairs(file):
        side = pair.rejected
        if side.reasoning is None or isinstance(pair.prompt, str) or pair.form in _ENDS_WELL:
            continue
        steps = split_steps(side.reasoning)
        chain = tuple(side.reasoning[step.start : step.stop] for step in steps)
        chain = chain[:-1] if side.is_reasoning_open else chain
        chains[pair.prompt] = max(chains.get(pair.prompt, ()), chain, key=len)
    return {prompt: chain for prompt, chain in chains.items() if chain}
