"""`saro synth`: prompts -> draws -> verdicts -> selection -> training records; recipes/synth.py for one process."""

from __future__ import annotations

from rich.console import Console

from saro.distributed.runtime import Runtime
from saro.synth.synth_options import Options
from saro.synth.synth_output import describe_result
from saro.synth.synthesis import synthesize


def run(options: Options, console: Console) -> int:
    """Make training records of stage rw, op, pp or mirror; see also saro synth check and saro synth export.

    Raises:
        SaroError: a prompt, policy, model or judge does not exist or is not sound, or the budget is spent.
    """
    runtime = Runtime.start()
    manifest = synthesize(options, runtime)
    if manifest is not None:
        for line in describe_result(manifest, options.output):
            console.out(line, highlight=False)
    return 0
