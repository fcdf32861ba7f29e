"""Tests that ranks which would train different models are refused before the first step, or at the next checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import Training

from saro.data.steps import Schedule, Steps
from saro.distributed.run_ranks import run_ranks
from saro.distributed.runtime import Runtime


def train_two(records: str, folder: str, output: str, method: str, fault: str) -> None:
    """Train two steps as one rank, with a checkpoint after each. Rank 1 has a fault."""

    def main() -> int:
        runtime = Runtime.start()
        run = Training.on(
            folder,
            records,
            Path(output),
            model={"method": method},
            rank=runtime.rank,
            processes=runtime.processes,
            save_every=1,
            eval_every=1,
        )
        steps = 2
        if runtime.rank == 1:
            if fault == "fewer steps":
                steps = 1
            elif fault == "drift":
                return fit(runtime, run, steps, drifts=True)
            elif fault != "none":
                run = FAULTS[fault](run)
        return fit(runtime, run, steps)

    run_ranks(main)


def fit(runtime: Runtime, run: Training, steps: int, drifts: bool = False) -> int:
    def evaluate(step: int) -> dict[str, float]:
        if drifts:
            drift(next(iter(run.policy.trainable().values())))
        return {}

    run.fit(runtime, steps, evaluate=evaluate)
    runtime.end()
    return 0


@torch.no_grad()
def drift(parameter: torch.Tensor) -> None:
    """Change a weight by more than the next step rounds away, as it may an ulp."""
    parameter.view(-1)[0] += 0.01


@torch.no_grad()
def add_an_ulp(parameter: torch.Tensor) -> None:
    first = parameter.view(-1)[:1]
    first.copy_(torch.nextafter(first, first + 1))


def change_base(run: Training) -> Training:
    add_an_ulp(next(p for p in run.policy.parameters() if not p.requires_grad and p.dtype == torch.float32))
    return run


def change_scales(run: Training) -> Training:
    state = next(p.quant_state for p in run.policy.parameters() if getattr(p, "quant_state", None) is not None)
    state.offset.mul_(2)
    return run


def change_trainable(run: Training) -> Training:
    add_an_ulp(next(iter(run.policy.trainable().values())))
    return run


def change_schedule(run: Training) -> Training:
    schedule = Schedule(run.data.kinds, run.options.records_per_step, run.options.seed + 1)
    return replace(run, steps=Steps(run.data, schedule, run.steps.pack_tokens, run.steps.share))


FAULTS = {"base": change_base, "scales": change_scales, "trainable": change_trainable, "schedule": change_schedule}


@pytest.mark.parametrize(
    ("method", "fault", "named"),
    [
        ("lora", "base", "the weights of the base model"),
        ("qlora", "scales", "the weights of the base model"),
        ("lora", "trainable", "the trainable weights"),
        ("full", "trainable", "the trainable weights"),
        ("lora", "schedule", "the schedule of records"),
        ("lora", "fewer steps", "the schedule of records"),
    ],
)
def test_ranks_that_would_train_something_else_are_refused_before_the_first_step(
    recipes, records_file, examples, tiny_model, tmp_path, method, fault, named
):
    """By a single ulp: DDP would hide it in the trainable weights, and sum gradients of two models in the others."""
    arguments = (records_file(examples, "train.jsonl"), tiny_model(), tmp_path / "run", method, fault)
    ranks = recipes.run_ranks(2, *arguments, call=f"{__file__}:train_two")
    assert [p.code for p in ranks] == [2, 2], ranks[0].err + ranks[1].err
    message = f"error: rank 1 differs from rank 0 in {named}; give every rank the same model and options\n"
    assert [p.err for p in ranks] == [message, f"[rank 1] {message}"]
    assert not list((tmp_path / "run").iterdir())


def test_weights_that_drift_apart_do_not_become_a_checkpoint(recipes, records_file, examples, tiny_model, tmp_path):
    arguments = (records_file(examples, "train.jsonl"), tiny_model(), tmp_path / "run", "lora", "drift")
    ranks = recipes.run_ranks(2, *arguments, call=f"{__file__}:train_two")
    assert [p.code for p in ranks] == [2, 2], ranks[0].err + ranks[1].err
    for process in ranks:
        assert "rank 1 differs from rank 0 in the trainable weights after step 2; no checkpoint" in process.err
    # The evaluation, in which rank 1 drifts, comes after the first checkpoint.
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000001"]


def test_ranks_that_are_alike_train(recipes, records_file, examples, tiny_model, tmp_path):
    arguments = (records_file(examples, "train.jsonl"), tiny_model(), tmp_path / "run", "qlora", "none")
    ranks = recipes.run_ranks(2, *arguments, call=f"{__file__}:train_two")
    assert [p.code for p in ranks] == [0, 0], ranks[0].err + ranks[1].err
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
