"""Tests of the sweep over causal LMs, in new processes: its verdicts, its exit code, and what a fault does to them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import model_sweep
import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from saro.model.attention import AttentionPlan
from saro.model.policy import Policy
from saro_kernels import LoraLinear

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# Faults. Each is planted in a process that ends with the sweep.


def leak() -> None:
    isolated_plan = AttentionPlan.of
    AttentionPlan.of = lambda pack, backend, isolated=True: isolated_plan(pack, backend, isolated=False)


def wrong_adapter_gradient() -> None:
    cast_gradients = LoraLinear.cast_gradients
    LoraLinear.cast_gradients = lambda layer, d_a, d_b: cast_gradients(layer, d_a, d_b / 2)


def traceback() -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("planted")

    Policy.forward = fail


def crash() -> None:
    replace_the_judge_of_llama(os.abort)


def hang() -> None:
    replace_the_judge_of_llama(lambda: time.sleep(600))


def replace_the_judge_of_llama(do: Callable[[], None]) -> None:
    judge = model_sweep.judge

    def replaced(case, folder, enter):
        if case.model_type == "llama":
            enter("saro")
            do()
        return judge(case, folder, enter)

    model_sweep.judge = replaced


def none() -> None:
    pass


def run_with_fault(fault: str, *arguments: str) -> int:
    """Plant a fault and run the sweep on the defaults of some model types."""
    globals()[fault]()
    return model_sweep.main(["--defaults", *arguments])


@pytest.fixture
def sweep(recipes) -> Callable:
    def run(*arguments: str, fault: Callable[[], None] = none):
        return recipes.run(fault.__name__, *arguments, call=f"{__file__}:run_with_fault")

    return run


def verdict(process, model_type: str) -> str:
    (line,) = [line for line in process.out.splitlines() if line.split()[:1] == [model_type]]
    return line.removeprefix(model_type).strip()


def test_a_model_is_exact_or_refused_with_a_reason_and_the_table_says_so(sweep, tmp_path):
    table = tmp_path / "table.md"
    process = sweep("--only", "gemma2,mixtral", "--output", str(table))
    assert process.code == 0, process.err
    assert verdict(process, "gemma2").startswith("exact")
    assert verdict(process, "mixtral").startswith("refused it is a mixture of experts (num_experts_per_tok=2); only")
    text = table.read_text()
    assert "2; 1 exact, 1 refused, 0 not loadable, 0 WRONG." in text
    assert "| gemma2 | Gemma2ForCausalLM |" in text
    assert "| mixtral | it is a mixture of experts" in text


@pytest.mark.parametrize("fault", [leak, wrong_adapter_gradient, traceback])
def test_a_model_that_is_accepted_and_wrong_fails_the_sweep(sweep, fault):
    process = sweep("--only", "llama", fault=fault)
    assert process.code == 1, process.err
    assert verdict(process, "llama").startswith("WRONG")
    assert "1; 0 exact, 0 refused, 0 not loadable, 1 WRONG." in process.out


@pytest.mark.parametrize(
    ("fault", "reason"), [(crash, "the process ended with -6"), (hang, "no result after 10 seconds")]
)
def test_a_crash_or_a_hang_fails_only_its_own_model(sweep, fault, reason):
    process = sweep("--only", "llama,mixtral", "--seconds", "10", fault=fault)
    assert process.code == 1, process.err
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
