"""Hold the predictions of `saro plan` against measurements on this CPU: peak memory and tokens per second of RW and SRPO steps.

    PYTHONPATH=benchmarks/gpu python benchmarks/plan_check.py [--method lora] [--packs 512 1024 2048] [--into benchmarks/README.md] [--times]

Each case is a process of its own. It loads the demo model with one thread, makes a step of two packs, so that gradients and the
optimizer's state are there, and measures the second pack of another such step: the peak of the resident memory above that before
loading. First a run's memory, as `Runtime.start` sets the C library: freed blocks are kept, and the gaps between them count. Then that
of tensors alone, measured while freed blocks are given back at once. Times need a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from gpu_tables import publish, table

from saro.config import ModelConfig, TrainConfig
from saro.demo import find_demo
from saro.distributed.runtime import keep_freed_memory
from saro.model.load import load_policy
from saro.model.source import find_model
from saro.tools.plan_run.cards import CPU_SHARE, find_card
from saro.train.optim import make_optimizer
from saro.train.predict_memory import Setting, Workload, predict_costs
from saro.train.resident_memory import give_freed_memory_back, resident_peak

MARKERS = ("<!-- plan check: begin -->", "<!-- plan check: end -->")
WORKLOADS = {"rw": Workload("rw", 256), "srpo": Workload("srpo", 512)}
# The C library maps larger blocks one by one, and gives each back when it is freed.
MAPPED_BYTES = 2**16
ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """A measurement.

    Attributes:
        keeps: the C library keeps freed memory, as in a run.
        times: repeat the packs and time them.
    """

    model: str
    method: str
    checkpointing: bool
    stage: str
    tokens: int
    keeps: bool
    times: bool


def measure(case: Case) -> dict[str, float]:
    """Load the model in this process, and return the peak in bytes and the tokens per second."""
    if case.keeps:
        keep_freed_memory()
    torch.set_num_threads(1)
    options = ModelConfig(
        name=case.model, method=case.method, dtype="float32", gradient_checkpointing=case.checkpointing
    )
    source = find_model(options)
    pack, gradient_rows = WORKLOADS[case.stage].pack(case.tokens, source.config.vocab_size)
    # Libraries allocate some memory once; it must not count.
    torch.nn.functional.linear(torch.randn(64, 64), torch.randn(64, 64, requires_grad=True)).sum().backward()
    give_freed_memory_back()
    before = psutil.Process().memory_info().rss
    policy = load_policy(source, options, torch.device("cpu"), seed=0).train()
    optimizer = make_optimizer(policy.trainable().values(), TrainConfig(lr=1e-12))

    def backward() -> None:
        (-policy(pack, gradient_rows=gradient_rows).mean()).backward()

    backward()
    optimizer.step()
    give_freed_memory_back()
    peak = resident_peak(backward) - before
    seconds, rates = [], []
    for _ in range(ROUNDS if case.times else 0):
        rates.append(find_card("cpu", 1, torch.float32).operations)
        start = time.perf_counter()
        backward()
        seconds.append(time.perf_counter() - start)
    found: dict[str, float] = {"peak": peak, "tokens": pack.tokens}
    if seconds:
        found |= {"tokens_per_second": pack.tokens / statistics.median(seconds), "gemm": statistics.median(rates)}
    return found


def run_apart(case: Case) -> dict[str, float]:
    """Measure in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if not case.keeps:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(MAPPED_BYTES)
    command = [sys.executable, __file__, "--case", json.dumps(vars(case))]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="demo", help="Folder of a model.")
    parser.add_argument("--method", default="lora", choices=("lora", "qlora", "full"))
    parser.add_argument("--checkpointing", action="store_true", help="Recompute all layers.")
    parser.add_argument("--packs", type=int, nargs="+", default=[512, 1024, 2048], help="Sizes of the packs, tokens.")
    parser.add_argument("--times", action="store_true", help="Measure times too.")
    parser.add_argument("--into", type=Path, help="Document whose table is replaced; without it, it is printed.")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(Case(**json.loads(options.case)))))
        return
    model = find_demo(options.model)
    config = find_model(ModelConfig(name=model)).config
    train = ModelConfig(method=options.method, gradient_checkpointing=options.checkpointing)
    setting = Setting(config, train, torch.float32, is_gpu=False)
    rows = []
    for stage, workload in WORKLOADS.items():
        for tokens, cost in zip(options.packs, predict_costs(setting, workload, options.packs), strict=True):
            tensors, kept = (
                run_apart(
                    Case(
                        model=model,
                        method=options.method,
                        checkpointing=options.checkpointing,
                        stage=stage,
                        tokens=tokens,
                        keeps=keeps,
                        times=options.times and keeps,
                    )
                )
                for keeps in (False, True)
            )
            row = [f"{stage.upper()}, {options.method}, {cost.tokens:,} tokens", f"{cost.peak / 2**30:.2f}"]
            row += [f"{kept['peak'] / 2**30:.2f}", f"{cost.peak / kept['peak'] - 1:+.1%}"]
            living = cost.peak - cost.gaps
            row += [f"{living / 2**30:.2f}", f"{tensors['peak'] / 2**30:.2f}", f"{living / tensors['peak'] - 1:+.1%}"]
            if options.times:
                predicted = cost.tokens * CPU_SHARE * kept["gemm"] / cost.operations
                measured = kept["tokens_per_second"]
                row += [f"{predicted:.0f}", f"{measured:.0f}", f"{predicted / measured - 1:+.1%}"]
            rows.append(row)
            print(" | ".join(row), file=sys.stderr, flush=True)
    header = ["", "predicted GiB", "measured", "difference", "without gaps", "measured", "difference"]
    header += ["predicted tokens/s", "measured", "difference"] if options.times else []
    publish(table(header, rows), options.into, MARKERS)


if __name__ == "__main__":
    main()
