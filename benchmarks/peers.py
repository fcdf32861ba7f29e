"""Compare this project with TRL: speed and memory of the same training steps, on a CPU or one GPU.

    python benchmarks/peers.py [--task srpo rw] [--rounds 3] [--data FILE] [--json FILE]
    python benchmarks/peers.py --task srpo --method qlora --gradient_checkpointing --model FOLDER --pack_tokens 8192

SRPO is compared with DPOTrainer with precomputed reference log-probs, RW with SFTTrainer. Each measurement runs in its
own process, and the sides take turns, so that a slow moment of the machine slows all of them. All sides train on the
same token ids in the same steps, with the same threads and allocator, and LoRA of rank 16 on all linear layers: in float32
on a CPU, in bfloat16 on a GPU. It checks that they see the same data and the same model. The time of a TRL step is that of
the step only; for this project it includes packing and logging. Ratios are medians over the rounds.

Memory is that of tensors on a GPU, counted from the end of loading, and resident memory on a CPU. A side that fails, as TRL
may for lack of memory, is left out with its error, and the exit code is 1.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import psutil
import torch
from peers_data import BASELINE, FIRST_METRICS, LENGTHS, PER_STEP, SIDES, Part, PartLengths, Request, Result
from rich.console import Console
from rich.table import Table

from saro.config import DEMO, ModelConfig
from saro.demo import find_demo
from saro.errors import SaroError
from saro.files import atomic_write
from saro.model.source import find_model
from saro.program import run_program

# Keep freed memory for the next step on every side. saro/distributed/runtime.py sets the same through mallopt.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
# Relative difference allowed between the first metrics of two sides. In float32, rounding changes them by a hundredth of
# this, one wrong token by a hundred times as much. In bfloat16, every logit is rounded to about three digits.
TOLERANCE = {"cpu": 1e-4, "cuda": 3e-3}

# side -> what it does, printed below the table
DESCRIPTIONS = {
    "saro": "packs of trees: the shared prefix of a pair is read once; RW: packs of complete examples",
    "saro, no sharing": "packs in which both sequences of a pair are read completely",
    "trl": "all pairs of a step in one padded batch",
    "trl, one by one": "one pair per batch, gradients accumulated over the step",
    "trl, packed": "packing (bfd): the examples of a step in one row, separated by a row x row mask (SDPA)",
    "trl, padded": "all examples of a step in one padded batch",
}


class MeasurementFailed(Exception):
    """The process of a measurement failed; the message is its exit code and the last line of its error output."""


def measure(request: Request, limit: float | None) -> Result:
    """Run one measurement in its own process, for at most ``limit`` seconds.

    Raises:
        MeasurementFailed: the process failed, and its error output is printed first; or it took longer.
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            **ALLOCATOR,
            "OMP_NUM_THREADS": str(request.threads),
            "HF_DATASETS_CACHE": cache,
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        command = [sys.executable, str(Path(__file__).with_name("peers_worker.py")), json.dumps(asdict(request))]
        try:
            process = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=limit
            )
        except subprocess.TimeoutExpired as error:
            print((error.stderr or b"").decode(errors="replace"), file=sys.stderr)
            raise MeasurementFailed(f"stopped after {limit:g} s, its --limit") from None
    if process.returncode:
        print(process.stderr, file=sys.stderr)
        last_line = process.stderr.strip().rpartition("\n")[2]
        raise MeasurementFailed(f"exit code {process.returncode}: {last_line}")
    # Libraries may print before the result.
    return Result(**json.loads(process.stdout.splitlines()[-1]))


def check_same(task: str, results: dict[str, list[Result]], tolerance: float) -> None:
    """Raise SaroError unless all sides start from the same data and the same model."""
    if not results:
        return
    name = BASELINE[task] if BASELINE[task] in results else next(iter(results))
    expected = results[name][0]
    for side, rounds in results.items():
        for result in rounds:
            same = all(math.isclose(result.first[m], expected.first[m], rel_tol=tolerance) for m in FIRST_METRICS[task])
            if not same or result.tokens != expected.tokens:
                raise SaroError(
                    f"{task}: {side} starts with {result.first} on {result.tokens} tokens, {name} with "
                    f"{expected.first} on {expected.tokens}; they do not train on the same data or model"
                )


