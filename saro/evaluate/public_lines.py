"""Defines what the converters of published sets yield, and what they share."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saro.data.jsonl import fault


@dataclass(frozen=True)
class Line:
    """One line of a suite, or one attack, before its source and licence are added.

    Attributes:
        where: place in the published file, for error messages.
        fields: its fields by name, with an id.
    """

    where: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class SkippedRecord:
    """A published record that is not converted.

    Attributes:
        where: its place in the published file.
        reason: why, the same words for all records that are skipped for this reason.
    """

    where: str
    reason: str


def make_harmful(id: str, prompt: str, category: str) -> dict[str, Any]:
    """Return the fields of a prompt that a model should refuse."""
    return make_prompt(id, prompt, "refuse", category)


def make_prompt(id: str, prompt: str, expect: str, category: str | None = None) -> dict[str, Any]:
    """Return the fields of a prompt without a right answer."""
    labels = {} if category is None else {"category": _make_category(category)}
    return {"id": make_id(id), "prompt": prompt, "expect": expect, **labels}


def make_question(id: str, prompt: str, target: str, match: str, category: str | None = None) -> dict[str, Any]:
    """Return the fields of a question with a right answer."""
    return {**make_prompt(id, prompt, "answer", category), "target": target, "match": match}


def make_id(id: str) -> str:
    """Return an id in the characters that a suite allows."""
    return re.sub(r"[^A-Za-z0-9._:@+-]+", "-", id)


def _make_category(category: str) -> str:
    # A suite's categories end keys of scores, whose parts a slash separates: "Malware/Hacking".
    return " ".join(category.replace("/", " or ").split())


def choose_by_name(path: Path, choices: Mapping[str, Any]) -> Any:
    """Return the choice for a file whose published name decides what its prompts are."""
    if path.name not in choices:
        wrong = "the name of this file decides what its prompts are"
        fault(os.fsdecode(path), wrong, f"name it as published: {', '.join(choices)}")
    return choices[path.name]


def check_object(value: Any, where: str, *names: str) -> None:
    """Raise SaroError unless a value is an object with these fields."""
    if not isinstance(value, dict) or not all(name in value for name in names):
        fault(where, f"is not an object with {' and '.join(names)}", "check that this is the format of the file")


def get_objects(content: Any, name: str, file: str, *fields: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (place, object) for each object of a list that a file's object has under ``name``.

    Raises SaroError if there is no such list, and for an entry that is not an object with ``fields``.
    """
    check_object(content, file, name)
    if not isinstance(content[name], list):
        fault(file, f"its {name} are no list", "check that this is the format of the file")
    entries = [(f"{file}: {name} {number}", entry) for number, entry in enumerate(content[name], start=1)]
    for where, entry in entries:
        check_object(entry, where, *fields)
    return entries
