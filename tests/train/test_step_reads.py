"""A step of fit() waits for the device once, and its bookkeeping takes as many operators for any number of layers."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import Training, save_tiny_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import saro
import saro_kernels
from saro.data.steps import Step, Steps
from saro.errors import SaroError
from saro.train import engine

# What makes the host wait for a GPU: methods that return numbers, copies to the host, and shapes that depend on data.
METHODS = {"item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__array__"}
OPERATORS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"}
OURS = tuple(Path(package.__file__).parent for package in (saro, saro_kernels))


def calling_file() -> str:
    """Return the name of the innermost file of saro or saro_kernels, or of transformers, that is running."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if any(folder in path.parents for folder in OURS) or "transformers" in path.parts:
            return path.name
        frame = frame.f_back
    return "?"


class Reads(TorchFunctionMode):
    """Records the files that read a tensor through one of its methods."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in METHODS:
            self.files.append(calling_file())
        # Nothing else runs in such a method but what it reads with.
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Counts operators, and records the files of those that read a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.files: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if function.overloadpacket.__name__ in OPERATORS:
            self.files.append(calling_file())
        return function(*args, **(kwargs or {}))


class Steering:
    """Steps that call ``at[i]`` when step i is read."""

    def __init__(self, steps: Steps, at: dict[int, Callable[[], object]]) -> None:
        self.schedule, self._steps, self._at = steps.schedule, steps, at
        self.asked: list[int] = []

    def __getitem__(self, step: int) -> Step:
        self.asked.append(step)
        if step in self._at:
            self._at[step]()
        return self._steps[step]


@pytest.fixture
def training(records_file, examples, tmp_path) -> Callable[..., Training]:
    file = records_file(examples)

    def make(output: str = "run", layers: int = 2, **options: object) -> Training:
        folder = tmp_path / f"model_{layers}"
        if not folder.exists():
            save_tiny_model(folder, num_hidden_layers=layers)
        return Training.on(str(folder), file, tmp_path / output, **options)

    return make


@pytest.mark.parametrize("log_every", [1, 2], ids=["every step is logged", "the step is not logged"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_step_reads_the_device_once(training, runtime, method, log_every):
    run = training(model={"method": method}, pack_tokens=110, log_every=log_every)
    assert len(run.steps[2].packs) > 1
    reads, operators = Reads(), Operators()

    def begin() -> None:
        reads.__enter__()
        operators.__enter__()

    def end() -> None:
        operators.__exit__(None, None, None)
        reads.__exit__(None, None, None)

    # The third step, whose optimizer has its state already.
    run.steps = Steering(run.steps, {2: begin, 3: end})
    run.fit(runtime, 4)
    assert reads.files.count("engine.py") == 1
    # The head checks its targets on a CPU only, and transformers looks at the positions of some models.
    elsewhere = {*reads.files, *operators.files} - {"engine.py"}
    assert elsewhere <= {"token_logps.py"}


def test_an_8_bit_optimizer_takes_a_second_read(training, runtime):
    """It cannot leave out a step on the device, so the host looks at the loss first. The control of the test above."""
    run = training(optimizer="adamw8bit")
    reads = Reads()
    steering = {2: reads.__enter__, 3: lambda: reads.__exit__(None, None, None)}
    run.steps = Steering(run.steps, steering)
    run.fit(runtime, 4)
    assert sorted({*reads.files} - {"token_logps.py"}) == ["engine.py", "optim.py"]


def test_what_follows_the_backward_takes_as_many_operators_for_any_number_of_layers(training, runtime, monkeypatch):
    counts = {}
    clip = engine._clip
    for layers in (2, 5):
        run = training(f"{layers}", layers=layers)
        operators = Operators()
        calls = []

        def clip_in_step_3(*arguments, operators=operators, calls=calls):
            calls.append(len(calls))
            if len(calls) == 3:
                operators.__enter__()
            return clip(*arguments)

        monkeypatch.setattr(engine, "_clip", clip_in_step_3)
        run.steps = Steering(run.steps, {3: lambda operators=operators: operators.__exit__(None, None, None)})
        run.fit(runtime, 4)
        counts[layers] = operators.count
    assert 0 < counts[2] == counts[5]


# Look-ahead.


@pytest.fixture
def ahead(monkeypatch) -> None:
    """Lay out the next step before the read, as on a GPU."""
    monkeypatch.setattr(engine, "_runs_ahead", lambda device: True)


def test_the_next_step_is_laid_out_before_the_read_and_none_after_the_last(training, runtime, ahead, monkeypatch):
    run = training()
    run.steps = Steering(run.steps, {})
    seen = []
    backward = engine.add_gradients

    def look(*arguments):
        seen.append(list(run.steps.asked))
        return backward(*arguments)

    monkeypatch.setattr(engine, "add_gradients", look)
    run.fit(runtime, 3)
    assert seen == [[0], [0, 1], [0, 1, 2]]
    assert run.steps.asked == [0, 1, 2]


def test_a_cpu_lays_out_each_step_when_it_begins(training, runtime):
    """Its operators are done when they return: there is no time to hide the work in."""
    run = training()
    begun = []
    run.steps = Steering(run.steps, {1: lambda: begun.append((Path(run.options.output) / "metrics.jsonl").read_text())})
    run.fit(runtime, 2)
    assert begun[0].count("\n") == 1


def test_a_run_that_lays_out_ahead_ends_with_the_same_bits_also_when_it_is_stopped_and_resumed(
    training, runtime, monkeypatch
):
    dropout = {"lora_dropout": 0.3}
    plain = training("plain", model=dropout)
    plain.fit(runtime, 5)
    monkeypatch.setattr(engine, "_runs_ahead", lambda device: True)
    unbroken = training("unbroken", model=dropout)
    unbroken.fit(runtime, 5)
    stopped = training("stopped", model=dropout)
    # The signal comes in step 2, while step 3 is laid out.
    stopped.steps = Steering(stopped.steps, {2: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert stopped.fit(runtime, 5).step == 3
    resumed = training("stopped", model=dropout)
    assert resumed.fit(runtime, 5, resume=True).step == 5
    for run in (unbroken, resumed):
        weights = run.weights()
        assert all(torch.equal(weights[name], weight) for name, weight in plain.weights().items())


def test_an_error_while_the_next_step_is_laid_out_ends_the_run(training, runtime, ahead):
    run = training()

    def fail() -> None:
        raise SaroError("records.jsonl:3: wrong; drop it")

    run.steps = Steering(run.steps, {2: fail})
    with pytest.raises(SaroError, match=r"^records.jsonl:3: wrong; drop it$"):
        run.fit(runtime, 4)
