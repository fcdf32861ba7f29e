"""With keep_best a run ends with the weights of its best evaluation, also if it was stopped and resumed in between."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saro.config import TrainConfig
from saro.errors import SaroError
from saro.train.best import BestWeights, check_metric

pytestmark = pytest.mark.usefixtures("one_thread")

# Held-out losses by number of steps: the best one is that of step 4.
LOSSES = {2: 1.0, 4: 0.5, 6: 0.7, 8: 0.5, 10: 0.9}
OPTIONS = {"eval_every": 2, "save_every": 1, "keep_best": "eval/loss", "keep_checkpoints": 2}


class Watched:
    """Evaluates as ``LOSSES`` says, keeps the weights of each evaluation, and may send SIGTERM in one."""

    def __init__(self, run, stop_at: int | None = None, losses=LOSSES) -> None:
        self.run, self.stop_at, self.losses = run, stop_at, losses
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def __call__(self, step: int) -> dict[str, float]:
        self.weights[step] = self.run.weights()
        if step == self.stop_at:
            signal.raise_signal(signal.SIGTERM)
        return {"eval/loss": self.losses[step]}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def files(run) -> list[str]:
    return sorted(p.name for p in (Path(run.options.output) / "best").iterdir())


def evaluations(run) -> list[int]:
    lines = (Path(run.options.output) / "metrics.jsonl").read_text().splitlines()
    return [line["step"] for line in map(json.loads, lines) if "eval/loss" in line]


def test_the_run_ends_with_the_weights_of_the_best_evaluation(training, runtime):
    run = training(**OPTIONS)
    watched = Watched(run)
    outcome = run.fit(runtime, 10, evaluate=watched)
    assert (outcome.step, outcome.best_step) == (10, 4)
    assert_same(run.weights(), watched.weights[4])
    assert evaluations(run) == [2, 4, 6, 8, 10], "the last step is evaluated too"
    assert files(run) == ["step_000004.safetensors"]


def test_more_is_better_for_margins_and_accuracies(training, runtime):
    run = training(**OPTIONS | {"keep_best": "eval/rewards/margins"})
    outcome = run.fit(runtime, 4, evaluate=lambda step: {"eval/loss": 1, "eval/rewards/margins": float(-step)})
    assert outcome.best_step == 2


def test_any_number_is_better_than_nan(training, runtime):
    run = training(**OPTIONS)
    losses = {2: float("nan"), 4: 9.0}
    assert run.fit(runtime, 4, evaluate=lambda step: {"eval/loss": losses[step]}).best_step == 4


@pytest.mark.parametrize(
    ("metric", "is_known"),
    [
        ("eval/loss", True),
        ("eval/rewards/chosen", True),
        ("eval/entropy/chosen", False),
        ("eval/lossy/entropy", False),
        ("eval/lossy/rewards/margins", True),
    ],
)
def test_a_metric_of_which_nobody_can_say_what_is_better_is_refused(metric, is_known):
    options = replace(TrainConfig(), keep_best=metric, eval_every=2)
    with nullcontext() if is_known else pytest.raises(SaroError, match="does not tell which of two models is better"):
        check_metric(options, {metric: 1.0})


@pytest.mark.parametrize("stop_at", [4, 6])
def test_a_resumed_run_ends_with_the_same_weights(training, runtime, stop_at):
    unbroken = training("unbroken", **OPTIONS)
    unbroken.fit(runtime, 10, evaluate=Watched(unbroken))
    stopped = training("stopped", **OPTIONS)
    assert stopped.fit(runtime, 10, evaluate=Watched(stopped, stop_at)).step == stop_at + 1
    resumed = training("stopped", **OPTIONS)
    assert resumed.fit(runtime, 10, evaluate=Watched(resumed), resume=True).best_step == 4
    assert_same(resumed.weights(), unbroken.weights())


def test_a_run_that_goes_back_before_its_best_evaluation_has_the_best_one_before(training, runtime):
    """The newest checkpoints are lost, and the run is now shorter."""
    run = training(**OPTIONS | {"keep_checkpoints": 3})
    watched = Watched(run, stop_at=4)
    run.fit(runtime, 10, evaluate=watched)
    for step in (4, 5):
        shutil.rmtree(Path(run.options.output) / "checkpoints" / f"step_{step:06d}")
    resumed = training(**OPTIONS)
    outcome = resumed.fit(runtime, 3, evaluate=Watched(resumed, losses={3: 2.0}), resume=True)
    assert (outcome.step, outcome.best_step) == (3, 2)
    assert_same(resumed.weights(), watched.weights[2])


def test_training_stops_when_evaluations_have_not_got_better(training, runtime, capsys):
    run = training(**OPTIONS, patience=2)
    watched = Watched(run)
    outcome = run.fit(runtime, 100, evaluate=watched)
    assert (outcome.step, outcome.stopped_by, outcome.best_step) == (8, None, 4)
    assert "stopped early: 2 evaluations were not better than that of step 4" in capsys.readouterr().err
    assert_same(run.weights(), watched.weights[4])
    again = training(patience=2, **OPTIONS)
    outcome = again.fit(runtime, 100, evaluate=Watched(again), resume=True)
    assert (outcome.step, outcome.best_step) == (8, 4), "a finished run stays finished"
    assert_same(again.weights(), watched.weights[4])
    patient = training(patience=3, **OPTIONS)
    assert patient.fit(runtime, 100, evaluate=Watched(patient), resume=True).step == 10


def test_a_users_copy_of_weights_is_neither_read_nor_deleted(runtime, tmp_path):
    (tmp_path / "best").mkdir()
    for name in ("step_000100", "step_000100.good"):
        (tmp_path / "best" / f"{name}.safetensors").touch()
    best = BestWeights(tmp_path, TrainConfig(**OPTIONS))
    best.resume(runtime, [])
    assert [file.name for file in (tmp_path / "best").iterdir()] == ["step_000100.good.safetensors"]


def test_lost_weights_are_named_in_one_line(training, runtime):
    run = training(**OPTIONS)
    run.fit(runtime, 4, evaluate=Watched(run))
    (Path(run.options.output) / "best" / "step_000004.safetensors").write_bytes(b"")
    with pytest.raises(SaroError, match=r"step_000004.safetensors: cannot be read .*; restore it, or start over"):
        training(**OPTIONS).fit(runtime, 4, evaluate=Watched(run), resume=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eval/los", "train.keep_best: eval/los is no metric of this run; did you mean eval/loss?"),
        ("eval/entropy", "train.keep_best: eval/entropy does not tell which of two models is better"),
    ],
)
def test_a_metric_that_cannot_be_compared_is_refused_before_training(name, message):
    options = TrainConfig(keep_best=name, eval_every=1)
    with pytest.raises(SaroError) as caught:
        check_metric(options, {"eval/loss": 1.0, "eval/entropy": 1.0})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_best": "eval/loss"}, "set --train.eval_every"),
        ({"patience": 2, "eval_every": 1}, "set --train.keep_best"),
    ],
)
def test_options_that_need_another_are_refused(options, message):
    with pytest.raises(SaroError, match=message):
        TrainConfig(**options)
