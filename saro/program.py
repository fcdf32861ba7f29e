"""The frame of every program: command line and YAML -> a dataclass, one-line errors, exit codes, quiet libraries."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import SequenceMatcher, get_close_matches
from itertools import islice
from typing import Any, NamedTuple, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from tqdm import tqdm

from saro.errors import SaroError, nearest

Config = TypeVar("Config")

# These libraries log lines that a user can do nothing about.
_LIBRARIES = ("bitsandbytes", "transformers", "accelerate", "peft", "torch.distributed")

# A group of options -> its option that is meant if only the group is typed: --model is --model.name.
_GROUP_OPTIONS = {"model": "name", "data": "train", "preference": "loss"}
# Option of TRL or transformers, in any group or none -> ours.
_FOREIGN_OPTIONS = {
    "attn_implementation": "model.attention",
    "base_model": "model.name",
    "batch_size": "train.records_per_step",
    "beta": "preference.beta",
    "bf16": "model.dtype bfloat16",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "eval_steps": "train.eval_every",
    "fp16": "model.dtype",
    "gradient_accumulation_steps": "train.records_per_step",
    "learning_rate": "train.lr",
    "load_in_4bit": "model.method qlora",
    "logging_steps": "train.log_every",
    "lora_r": "model.lora_rank",
    "lora_target_modules": "model.lora_targets",
    "loss_type": "preference.loss",
    "lr_scheduler_type": "train.schedule",
    "max_length": "data.pack_tokens",
    "max_seq_length": "data.pack_tokens",
    "model_name_or_path": "model.name",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "optim": "train.optimizer",
    "output_dir": "train.output",
    "overwrite_output_dir": "overwrite",
    "per_device_train_batch_size": "train.records_per_step",
    "report_to": "train.trackers",
    "resume_from_checkpoint": "resume",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "target_modules": "model.lora_targets",
    "torch_dtype": "model.dtype",
    "use_peft": "model.method lora",
    "warmup_ratio": "train.warmup",
}
# Likeness, 0 to 1, from which a name may be a misspelling of an option's: difflib's default, for a name without its group.
_LIKENESS = 0.6
# Likeness from which an option without a group is meant rather than one of the same name in some group.
_TOP_LIKENESS = 0.8


class RunFlags(NamedTuple):
    """The flags that say what a recipe does with a run that is already in its output folder."""

    resume: bool
    overwrite: bool


class Parser(ArgumentParser):
    """jsonargparse's parser; each mistake is one line that names the nearest valid option.

    Attributes:
        group_options: name of a group -> the option that is suggested to someone who types only the group.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, exit_on_error=False, allow_abbrev=False, **kwargs)
        self.group_options: dict[str, str] = {}

    def parse(self, args: Sequence[str] | None = None) -> Namespace:
        """Parse the arguments, by default those of the process.

        Raises:
            SaroError: for an unknown option or a value of the wrong type.
        """
        try:
            return self.parse_args(args)
        except ArgumentError as error:
            raise SaroError(self._one_line(str(error), sys.argv[1:] if args is None else args)) from error
        except UnicodeDecodeError as error:
            raise SaroError("--config: the file is not UTF-8; convert it") from error

    def _option_names(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings]

    def _one_line(self, message: str, args: Sequence[str]) -> str:
        """Return an error message of jsonargparse as one line of ours. ``args``: the arguments that it is about."""
        names = self._option_names()
        if match := re.match(r"unrecognized arguments: (\S+)", message):
            given = match[1].partition("=")[0]
            return (
                f"unknown option {given}{self._suggestion(given)}"
                if given.startswith("-")
                else self._stray(given, args)
            )
        if match := re.match(r"Group '([\w.]+)' does not accept option '([\w.-]+)'", message):
            given = f"{match[1]}.{match[2]}"
            return f"unknown option {given}{self._suggestion(given)}"
        if match := re.match(r"(?:Parser does not accept option|Key|Option) '([\w.-]+)'", message):
            return f"unknown option {match[1]}{self._suggestion(match[1])}"
        if match := re.match(r"argument (\w+): invalid choice: '(.*?)' \(choose from (.*)\)", message):
            choices = re.findall(r"[\w-]+", match[3])
            return f"unknown {match[1]} {match[2]!r}{nearest(match[2], choices)}"
        if match := re.match(r"the following arguments are required: (.*)", message):
            required = [f"--{name}" if f"--{name}" in names else name for name in match[1].split(", ")]
            return f"missing {', '.join(required)}; see {self.prog} --help"
        if match := re.match(r"Parser key \"config\": File does not exist: '(.*)'", " ".join(message.split())):
            return f"--config: there is no file {match[1]}; correct the path, or leave --config out for the defaults"
        if message.startswith("Unexpected config"):
            return "--config: the file holds no options; write them as group: {option: value}"
        message = re.sub(r'^Parser key "([\w.]+)":\s*', r"--\1: ", message)
        message = re.sub(r"<class '(\w+)'>", r"\1", message).replace("typing.", "")
        message = " ".join(message.split())
        optional = r"Does not validate against any of the Union subtypes Subtypes: \[(.*?), NoneType\].* Given value: "
        message = re.sub(optional, r"Expected a \1. Got value: ", message)
        choice = r"(--[\w.]+): Expected a Literal\[([^]]*)\]\. Got value: (.*)"
        if match := re.fullmatch(choice, message):
            values = re.findall(r"'(.*?)'", match[2])
            listed = " or ".join(filter(None, [", ".join(values[:-1]), values[-1]]))
            return f"{match[1]} is {match[3]}; it must be {listed}"
        union = r"Does not validate against any of the Union subtypes Subtypes: \[(.*)\] Errors: .* Given value: "
        return re.sub(union, r"Expected one of \1. Got value: ", message)

    def _stray(self, given: str, args: Sequence[str]) -> str:
        """Return the message about a value without an option. After an option that takes a list, it is one value more."""
        i = list(args).index(given) if given in args else 0
        start = next((j for j in range(i - 1, -1, -1) if args[j].startswith("--")), i)
        end = next((j for j in range(i, len(args)) if args[j].startswith("--")), len(args))
        name, _, value = args[start].partition("=") if args else ("", "", "")
        for action in self._actions:
            if name in action.option_strings and "list[" in str(getattr(action, "_typehint", "")):
                values = [each.strip("[]") for each in (value, *args[start + 1 : end]) if each]
                return f"{name} takes one value; write several as {name} '[{', '.join(values)}]'"
        return f"unknown option {given}"

    def _suggestion(self, given: str) -> str:
        """Return the end of a message about an unknown option of the command line or a file: its spelling, or a near name."""
        dashes = "--" if given.startswith("-") else ""
        spelled = given.lstrip("-").replace("-", "_")
        names = [name.lstrip("-") for name in self._option_names()]
        # An option without a group is meant rather than one of the same name in a group: --model is --models in
        # `saro evaluate`, not --judge.model.
        top = get_close_matches(spelled, [name for name in names if "." not in name], n=1, cutoff=_TOP_LIKENESS)
        if top and spelled not in names:
            return f"; did you mean {dashes}{top[0]}?"
        # Be certain if one option fits with underscores for hyphens and its group added: --pack-tokens is
        # --data.pack_tokens.
        exact = [name for name in names if name == spelled or name.endswith(f".{spelled}")]
        if spelled in self.group_options:
            exact.append(self.group_options[spelled])
        if len(exact) == 1:
            return f"; it is spelled {dashes}{exact[0]}"
        if foreign := _FOREIGN_OPTIONS.get(spelled.rpartition(".")[2]):
            is_option = foreign.split()[0] in names
            return f"; it is spelled {dashes}{foreign}" if is_option else f"; see {self.prog} --help"
        # Compare without groups too: they would make two options alike that share nothing else.
        groups = {name.partition(".")[0] for name in names if "." in name}
        words = [word for word in spelled.split(".") if word not in groups] or [spelled]
        alike = [name for name in names if any(_likeness(word, name.rpartition(".")[2]) >= _LIKENESS for word in words)]
        near = get_close_matches(spelled, alike, n=1, cutoff=_LIKENESS)
        return f"; did you mean {dashes}{near[0]}?" if near else f"; see {self.prog} --help"


