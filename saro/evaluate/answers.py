"""Defines the files of an evaluation's folder: items, answers and verdicts, one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from saro.files import atomic_write

# States of an answer:
#   finished    the reasoning was closed, an answer followed and the model ended it
#   no-think    the same without any reasoning
#   cut         an answer had begun and was cut at the limit: it is judged, and its length is only known to be longer
#   unfinished  the reasoning was not closed: there is no answer
#   looped      as cut or unfinished, and the text ends in a repetition
#   empty       the model ended without an answer
#   failed      the generator gave no text; ``failure`` says why
STATES = ("finished", "no-think", "cut", "unfinished", "looped", "empty", "failed")

RowType = TypeVar("RowType", "Answer", "Verdict")


@dataclass(frozen=True)
class Answer:
    """One line of answers.jsonl: what one model answered to one item under one attack.

    Attributes:
        key: "model/suite/attack/item/number"; verdicts and scores name answers by it.
        model, suite, attack, item: names of these; the attack is "none" for the plain prompt.
        number: number of the draw, from 0.
        draw: key of the draw in the store.
        think: text of the reasoning, without its tags; with what was prefilled.
        answer: text after the reasoning, after the attack's inverse; with what was prefilled.
        tokens: {"think", "answer", "prefill"}: tokens drawn by the model in each part, and tokens that were prefilled.
        state: one of ``STATES``.
        failure: why there is no text, for state "failed".
        seconds: time that the draw took.
    """

    key: str
    model: str
    suite: str
    attack: str
    item: str
    number: int
    draw: str
    think: str
    answer: str
    tokens: Mapping[str, int]
    state: str
    failure: str | None = None
    seconds: float = 0.0

    @property
    def has_answer(self) -> bool:
        """True if there is a text to judge, of which the model wrote at least a part."""
        return bool(self.answer.strip()) and self.state != "empty"


@dataclass(frozen=True)
class Verdict:
    """One line of verdicts.jsonl: what one judge says of one answer.

    Attributes:
        answer: key of the answer.
        judge: name of the judge.
        judge_hash: sha256 of all that decides its verdicts.
        harmful: probability, 0 to 1, that the answer does what a harmful request asks; None if the judge does not say.
        refuses: does the answer refuse the request; None if the judge does not say.
        accepts: does a gate accept the text; None for other judges.
        why: short reason, such as the pattern that matched; may be empty.
        raw: the judge's reply as it came.
        abstained: why there is no verdict, such as "parse"; None if there is one.
    """

    answer: str
    judge: str
    judge_hash: str
    harmful: float | None = None
    refuses: Literal["full", "partial", "none"] | None = None
    accepts: bool | None = None
    why: str = ""
    raw: str = ""
    abstained: str | None = None


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write dataclass instances as JSONL, readable only by their owner. The file appears complete or not at all."""
    with atomic_write(path) as file:
        os.chmod(file.name, 0o600)
        for row in rows:
            file.write(json.dumps(asdict(row), ensure_ascii=False, sort_keys=True) + "\n")


def read_rows(path: Path, row_type: type[RowType]) -> Iterator[RowType]:
    """Yield the rows of a file that ``write_rows`` wrote."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield row_type(**json.loads(line))
