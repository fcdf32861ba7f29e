"""Converts public data sets to native JSONL records, and to prompts for data construction."""

import json
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from saro.data.jsonl import fault, shown
from saro.data.published import check_target, parse_field, read_records
from saro.data.records import parse_example, parse_pair
from saro.errors import SaroError, nearest
from saro.evaluate.public_lines import make_id
from saro.files import atomic_write
from saro.synth.answers_only import drop_reasoning
from saro.synth.chat_sets import convert_alpaca, convert_sharegpt
from saro.synth.prompts import parse_prompt_fields

Record = dict[str, Any]


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        records: number of records or prompts written.
        left_out: places ("file:line") of the records that were left out, as ``convert`` describes.
    """

    records: int
    left_out: tuple[str, ...]


def convert(
    source_format: str,
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    overwrite: bool = False,
    without: Collection[str] = (),
) -> Converted:
    """Write the records, or the prompts, of a public data set as native JSONL.

    ``src`` is the data set as published: a JSON array, JSONL, Parquet or a hub data set. ``dst`` appears complete or not at all.
    The formats (``source_format``) and their fields:

    - "star1" (UCSC-VLAA/STAR-1): ``question``, ``response`` = ``<think>…</think>`` and the answer. Kind safety.
    - "gsm8k" (openai/grade-school-math): ``question``, ``answer`` = one step per line, then ``#### result``. Kind
      general. Calculator annotations (``<<48/2=24>>``) are removed.
    - "gsm8k-pairs" (made from its example_model_solutions): ``question``, ``correct`` and ``incorrect`` = one step per
      line, then ``A: result``. Pairs; kind pp-cot if both sides begin with the same step, otherwise op-cot. Annotations
      are removed here too. A solution that is only a number has no chain to compare (the published set has one): its
      pair is left out.
    - "stair-sft" (thu-ml/STAIR-SFT): ``prompt``, ``answer`` = steps and output between ``<|Reasoning_step|>`` and
      ``<|Output|>`` markers, ``source``, which decides the kind. A text without markers is an answer without reasoning.
    - "coconot-pairs" (CoCoNot's preference set, allenai/noncompliance): ``id``, ``prompt``, ``chosen`` = help and ``rejected`` = a
      needless refusal. Pairs of kind op-cot without reasoning.
    - "answers": native examples or pairs, whose reasoning is taken out (``drop_reasoning``).
    - "alpaca" and "sharegpt", the formats of many sets: see ``convert_alpaca`` and ``convert_sharegpt``. Kind general.

    Formats of prompts, which ``read_prompts`` reads; source and licence are written with each:

    - "star1-prompts": harmful prompts. STAR-1's categories become hazards.
    - "coconot-prompts" (the same set as coconot-pairs): harmless prompts. Those without a safety concern are general: they
      only look as if something were missing or impossible.
    - "gsm8k-prompts": general prompts with the result as target.

    Raises SaroError for an unknown format, for a ``dst`` that exists unless ``overwrite``, if there is no record to
    write, and for the first record that does not follow its format. Nothing is left out except as described above.

    Args:
        without: ids of records to leave out too.
    """
    if source_format not in FORMATS:
        raise SaroError(f"unknown format {shown(source_format)}{nearest(source_format, FORMATS)}")
    check_target(src, dst, overwrite)
    first: dict[str, str] = {}
    left_out: list[str] = []
    with atomic_write(dst) as file:
        for number, where, source in read_records(src):
            record = FORMATS[source_format](source, number, where)
            if record is None or record["id"] in without:
                left_out.append(where)
                continue
            # Our reader must accept the record: without markers, a text may be empty, or the two sides may be equal.
            if source_format in PROMPT_FORMATS:
                parse_prompt_fields(record, "converted", where)
            else:
                parse = parse_pair if "chosen" in record else parse_example
                parse(record, where, default_id=record["id"])
            if (other := first.setdefault(record["id"], where)) != where:
                fault(where, f"its id {shown(record['id'])} is already used by {other}", "keep one of the two")
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if not first:
            wrong = f"all of its records are {LEFT_OUT.get(source_format, 'left out')}"
            fault(os.fsdecode(src), wrong, "check how it was written")
    return Converted(len(first), tuple(left_out))


def _convert_star1(source: Record, number: int, where: str) -> Record:
    question, response = parse_field(source, "question", where), parse_field(source, "response", where)
    if response.count("<think>") != 1 or response.count("</think>") != 1 or not response.startswith("<think>"):
        fault(where, "response is not <think>…</think> and an answer, each tag once", "fix or drop the record")
    reasoning, answer = response.removeprefix("<think>").split("</think>")
    id = f"star1-{_parse_star1_id(source, where)}"
    return _make_record(id, "safety", question, reasoning.strip(), answer.strip())


def _convert_gsm8k(source: Record, number: int, where: str) -> Record:
    steps, answer = _split_solution(source, "answer", "####", where)
    return _make_record(f"gsm8k-{number:06d}", "general", parse_field(source, "question", where), steps, answer)


def _convert_gsm8k_pair(source: Record, number: int, where: str) -> Record | None:
    question = parse_field(source, "question", where)
    if any(_BARE_NUMBER.fullmatch(parse_field(source, name, where)) for name in ("correct", "incorrect")):
        return None
    chosen_steps, chosen_answer = _split_solution(source, "correct", "A:", where)
    rejected_steps, rejected_answer = _split_solution(source, "incorrect", "A:", where)
    return {
        "id": f"gsm8k-pairs-{number:06d}",
        "kind": "pp-cot" if chosen_steps[:1] == rejected_steps[:1] else "op-cot",
        "prompt": question,
        "chosen": {"reasoning": chosen_steps, "answer": chosen_answer},
        "rejected": {"reasoning": rejected_steps, "answer": rejected_answer},
    }


_BARE_NUMBER = re.compile(r"\s*\$?-?[\d,]+(\.\d+)?\s*")


def _split_solution(source: Record, name: str, mark: str, where: str) -> tuple[list[str], str]:
    """Split a GSM8K solution (one step per line, then ``mark`` and the result) into its steps and the answer."""
    text, result = _split_result(source, name, mark, where)
    text = re.sub(r"<<[^<>\n]*>>", "", text)
    if "<<" in text or ">>" in text:
        fault(where, f"{name} has a calculator annotation that does not end", "fix or drop the record")
    return [line.strip() for line in text.split("\n") if line.strip()], f"The answer is {result}."


def _split_result(source: Record, name: str, mark: str, where: str) -> tuple[str, str]:
    """Return the text before the last line, and the result in that line, which begins with ``mark``."""
    text, mark_found, result = parse_field(source, name, where).rpartition(f"\n{mark} ")
    if not mark_found or not result.strip() or "\n" in result.strip():
        fault(where, f"{name} does not end with a line {mark} and the result", "fix or drop the record")
    return text, result.strip()


_STAIR_STEP = ["<|Reasoning_step|>", "<|/Reasoning_step|>"]
_STAIR_OUTPUT = ["<|Output|>", "<|/Output|>"]
_STAIR_MARK = re.compile("|".join(re.escape(mark) for mark in _STAIR_STEP + _STAIR_OUTPUT))
# Source of the prompt, as the data set's README names it -> kind.
_STAIR_KINDS = {"SafeRLHF": "safety", "JailbreakV": "safety", "UltraFeedback": "general"}


def _convert_stair_sft(source: Record, number: int, where: str) -> Record:
    prompt, text = parse_field(source, "prompt", where), parse_field(source, "answer", where)
    kind = _parse_stair_kind(parse_field(source, "source", where), where)
    steps, answer = [], text
    if marks := _STAIR_MARK.findall(text):
        parts = _STAIR_MARK.split(text)
        *steps, answer = parts[1::2]
        if marks != _STAIR_STEP * len(steps) + _STAIR_OUTPUT or any(outside.strip() for outside in parts[0::2]):
            fault(where, "answer is not reasoning steps and then one output, each marked", "fix or drop the record")
    reasoning = [step.strip() for step in steps] or None
    return _make_record(f"stair-sft-{number:06d}", kind, prompt, reasoning, answer.strip())


def _parse_stair_kind(name: str, where: str) -> str:
    """Return the kind of a STAIR-SFT record from the name of its source."""
    # Search for each name: hub names of these sets vary in case, owner and suffix ("JailbreakV-28K/JailBreakV-28k").
    kinds = [kind for known, kind in _STAIR_KINDS.items() if known.lower() in name.lower()]
    if not kinds:
        fault(where, f"unknown source {shown(name)}, which decides the kind", nearest(name, _STAIR_KINDS))
    return kinds[0]


_COCONOT = {"source": "allenai/noncompliance", "licence": "MIT"}
_COCONOT_SAFETY = "Requests with safety concerns"
_COCONOT_CATEGORIES = (
    _COCONOT_SAFETY,
    "Incomplete requests",
    "Unsupported requests",
    "Indeterminate requests",
    "Humanizing requests",
)


def _convert_coconot_pair(source: Record, number: int, where: str) -> Record:
    chosen, rejected = (parse_field(source, name, where).strip() for name in ("chosen", "rejected"))
    return {
        "id": make_id(f"coconot-{parse_field(source, 'id', where)}"),
        "kind": "op-cot",
        "prompt": parse_field(source, "prompt", where),
        "chosen": {"reasoning": None, "answer": chosen},
        "rejected": {"reasoning": None, "answer": rejected},
    }


def _convert_coconot_prompt(source: Record, number: int, where: str) -> Record:
    # The preference set is the only one with a chosen answer; CoCoNot's evaluation sets must not be trained on.
    parse_field(source, "chosen", where)
    category = parse_field(source, "category", where)
    if category not in _COCONOT_CATEGORIES:
        fault(
            where, f"unknown category {shown(category)}, which decides the kind", nearest(category, _COCONOT_CATEGORIES)
        )
    return {
        "id": make_id(f"coconot-{parse_field(source, 'id', where)}"),
        "prompt": parse_field(source, "prompt", where),
        "kind": "harmless" if category == _COCONOT_SAFETY else "general",
        **_COCONOT,
    }


# Category of STAR-1 -> the hazards of AILuminate that are nearest to it.
_STAR1_HAZARDS = {
    "Harassment / Hate / Discrimination": "hte",
    "Illicit / Criminal Behavior": "ncr",
    "Intellectual Property": "ipv",
    "Misinformation / Disinformation": "dfm",
    "Privacy / Personal Data": "prv",
    "Self-Harm": "ssh",
    "Sexual / Adult": "sxc",
    "Violence / Physical Harm": "vcr",
}


def _convert_star1_prompt(source: Record, number: int, where: str) -> Record:
    categories, origin = source.get("category"), parse_field(source, "source", where)
    if not isinstance(categories, list) or not categories:
        fault(where, "category is no list, or an empty one", "check that this is the format of the file")
    for category in categories:
        if not isinstance(category, str) or category not in _STAR1_HAZARDS:
            fault(where, f"unknown category {shown(str(category))}", nearest(str(category), _STAR1_HAZARDS))
    return {
        "id": make_id(f"star1-{_parse_star1_id(source, where)}"),
        "prompt": parse_field(source, "question", where),
        "kind": "harmful",
        "hazard": list(dict.fromkeys(_STAR1_HAZARDS[category] for category in categories)),
        "source": f"UCSC-VLAA/STAR-1, from {origin}",
        # STAR-1 took its prompts from other sets, some of which forbid commercial use.
        "licence": f"Apache-2.0; the prompt's own is that of {origin}",
    }


def _convert_gsm8k_prompt(source: Record, number: int, where: str) -> Record:
    target = _split_result(source, "answer", "####", where)[1].replace(",", "")
    if not re.fullmatch(r"-?\d+(?:\.\d+)?", target):
        fault(where, "the result after #### is no number", "fix or drop the record")
    return {
        "id": f"gsm8k-{number:06d}",
        "prompt": parse_field(source, "question", where),
        "kind": "general",
        "target": target,
        "match": "number",
        "source": "openai/grade-school-math",
        "licence": "MIT",
    }


# Formats of prompts. Their ids are those of the training records that are converted from the same set.
PROMPT_FORMATS: dict[str, Callable[[Record, int, str], Record]] = {
    "star1-prompts": _convert_star1_prompt,
    "coconot-prompts": _convert_coconot_prompt,
    "gsm8k-prompts": _convert_gsm8k_prompt,
}
FORMATS: dict[str, Callable[[Record, int, str], Record | None]] = {
    "star1": _convert_star1,
    "gsm8k": _convert_gsm8k,
    "gsm8k-pairs": _convert_gsm8k_pair,
    "stair-sft": _convert_stair_sft,
    "coconot-pairs": _convert_coconot_pair,
    "answers": drop_reasoning,
    "alpaca": convert_alpaca,
    "sharegpt": convert_sharegpt,
    **PROMPT_FORMATS,
}

# The records that a format leaves out.
LEFT_OUT = {
    "gsm8k-pairs": "without a chain of steps",
    "answers": "without an answer on both sides, with answers that do not part, or too long for the run of --as_trained",
    "alpaca": "without an output",
    "sharegpt": "without a first turn of the user's or a last one of the assistant's",
}


def _make_record(id: str, kind: str, prompt: str, reasoning: str | list[str] | None, answer: str) -> Record:
    return {"id": id, "kind": kind, "prompt": prompt, "reasoning": reasoning, "answer": answer}


def _parse_star1_id(source: Record, where: str) -> str:
    """Return the id of a STAR-1 record, which is a string of digits or a whole number."""
    value = source.get("id")
    if not isinstance(value, str | int) or isinstance(value, bool) or not str(value).strip():
        fault(where, 'field "id" is missing, empty or not a whole number', "fix or drop the record")
    return str(value)