def _likeness(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b).ratio()


def parse_recipe(
    config: type[Config], prog: str, description: str, args: Sequence[str] | None = None
) -> tuple[Config, RunFlags]:
    """Read the options of a recipe: YAML file first, then command line.

    Returns:
        The config, and the flags that say what to do with an existing run in the output folder.

    Raises:
        SaroError: for an unknown option or a value that a check refuses.
    """
    parser = Parser(prog=prog, description=description.split("\n")[0])
    parser.add_argument("--config", action="config", help="YAML file with options; the command line overrides it.")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Continue the run in the output folder, if there is one, on the same data and model. Options of memory, speed, "
        "output and length may be others; the same bits need the same options.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Delete the run in the output folder and start over.")
    hints, docs = get_type_hints(config), _read_docs(config)
    for field in fields(config):
        _add_group(parser, field, hints[field.name], docs[field.name])
    parsed = parser.parse(_files_first(sys.argv[1:] if args is None else args))
    _check_parsed(config, parsed)
    groups = {name: _read_group(hint, parsed[name]) for name, hint in hints.items()}
    flags = RunFlags(resume=parsed.resume, overwrite=parsed.overwrite)
    return config(**groups), flags


def _check_parsed(config: type, parsed: Namespace) -> None:
    """Raise SaroError for values that jsonargparse accepts from a file but should not.

    It accepts any value for a flag or a group, and null for any option.
    """
    for flag in ("resume", "overwrite"):
        if not isinstance(parsed[flag], bool):
            raise SaroError(f"{flag} is {parsed[flag]!r}; it must be true or false")
    for group, group_type in get_type_hints(config).items():
        options = parsed[group]
        if not isinstance(options, Namespace):
            raise SaroError(f"{group} is {options!r}; it must hold options, such as {{option: value}}")
        for name, hint in get_type_hints(group_type).items():
            if options[name] is None and type(None) not in get_args(hint):
                raise SaroError(f"--{group}.{name} has no value; give one or leave the option out")


