"""Collect metrics as tensors until a log line is due, write metrics.jsonl, and show progress on the terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from saro.distributed.runtime import Runtime
from saro.files import atomic_write


def format_metrics(values: Mapping[str, float]) -> str:
    """Format metrics as one line of text."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


class Meter:
    """Average metrics over packs, steps and ranks, from sums and counts by name: never an average of averages."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, metrics: dict[str, tuple[torch.Tensor, torch.Tensor | int]]) -> None:
        """Add the (sum, count) of each metric of one pack, without synchronising with the device."""
        for name, (total, count) in metrics.items():
            if isinstance(count, torch.Tensor):
                divisor = count.double()
            else:
                # new_full fills on the device; torch.tensor(count) would synchronise.
                divisor = total.new_full((), count, dtype=torch.float64)
            pair = torch.stack([total.detach().double(), divisor])  # (2,) sum, count
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def read(self, runtime: Runtime) -> dict[str, float]:
        """Return the average of each metric over all ranks, without those that have a count of zero, and reset."""
        names = sorted(self._sums)
        if not names:
            return {}
        sums = runtime.sum_(torch.stack([self._sums[name] for name in names])).tolist()  # (metrics, 2)
        self._sums.clear()
        return {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count}


class MetricsFile:
    """Write metrics.jsonl: one JSON object per line, each with its ``step``.

    Args:
        path: the file.
        resume_step: the step to resume from. Lines of later steps are dropped, because those steps will run again.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if resume_step and path.exists() else []
        with atomic_write(path) as file:
            # The last line may be incomplete, if the run was killed while writing it.
            complete = (line for line in lines if line.endswith("}"))
            file.writelines(line + "\n" for line in complete if json.loads(line)["step"] <= resume_step)

    def write(self, values: dict[str, float | int]) -> None:
        """Append one line and hand it to the operating system, so that a kill after the call cannot lose it."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


class Progress:
    """Show a progress bar over the steps, or one line per log interval if there is no terminal."""

    def __init__(self, total: int, start: int, shown: bool) -> None:
        self._shown = shown
        self._total = total
        self._bar = None
        if shown and sys.stderr.isatty() and "NO_PROGRESS" not in os.environ:
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1)

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def line(self, step: int, values: dict[str, float]) -> None:
        """Show the newest values."""
        text = format_metrics(values)
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif self._shown:
            print(f"step {step}/{self._total}  {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
