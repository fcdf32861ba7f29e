"""Reads what training runs wrote: manifest.json, metrics.jsonl and margins.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saro.errors import SaroError
from saro.manifest import read_manifest
from saro.report.plots import read_margins


@dataclass(frozen=True)
class TrainingRun:
    """The course of one training run.

    Attributes:
        name: name of the run's folder.
        manifest: content of manifest.json.
        lines: lines of metrics.jsonl, each with its ``step``.
        margins: steps of the evaluations, (S,), and margins of the held-out pairs in nats, (S, P); None without pairs.
    """

    name: str
    manifest: Mapping[str, Any]
    lines: tuple[Mapping[str, float], ...]
    margins: tuple[np.ndarray, np.ndarray] | None

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Return the steps at which a metric was written, and its values."""
        rows = [line for line in self.lines if isinstance(line.get(metric), (int, float))]
        return [int(line["step"]) for line in rows], [float(line[metric]) for line in rows]

    def last(self, metric: str) -> float | None:
        """Return the last value of a metric; None if it was never written."""
        values = self.series(metric)[1]
        return values[-1] if values else None

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps that the run has made."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def num_records(self) -> Mapping[str, int]:
        """Number of training records of each kind, without those that were left out; empty if the manifest has none."""
        return self.manifest.get("records", {}).get("train", {}).get("records", {})


def read_training_run(folder: Path) -> TrainingRun:
    """Read the folder of a run of recipes/rw.py or recipes/srpo.py.

    Raises:
        SaroError: the folder holds no run, or a file is damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise SaroError(f"{folder}: holds no training run; give the output folder of a recipe")
    path = folder / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        steps = [line["step"] for line in lines]
    except FileNotFoundError as error:
        raise SaroError(f"{path}: does not exist; the run has not begun to train") from error
    except (ValueError, TypeError, KeyError) as error:
        raise SaroError(f"{path}: is damaged; resume the run, which repairs it") from error
    margins = folder / "margins.jsonl"
    order = sorted(range(len(lines)), key=lambda i: steps[i])
    return TrainingRun(
        name=folder.resolve().name,
        manifest=manifest,
        lines=tuple(lines[i] for i in order),
        margins=read_margins(margins) if margins.exists() and margins.stat().st_size else None,
    )
