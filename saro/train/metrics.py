"""Metrics: sums stay tensors until a line is due; lines go to metrics.jsonl, the trackers and the screen."""

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
    """Values on one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


class Meter:
    """Sums and counts by name, over packs, steps and processes: never a mean of means."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, metrics: dict[str, tuple[torch.Tensor, torch.Tensor | int]]) -> None:
        """Add sums and counts of one pack. No host read."""
        for name, (total, count) in metrics.items():
            # A fill on the device, where a copy of a number from the host would wait for all that is queued.
            number = (
                count.double() if isinstance(count, torch.Tensor) else total.new_full((), count, dtype=torch.float64)
            )
            pair = torch.stack([total.detach().double(), number])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def read(self, runtime: Runtime) -> dict[str, float]:
        """Means over all processes, those with a count of zero left out; then starts again."""
        names = sorted(self._sums)
        if not names:
            return {}
        sums = runtime.sum_(torch.stack([self._sums[name] for name in names])).tolist()
        self._sums.clear()
        return {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count}


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each with its ``step``.

    Args:
        path: the file.
        resume_step: lines of later steps are cut off; they will be written again.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if resume_step and path.exists() else []
        with atomic_write(path) as file:
            # The last line may be half written, if the run was killed while it wrote.
            whole = (line for line in lines if line.endswith("}"))
            file.writelines(line + "\n" for line in whole if json.loads(line)["step"] <= resume_step)

    def write(self, values: dict[str, float | int]) -> None:
        """Append one line; it is with the operating system when this returns."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


class Progress:
    """A progress bar over the steps; where there is no terminal, one line per log interval."""

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
