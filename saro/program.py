"""Command line and YAML -> a config dataclass, and the frame of a program: errors of one line, exit code 2."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from itertools import islice
from typing import Any, NamedTuple, NoReturn, TypeVar, get_args, get_type_hints

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from tqdm import tqdm

from saro.errors import SaroError, nearest

Config = TypeVar("Config")


class RunFlags(NamedTuple):
    """What a recipe may do with a run that is in its output folder already."""

    resume: bool
    overwrite: bool


class Parser(ArgumentParser):
    """jsonargparse's parser; what a user mistypes is one line that names the nearest valid option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, exit_on_error=False, allow_abbrev=False, **kwargs)

    def parse(self, args: Sequence[str] | None = None) -> Namespace:
        """Parse; raises SaroError."""
        try:
            return self.parse_args(args)
        except ArgumentError as error:
            raise SaroError(self._one_line(str(error))) from error
        except UnicodeDecodeError as error:
            raise SaroError("--config: the file is not UTF-8; convert it") from error

    def _option_names(self) -> list[str]:
        commands = self._subcommands_action.choices.values() if self._subcommands_action else []
        own = [option for action in self._actions for option in action.option_strings]
        return own + [option for command in commands for action in command._actions for option in action.option_strings]

    def _one_line(self, message: str) -> str:
        names = self._option_names()
        if found := re.match(r"unrecognized arguments: (\S+)", message):
            given = found[1].partition("=")[0]
            return f"unknown option {given}{nearest(given, names) if given.startswith('-') else ''}"
        if found := re.match(r"Group '([\w.]+)' does not accept option '([\w.-]+)'", message):
            given = f"{found[1]}.{found[2]}"
            return f"unknown option {given}{nearest(given, [name.lstrip('-') for name in names])}"
        if found := re.match(r"(?:Parser does not accept option|Key|Option) '([\w.-]+)'", message):
            given = found[1]
            return f"unknown option {given}{nearest(given, [name.lstrip('-') for name in names])}"
        if found := re.match(r"argument (\w+): invalid choice: '(.*?)' \(choose from (.*)\)", message):
            choices = re.findall(r"[\w-]+", found[3])
            return f"unknown {found[1]} {found[2]!r}{nearest(found[2], choices)}"
        if message.startswith("Unexpected config"):
            return "--config: the file holds no options; write them as group: {option: value}"
        message = re.sub(r'^Parser key "([\w.]+)":\s*', r"--\1: ", message)
        message = re.sub(r"<class '(\w+)'>", r"\1", message).replace("typing.", "")
        message = " ".join(message.split())
        optional = r"Does not validate against any of the Union subtypes Subtypes: \[(.*?), NoneType\].* Given value: "
        return re.sub(optional, r"Expected a \1. Got value: ", message)


def parse_recipe(
    config: type[Config], prog: str, description: str, args: Sequence[str] | None = None
) -> tuple[Config, RunFlags]:
    """Options of a recipe: YAML file first, then command line. Returns the config and the flags of the run's folder.

    Raises:
        SaroError: for an unknown option or a value that a check refuses.
    """
    parser = Parser(prog=prog, description=description.split("\n")[0])
    parser.add_argument("--config", action="config", help="YAML file with options; the command line goes before it.")
    parser.add_argument(
        "--resume", action="store_true", help="Go on with the run in the output folder, if there is one."
    )
    parser.add_argument("--overwrite", action="store_true", help="Remove the run in the output folder and start anew.")
    parser.add_class_arguments(config)
    parsed = parser.parse(_files_first(sys.argv[1:] if args is None else args))
    _check_parsed(config, parsed)
    groups = parser.instantiate(parsed)
    flags = RunFlags(resume=parsed.resume, overwrite=parsed.overwrite)
    return config(**{field.name: groups[field.name] for field in fields(config)}), flags


def _check_parsed(config: type, parsed: Namespace) -> None:
    """Raise SaroError for what jsonargparse lets through in a file.

    That is any value of a flag or a group, and null for any option.
    """
    for flag in ("resume", "overwrite"):
        if not isinstance(parsed[flag], bool):
            raise SaroError(f"{flag} is {parsed[flag]!r}; it must be true or false")
    for group, of_group in get_type_hints(config).items():
        options = parsed[group]
        if not isinstance(options, Namespace):
            raise SaroError(f"{group} is {options!r}; it must hold options, such as {{option: value}}")
        for name, hint in get_type_hints(of_group).items():
            if options[name] is None and type(None) not in get_args(hint):
                raise SaroError(f"--{group}.{name} has no value; give one or leave the option out")


def _files_first(args: Sequence[str]) -> list[str]:
    """The arguments with the YAML files before all options, which override them wherever they stand."""
    files: list[str] = []
    options: list[str] = []
    rest = iter(args)
    for arg in rest:
        if arg == "--config":
            files += [arg, *islice(rest, 1)]
        else:
            (files if arg.startswith("--config=") else options).append(arg)
    return files + options


def progress_bar(
    items: Iterable[Any] | None, description: str, unit: str, *, shown: bool = True, total: int | None = None
) -> tqdm:
    """Return a progress bar over ``items``, or of ``total`` units. It appears after two seconds, on a terminal only."""
    # disable=None hides the bar if standard error is no terminal.
    disable = None if shown else True
    return tqdm(items, desc=description, unit=f" {unit}", total=total, delay=2, leave=False, disable=disable)


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run a program and exit with its code; what a user can mend is one line and exit code 2."""
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f"[rank {rank}] "
    try:
        code = main()
    except SaroError as error:
        print(f"{where}error: {error}", file=sys.stderr)
        code = 2
    except (torch.OutOfMemoryError, MemoryError) as error:
        print(
            f"{where}error: out of memory ({str(error).splitlines()[0] if str(error) else 'host'}); lower "
            "--data.pack_tokens, or set --model.gradient_checkpointing true or --model.method qlora",
            file=sys.stderr,
        )
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
