"""`saro doctor`: runs the checks, prints their table and recommends options."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console

from saro.config import DataConfig, ModelConfig
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.files import atomic_write
from saro.model.training_dtype import decide_dtype
from saro.program import shown
from saro.report.tables import doctor_table
from saro.tools.doctor.checked_model import CheckedModel
from saro.tools.doctor.finding import Check, Finding, guarded
from saro.tools.doctor.kernel_checks import kernel_checks
from saro.tools.doctor.machine_checks import has_bf16, machine_checks
from saro.tools.doctor.memory_check import MEMORY, memory_check
from saro.tools.doctor.model_checks import ATTENTION, model_checks
from saro.tools.doctor.training_checks import training_checks


@dataclass(frozen=True)
class Options:
    """Options of `saro doctor`.

    Attributes:
        model: The model to check, and how it would be trained.
        data: Size of the packs. Memory is measured on a sixteenth and a quarter of --data.pack_tokens.
        json: File to write the findings to as well.
    """

    model: ModelConfig = field(
        default_factory=ModelConfig, metadata=shown("name", "method", "dtype", "attention", "liger")
    )
    data: DataConfig = field(default_factory=DataConfig, metadata=shown("pack_tokens"))
    json: str | None = None

    def __post_init__(self) -> None:
        if self.data.pack_tokens < 256:
            raise SaroError(f"--data.pack_tokens is {self.data.pack_tokens}; it must be at least 256")


def run(options: Options, console: Console) -> int:
    """Check kernels, packs, training and resuming on this machine and your model.

    Raises:
        SaroError: as ``doctor`` does.
    """
    runtime = Runtime.start()
    code = doctor(runtime, options, console)
    runtime.end()
    return code


def doctor(runtime: Runtime, options: Options, console: Console) -> int:
    """Run all checks and print their findings. Return 0, or 1 if one failed.

    Raises:
        SaroError: there is no such model, it cannot be trained as the options say, or there is no folder for the JSON
            file.
    """
    if options.json is not None and not Path(options.json).absolute().parent.is_dir():
        raise SaroError(f"--json: there is no folder {Path(options.json).absolute().parent}; make it first")
    findings = _run(runtime, machine_checks(runtime))
    models: list[CheckedModel] = []

    def load() -> Finding:
        checked = CheckedModel.load(runtime, options.model, options.data.pack_tokens)
        models.append(checked)
        figure = f"{options.model.name}, {options.model.method}: {checked.policy.summary()}; on {checked.records}"
        return Finding("the model loads", True, figure)

    findings += _run(runtime, [Check("the model loads", load)], user_errors=(SaroError,))
    advice: list[str] = []
    # None if a broken backend could not load the model.
    for checked in models:
        with tempfile.TemporaryDirectory(prefix="saro-doctor-") as folder:
            checks = [*kernel_checks(checked.policy), *model_checks(checked), *training_checks(checked, Path(folder))]
            findings += _run(runtime, checks)
        findings += _run(runtime, [Check(MEMORY, partial(memory_check, checked, advice.append))])
    advice = [*_backend_advice(runtime, models, findings), *advice]
    failed = any(finding.ok is False for finding in findings)
    console.print(doctor_table([asdict(finding) for finding in findings]))
    for line in advice:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if options.json is not None:
        report = {"ok": not failed, "checks": [asdict(finding) for finding in findings], "recommendations": advice}
        with atomic_write(options.json) as file:
            json.dump(report, file, indent=2, ensure_ascii=False)
            file.write("\n")
    return int(failed)


def _run(runtime: Runtime, checks: Iterable[Check], user_errors: tuple[type[Exception], ...] = ()) -> list[Finding]:
    """Run the checks one after the other; ``user_errors`` are raised, all other errors become findings."""
    findings = []
    for check in checks:
        runtime.say(f"checking: {check.name}")
        findings.append(guarded(check, user_errors))
    return findings


def _backend_advice(runtime: Runtime, models: Sequence[CheckedModel], findings: Sequence[Finding]) -> list[str]:
    """Recommend dtype and attention: the fast ones if their checks passed here."""
    dtype = _fast_dtype(runtime, models)
    varlen_passed = any(finding.name == ATTENTION and finding.ok for finding in findings)
    attention = "auto" if varlen_passed and dtype == "bfloat16" else "sdpa"
    return [f"dtype: {dtype} (--model.dtype)", f"attention: {attention} (--model.attention)"]


def _fast_dtype(runtime: Runtime, models: Sequence[CheckedModel]) -> str:
    """Return the name of the dtype in which the model's products are fastest here; float32 if no model was loaded on a CPU."""
    if runtime.device.type == "cpu":
        chosen = [decide_dtype("auto", checked.policy.causal_lm.config, runtime.device) for checked in models]
        return chosen[0] if chosen else "float32"
    return "bfloat16" if has_bf16(runtime.device) else "float32"
