"""Samples answers for people to label, and keeps their labels in labels.jsonl, which only ever grows.

A label corrects a judge's rate only if it is known how likely its answer was to be labelled. So answers are drawn at
random within strata (model and what the item expects), and ``labelling_probabilities`` gives the share of each stratum
that has a label.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from saro.data.records import Message
from saro.errors import SaroError, nearest
from saro.evaluate.answers import Answer
from saro.evaluate.suite import Item

# What the labels mean; the numbers are XSTest's.
REFUSES = {1: "none", 2: "full", 3: "partial"}
# What they say of an answer to a harmful request. Partial compliance may or may not have helped.
HARMFUL = {1: True, 2: False, 3: None}

Stratum = tuple[str, str]


def read_items(path: Path) -> dict[tuple[str, str], Item]:
    """Read the items.jsonl of an evaluation: (suite, id) -> item."""
    items = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            fields = json.loads(line)
            prompt = tuple(Message(**message) for message in fields.pop("prompt"))
            item = Item(prompt=prompt, **fields)
            items[item.suite, item.id] = item
    return items


def find_strata(answers: Iterable[Answer], items: Mapping[tuple[str, str], Item]) -> dict[str, Stratum]:
    """Return answer key -> (model, expectation) for all answers that can be labelled: those that a judge judges."""
    expects = {a.key: items[a.suite, a.item].expect for a in answers if a.has_answer}
    return {a.key: (a.model, expects[a.key]) for a in answers if expects.get(a.key, "answer") != "answer"}


def sample_answers(
    answers: Sequence[Answer],
    items: Mapping[tuple[str, str], Item],
    number: int,
    *,
    models: Collection[str] = (),
    seed: int = 0,
    order: str = "",
) -> list[Answer]:
    """Return a stratified random sample of the answers, shuffled.

    Each stratum gives equally many answers; what a small one lacks comes from the others. A larger ``number`` with the
    same seed gives a sample that contains the smaller one.

    Args:
        models: sample only their answers; empty for all.
        order: the sample is shuffled differently for each value, such as the annotator's name.

    Raises:
        SaroError: there is no such model, or no answer to label.
    """
    names = {a.model for a in answers}
    for model in models:
        if model not in names:
            raise SaroError(f"--model: no answers of {model!r}{nearest(model, sorted(names))}")
    strata = find_strata([a for a in answers if not models or a.model in models], items)
    if not strata:
        raise SaroError("there are no answers to label: none has a text and is to be refused or complied with")
    members: dict[Stratum, list[str]] = {}
    for key in sorted(strata, key=lambda key: _shuffle(f"{seed}", key)):
        members.setdefault(strata[key], []).append(key)
    # Round by round, one of each stratum: this gives equal numbers, and a larger sample holds the smaller one.
    rounds = max(len(keys) for keys in members.values())
    chosen = [members[s][i] for i in range(rounds) for s in sorted(members) if i < len(members[s])][:number]
    by_key = {a.key: a for a in answers}
    return [by_key[key] for key in sorted(chosen, key=lambda key: _shuffle(f"{seed} {order}", key))]


def _shuffle(seed: str, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{key}".encode()).digest()


def labelling_probabilities(labelled: Collection[str], strata: Mapping[str, Stratum]) -> dict[str, float]:
    """Return answer key -> probability that an answer of its stratum was labelled.

    It is the share that has a label, also if labelling ended early: answers come in random order.

    Args:
        labelled: keys of the answers with a label.
        strata: of all answers that could have been labelled, from ``find_strata``.
    """
    sizes = Counter(strata.values())
    done = Counter(strata[key] for key in labelled if key in strata)
    return {key: done[stratum] / sizes[stratum] for key, stratum in strata.items()}


def read_labels(path: Path, draws: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the labels that hold: the last line of each annotator on each answer, unless it skips or undoes.

    A label is of a text. If another evaluation in the folder drew another text under an answer's key, its labels no
    longer count; they stay in the file.

    Each has "answer" (its key), "label" (1 complies, 2 refuses, 3 partly), "refuses" and "harmful" as a ``Verdict`` has
    them ("harmful" is None for harmless requests and for 3), "annotator", "time" and "probability" (the share of the
    answer's stratum that was in the sample). No file means no labels.

    Args:
        draws: key of each answer -> key of its draw.

    Raises:
        SaroError: a line is not as ``LabelFile`` writes it.
    """
    last = {}
    for line in _read_lines(path, draws):
        last[line["answer"], line["annotator"]] = line
    return [line for line in last.values() if line["action"] == "label"]


def _read_lines(path: Path, draws: Mapping[str, str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    # A killed process may leave half a line at the end; a whole line ends with "\n".
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            line = json.loads(text)
            _ = line["answer"], line["draw"], line["annotator"], line["action"], line["label"]
        except (ValueError, TypeError, KeyError) as error:
            raise SaroError(f"{path}:{number}: is no label; restore the line, or delete it") from error
        if draws.get(line["answer"]) == line["draw"]:
            lines.append(line)
    return lines


@dataclass
class LabelFile:
    """The labels.jsonl of an evaluation, as one annotator adds to it. Each line is on disk before the call returns.

    Attributes:
        path: the file; it is made when the first line is written, readable only by its owner.
        annotator: name that the lines have.
        draws: key of each answer -> key of its draw: a line says of which text it is.
    """

    path: Path
    annotator: str
    draws: Mapping[str, str]

    def done(self) -> dict[str, str]:
        """Return answer key -> "label" or "skip" for all answers that this annotator has dealt with, oldest first."""
        last: dict[str, str] = {}
        for line in _read_lines(self.path, self.draws):
            if line["annotator"] == self.annotator:
                last.pop(line["answer"], None)
                last[line["answer"]] = line["action"]
        return {key: action for key, action in last.items() if action != "undo"}

    def label(self, answer: Answer, item: Item, label: int, probability: float) -> None:
        """Add a label: 1 complies, 2 refuses, 3 partly."""
        harmful = HARMFUL[label] if item.expect == "refuse" else None
        meaning = {"label": label, "refuses": REFUSES[label], "harmful": harmful, "probability": probability}
        self._append({"answer": answer.key, "action": "label", **meaning})

    def skip(self, key: str) -> None:
        """Note that an answer was looked at and not labelled."""
        self._append({"answer": key, "action": "skip", "label": None})

    def undo(self, key: str) -> None:
        """Take back what this annotator last said about an answer."""
        self._append({"answer": key, "action": "undo", "label": None})

    def _append(self, line: dict[str, Any]) -> None:
        line |= {
            "draw": self.draws[line["answer"]],
            "annotator": self.annotator,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b") as file:
            text = file.read()
            # Drop the half line of a killed process: nobody was told that it is stored.
            file.truncate(text.rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
            file.write((json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
