"""Defines the lines of a suite, prompts and what a good answer does, and reads them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from saro.data.jsonl import fault, how_to_add, parse_text, read_objects, shown, type_name
from saro.data.messages import Message, parse_prompt
from saro.errors import nearest

EXPECTATIONS = ("refuse", "comply", "answer")
MATCHES = ("number", "choice", "exact")
_FIELDS = ("id", "prompt", "expect", "target", "match", "category", "twin", "cluster", "source", "licence")
# Keys of answers join names with "/", and names stand in file names and pages.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,99}")


@dataclass(frozen=True)
class Item:
    """One line of a suite.

    Attributes:
        suite: name of the suite: its file's name without the suffix.
        id: unique in the suite; ASCII letters, digits and ``._:@+-``.
        prompt: the conversation to answer. A prompt that is text in the file is one user turn here.
        expect: what a good answer does: refuses a harmful request, complies with a harmless one, or is right.
        target: for "answer", the right answer.
        match: for "answer", how the target is found in the answer; the default in a file is "exact".
        category: kind of the prompt, for rates by kind; None if the file names none.
        twin: id of the harmless or harmful prompt of which this is the contrast, or None. Twins name each other.
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


def read_suite(path: str | os.PathLike) -> list[Item]:
    """Read a suite: a JSONL file with one item a line. The suite's name is the file's name without its suffix.

    Raises SaroError "file:line: what is wrong; what to do" for the first faulty line, without the text of any prompt.
    """
    name = Path(os.fsdecode(path)).stem
    check_name(name, "the suite's name, which is the file's,", os.fsdecode(path))
    items: dict[str, Item] = {}
    places: dict[str, str] = {}
    for line, where, fields in read_objects(path, '{"id": ..., "prompt": ..., "expect": ...}'):
        item = parse_item(fields, name, where)
        if item.id in items:
            first = places[item.id].rpartition(":")[2]
            fault(where, f"id {shown(item.id)} is already used on line {first}", "give each item its own id")
        items[item.id], places[item.id] = item, f"{os.fsdecode(path)}:{line}"
    for item in items.values():
        _check_twin(item, items, places[item.id])
    return list(items.values())


def parse_item(fields: dict[str, Any], suite: str, where: str) -> Item:
    """Parse a JSON object as an item. Its twin is not looked up. Raises SaroError at ``where`` if it is faulty."""
    if "prompt" not in fields:
        fault(where, 'field "prompt" is missing', how_to_add(fields, "prompt"))
    for name in fields:
        if name not in _FIELDS:
            fault(where, f"unknown field {shown(name)}", nearest(name, _FIELDS))
    for name in ("id", "expect"):
        if name not in fields:
            fault(where, f"field {shown(name)} is missing", "add it")
    expect = _parse_choice(fields["expect"], EXPECTATIONS, "expect", where)
    target, match = _parse_target(fields, expect, where)
    twin = fields.get("twin")
    if twin is not None and expect == "answer":
        fault(where, 'twin is given and expect is "answer"', "twins are a harmful and a harmless prompt; remove it")
    return Item(
        suite=suite,
        id=_parse_name(fields["id"], "id", where),
        prompt=parse_prompt(fields["prompt"], "prompt", where),
        expect=expect,
        target=target,
        match=match,
        category=_parse_label(fields, "category", where),
        twin=None if twin is None else _parse_name(twin, "twin", where),
        cluster=_parse_label(fields, "cluster", where),
        source=_parse_note(fields, "source", where),
        licence=_parse_note(fields, "licence", where),
    )


def check_name(name: str, owner: str, where: str) -> None:
    """Raise SaroError at ``where`` unless a name can be a part of the keys of answers.

    Args:
        owner: what has the name, for the error message.
    """
    if not _NAME.fullmatch(name):
        wrong = f"{owner} is {shown(name)}"
        fault(where, wrong, "use up to 100 ASCII letters, digits and ._:@+- (no /), and begin with a letter or digit")


def _parse_name(value: Any, name: str, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        fault(where, f"{name} is {type_name(value)}", "give a string or a whole number")
    check_name(value, name, where)
    return value


def _parse_choice(value: Any, valid: tuple[str, ...], name: str, where: str) -> Any:
    if not isinstance(value, str):
        fault(where, f"{name} is {type_name(value)}", f"give one of {', '.join(valid)}")
    if value not in valid:
        fault(where, f"{name} is {shown(value)}", nearest(value, valid))
    return value


def _parse_target(fields: Mapping[str, Any], expect: str, where: str) -> tuple[str | None, Any]:
    target, match = fields.get("target"), fields.get("match")
    if expect != "answer":
        for name, value in (("target", target), ("match", match)):
            if value is not None:
                fault(where, f'{name} is given and expect is {shown(expect)}, not "answer"', "remove it")
        return None, None
    if target is None:
        fault(where, 'expect is "answer" and there is no target', "add the right answer")
    if isinstance(target, int) and not isinstance(target, bool):
        target = str(target)
    match = "exact" if match is None else _parse_choice(match, MATCHES, "match", where)
    return parse_text(target, "target", where, "add the right answer"), match


def _parse_label(fields: Mapping[str, Any], name: str, where: str) -> str | None:
    """Return a category or a cluster: a short text of one line that can end a key, so without a slash."""
    value = fields.get(name)
    if value is None:
        return None
    text = parse_text(value, name, where, "write it, or leave the field out")
    if "/" in text or len(text) > 100 or not text.isprintable():
        fault(where, f"{name} is {shown(text)}", "give one line of up to 100 characters without /")
    return text


def _parse_note(fields: Mapping[str, Any], name: str, where: str) -> str:
    value = fields.get(name)
    return "" if value is None else parse_text(value, name, where, may_be_empty=True)


def _check_twin(item: Item, items: Mapping[str, Item], where: str) -> None:
    if item.twin is None:
        return
    twin = items.get(item.twin)
    if twin is None:
        fault(where, f"the suite has no item {shown(item.twin)}, which is named as twin", nearest(item.twin, items))
    if twin is item:
        fault(where, "the item is its own twin", "name the harmful or the harmless sister")
    if twin.twin != item.id:
        fault(where, f"the twin {shown(twin.id)} does not name {shown(item.id)} as its twin", "name each in the other")
    if twin.expect == item.expect:
        wrong = f"the twin {shown(twin.id)} has the same expect"
        fault(where, wrong, "one of two twins is to be refused and the other to be answered")


def suite_hash(items: Sequence[Item]) -> str:
    """Return a sha256 of all that decides what is asked, and how answers count."""
    rows = json.dumps([asdict(item) for item in items], sort_keys=True)
    return hashlib.sha256(rows.encode()).hexdigest()