def _files_first(args: Sequence[str]) -> list[str]:
    """Return the arguments with the YAML files first, so that all options override them."""
    files: list[str] = []
    options: list[str] = []
    rest = iter(args)
    for arg in rest:
        if arg == "--config":
            files += [arg, *islice(rest, 1)]
        else:
            (files if arg.startswith("--config=") else options).append(arg)
    return files + options


def shown(*names: str) -> dict[str, Any]:
    """Return the metadata of a field that holds a group of the recipes' options, of which the tool has only ``names``.

    The other options keep their defaults.
    """
    return {"shown": names}


def short() -> dict[str, Any]:
    """Return the metadata of a field that holds a group of options, of which --FIELD alone sets the first one."""
    return {"short": True}


def positional(choices: Collection[str] = ()) -> dict[str, Any]:
    """Return the metadata of a field that is a positional argument; without ``choices``, any value is valid.

    A field with a default may be left out. A field of a list type takes one or more values.
    """
    return {"positional": True, "choices": sorted(choices)}


def parse_tool(options: type[Config], prog: str, description: str, args: Sequence[str] | None = None) -> Config:
    """Read the options of a tool from the command line.

    A field without a default is required. A field whose default is False is a flag. A field of a dataclass type is a
    group of options, --group.option. A YAML file, --config, may give options too; the command line overrides it.

    Raises:
        SaroError: for an unknown option or a value that a check refuses.
    """
    parser = Parser(prog=prog, description=description.split("\n")[0])
    parser.add_argument("--config", action="config", help="YAML file with options; the command line overrides it.")
    hints, docs = get_type_hints(options), _read_docs(options)
    first_options = {}  # "--judge" -> "--judge.name"
    for field in fields(options):
        if is_dataclass(hints[field.name]):
            _add_group(parser, field, hints[field.name], docs[field.name])
        else:
            _add_option(parser, field, hints[field.name], docs[field.name])
        if field.metadata.get("short"):
            first_options[f"--{field.name}"] = f"--{field.name}.{fields(hints[field.name])[0].name}"
    parsed = parser.parse(_files_first(_spell_out(sys.argv[1:] if args is None else args, first_options)))
    values = {}
    for field in fields(options):
        value, hint = parsed[field.name], hints[field.name]
        values[field.name] = _make_group(field.name, hint, value) if is_dataclass(hint) else _listed(value, hint)
    return options(**values)


