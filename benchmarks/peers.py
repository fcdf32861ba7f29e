"""Compare this project with TRL: speed and memory of the same training steps, on a CPU.

    python benchmarks/peers.py [--task srpo rw] [--rounds 3] [--data FILE] [--json FILE]

SRPO is compared with DPOTrainer with precomputed reference log-probs, RW with SFTTrainer. Each measurement runs in its
own process, and the sides take turns, so that a slow moment of the machine slows all of them. All sides train on the
same token ids in the same steps, with the same threads and allocator, LoRA of rank 16 on all linear layers, fp32, and no
recomputed activations. It checks that they see the same data and the same model. The time of a TRL step is that of the
step only; for this project it includes packing and logging. Ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import psutil
from peers_data import BASELINE, FIRST_METRICS, PER_STEP, SIDES, Request, Result
from rich.console import Console
from rich.table import Table

from saro.config import DEMO, ModelConfig
from saro.demo import find_demo
from saro.errors import SaroError
from saro.model.source import find_model
from saro.program import run_program

# Keep freed memory for the next step on every side. saro/distributed/runtime.py sets the same through mallopt.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
# Relative difference allowed between the first metrics of two sides. Rounding changes them by a hundredth of this, one
# wrong token by a hundred times as much.
TOLERANCE = 1e-4

# side -> what it does, printed below the table
DESCRIPTIONS = {
    "saro": "packs of trees: the shared prefix of a pair is read once; RW: packs of complete examples",
    "saro, no sharing": "packs in which both sequences of a pair are read completely",
    "trl": "all pairs of a step in one padded batch",
    "trl, one by one": "one pair per batch, gradients accumulated over the step",
    "trl, packed": "packing (bfd): the examples of a step in one row, separated by a row x row mask (SDPA)",
    "trl, padded": "all examples of a step in one padded batch",
}


def measure(request: Request) -> Result:
    """Run one measurement in its own process.

    Raises:
        SaroError: the process failed. Its error output is printed first.
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            **ALLOCATOR,
            "OMP_NUM_THREADS": str(request.threads),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_DATASETS_CACHE": cache,
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        command = [sys.executable, str(Path(__file__).with_name("peers_worker.py")), json.dumps(asdict(request))]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        print(process.stderr, file=sys.stderr)
        raise SaroError(f"{request.task}, {request.side}: the measurement failed; see its error output above")
    return Result(**json.loads(process.stdout))


def check_same(task: str, results: dict[str, list[Result]]) -> None:
    """Raise SaroError unless all sides start from the same data and the same model."""
    expected = results[BASELINE[task]][0]
    for side, rounds in results.items():
        for result in rounds:
            same = all(math.isclose(result.first[m], expected.first[m], rel_tol=TOLERANCE) for m in FIRST_METRICS[task])
            if not same or result.tokens != expected.tokens:
                raise SaroError(
                    f"{task}: {side} starts with {result.first} on {result.tokens} tokens, {BASELINE[task]} with "
                    f"{expected.first} on {expected.tokens}; they do not train on the same data or model"
                )


# Names of `Result`'s figures whose medians are reported, and of those that are also compared with the baseline.
FIGURES = ("records_per_second", "tokens_per_second", "peak_gib", "above_load_gib", "reference_seconds", "read_share")
COMPARED_FIGURES = ("records_per_second", "peak_gib", "above_load_gib", "reference_seconds")


def summary(task: str, results: dict[str, list[Result]]) -> dict[str, dict[str, float | None]]:
    """Return {side: {figure: value}}: medians over the rounds; ``*_ratio`` compare with the baseline of the same round."""
    baseline = results[BASELINE[task]]

    def median(rounds: list[Result], name: str) -> float | None:
        values = [getattr(result, name) for result in rounds]
        return None if None in values else statistics.median(values)

    def ratio(rounds: list[Result], name: str) -> float | None:
        pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(rounds, baseline, strict=True)]
        return None if (None, None) in pairs else statistics.median(a / b for a, b in pairs)

    figures = {}
    for side, rounds in results.items():
        medians = {name: median(rounds, name) for name in FIGURES}
        ratios = {f"{name}_ratio": ratio(rounds, name) for name in COMPARED_FIGURES}
        figures[side] = medians | ratios
    return figures


