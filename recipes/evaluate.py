"""Evaluation: models x suites x attacks -> answers, verdicts and scores, on all of the launcher's ranks.

    accelerate launch recipes/evaluate.py --models '[demo, output/rw/final]' --suites '[xstest.jsonl]' [--option VALUE ...]

`saro evaluate` is the same in one process. saro/evaluate/evaluation.py reads from top to bottom.
"""

from __future__ import annotations

from rich.console import Console

from saro.distributed.run_ranks import run_ranks
from saro.distributed.runtime import Runtime
from saro.evaluate.evaluation import evaluate
from saro.evaluate.options import Options
from saro.program import parse_tool
from saro.report.score_table import score_table


def main() -> int:
    """Run the evaluation. Returns the exit code."""
    options = parse_tool(Options, "evaluate.py", __doc__)
    runtime = Runtime.start()
    scores = evaluate(options, runtime)
    if scores is not None and runtime.is_main:
        Console().print(score_table(scores))
        runtime.say(f"saro report {options.output} shows the answers behind these numbers")
    runtime.end()
    return 0


if __name__ == "__main__":
    run_ranks(main)
