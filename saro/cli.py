"""The command `saro`: finds the tool that the command line names, and runs it with its options."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NamedTuple, NoReturn

from rich.console import Console

from saro.program import Parser, parse_tool, quiet_libraries, run_program


class Command(NamedTuple):
    """A tool.

    Attributes:
        module: name of a module with ``Options``, a dataclass, and ``run(options, console)``, which returns the exit
            code.
        help: the tool's line in `saro --help`.
    """

    module: str
    help: str


COMMANDS = {
    "plan": Command("saro.tools.plan_run.plan_tool", "memory, largest pack, time and disk of a run, before it"),
    "inspect": Command("saro.tools.inspect_data", "length report and coloured records"),
    "convert": Command("saro.tools.convert", "public data sets to training records, suites or attacks"),
    "export": Command("saro.tools.export", "a run's adapter, or a merged model, verified"),
    "chat": Command("saro.tools.chat", "talk to a run's model"),
    "score": Command("saro.tools.score_steps", "rewards of responses and of their steps, from two models"),
    "compare": Command("saro.tools.compare", "several models on the same records, in one table"),
    "evaluate": Command("saro.tools.evaluate_models", "harm, refusals, ability and cost of models, with intervals"),
    "report": Command("saro.tools.report_tool", "an evaluation as one HTML page and tables to paste"),
    "runs": Command("saro.tools.show_runs", "records and steps of training runs, one line each"),
    "label": Command("saro.tools.label", "label answers by hand, blind, to correct a judge's rates"),
    "judge-check": Command("saro.tools.judge_check", "how far a judge agrees with people"),
    "synth": Command("saro.tools.synth_tool", "training records from prompts, a model and a judge"),
    "synth check": Command("saro.tools.synth_check", "forks, leaks, lengths, balance and verdicts of such records"),
    "synth export": Command("saro.tools.synth_export", "their steps with labels, to train a process reward model"),
    "draws": Command("saro.tools.draws_tool", "a store of draws: batch files there and back, and what it holds"),
    "export-eval": Command("saro.tools.export_eval", "suites for lm-eval, Inspect or HarmBench"),
    "doctor": Command("saro.tools.doctor.doctor", "kernels, packs, training and resuming, checked on this machine"),
}


def main() -> NoReturn:
    """Run the console script."""
    run_program(_main)


def _main() -> int:
    """Run the tool that the command line names, and return its exit code."""
    if len(sys.argv) == 1:
        _command_parser().print_help(sys.stderr)
        return 2
    name, arguments = _split_command(sys.argv[1:])
    if name not in COMMANDS:
        _show_commands()
    # Import only this tool: most tools import transformers, and `saro --help` should not wait for that.
    tool = import_module(COMMANDS[name].module)
    options = parse_tool(tool.Options, f"saro {name}", tool.run.__doc__, arguments)
    # Not every tool needs transformers, whose import takes seconds.
    if "transformers" in sys.modules:
        quiet_libraries()
    return tool.run(options, Console())


def _split_command(arguments: list[str]) -> tuple[str, list[str]]:
    """Return the name of the command, which may be two words, and its arguments."""
    two = " ".join(arguments[:2])
    words = 2 if two in COMMANDS else 1
    return " ".join(arguments[:words]), arguments[words:]


def _show_commands() -> NoReturn:
    """Print the commands and exit if --help was given. Raises SaroError for an unknown command."""
    _command_parser().parse(sys.argv[1:])
    raise AssertionError("neither a command nor an error")


def _command_parser() -> Parser:
    """Return a parser that knows the commands by name, and none of their options."""
    parser = Parser(prog="saro", description="Tools around the SaRO recipes, recipes/rw.py and recipes/srpo.py.")
    commands = parser.add_subcommands(required=True)
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, Parser(), help=command.help)
    return parser
