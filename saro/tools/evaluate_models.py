"""`saro evaluate`: models x suites x attacks -> answers, verdicts and scores; recipes/evaluate.py for one process."""

from __future__ import annotations

from rich.console import Console

from saro.distributed.runtime import Runtime
from saro.evaluate.evaluation import evaluate
from saro.evaluate.options import Options
from saro.report.score_table import score_table


def run(options: Options, console: Console) -> int:
    """Compare models: do they harm less, refuse less, know as much, and what does it cost?

    Raises:
        SaroError: a model, suite, attack or judge does not exist or is not sound.
    """
    runtime = Runtime.start()
    scores = evaluate(options, runtime)
    if scores is not None:
        console.print(score_table(scores))
        console.print(f"saro report {options.output} shows the answers behind these numbers", highlight=False)
    return 0
