"""Measure speed and memory of log-probs from hidden states, for this project's kernels and for others.

    python benchmarks/loss_kernels.py [--heads SmolLM2-135M ...] [--rounds 3] [--json FILE] [--plot FILE.png] [--smoke]

The sides take turns in each round, and the GEMM rate is measured next to each of them. Shares are medians of the shares
within a round, so that a slow moment of the machine slows all sides. A share of the GEMM rate counts only the operations
that the mathematics needs: recomputation counts as lost time. Peak memory is memory on top of the inputs: on CUDA from
the allocator, on a CPU the resident memory of a process that runs only this pass.

A side that fails is left out with its error, and the others are still measured. The exit code is 1 if a side computes
something else than the definition, or if one of this project's own sides fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from loss_kernels_sides import HEADS, OPERATIONS, OWN_SIDES, PASSES, SIDES, SMOKE, Case, Head, why_unavailable
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from yardstick import gemm_per_second, seconds

from saro.distributed.runtime import keep_freed_memory
from saro.files import atomic_write
from saro.program import quiet_libraries

Result = TypeVar("Result")

# Relative difference of a sum of log-probs from the definition's that rounding can explain.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3}


def _memory(key: str) -> int:
    """Read an entry of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _resident_peak(side: str, pass_name: str, head: Head, rows: int, dtype: torch.dtype, threads: int) -> int:
    """Return the bytes that one pass takes on top of its inputs. Call it in a new process."""
    quiet_libraries()
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    # Warm up, so that the memory of libraries and threads is not counted.
    warm = Case.of(Head(head.width, 512, 64), 64, device, dtype)
    for _ in range(2):
        warm.run(side, pass_name)
    case = Case.of(head, rows, device, dtype)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak, to the present resident memory
    case.run(side, pass_name)
    return max(0, _memory("VmHWM") - before)


def peak_bytes(side: str, pass_name: str, head: Head, case: Case, threads: int) -> int | None:
    """Return the bytes of one pass on top of its inputs; None if this system does not report them."""
    if case.hidden.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.run(side, pass_name)
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    # Each pass gets a new process: a fork of one that has imported the libraries and computed nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers", "saro.distributed.runtime", "saro_kernels"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        rows, dtype = len(case.hidden), case.hidden.dtype
        return process.submit(_resident_peak, side, pass_name, head, rows, dtype, threads).result()


class DifferentSum(Exception):
    """Raised if a side computes another sum of log-probs than the definition."""


def check_same(case: Case, side: str, expected: float) -> None:
    """Raise DifferentSum unless a side computes the expected sum of log-probs."""
    total = case.run(side, "scoring").item()
    if not abs(total - expected) <= TOLERANCE[case.hidden.dtype] * abs(expected):
        raise DifferentSum(f"it sums to {total}, the definition to {expected}: they do not compute the same")


