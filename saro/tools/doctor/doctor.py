"""The checks one after the other, the table, and what to set."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saro.config import ModelConfig
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.files import atomic_write
from saro.tool_config import DoctorConfig
from saro.tools.doctor.finding import Check, Finding, guarded
from saro.tools.doctor.kernel_checks import kernel_checks
from saro.tools.doctor.machine_checks import has_bf16, machine_checks
from saro.tools.doctor.memory_check import MEMORY, memory_check
from saro.tools.doctor.model_checks import ATTENTION, model_checks
from saro.tools.doctor.subject import Subject
from saro.tools.doctor.training_checks import training_checks

_RESULTS = {True: "[green]ok[/green]", False: "[bold red]FAILED[/bold red]", None: "skipped"}


def doctor(runtime: Runtime, options: DoctorConfig, console: Console) -> int:
    """Run all checks and print what they found. Returns 0, or 1 where one failed.

    Raises:
        SaroError: there is no such model, or it cannot be trained as the options say; no place for the JSON file.
    """
    if options.json is not None and not Path(options.json).absolute().parent.is_dir():
        raise SaroError(f"--json: there is no folder {Path(options.json).absolute().parent}; make it first")
    model = ModelConfig(
        name=options.model,
        method=options.method,
        dtype=options.dtype,
        attention=options.attention,
        liger=options.liger,
    )
    findings = _run(runtime, machine_checks(runtime))
    loaded: list[Subject] = []

    def load() -> Finding:
        loaded.append(Subject.load(runtime, model, options.pack_tokens))
        summary = loaded[0].policy.summary()
        return Finding("the model loads", True, f"{model.name}, {model.method}: {summary}; on {loaded[0].records}")

    findings += _run(runtime, [Check("the model loads", load)], users=(SaroError,))
    advice: list[str] = []
    for subject in loaded:
        with tempfile.TemporaryDirectory(prefix="saro-doctor-") as folder:
            checks = [*kernel_checks(subject.policy), *model_checks(subject), *training_checks(subject, Path(folder))]
            findings += _run(runtime, checks)
        findings += _run(runtime, [Check(MEMORY, lambda of=subject: memory_check(of, advice.append))])
    advice = [*_backend_advice(runtime, findings), *advice]
    failed = any(finding.ok is False for finding in findings)
    console.print(_table(findings))
    for line in advice:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if options.json is not None:
        with atomic_write(options.json) as file:
            what = {"ok": not failed, "checks": [asdict(finding) for finding in findings], "recommendations": advice}
            json.dump(what, file, indent=2, ensure_ascii=False)
            file.write("\n")
    return int(failed)


def _run(runtime: Runtime, checks: Iterable[Check], users: tuple[type[Exception], ...] = ()) -> list[Finding]:
    findings = []
    for check in checks:
        runtime.say(f"checking: {check.name}")
        findings.append(guarded(check, users))
    return findings


def _backend_advice(runtime: Runtime, findings: Sequence[Finding]) -> list[str]:
    """Dtype and attention: the fast ones where they are proved here."""
    dtype = "bfloat16" if has_bf16(runtime.device) else "float32"
    proved = any(finding.name == ATTENTION and finding.ok for finding in findings)
    attention = "varlen" if proved and dtype == "bfloat16" else "sdpa"
    return [f"dtype: {dtype} (--model.dtype)", f"attention: {attention} (--model.attention)"]


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(title="saro doctor", title_justify="left")
    for column, options in (
        ("check", {"ratio": 3}),
        ("result", {}),
        ("measured", {"ratio": 5}),
        ("limit", {"ratio": 2}),
    ):
        table.add_column(column, overflow="fold", **options)
    for finding in findings:
        table.add_row(escape(finding.name), _RESULTS[finding.ok], escape(finding.figure), escape(finding.limit))
    return table
