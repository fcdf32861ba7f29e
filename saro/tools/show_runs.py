"""`saro runs`: what runs were trained on, one line each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from saro.errors import SaroError
from saro.program import as_list, positional
from saro.report.training_files import read_training_run


@dataclass(frozen=True)
class Options:
    """Options of `saro runs`.

    Attributes:
        folders: Output folders of runs.
        names: A name to show for each of them; default the folders' own.
        steps: Print only the number of optimizer steps of each run, for scripts.
    """

    folders: list[str] = field(metadata=positional())
    names: list[str] | str = field(default_factory=list)
    steps: bool = False


def run(options: Options, console: Console) -> int:
    """Print the training records of runs by kind, without those that were too long, and their optimizer steps.

    Raises:
        SaroError: a folder holds no run that has begun to train, or there are names, and not one for each folder.
    """
    runs = [read_training_run(Path(folder)) for folder in options.folders]
    names = as_list(options.names) or [run.name for run in runs]
    if len(names) != len(runs):
        raise SaroError(f"--names names {len(names)} runs, and there are {len(runs)} folders; give one for each")
    for name, run in zip(names, runs, strict=True):
        if options.steps:
            console.out(run.num_steps, highlight=False)
            continue
        records = ", ".join(f"{number:,} {kind}" for kind, number in run.num_records.items()) or "unknown records"
        console.out(f"{name}: {records}; {run.num_steps:,} optimizer steps", highlight=False)
    return 0