def _spell_out(args: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """Return the arguments with some names of options replaced by others."""
    split = [arg.partition("=") for arg in args]
    return [names.get(name, name) + equals + value for name, equals, value in split]


def _takes_list(hint: Any) -> bool:
    """Return True for a list, or a list or None, of which the dataclass takes no other form."""
    kinds = {hint, *get_args(hint)} if get_origin(hint) is not list else {hint}
    return str not in kinds and any(get_origin(kind) is list for kind in kinds)


def _or_one(hint: Any) -> Any:
    """Return the type of an option on the command line and in files; where a list is expected, one name will do."""
    return hint | str if _takes_list(hint) else hint


def _listed(value: Any, hint: Any) -> Any:
    """Return a value in the form of its field: a list of one name if the name was given alone."""
    return [value] if isinstance(value, str) and _takes_list(hint) else value


def _read_docs(config: type) -> dict[str, str]:
    """Return the description of each field, from the Attributes of the docstring."""
    return {item.arg_name: item.description for item in parse_docstring(config.__doc__ or "").params}


def _add_option(parser: Parser, field: Field, hint: Any, doc: str) -> None:
    """Add one field of a tool's options to its command line."""
    if field.metadata.get("positional"):
        # jsonargparse does not take choices=None.
        choices = {"choices": field.metadata["choices"]} if field.metadata["choices"] else {}
        optional = {} if field.default is MISSING else {"nargs": "?", "default": field.default}
        # A list takes all values, and needs one.
        several = {"nargs": "+"} if get_origin(hint) is list else {}
        parser.add_argument(field.name, help=doc, **choices, **optional, **several)
    elif field.default is False:
        parser.add_argument(f"--{field.name}", action="store_true", help=doc)
    elif field.default is MISSING and field.default_factory is MISSING:
        parser.add_argument(f"--{field.name}", type=_or_one(hint), required=True, help=doc)
    else:
        default = field.default if field.default_factory is MISSING else field.default_factory()
        parser.add_argument(f"--{field.name}", type=_or_one(hint), default=default, help=doc)


def _add_group(parser: Parser, field: Field, config: type, doc: str) -> None:
    """Add the shown options of a group one by one.

    ``add_class_arguments`` would add an option for the group too, --model, which reads a file.
    """
    names = [item.name for item in fields(config)]
    names_shown = field.metadata.get("shown", names)
    hints, docs, defaults = get_type_hints(config), _read_docs(config), field.default_factory()
    title, _, description = doc.partition(". ")
    group = parser.add_argument_group(title.rstrip("."), description or None)
    for name in names_shown:
        option = f"--{field.name}.{name}"
        group.add_argument(option, type=_or_one(hints[name]), default=getattr(defaults, name), help=docs[name])
    meant = _GROUP_OPTIONS.get(field.name)
    if meant in names_shown:
        parser.group_options[field.name] = f"{field.name}.{meant}"


def _make_group(name: str, config: type, values: Namespace) -> Any:
    try:
        return _read_group(config, values)
    except SaroError as error:
        # The recipes' checks name their options as YAML does, "data.pack_tokens"; tools have a command line only.
        text = str(error)
        raise SaroError(f"--{text}" if text.startswith(f"{name}.") else text) from error


def _read_group(config: type, values: Namespace) -> Any:
    hints = get_type_hints(config)
    return config(**{name: _listed(value, hints[name]) for name, value in values.as_dict().items()})


def as_list(value: list[str] | str) -> list[str]:
    """Return names as a list; the command line may give one name as a string."""
    return [value] if isinstance(value, str) else value


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run a program and exit with its code; an error that a user can fix is one line and exit code 2."""
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f"[rank {rank}] "
    try:
        code = main()
    except SaroError as error:
        print(f"{where}error: {error}", file=sys.stderr)
        code = 2
    except (RuntimeError, MemoryError) as error:
        # By its name: torch.OutOfMemoryError would make every `--help` wait for torch.
        if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":
            raise
        print(
            f"{where}error: out of memory ({str(error).splitlines()[0] if str(error) else 'host'}); lower "
            "--data.pack_tokens, or set --model.gradient_checkpointing true; a run that is resumed may change both",
            file=sys.stderr,
        )
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def quiet_libraries() -> None:
    """Silence the libraries' warnings, log lines and progress bars; their errors still show."""
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.simplefilter("ignore", category)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def progress_bar(
    items: Iterable | None, description: str, unit: str, *, shown: bool = True, total: int | None = None
) -> tqdm:
    """Return a progress bar over ``items``, which appears after two seconds and only on a terminal.

    Args:
        items: the items to iterate over; None for a bar that the caller updates.
        unit: plural noun, such as "packs".
        shown: False hides the bar, as on all ranks but the first.
        total: number of items; default len(items).
    """
    # With disable=None, tqdm shows the bar only if stderr is a terminal.
    disable = None if shown else True
    return tqdm(items, desc=description, unit=f" {unit}", total=total, delay=2, leave=False, disable=disable)
