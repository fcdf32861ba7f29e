"""Writes metrics.jsonl and margins.jsonl, and shows progress on the terminal."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from saro.files import atomic_write

_MARGINS = "margins.jsonl"
# One line of margins.jsonl, see ``PairLog.take``.
Row = dict[str, float | int | str]


def format_metrics(values: Mapping[str, float]) -> str:
    """Format metrics as one line of text."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


class MetricsFile:
    """Writes metrics.jsonl: one JSON object per line, each with its ``step``.

    Args:
        path: the file.
        resume_step: the step to resume from. Lines of later steps are dropped, because those steps will run again.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        kept = _lines_until(path, resume_step) if resume_step else []
        _write_lines(path, kept)
        # Lines of the evaluations that the file had when it was opened.
        self.evaluations = [line for line in map(json.loads, kept) if any(k.startswith("eval/") for k in line)]

    def has_evaluation(self, step: int) -> bool:
        """Return True if the file had an evaluation after ``step`` steps when it was opened."""
        return any(line["step"] == step for line in self.evaluations)

    def write(self, values: dict[str, float | int]) -> None:
        """Append one line and hand it to the operating system, so that a kill after the call cannot lose it."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def drop_later_results(output: Path, step: int) -> None:
    """Delete what a run wrote after ``step`` from margins.jsonl, and after.json: these steps will run again.

    ``MetricsFile`` does the same for metrics.jsonl. The model of a finished run that is extended becomes
    ``final.step_N``: in ``final`` it would pass as that of the longer run.
    """
    (output / "after.json").unlink(missing_ok=True)
    final = output / "final"
    if final.is_dir():
        kept = output / f"final.step_{step:06d}"
        if kept.exists():
            shutil.rmtree(kept)
        final.rename(kept)
    margins = output / _MARGINS
    if margins.exists():
        _write_lines(margins, _lines_until(margins, step))


def write_margins(output: Path, step: int, rows: Sequence[Row]) -> None:
    """Append an evaluation's rows to margins.jsonl. Rows of this or later steps, from a killed run, are dropped."""
    margins = output / _MARGINS
    _write_lines(margins, [*_lines_until(margins, step - 1), *map(json.dumps, rows)])


def _lines_until(path: Path, step: int) -> list[str]:
    """Return the complete lines of a file, if it exists, that are not of a later step."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in lines if _step_of(line) <= step]


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    with atomic_write(path) as file:
        file.writelines(line + "\n" for line in lines)


def _step_of(line: str) -> float:
    """Return the step of a line; infinity if it is not whole, as after a kill or a power failure."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf


class Progress:
    """Shows a progress bar over the steps, or one line per log interval if there is no terminal, in its ``with`` block."""

    def __init__(self, total: int, start: int, shown: bool) -> None:
        self._shown = shown
        self._total = total
        self._bar = None
        if shown and sys.stderr.isatty() and "NO_PROGRESS" not in os.environ:
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1)

    def step(self) -> None:
        """Advance the bar by one step."""
        if self._bar is not None:
            self._bar.update()

    def line(self, step: int, values: dict[str, float]) -> None:
        """Show the newest values."""
        text = format_metrics(values)
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif self._shown:
            print(f"step {step}/{self._total}  {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bar, so that what is printed next, such as an error, has a line of its own."""
        if self._bar is not None:
            self._bar.close()
