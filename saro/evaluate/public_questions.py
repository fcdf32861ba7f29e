"""Reads published sets of questions that have one right answer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from saro.data.jsonl import fault, parse_text
from saro.data.published import parse_field, read_csv_rows, read_json, read_records
from saro.evaluate.public_lines import Line, SkippedRecord, get_objects, make_question

_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def read_gsm8k_test(path: Path) -> Iterator[Line]:
    """Yield GSM8K's questions: fields question and answer, whose last line is ``#### result``."""
    for number, where, row in read_records(path):
        _, mark, result = parse_field(row, "answer", where).rpartition("\n#### ")
        target = result.strip().replace(",", "")
        if not mark or not _NUMBER.fullmatch(target):
            fault(where, "answer does not end with a line #### and a number", "fix or drop the record")
        question = parse_field(row, "question", where)
        yield Line(where, make_question(f"gsm8k-test-{number:04d}", question, target, "number"))


# Letters that ``match: choice`` knows.
_LETTERS = "ABCDEFGHIJ"
_ASK_LETTER = 'End with the line "Answer: " and the letter of the right choice.'
_ASK_NUMBER = 'End with the line "Answer: " and the number.'
_ASK_WORDS = 'End with the line "Answer: " and the answer itself, nothing else.'


def read_mmlu(path: Path) -> Iterator[Line]:
    """Yield MMLU's questions, from one CSV file per subject or from JSONL, with lettered choices and how to answer.

    The CSV files are those of the published archive, without a header: question, four choices, letter. A folder stands
    for its test files. The JSON form is the hub's: question, choices, answer (number of the choice from 0), subject.
    """
    if path.suffix == ".csv":
        yield from _read_mmlu_csv(path)
        return
    for number, where, row in read_records(path):
        choices, answer = row.get("choices"), row.get("answer")
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(_LETTERS):
            fault(where, f"choices is not a list of 2 to {len(_LETTERS)}", "check that this is the format of the file")
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            fault(where, "answer is not the number of a choice, from 0", "fix or drop the record")
        subject = parse_field(row, "subject", where)
        question = parse_field(row, "question", where)
        yield _make_choice_line(f"mmlu-{number:05d}", where, question, choices, _LETTERS[answer], subject)


def _read_mmlu_csv(path: Path) -> Iterator[Line]:
    subject, _, split = path.stem.rpartition("_")
    if split not in ("test", "val", "dev") or not subject:
        fault(os.fsdecode(path), "the name of this file decides the subject", "name it as published: SUBJECT_test.csv")
    for number, (where, row) in enumerate(read_csv_rows(path), start=1):
        if len(row) != 6 or row[5].strip() not in tuple("ABCD"):
            fault(where, "the row is not question, four choices and the letter of one", "fix or drop the row")
        question, *choices, letter = row
        id = f"mmlu-{subject}-{number:04d}" if split == "test" else f"mmlu-{subject}-{split}-{number:04d}"
        yield _make_choice_line(id, where, parse_text(question, "question", where), choices, letter.strip(), subject)


def _make_choice_line(id: str, where: str, question: str, choices: list[str], letter: str, subject: str) -> Line:
    texts = [parse_text(choice, "a choice", where) for choice in choices]
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, texts, strict=False))
    return Line(where, make_question(id, f"{question}\n\n{listed}\n\n{_ASK_LETTER}", letter, "choice", subject))


def read_bbh(path: Path) -> Iterator[Line | SkippedRecord]:
    """Yield the questions of a task of BIG-Bench Hard, ``{"examples": [{"input", "target"}]}``, with how to answer.

    The answer is a lettered choice, a number, or words.
    """
    name = os.fsdecode(path)
    rows = get_objects(read_json(path), "examples", name, "input", "target")
    for number, (where, row) in enumerate(rows, start=1):
        id, text, target = f"bbh-{path.stem}-{number:03d}", parse_field(row, "input", where), row["target"]
        if letter := re.fullmatch(r"\(([A-Z])\)", parse_text(target, "target", where)):
            match = "choice" if letter[1] in _LETTERS else "exact"
            yield Line(where, make_question(id, f"{text}\n\n{_ASK_LETTER}", letter[1], match, path.stem))
        elif "\n(A) " in text:
            yield SkippedRecord(where, "the target is none of the choices")
        elif _NUMBER.fullmatch(target):
            yield Line(where, make_question(id, f"{text}\n\n{_ASK_NUMBER}", target, "number", path.stem))
        elif re.search(r"\w", target):
            yield Line(where, make_question(id, f"{text}\n\n{_ASK_WORDS}", target, "exact", path.stem))
        else:
            yield SkippedRecord(where, "the target is punctuation, which a match of words does not see")