def attempt(work: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Return what ``work`` returns and None, or None and the first line of the error that it raised."""
    try:
        return work(), None
    except Exception as error:
        line = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
    # Here the traceback, which holds the side's tensors, is gone.
    if out_of_memory:
        gc.collect()
        torch.cuda.empty_cache()
    return None, line


def measure(
    head: Head, sides: Sequence[str], passes: Sequence[str], case: Case, options: argparse.Namespace, step: Callable
) -> Iterator[list[dict]]:
    """Measure each pass and side on one head; ``step`` is called after each measurement.

    Yields, after each pass, one dict for each side: the figures, or "error".
    """
    device, dtype, rows = case.hidden.device, case.hidden.dtype, len(case.hidden)
    gemm = partial(gemm_per_second, device, dtype, 256 if options.smoke else None)
    gemm()  # warm up
    expected = case.defined_sum()
    errors: dict[tuple[str, str], str] = {}  # (side, pass) -> first line
    for side in sides:
        _, error = attempt(partial(check_same, case, side, expected))
        if error is not None:
            errors |= {(side, pass_name): error for pass_name in passes}
    for pass_name in passes:
        results = []
        operations = OPERATIONS[pass_name] * rows * head.width * head.vocab
        runs: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}  # (seconds, share of the GEMM rate)
        for _ in range(options.warmup + options.rounds):
            for side in sides:
                if (side, pass_name) not in errors:
                    run, error = attempt(partial(time_run, case, side, pass_name, operations, gemm))
                    if error is None:
                        runs[side].append(run)
                    else:
                        errors[side, pass_name] = error
                step()
        for side in sides:
            figures: dict = {"side": side, "pass": pass_name}
            if (side, pass_name) not in errors:
                peak, error = attempt(partial(peak_bytes, side, pass_name, head, case, options.threads))
                if error is not None:
                    errors[side, pass_name] = error
            if (side, pass_name) in errors:
                figures["error"] = errors[side, pass_name]
            else:
                times, shares = zip(*runs[side][options.warmup :], strict=True)
                figures |= {
                    "seconds": statistics.median(times),
                    "share_of_gemm_rate": statistics.median(shares),
                    "peak_bytes": peak,
                    "floor_bytes": case.floor_bytes(pass_name),
                }
            results.append(figures)
            step()
        yield results


def time_run(case: Case, side: str, pass_name: str, operations: int, gemm: Callable[[], float]) -> tuple[float, float]:
    """Return the seconds of one run, and its share of the rate of a GEMM that runs just before."""
    rate = gemm()
    elapsed = seconds(partial(case.run, side, pass_name), case.hidden.device)
    return elapsed, operations / elapsed / rate


def is_wrong(result: dict) -> bool:
    """Tell whether a side computes something else, or one of this project's own sides fails."""
    error = result.get("error")
    return error is not None and (error.startswith(DifferentSum.__name__) or result["side"] in OWN_SIDES)


def format_cells(figures: dict | None) -> list[str]:
    """Format time, share of the GEMM rate and memory of one side in one pass; empty if it was not asked for."""
    if figures is None:
        return ["", "", ""]
    if "error" in figures:
        return ["failed", "", ""]
    peak, floor = figures["peak_bytes"], figures["floor_bytes"]
    memory = "" if peak is None else f"{peak / 2**20:,.0f} ({floor / 2**20:,.0f})"
    return [f"{1e3 * figures['seconds']:,.1f}", f"{figures['share_of_gemm_rate']:.0%}", memory]


def show(console: Console, name: str, entry: dict) -> None:
    """Print the figures of a head."""
    dtype, rows = entry["dtype"], entry["rows"]
    title = f"{name}: N {rows:,}, D {entry['width']:,}, V {entry['vocab']:,}, {dtype}, {entry['device']}"
    table = Table(title=title, caption="MiB on top of the inputs (in parentheses: only log-probs and gradients)")
    table.add_column("")
    measured = {result["pass"] for result in entry["results"]}
    passes = [pass_name for pass_name in PASSES if pass_name in measured]
    for pass_name in passes:
        for column in (f"{pass_name}, ms", "of GEMM", "MiB"):
            table.add_column(column, justify="right")
    for side in entry["sides"]:
        figures = {result["pass"]: result for result in entry["results"] if result["side"] == side}
        table.add_row(side, *(cell for pass_name in passes for cell in format_cells(figures.get(pass_name))))
    console.print(table)
    for result in entry["results"]:
        if "error" in result:
            console.print(f"{result['side']}, {result['pass']}: {result['error']}", highlight=False, markup=False)


def _find_result(entry: dict, side: str, pass_name: str) -> dict | None:
    """Return the figures of a side in a pass on one head; None if there are none."""
    results = (r for r in entry["results"] if "error" not in r)
    return next((r for r in results if (r["side"], r["pass"]) == (side, pass_name)), None)


def plot(heads: dict[str, dict], file: str) -> None:
    """Write a PNG with a row of panels for each pass: shares of the GEMM rate, and peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = {result["pass"] for entry in heads.values() for result in entry["results"]}
    passes = [pass_name for pass_name in PASSES if pass_name in measured]
    sides = list(dict.fromkeys(side for entry in heads.values() for side in entry["sides"]))
    figure, axes = pyplot.subplots(
        len(passes), 2, figsize=(12, 0.5 + 3 * len(passes)), squeeze=False, layout="constrained"
    )
    thickness = 0.8 / len(sides)
    for (left, right), pass_name in zip(axes, passes, strict=True):
        for i, side in enumerate(sides):
            results = [_find_result(entry, side, pass_name) for entry in heads.values()]
            positions = [x + i * thickness for x in range(len(heads))]
            shares = [100 * r["share_of_gemm_rate"] if r else 0 for r in results]
            memory = [r["peak_bytes"] / 2**20 if r and r["peak_bytes"] else 0 for r in results]
            for panel, heights in ((left, shares), (right, memory)):
                bars = panel.bar(positions, heights, thickness, label=side)
                panel.bar_label(bars, [f"{h:,.0f}" if h else "" for h in heights], fontsize=6)
        left.set_ylabel("% of the GEMM rate")
        right.set_ylabel("peak MiB on top of the inputs")
        right.set_yscale("symlog", linthresh=10)
        right.margins(y=0.1)
        for panel in (left, right):
            panel.set_title(
                "scoring" if pass_name == "scoring" else f"forward and backward, {pass_name} head", fontsize=10
            )
            panel.set_xticks([x + 0.4 - thickness / 2 for x in range(len(heads))], list(heads), fontsize=8)
    labels = axes[0][0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside upper center", ncols=len(sides), fontsize=8, frameon=False)
    figure.savefig(file, dpi=150)


def parse(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--heads", nargs="+", choices=list(HEADS), default=list(HEADS), help="Models whose LM heads are measured.")
    add(
        "--sides",
        nargs="+",
        choices=list(SIDES),
        default=list(SIDES),
        help="Implementations to measure; one that cannot run is left out.",
    )
    add(
        "--passes",
        nargs="+",
        choices=PASSES,
        default=list(PASSES),
        help="Passes to measure: they differ in the gradients.",
    )
    add("--rows", type=int, help="Rows scored at once; default 4,096 on a GPU, 256 to 2,048 on a CPU.")
    add(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="auto: bfloat16 on a GPU, else float32.",
    )
    add("--rounds", type=int, default=3, help="Measured rounds; each side runs once per round.")
    add("--warmup", type=int, default=1, help="Rounds before these; they touch new memory and are slow.")
    add("--threads", type=int, default=psutil.cpu_count(logical=False) or 1, help="CPU threads.")
    add("--json", metavar="FILE", help="Also write the figures to this file, after each pass.")
    add("--plot", metavar="FILE", help="Also draw them to this file, as a PNG.")
    add("--smoke", action="store_true", help="Run one round on a tiny head, to check that all sides run.")
    options = parser.parse_args(args)
    for name in ("rounds", "threads", *(["rows"] if options.rows is not None else [])):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if options.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib; pip install -e '.[bench]'")
    if options.warmup < 0:
        parser.error(f"--warmup is {options.warmup}; it must be at least 0")
    return options


def main(args: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the files that the options name, and return the exit code."""
    options = parse(args)
    quiet_libraries()
    keep_freed_memory()  # for all sides, as in training
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    else:
        dtype = getattr(torch, options.dtype)
    if options.smoke:
        options.rounds, options.warmup = 1, 0
    console = Console()
    if not console.is_terminal:
        console.width = 160  # wide enough for the table; rich assumes 80 columns in a file
    sides = []
    for side in options.sides:
        reason = why_unavailable(side, device, dtype)
        if reason is None:
            sides.append(side)
        else:
            console.print(f"{side} is left out: {reason}", highlight=False)
    heads = SMOKE if options.smoke else {name: HEADS[name] for name in options.heads}
    results = {}
    steps_per_head = len(sides) * len(options.passes) * (options.warmup + options.rounds + 1)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(heads) * steps_per_head)
        for name, head in heads.items():
            rows = options.rows or (head.cpu_rows if device.type == "cpu" else head.gpu_rows)
            case = Case.of(head, rows, device, dtype)
            results[name] = {
                "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{options.threads} CPU threads",
                "dtype": str(dtype).removeprefix("torch."),
                "rows": rows,
                "width": head.width,
                "vocab": head.vocab,
                "sides": sides,
                "results": [],
            }
            for figures in measure(head, sides, options.passes, case, options, lambda: progress.advance(task)):
                results[name]["results"] += figures
                if options.json:
                    with atomic_write(options.json) as out:
                        out.write(json.dumps({"torch": torch.__version__, "heads": results}, indent=1) + "\n")
            del case
            show(console, name, results[name])
    if options.plot:
        plot(results, options.plot)
    return int(any(is_wrong(result) for entry in results.values() for result in entry["results"]))


if __name__ == "__main__":
    sys.exit(main())
