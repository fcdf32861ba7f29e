"""`saro export-eval`: suites -> files for lm-eval, Inspect or HarmBench."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console

from saro.demo import suite_files
from saro.evaluate.export_suites import export_suites
from saro.evaluate.suite import read_suite
from saro.program import positional


@dataclass(frozen=True)
class Options:
    """Options of `saro export-eval`.

    Attributes:
        suites: Suites to export, JSONL files; "demo" is the demo's suites.
        to: The tool that reads the files.
        output: The folder to make.
        overwrite: Replace the folder if it exists.
    """

    suites: list[str] = field(metadata=positional())
    to: Literal["lm-eval", "inspect", "harmbench"] = field()
    output: str = field()
    overwrite: bool = False


def run(options: Options, console: Console) -> int:
    """Write suites as files that another evaluation tool reads.

    Raises:
        SaroError: a suite is faulty, the folder exists, or the tool can score no item.
    """
    suites = [read_suite(path) for path in suite_files(options.suites)]
    exported = export_suites(suites, options.to, options.output, overwrite=options.overwrite)
    for name, items in exported.tasks.items():
        console.out(f"{name}: {items:,} items", highlight=False)
    for reason, ids in exported.left_out.items():
        console.out(f"{len(ids):,} left out, {reason}", highlight=False)
    console.out(f"written to {options.output}; {_NEXT[options.to].format(folder=options.output)}", highlight=False)
    return 0


_NEXT = {
    "lm-eval": "lm_eval --include_path {folder} --tasks saro --apply_chat_template",
    "inspect": "inspect eval {folder}/saro_suites.py --model-role grader=MODEL",
    "harmbench": "give saro_behaviors.csv to HarmBench as --behaviors_path",
}
