"""Public data sets -> native JSONL records."""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saro.data.jsonl import decode, fault, open_data, parse_json, read_objects, shown
from saro.data.records import parse_example, parse_pair
from saro.errors import SaroError, nearest
from saro.files import atomic_write

Record = dict[str, Any]


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        records: how many were written.
        left_out: places of the records that their format says to leave out.
    """

    records: int
    left_out: tuple[str, ...]


def convert(
    source_format: str, src: str | os.PathLike, dst: str | os.PathLike, *, overwrite: bool = False
) -> Converted:
    """Write the records of a public data set as native JSONL.

    ``src`` is the data set as published: a JSON array or JSONL. ``dst`` appears complete or not at all.
    Formats (``source_format``), and where the fields come from:

    - "star1" (UCSC-VLAA/STAR-1): ``question``, ``response`` = ``<think>…</think>`` and the answer; kind safety.
    - "gsm8k" (openai/grade-school-math): ``question``, ``answer`` = a step a line, then ``#### result``; kind general.
      Calculator annotations (``<<48/2=24>>``) are taken out.
    - "gsm8k-pairs" (made from its example_model_solutions): ``question``, ``correct`` and ``incorrect`` = a step a line,
      then ``A: result``; pairs, kind pp-cot where both begin with the same step, op-cot elsewhere. Treated as gsm8k. A
      solution that is a bare number has no chain to compare (the published set has one): its pair is left out.
    - "stair-sft" (thu-ml/STAIR-SFT): ``prompt``, ``answer`` = steps and output between ``<|Reasoning_step|>`` and
      ``<|Output|>`` markers, ``source``, which tells the kind. A text without markers is an answer without reasoning.

    Raises SaroError for an unknown format, a ``dst`` that exists unless ``overwrite``, no record to write, and for the
    first record that is not as its format says: but for what stands above, nothing is left out.
    """
    if source_format not in FORMATS:
        raise SaroError(f"unknown format {shown(source_format)}{nearest(source_format, FORMATS)}")
    dst = Path(dst)
    if dst.exists():
        if os.path.exists(src) and dst.samefile(src):
            raise SaroError(f"{dst}: is the source itself; write to another file")
        if not overwrite:
            raise SaroError(f"{dst}: exists already; name another file, or ask to overwrite it")
    first: dict[str, str] = {}
    left_out: list[str] = []
    with atomic_write(dst) as file:
        for number, where, source in _source_objects(src):
            record = FORMATS[source_format](source, number, where)
            if record is None:
                left_out.append(where)
                continue
            # Our own reader must accept what is written: it also refuses NUL characters and cut surrogate pairs.
            parse = parse_pair if "chosen" in record else parse_example
            parse(record, where, default_id=record["id"])
            if (other := first.setdefault(record["id"], where)) != where:
                fault(where, f"its id {shown(record['id'])} is that of {other}", "keep one of the two")
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if not first:
            fault(os.fsdecode(src), "none of its records has a chain of steps", "check how it was written")
    return Converted(len(first), tuple(left_out))


def _star1(source: Record, number: int, where: str) -> Record:
    question, response = _field(source, "question", where), _field(source, "response", where)
    if response.count("<think>") != 1 or response.count("</think>") != 1 or not response.startswith("<think>"):
        fault(where, "response is not <think>…</think> and an answer, each tag once", "mend or drop the record")
    reasoning, answer = response.removeprefix("<think>").split("</think>")
    return _native(f"star1-{_star1_id(source, where)}", "safety", question, reasoning.strip(), answer.strip())


def _gsm8k(source: Record, number: int, where: str) -> Record:
    steps, answer = _worked(source, "answer", "####", where)
    return _native(f"gsm8k-{number:06d}", "general", _field(source, "question", where), steps, answer)


def _gsm8k_pair(source: Record, number: int, where: str) -> Record | None:
    question = _field(source, "question", where)
    if any(_BARE_NUMBER.fullmatch(_field(source, name, where)) for name in ("correct", "incorrect")):
        return None
    (chosen, right), (rejected, wrong) = (_worked(source, name, "A:", where) for name in ("correct", "incorrect"))
    return {
        "id": f"gsm8k-pairs-{number:06d}",
        "kind": "pp-cot" if chosen[:1] == rejected[:1] else "op-cot",
        "prompt": question,
        "chosen": {"reasoning": chosen, "answer": right},
        "rejected": {"reasoning": rejected, "answer": wrong},
    }


_BARE_NUMBER = re.compile(r"\s*\$?-?[\d,]+(\.\d+)?\s*")


def _worked(source: Record, name: str, mark: str, where: str) -> tuple[list[str], str]:
    """Steps and answer of a solution of GSM8K: a step a line, then ``mark`` and the result."""
    text, found, result = _field(source, name, where).rpartition(f"\n{mark} ")
    if not found or not result.strip() or "\n" in result.strip():
        fault(where, f"{name} does not end with a line {mark} and the result", "mend or drop the record")
    text = re.sub(r"<<[^<>\n]*>>", "", text)
    if "<<" in text or ">>" in text:
        fault(where, f"{name} has a calculator annotation that does not end", "mend or drop the record")
    return [line.strip() for line in text.split("\n") if line.strip()], f"The answer is {result.strip()}."


_STAIR_STEP = ["<|Reasoning_step|>", "<|/Reasoning_step|>"]
_STAIR_OUTPUT = ["<|Output|>", "<|/Output|>"]
_STAIR_MARK = re.compile("|".join(re.escape(mark) for mark in _STAIR_STEP + _STAIR_OUTPUT))
# Where the set's prompts come from, as its README names them.
_STAIR_KINDS = {"SafeRLHF": "safety", "JailbreakV": "safety", "UltraFeedback": "general"}


def _stair_sft(source: Record, number: int, where: str) -> Record:
    prompt, text = _field(source, "prompt", where), _field(source, "answer", where)
    kind = _stair_kind(_field(source, "source", where), where)
    steps, answer = [], text
    if marks := _STAIR_MARK.findall(text):
        parts = _STAIR_MARK.split(text)
        *steps, answer = parts[1::2]
        if marks != _STAIR_STEP * len(steps) + _STAIR_OUTPUT or any(outside.strip() for outside in parts[0::2]):
            fault(where, "answer is not reasoning steps and then one output, each marked", "mend or drop the record")
    reasoning = [step.strip() for step in steps] or None
    return _native(f"stair-sft-{number:06d}", kind, prompt, reasoning, answer.strip())


def _stair_kind(name: str, where: str) -> str:
    # Hub names of these sets differ in case, owner and suffix: "JailbreakV-28K/JailBreakV-28k".
    kinds = [kind for known, kind in _STAIR_KINDS.items() if known.lower() in name.lower()]
    if not kinds:
        fault(where, f"unknown source {shown(name)}, so the kind cannot be told", nearest(name, _STAIR_KINDS))
    return kinds[0]


FORMATS: dict[str, Callable[[Record, int, str], Record | None]] = {
    "star1": _star1,
    "gsm8k": _gsm8k,
    "gsm8k-pairs": _gsm8k_pair,
    "stair-sft": _stair_sft,
}


def _native(id: str, kind: str, prompt: str, reasoning: str | list[str] | None, answer: str) -> Record:
    return {"id": id, "kind": kind, "prompt": prompt, "reasoning": reasoning, "answer": answer}


def _field(source: Record, name: str, where: str) -> str:
    if name not in source:
        fault(where, f"field {shown(name)} is missing", "check that this is the format of the file")
    if not isinstance(source[name], str) or not source[name].strip():
        fault(where, f"field {shown(name)} is empty or not a text", "mend or drop the record")
    return source[name]


def _star1_id(source: Record, where: str) -> str:
    """The id of a STAR-1 record: digits as text, or a whole number."""
    value = source.get("id")
    if not isinstance(value, str | int) or isinstance(value, bool) or not str(value).strip():
        fault(where, 'field "id" is missing, empty or no whole number', "mend or drop the record")
    return str(value)


def _source_objects(src: str | os.PathLike) -> Iterator[tuple[int, str, Record]]:
    """The objects of a JSON array or a JSONL file: number (from 1), place for error messages, object."""
    name = os.fsdecode(src)
    with open_data(src) as file:
        first = next((raw.strip() for raw in file if raw.strip()), b"").removeprefix(b"\xef\xbb\xbf")
        if not first.startswith(b"["):
            for number, (_, where, value) in enumerate(read_objects(src), start=1):
                yield number, where, value
            return
        file.seek(0)
        records = parse_json(decode(file.read(), name).removeprefix("\ufeff"), name)
    if not records:
        fault(name, "the file has no records", "check how it was written")
    for number, value in enumerate(records, start=1):
        where = f"{name}: record {number}"
        if not isinstance(value, dict):
            fault(where, "is not an object", "check that this is the format of the file")
        yield number, where, value