# Rows of the table: label -> (figure, format)
ROWS = {
    "records/s": ("records_per_second", "{:.3f}"),
    "tokens/s": ("tokens_per_second", "{:.0f}"),
    "read of the tokens": ("read_share", "{:.0%}"),
    "peak memory, GiB": ("peak_gib", "{:.2f}"),
    "above loading, GiB": ("above_load_gib", "{:.2f}"),
    "reference pass, s": ("reference_seconds", "{:.1f}"),
}


def show(console: Console, title: str, figures: dict[str, dict[str, float | None]]) -> None:
    """Print the figures of a task, with the ratios in parentheses."""
    table = Table(title=title)
    table.add_column("")
    for side in figures:
        table.add_column(side, justify="right")
    for label, (name, number_format) in ROWS.items():
        if any(values[name] is None for values in figures.values()):
            continue
        cells = []
        for values in figures.values():
            ratio = values.get(f"{name}_ratio")
            cells.append(number_format.format(values[name]) + ("" if ratio is None else f" ({ratio:.2f})"))
        table.add_row(label, *cells)
    console.print(table)
    for side in figures:
        console.print(f"{side}: {DESCRIPTIONS[side]}", highlight=False)


def parse(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line. Raises SaroError if a value is invalid."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--task", nargs="+", choices=list(SIDES), default=list(SIDES), help="Stages to compare.")
    add("--steps", type=int, default=4, help="Measured optimizer steps in each measurement.")
    add("--warmup", type=int, default=2, help="Optimizer steps before these; they touch new memory and are slow.")
    add("--rounds", type=int, default=3, help="Measurements of each side.")
    add("--threads", type=int, default=psutil.cpu_count(logical=False) or 1, help="CPU threads.")
    add(
        "--pairs",
        type=int,
        default=32,
        help="Number of records (SRPO: pairs, RW: examples); training cycles over them.",
    )
    add("--pack_tokens", type=int, default=2048, help="Tokens per pack of this project; longer records are left out.")
    add("--data", help="JSONL file of native records, for one task; default: random token ids.")
    add("--model", default=DEMO, help="Folder or hub name of a causal LM.")
    add("--seed", type=int, default=0, help="Seed of the random token ids and the adapters.")
    add("--json", type=Path, help="Also write all figures to this file.")
    options = parser.parse_args(args)
    for name in ("steps", "rounds", "threads", "pairs"):
        if getattr(options, name) < 1:
            raise SaroError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    for task in options.task:
        if options.pairs % PER_STEP[task]:
            raise SaroError(
                f"--pairs is {options.pairs}; {task} needs a multiple of {PER_STEP[task]}, the records per step"
            )
    if options.data and len(options.task) > 1:
        raise SaroError("--data is a file for one task, but --task names several; name only the --task that it is for")
    return options


def main() -> int:
    options = parse()
    console = Console()
    # Find the model here: fetching the demo model would count as memory of a measurement.
    model = find_model(ModelConfig(name=find_demo(options.model))).path
    report = {"options": vars(options), "tasks": {}}
    for task in options.task:
        results: dict[str, list[Result]] = {side: [] for side in SIDES[task]}
        for number in range(options.rounds):
            for side in SIDES[task]:
                request = Request(
                    task=task,
                    side=side,
                    model=model,
                    data=options.data,
                    records=options.pairs,
                    pack_tokens=options.pack_tokens,
                    steps=options.steps,
                    warmup=options.warmup,
                    threads=options.threads,
                    seed=options.seed,
                )
                result = measure(request)
                results[side].append(result)
                print(
                    f"round {number + 1}/{options.rounds}  {task}  {side}: {result.tokens_per_second:.0f} tokens/s, "
                    f"peak {result.peak_gib:.2f} GiB",
                    file=sys.stderr,
                    flush=True,
                )
            check_same(task, results)
        figures = summary(task, results)
        title = (
            f"{task.upper()}: {options.model}, LoRA, fp32, {PER_STEP[task]} records per step, {options.data or 'random tokens'}, "
            f"{options.threads} threads; ratios to {BASELINE[task]}"
        )
        show(console, title, figures)
        report["tasks"][task] = {
            "figures": figures,
            "rounds": {side: [asdict(result) for result in rounds] for side, rounds in results.items()},
        }
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=2, default=str) + "\n")
    return 0


if __name__ == "__main__":
    run_program(main)
