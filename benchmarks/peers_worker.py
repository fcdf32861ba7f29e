"""Run one measurement of `peers.py`: load a model, train it for some steps, and time them.

`python benchmarks/peers_worker.py REQUEST` takes a Request as JSON and writes a Result as JSON to standard output.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict
from datetime import date
from pathlib import Path

import numpy as np
import torch
from peers_data import (
    BETA,
    FIRST_METRICS,
    LR,
    MAX_GRAD_NORM,
    Data,
    InOrder,
    Request,
    Result,
    load_records,
    loaded_gib,
    measured,
    memory_figures,
    sequences,
    synchronize,
    unshared,
)

from saro.config import DataConfig, ModelConfig, PreferenceConfig, TrainConfig
from saro.data.dataset import PairSet
from saro.data.packs import Pack
from saro.data.steps import Steps
from saro.data.tree import SequenceTree
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.model.load import load_policy
from saro.model.score import score_pairs
from saro.model.source import ModelSource, find_model
from saro.program import run_program
from saro.train.engine import fit
from saro.train.objective import Sums
from saro.train.rw_objective import RWObjective
from saro.train.srpo_objective import SRPOObjective


class StepClock:
    """Records when each step has been logged; ``fit`` tells it, as its ``log``.

    So the time of a step is the time between two log lines, and includes packing, metrics and logging.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self.marks = [time.perf_counter()]

    def observe(self, pack: Pack, sums: Sums) -> None:
        pass

    def watch(self, step: int, means: Mapping[str, float]) -> None:
        synchronize(self._device)
        self.marks.append(time.perf_counter())


class UnsharedPairs:
    """Pairs whose trees share nothing: each side repeats the prompt and the common steps."""

    def __init__(self, pairs: PairSet) -> None:
        self._pairs = pairs

    def trees(self, records: Iterable[int], budget: int) -> list[SequenceTree]:
        return [unshared(self._pairs.sequences(record)) for record in records]


def run_saro(request: Request, source: ModelSource, data: Data, folder: Path) -> Result:
    """Load the model, train it with this project's trainer, and time the steps."""
    runtime = Runtime.start()
    torch.set_num_threads(request.threads)
    options = ModelConfig(
        name=request.model, method=request.method, gradient_checkpointing=request.gradient_checkpointing
    )
    policy = load_policy(source, options, runtime.device, request.seed)
    loaded = loaded_gib(policy, request.device)
    budget, reference_seconds = request.pack_tokens, None

    records = UnsharedPairs(data) if request.side == "saro, no sharing" else data
    everything = records.trees(range(request.records), budget)
    # Without sharing, a pair may exceed the budget: it was accepted because its tree with a shared prefix fits.
    budget = max(budget, *(tree.tokens for tree in everything))
    if isinstance(data, PairSet):
        start = time.perf_counter()
        reference = score_pairs(policy, data, everything, budget)
        synchronize(request.device)
        reference_seconds = time.perf_counter() - start
        objective = SRPOObjective(data.kinds, reference, PreferenceConfig(beta=BETA))
    else:
        objective = RWObjective(data.kinds)
    schedule = InOrder(request.records, request.per_step)
    steps = Steps(records, schedule, budget)
    training = TrainConfig(
        output=str(folder),
        records_per_step=request.per_step,
        lr=LR,
        schedule="constant",
        warmup=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        log_every=1,
        save_every=0,
    )
    clock = StepClock(request.device)
    fit(runtime, policy, objective, steps, request.all_steps, training, ids=data.ids, log=clock)
    first = json.loads((folder / "metrics.jsonl").read_text().partition("\n")[0])
    epoch = [steps[i] for i in range(schedule.steps_per_epoch)]
    step_tokens = [sum(len(s.tokens) for s in sequences(data, step.records)) for step in epoch]
    return Result(
        seconds=np.diff(clock.marks)[request.warmup :].tolist(),
        records=request.steps * request.per_step,
        tokens=measured(request, step_tokens),
        read_tokens=measured(request, [step.tokens for step in epoch]),
        first={name: first[name] for name in FIRST_METRICS[request.task]},
        loaded_gib=loaded,
        reference_seconds=reference_seconds,
        **memory_figures(request.device),
    )


def use_only(device: str) -> None:
    """Hide all GPUs on a CPU, else all but the first one: transformers' Trainer would use all of them.

    Call it before torch looks for GPUs.

    Raises:
        SaroError: there is no GPU.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.partition(",")[0] if device == "cuda" else ""
    if device == "cuda" and not torch.cuda.is_available():
        raise SaroError("--device cuda: torch finds no GPU; give cpu, or install a build of torch with CUDA")


def main() -> int:
    request = Request.parse(sys.argv[1])
    use_only(request.device)
    # Send what TRL prints to standard error: standard output is only for the result.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        source = find_model(ModelConfig(name=request.model))
        chat = source.chat_format(DataConfig(), date(2024, 7, 26))
        data = load_records(request, chat, source.config.vocab_size)
        if request.side.startswith("trl"):
            # Import TRL only to measure it: it takes memory.
            from peers_trl import run_trl

            result = run_trl(request, source, data, Path(folder))
        else:
            result = run_saro(request, source, data, Path(folder))
    print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    run_program(main)
