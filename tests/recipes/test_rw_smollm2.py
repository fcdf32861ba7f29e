"""Tests a few steps of stage 1 on the demo model with each method, in this process."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import AutoPeftModelForCausalLM
from tiny import Training
from transformers import AutoModelForCausalLM, AutoTokenizer

from saro.checks.check_packs import check_packs
from saro.demo import demo_file
from saro.demo.fetch_model import demo_model
from saro.distributed.runtime import Runtime
from saro.runs.finish import save_final

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def short_records(tmp_path_factory) -> str:
    """Write the three shortest demo records to a file, so that a step takes seconds."""
    lines = sorted(Path(demo_file("rw_train")).read_text().splitlines(), key=len)[:3]
    path = tmp_path_factory.mktemp("demo") / "short.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(("method", "lr"), [("full", 5e-5), ("lora", 2e-3), ("qlora", 2e-3)])
def test_three_steps_lower_the_loss_and_the_final_model_loads(short_records, tmp_path, method, lr):
    runtime = Runtime(Accelerator(cpu=True, mixed_precision="no"), 0, 1, torch.get_num_threads())
    started = time.perf_counter()
    run = Training.on(
        str(demo_model()),
        short_records,
        tmp_path / "run",
        pack_tokens=512,
        model={"method": method},
        records_per_step=2 if method == "full" else 1,
        lr=lr,
        schedule="constant",
        warmup=0,
    )
    # Train on the same records in every step.
    first = run.steps[0]

    class Same:
        schedule = run.steps.schedule

        def __getitem__(self, step: int):
            return first

    run.steps = Same()
    assert check_packs(run.policy, run.data).layout.control > 0.01
    outcome = run.fit(runtime, 3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert outcome.step == 3
    assert all(math.isfinite(line[name]) for line in lines for name in ("loss", "grad_norm"))
    assert 0.5 < losses[0] < 5, "an untouched SmolLM2 predicts English"
    assert losses[2] < losses[0] - 0.05
    assert lines[2]["changed_parameters"] > 0.99 if method != "full" else lines[2]["changed_parameters"] > 0.5

    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    save_final(tmp_path / "final", run.policy.model, tokenizer)
    kind = AutoModelForCausalLM if method == "full" else AutoPeftModelForCausalLM
    loaded = kind.from_pretrained(tmp_path / "final", dtype=torch.float32)
    parameters = dict(loaded.named_parameters())
    for name, weight in run.weights().items():
        assert torch.equal(parameters[name], weight), name
    assert AutoTokenizer.from_pretrained(tmp_path / "final").chat_template == tokenizer.chat_template
    print(f"{method}: {time.perf_counter() - started:.0f} s, losses {losses}")
