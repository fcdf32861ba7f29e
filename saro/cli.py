"""The command `saro`: a table of tools, and one way from the command line to each of them."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NamedTuple, NoReturn

from rich.console import Console

from saro.program import Parser, parse_tool, quiet_libraries, run_program


class Command(NamedTuple):
    """A tool.

    Attributes:
        module: has ``Options``, a dataclass, and ``run(options, console)``, which returns the exit code.
        help: its line in `saro --help`.
    """

    module: str
    help: str


COMMANDS = {
    "inspect": Command("saro.tools.inspect_data", "length report and coloured records"),
    "convert": Command("saro.tools.convert", "public data sets to native JSONL"),
    "export": Command("saro.tools.export", "a run's adapter, or a merged model, verified"),
    "chat": Command("saro.tools.chat", "talk to a run's model"),
    "compare": Command("saro.tools.compare", "several models on the same records, in one table"),
    "doctor": Command("saro.tools.doctor.doctor", "kernels, packs, training and resuming, checked on this machine"),
}


def main() -> NoReturn:
    """Run the console script."""
    run_program(_main)


def _main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        _show_commands()
    # Import only the chosen tool: most import transformers, which `saro --help` need not wait for.
    tool = import_module(COMMANDS[name].module)
    options = parse_tool(tool.Options, f"saro {name}", tool.run.__doc__, sys.argv[2:])
    quiet_libraries()
    return tool.run(options, Console())


def _show_commands() -> NoReturn:
    """Print the commands and exit if the first argument is --help, or else raise SaroError."""
    parser = Parser(prog="saro", description="Tools around the SaRO recipes, recipes/rw.py and recipes/srpo.py.")
    commands = parser.add_subcommands(required=True)
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, Parser(), help=command.help)
    parser.parse(sys.argv[1:])
    raise AssertionError("neither a command nor an error")
