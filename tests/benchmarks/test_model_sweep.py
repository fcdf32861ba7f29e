"""Tests of the sweep over causal LMs, in new processes: its verdicts, its exit code, and what a fault does to them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import model_sweep
import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"

LEAK = """
from saro.model.attention import AttentionPlan
isolated_plan = AttentionPlan.of
AttentionPlan.of = lambda pack, backend, isolated=True: isolated_plan(pack, backend, isolated=False)
"""
WRONG_ADAPTER_GRADIENT = """
from saro_kernels import LoraLinear
cast_gradients = LoraLinear.cast_gradients
LoraLinear.cast_gradients = lambda layer, d_a, d_b: cast_gradients(layer, d_a, d_b / 2)
"""
TRACEBACK = """
from saro.model.policy import Policy
def fail(*arguments, **options):
    raise RuntimeError("planted")
Policy.forward = fail
"""
CRASH = """
import os
import model_sweep
judge = model_sweep.judge
def crash(case, folder, enter):
    if case.model_type == "llama":
        enter("saro")
        os.abort()
    return judge(case, folder, enter)
model_sweep.judge = crash
"""
HANG = CRASH.replace("os.abort()", "__import__('time').sleep(600)")


def sweep(*arguments: str, fault: str = "") -> subprocess.CompletedProcess:
    """Run the sweep on the defaults of some model types, with a fault planted first."""
    program = f"{fault}\nimport sys, model_sweep\nsys.exit(model_sweep.main())"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])}
    command = [sys.executable, "-c", program, "--defaults", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def verdict(process: subprocess.CompletedProcess, model_type: str) -> str:
    (line,) = [line for line in process.stdout.splitlines() if line.split()[:1] == [model_type]]
    return line.removeprefix(model_type).strip()


def test_a_model_is_exact_or_refused_with_a_reason_and_the_table_says_so(tmp_path):
    table = tmp_path / "table.md"
    process = sweep("--only", "gemma2,mixtral", "--output", str(table))
    assert process.returncode == 0, process.stderr
    assert verdict(process, "gemma2").startswith("exact")
    assert verdict(process, "mixtral").startswith("refused it is a mixture of experts (num_experts_per_tok=2); only")
    text = table.read_text()
    assert "2; 1 exact, 1 refused, 0 not loadable, 0 WRONG." in text
    assert "| gemma2 | Gemma2ForCausalLM |" in text
    assert "| mixtral | it is a mixture of experts" in text


@pytest.mark.parametrize("fault", [LEAK, WRONG_ADAPTER_GRADIENT, TRACEBACK], ids=["leak", "adapter", "traceback"])
def test_a_model_that_is_accepted_and_wrong_fails_the_sweep(fault):
    process = sweep("--only", "llama", fault=fault)
    assert process.returncode == 1, process.stderr
    assert verdict(process, "llama").startswith("WRONG")
    assert "1; 0 exact, 0 refused, 0 not loadable, 1 WRONG." in process.stdout


@pytest.mark.parametrize(
    ("fault", "reason"), [(CRASH, "the process ended with -6"), (HANG, "no result after 10 seconds")]
)
def test_a_crash_or_a_hang_fails_only_its_own_model(fault, reason):
    process = sweep("--only", "llama,mixtral", "--seconds", "10", fault=fault)
    assert process.returncode == 1, process.stderr
    assert verdict(process, "llama") == f"WRONG saro: {reason}"
    assert verdict(process, "mixtral").startswith("refused it is a mixture of experts")


def test_an_unknown_model_type_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        model_sweep.main(["--only", "llama,lama"])
    assert "has no causal LM of type lama" in capsys.readouterr().err


def test_the_written_table_has_a_verdict_on_every_model_type_and_none_is_wrong():
    text = (BENCHMARKS / "results" / "model_sweep.md").read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}," not in text:
        pytest.skip("the table is of another version of transformers")
    by_default, _, options = text.partition("## Options")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in by_default.splitlines() if line.startswith("| ")]
    assert {name for row in rows for name in row.split(", ")} >= MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    assert by_default.count(", 0 WRONG.") == 2
    assert "| rope: yarn |" in options