# Names of `Result`'s figures whose medians are reported, and of those that are also compared with the baseline.
FIGURES = (
    "records_per_second",
    "tokens_per_second",
    "peak_gib",
    "reserved_gib",
    "above_load_gib",
    "reference_seconds",
    "read_share",
)
COMPARED_FIGURES = ("records_per_second", "peak_gib", "reserved_gib", "above_load_gib", "reference_seconds")


def summary(task: str, results: dict[str, list[Result]]) -> dict[str, dict[str, float | None]]:
    """Return {side: {figure: value}}: medians over the rounds; ``*_ratio`` compare with the baseline of the same round.

    Without a baseline, all ratios are None.
    """
    baseline = results.get(BASELINE[task])

    def median(rounds: list[Result], name: str) -> float | None:
        values = [getattr(result, name) for result in rounds]
        return None if None in values else statistics.median(values)

    def ratio(rounds: list[Result], name: str) -> float | None:
        if baseline is None:
            return None
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
    "reserved, GiB": ("reserved_gib", "{:.2f}"),
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


def parse_part(text: str) -> Part:
    """Read the length of a part of generated records: MEDIAN,SIGMA,MOST."""
    median, sigma, most = text.split(",")
    return Part(int(median), float(sigma), int(most))


def parse(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line. Raises SaroError if a value is invalid."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--task", nargs="+", choices=list(SIDES), default=list(SIDES), help="Stages to compare.")
    all_sides = list(dict.fromkeys(side for sides in SIDES.values() for side in sides))
    add("--side", nargs="+", choices=all_sides, default=all_sides, help="Sides to measure, in this order.")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the first GPU, if there is one.")
    add("--method", choices=["lora", "qlora"], default="lora", help="qlora trains LoRA on a 4-bit base (NF4).")
    add("--gradient_checkpointing", action="store_true", help="Recompute activations, on all sides.")
    add("--steps", type=int, default=4, help="Measured optimizer steps in each measurement.")
    add("--warmup", type=int, default=2, help="Optimizer steps before these; they touch new memory and are slow.")
    add("--rounds", type=int, default=3, help="Measurements of each side.")
    add("--limit", type=float, help="Seconds after which a measurement is stopped; default none.")
    add("--threads", type=int, default=psutil.cpu_count(logical=False) or 1, help="CPU threads.")
    add(
        "--pairs",
        type=int,
        default=32,
        help="Number of records (SRPO: pairs, RW: examples); training cycles over them.",
    )
    add("--records_per_step", type=int, help="Records of an optimizer step; default SRPO 4, RW 8.")
    for field in fields(PartLengths):
        part = getattr(LENGTHS, field.name)
        add(
            f"--{field.name}_tokens",
            type=parse_part,
            default=part,
            metavar="MEDIAN,SIGMA,MOST",
            help="Length of this part of generated pairs: median, standard deviation of its logarithm, upper limit.",
        )
    add("--pack_tokens", type=int, default=2048, help="Tokens per pack of this project; longer records are left out.")
    add("--data", help="JSONL file of native records, for one task; default: random token ids.")
    add("--model", default=DEMO, help="Folder or hub name of a causal LM.")
    add("--seed", type=int, default=0, help="Seed of the random token ids and the adapters.")
    add("--json", type=Path, help="Also write all figures to this file, after each measurement.")
    options = parser.parse_args(args)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.records_per_step is None:
        options.records_per_step = dict(PER_STEP)
    else:
        options.records_per_step = dict.fromkeys(SIDES, options.records_per_step)
    for name in ("steps", "rounds", "threads", "pairs"):
        if getattr(options, name) < 1:
            raise SaroError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    for task in options.task:
        per_step = options.records_per_step[task]
        if per_step < 1:
            raise SaroError(f"--records_per_step is {per_step}; it must be at least 1")
        if options.pairs % per_step:
            raise SaroError(f"--pairs is {options.pairs}; {task} needs a multiple of {per_step}, the records per step")
        if not set(options.side) & set(SIDES[task]):
            raise SaroError(f"--side names no side of {task}; it has {', '.join(SIDES[task])}")
    if options.data and len(options.task) > 1:
        raise SaroError("--data is a file for one task, but --task names several; name only the --task that it is for")
    return options


