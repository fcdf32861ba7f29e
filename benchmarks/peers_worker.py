"""One measurement of `peers.py`, in a process of its own: load a model, train it for some steps, and time them.

python benchmarks/peers_worker.py REQUEST   writes a Result as JSON to standard output
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import redirect_stdout, suppress
from dataclasses import asdict
from datetime import date
from pathlib import Path

import numpy as np
import torch
from peers_data import (
    BETA,
    FIRST,
    LR,
    MAX_GRAD_NORM,
    Data,
    InOrder,
    Request,
    Result,
    load_records,
    loaded_gib,
    measured,
    peak_gib,
    sequences,
    unshared,
)

from saro.config import DataConfig, ModelConfig, PreferenceConfig, TrainConfig
from saro.data.dataset import PairSet
from saro.data.steps import Step, Steps
from saro.data.tree import SequenceTree, build_tree
from saro.distributed.runtime import Runtime
from saro.model.load import load_policy
from saro.model.score import score_pairs
from saro.model.source import ModelSource, find_model
from saro.train.engine import fit
from saro.train.objective import RWObjective, SRPOObjective


class Done(Exception):
    """All steps have been made."""


class MarkedSteps:
    """Steps that note when each is asked for, and end the training when it asks for one more.

    The time of a step is thus all that lies between two of them: packing, metrics and logging too.
    """

    def __init__(self, steps: Steps, number: int) -> None:
        self.schedule = steps.schedule
        self.marks: list[float] = []
        self._steps = steps
        self._number = number

    def __getitem__(self, step: int) -> Step:
        self.marks.append(time.perf_counter())
        if step == self._number:
            raise Done
        return self._steps[step]


def run_saro(request: Request, source: ModelSource, data: Data, folder: Path) -> Result:
    """This project's trainer: load, train and time."""
    runtime = Runtime.start()
    torch.set_num_threads(request.threads)
    policy = load_policy(source, ModelConfig(name=request.model, method="lora"), runtime.device, request.seed)
    loaded = loaded_gib(policy)
    budget, reference_seconds = request.pack_tokens, None

    def trees(records: Iterable[int]) -> list[SequenceTree]:
        if not isinstance(data, PairSet):
            return [build_tree([data.sequence(record)]) for record in records]
        if request.side == "saro, no sharing":
            return [unshared(data.sequences(record)) for record in records]
        return data.trees(records, budget)

    everything = trees(range(request.records))
    # A pair that shares nothing may be larger than the budget by which its tree was admitted.
    budget = max(budget, *(tree.tokens for tree in everything))
    if isinstance(data, PairSet):
        start = time.perf_counter()
        reference = score_pairs(policy, data, everything, budget)
        reference_seconds = time.perf_counter() - start
        objective = SRPOObjective(data.kinds, reference, PreferenceConfig(beta=BETA))
    else:
        objective = RWObjective(data.kinds)
    schedule = InOrder(request.records, request.per_step)
    steps = Steps(schedule, trees, budget)
    marked = MarkedSteps(steps, request.all_steps)
    options = TrainConfig(
        output=str(folder),
        records_per_step=request.per_step,
        lr=LR,
        schedule="constant",
        warmup=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        save_every=0,
    )
    with suppress(Done):
        fit(
            runtime,
            policy,
            objective,
            marked,
            request.all_steps + 1,
            options,
            record_ids=lambda records: [data.ids[record] for record in records],
        )
    first = json.loads((folder / "metrics.jsonl").read_text().partition("\n")[0])
    epoch = [steps[i] for i in range(schedule.steps_per_epoch)]
    return Result(
        np.diff(marked.marks)[request.warmup :].tolist(),
        request.steps * request.per_step,
        measured(request, [sum(len(s.tokens) for s in sequences(data, step.records)) for step in epoch]),
        measured(request, [step.tokens for step in epoch]),
        {name: first[name] for name in FIRST[request.task]},
        loaded,
        peak_gib(),
        reference_seconds,
    )


def main() -> None:
    request = Request(**json.loads(sys.argv[1]))
    # What TRL prints is not the result.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        source = find_model(ModelConfig(name=request.model))
        chat = source.chat_format(DataConfig(), date(2024, 7, 26))
        data = load_records(request, chat, source.config.vocab_size)
        if request.side.startswith("trl"):
            # TRL is imported where it is measured alone: it takes memory.
            from peers_trl import run_trl

            result = run_trl(request, source, data, Path(folder))
        else:
            result = run_saro(request, source, data, Path(folder))
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
