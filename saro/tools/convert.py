"""`saro convert`: a public data set -> native JSONL."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console

from saro.program import positional
from saro.synth.public_sets import FORMATS, convert


@dataclass(frozen=True)
class Options:
    """Options of `saro convert`.

    Attributes:
        format: Format of the source.
        source: The data set as published, a JSON array or JSONL.
        target: The JSONL file to write.
        overwrite: Replace the target if it exists.
    """

    format: str = field(metadata=positional(choices=FORMATS))
    source: str = field(metadata=positional())
    target: str = field(metadata=positional())
    overwrite: bool = False


def run(options: Options, console: Console) -> int:
    """Convert a public data set to the native JSONL format.

    Raises:
        SaroError: the source is not as its format says, or the target exists.
    """
    converted = convert(options.format, options.source, options.target, overwrite=options.overwrite)
    console.out(f"{converted.records:,} records in {options.target}", highlight=False)
    if converted.left_out:
        places = ", ".join(converted.left_out)
        console.out(f"{len(converted.left_out):,} left out, without a chain of steps: {places}", highlight=False)
    return 0
