"""Data construction: prompts -> draws -> verdicts -> selection -> training records, on all of the launcher's ranks.

    accelerate launch recipes/synth.py rw|op|pp|mirror --config FILE.yaml [--option VALUE ...]

`saro synth` is the same in one process. saro/synth/synthesis.py reads from top to bottom.
"""

from __future__ import annotations

from saro.distributed.run_ranks import run_ranks
from saro.distributed.runtime import Runtime
from saro.program import parse_tool
from saro.synth.synth_options import Options
from saro.synth.synth_output import describe_result
from saro.synth.synthesis import synthesize


def main() -> int:
    """Make the records of one stage. Returns the exit code."""
    options = parse_tool(Options, "synth.py", __doc__)
    runtime = Runtime.start()
    manifest = synthesize(options, runtime)
    if manifest is not None:
        for line in describe_result(manifest, options.output):
            runtime.say(line)
    runtime.end()
    return 0


if __name__ == "__main__":
    run_ranks(main)
