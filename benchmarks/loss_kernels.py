"""Speed and memory of log-probs from hidden states: this project's kernels beside what else there is.

    python benchmarks/loss_kernels.py [--heads SmolLM2-135M ...] [--rounds 3] [--json FILE] [--plot FILE.png] [--smoke]

The sides take turns within a round, each beside a measurement of the GEMM rate, and shares are medians of shares within
a round, so that a slow moment of the machine slows all. A share of the GEMM rate counts the operations that the
mathematics needs; what a side computes a second time is lost time. Peak memory is what comes on top of the inputs: on
CUDA by the allocator, on a CPU as resident memory of a process that runs that one pass.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from loss_kernels_sides import HEADS, OPERATIONS, PASSES, SIDES, SMOKE, Case, Head, why_not
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from saro.distributed.runtime import keep_freed_memory
from saro.program import quiet_libraries

# Sides of the square GEMM whose rate is the yardstick.
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
# Relative difference of the sums of log-probs that rounding explains.
SAME = {torch.float32: 1e-5, torch.bfloat16: 2e-3}


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time of one call."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def gemm(device: torch.device, dtype: torch.dtype, size: int) -> tuple[Callable[[], object], int]:
    """A square GEMM, and its operations."""
    a, b, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out), 2 * size**3


def _memory(key: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _resident_peak(side: str, which: str, head: Head, rows: int, dtype: torch.dtype, threads: int) -> int:
    """Bytes that one pass takes on top of its inputs; in a process of its own."""
    quiet_libraries()
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    # Libraries and threads take their memory before, not within.
    warm = Case.of(Head(head.width, 512, 64), 64, device, dtype)
    for _ in range(2):
        warm.run(side, which)
    case = Case.of(head, rows, device, dtype)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    case.run(side, which)
    return max(0, _memory("VmHWM") - before)


def peak_bytes(side: str, which: str, head: Head, case: Case, threads: int) -> int | None:
    """Memory of one pass on top of its inputs; None where it cannot be told."""
    if case.hidden.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.run(side, which)
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        rows, dtype = len(case.hidden), case.hidden.dtype
        return process.submit(_resident_peak, side, which, head, rows, dtype, threads).result()


def check_same(case: Case, sides: Sequence[str]) -> None:
    """End the program unless all sides compute the same sum of log-probs."""
    sums = {side: case.run(side, "scoring").item() for side in sides}
    first = sums[sides[0]]
    for side, total in sums.items():
        if not abs(total - first) <= SAME[case.hidden.dtype] * abs(first):
            raise SystemExit(f"{side} sums to {total}, {sides[0]} to {first}: they do not compute the same")


def measure(
    head: Head, sides: Sequence[str], passes: Sequence[str], case: Case, options: argparse.Namespace, step: Callable
) -> list[dict]:
    """Figures of each side and pass on one head; ``step`` is called after each measurement."""
    device, rows = case.hidden.device, len(case.hidden)
    yardstick, gemm_operations = gemm(device, case.hidden.dtype, 256 if options.smoke else GEMM_SIZE[device.type])
    check_same(case, sides)
    yardstick()
    results = []
    for which in passes:
        operations = OPERATIONS[which] * rows * head.width * head.vocab
        times: dict[str, list[float]] = {side: [] for side in sides}
        shares: dict[str, list[float]] = {side: [] for side in sides}
        for round_ in range(options.warmup + options.rounds):
            for side in sides:
                rate = gemm_operations / seconds(yardstick, device)
                taken = seconds(lambda side=side, which=which: case.run(side, which), device)
                step()
                if round_ >= options.warmup:
                    times[side].append(taken)
                    shares[side].append(operations / taken / rate)
        for side in sides:
            results.append(
                {
                    "side": side,
                    "pass": which,
                    "seconds": statistics.median(times[side]),
                    "share_of_gemm_rate": statistics.median(shares[side]),
                    "peak_bytes": peak_bytes(side, which, head, case, options.threads),
                    "floor_bytes": case.floor_bytes(which),
                }
            )
            step()
    return results


def cells(figures: dict | None) -> list[str]:
    """Time, share of the GEMM rate, memory of one side in one pass, as they stand in the table."""
    if figures is None:
        return ["", "", ""]
    peak, floor = figures["peak_bytes"], figures["floor_bytes"]
    memory = "" if peak is None else f"{peak / 2**20:,.0f} ({floor / 2**20:,.0f})"
    return [f"{1e3 * figures['seconds']:,.1f}", f"{figures['share_of_gemm_rate']:.0%}", memory]


def show(console: Console, name: str, entry: dict) -> None:
    """Print the figures of a head."""
    dtype, rows = entry["dtype"], entry["rows"]
    title = f"{name}: N {rows:,}, D {entry['width']:,}, V {entry['vocab']:,}, {dtype}, {entry['device']}"
    by_side = {side: {r["pass"]: r for r in entry["results"] if r["side"] == side} for side in entry["sides"]}
    table = Table(title=title, caption="MiB on top of the inputs (of log-probs and gradients alone)")
    table.add_column("")
    passes = [which for which in PASSES if any(which in of_side for of_side in by_side.values())]
    for which in passes:
        for column in (f"{which}, ms", "of GEMM", "MiB"):
            table.add_column(column, justify="right")
    for side, of_side in by_side.items():
        table.add_row(side, *(cell for which in passes for cell in cells(of_side.get(which))))
    console.print(table)


def plot(heads: dict[str, dict], file: str) -> None:
    """A picture of shares of the GEMM rate and of peak memory, a row of panels for each pass with gradients."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    passes = [which for which in PASSES if any(r["pass"] == which for e in heads.values() for r in e["results"])]
    sides = list(dict.fromkeys(side for entry in heads.values() for side in entry["sides"]))
    figure, axes = pyplot.subplots(
        len(passes), 2, figsize=(12, 0.5 + 3 * len(passes)), squeeze=False, layout="constrained"
    )
    thickness = 0.8 / len(sides)
    for (left, right), which in zip(axes, passes, strict=True):
        for i, side in enumerate(sides):
            found = [
                next((r for r in entry["results"] if (r["side"], r["pass"]) == (side, which)), None)
                for entry in heads.values()
            ]
            places = [x + i * thickness for x in range(len(heads))]
            shares = [100 * r["share_of_gemm_rate"] if r else 0 for r in found]
            memory = [r["peak_bytes"] / 2**20 if r and r["peak_bytes"] else 0 for r in found]
            for panel, heights in ((left, shares), (right, memory)):
                bars = panel.bar(places, heights, thickness, label=side)
                panel.bar_label(bars, [f"{h:,.0f}" if h else "" for h in heights], fontsize=6)
        left.set_ylabel("% of the GEMM rate")
        right.set_ylabel("peak MiB on top of the inputs")
        right.set_yscale("symlog", linthresh=10)
        right.margins(y=0.1)
        for panel in (left, right):
            panel.set_title("scoring" if which == "scoring" else f"forward and backward, {which} head", fontsize=10)
            panel.set_xticks([x + 0.4 - thickness / 2 for x in range(len(heads))], list(heads), fontsize=8)
    labels = axes[0][0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside upper center", ncols=len(sides), fontsize=8, frameon=False)
    figure.savefig(file, dpi=150)


def parse(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Options from the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--heads", nargs="+", choices=list(HEADS), default=list(HEADS), help="Whose LM heads.")
    add("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), help="What is measured, where it can run.")
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="Which gradients are computed.")
    add("--rows", type=int, help="Rows scored at once; 4,096 on a GPU, 256 to 2,048 on a CPU where not given.")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 on a GPU.")
    add("--rounds", type=int, default=3, help="Measured rounds, in each of which every side runs once.")
    add("--warmup", type=int, default=1, help="Rounds before them, which touch new memory and are slow.")
    add("--threads", type=int, default=psutil.cpu_count(logical=False) or 1, help="CPU threads.")
    add("--json", metavar="FILE", help="Also write the figures here.")
    add("--plot", metavar="FILE", help="Also draw them here, as a PNG.")
    add("--smoke", action="store_true", help="One round on a tiny head, to see that all sides run.")
    options = parser.parse_args(args)
    for name in ("rounds", "threads", *(["rows"] if options.rows is not None else [])):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if options.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib; pip install -e '.[bench]'")
    if options.warmup < 0:
        parser.error(f"--warmup is {options.warmup}; it must be at least 0")
    return options


def main(args: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    options = parse(args)
    quiet_libraries()
    keep_freed_memory()  # as in training, for all sides
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(
        torch, {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(options.dtype, options.dtype)
    )
    if options.smoke:
        options.rounds, options.warmup = 1, 0
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has room for the whole table
    sides = []
    for side in options.sides:
        reason = why_not(side, device, dtype)
        if reason is None:
            sides.append(side)
        else:
            console.print(f"{side} is left out: {reason}", highlight=False)
    heads = SMOKE if options.smoke else {name: HEADS[name] for name in options.heads}
    results = {}
    each = len(sides) * len(options.passes) * (options.warmup + options.rounds + 1)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(heads) * each)
        for name, head in heads.items():
            rows = options.rows or (head.cpu_rows if device.type == "cpu" else head.gpu_rows)
            case = Case.of(head, rows, device, dtype)
            found = measure(head, sides, options.passes, case, options, lambda: progress.advance(task))
            results[name] = {
                "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{options.threads} CPU threads",
                "dtype": str(dtype).removeprefix("torch."),
                "rows": rows,
                "width": head.width,
                "vocab": head.vocab,
                "sides": sides,
                "results": found,
            }
            del case
            show(console, name, results[name])
    if options.json:
        Path(options.json).write_text(json.dumps({"torch": torch.__version__, "heads": results}, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
