"""`saro synth export`: process pairs -> steps with labels, to train a process reward model with TRL."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console

from saro.program import positional
from saro.synth.export_prm import export_prm


@dataclass(frozen=True)
class Options:
    """Options of `saro synth export`.

    Attributes:
        file: JSONL file of pairs of stage pp or mirror.
        prm: JSONL file to write: {"prompt", "completions", "labels"}, TRL's stepwise supervision.
        overwrite: Replace the file if it exists.
    """

    file: str = field(metadata=positional())
    prm: str = field()
    overwrite: bool = False


def run(options: Options, console: Console) -> int:
    """Write the steps of process pairs with labels: right before the step that decides, wrong from there on.

    Raises:
        SaroError: the file holds no process pair, or the output exists.
    """
    exported = export_prm(options.file, options.prm, overwrite=options.overwrite)
    for reason, number in exported.left_out.items():
        console.out(f"{number:,} left out: {reason}", highlight=False)
    console.out(
        f"{exported.chains:,} chains with {exported.steps:,} steps, {exported.right:,} of them right, in {options.prm}",
        highlight=False,
    )
    return 0