def make_request(task: str, side: str, model: str, options: argparse.Namespace) -> Request:
    """Return the request of one measurement."""
    lengths = PartLengths(**{field.name: getattr(options, f"{field.name}_tokens") for field in fields(PartLengths)})
    return Request(
        task=task,
        side=side,
        model=model,
        device=options.device,
        method=options.method,
        gradient_checkpointing=options.gradient_checkpointing,
        data=options.data,
        lengths=lengths,
        records=options.pairs,
        per_step=options.records_per_step[task],
        pack_tokens=options.pack_tokens,
        steps=options.steps,
        warmup=options.warmup,
        threads=options.threads,
        seed=options.seed,
    )


def compare_sides(task: str, model: str, options: argparse.Namespace, write: Callable[[dict], None]) -> dict:
    """Measure the sides of a task in turns.

    Args:
        write: is called with what this function returns, after each measurement.

    Returns:
        "figures" of each side; "rounds", its results; "errors", the error of each side that failed and is left out.

    Raises:
        SaroError: the sides do not train on the same data or model.
    """
    sides = [side for side in options.side if side in SIDES[task]]
    results: dict[str, list[Result]] = {side: [] for side in sides}
    errors: dict[str, str] = {}
    entry: dict = {}
    for number in range(options.rounds):
        for side in sides:
            if side in errors:
                continue
            where = f"round {number + 1}/{options.rounds}  {task}  {side}"
            try:
                result = measure(make_request(task, side, model, options), options.limit)
            except MeasurementFailed as error:
                errors[side] = str(error)
                print(f"{where}: failed: {error}", file=sys.stderr, flush=True)
            else:
                results[side].append(result)
                speed = f"{result.tokens_per_second:.0f} tokens/s, peak {result.peak_gib:.2f} GiB"
                print(f"{where}: {speed}", file=sys.stderr, flush=True)
            # Ratios need the same rounds on both sides: of an unfinished round, only the results are written.
            rounds = {side: results[side] for side in sides if side not in errors}
            complete = min(len(done) for done in rounds.values()) if rounds else 0
            entry = {
                "figures": summary(task, {s: done[:complete] for s, done in rounds.items()}) if complete else {},
                "rounds": {side: [asdict(result) for result in done] for side, done in results.items()},
                "errors": errors,
            }
            write(entry)
        check_same(task, {s: done for s, done in results.items() if done}, TOLERANCE[options.device])
    return entry


def main() -> int:
    options = parse()
    console = Console()
    # Find the model here: fetching the demo model would count as memory of a measurement.
    model = find_model(ModelConfig(name=find_demo(options.model))).path
    report: dict = {"options": {k: v for k, v in vars(options).items() if k != "json"}, "tasks": {}}

    def write(task: str, entry: dict) -> None:
        report["tasks"][task] = entry
        if options.json is not None:
            with atomic_write(options.json) as out:
                out.write(json.dumps(report, indent=2, default=str) + "\n")

    failed = False
    for task in options.task:
        entry = compare_sides(task, model, options, partial(write, task))
        device = f"{options.threads} threads"
        if options.device == "cuda":
            device = next((r["device"] for done in entry["rounds"].values() for r in done), "GPU")
        dtype = "bf16" if options.device == "cuda" else "fp32"
        recomputation = ", gradient checkpointing" if options.gradient_checkpointing else ""
        title = (
            f"{task.upper()}: {options.model}, {options.method}, {dtype}{recomputation}, "
            f"{options.records_per_step[task]} records per step, {options.data or 'random tokens'}, {device}; "
            f"ratios to {BASELINE[task]}"
        )
        show(console, title, entry["figures"])
        for side, error in entry["errors"].items():
            failed = True
            console.print(f"{side} failed: {error}", highlight=False, markup=False)
    return int(failed)


if __name__ == "__main__":
    run_program(main)
