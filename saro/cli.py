"""The command `saro`."""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields
from typing import Any, NoReturn, get_type_hints

from docstring_parser import parse as parse_docstring

from saro.program import Parser, run_program


def main() -> NoReturn:
    """Entry point of the console script."""
    run_program(_main)


def _add_options(parser: Parser, options: type) -> None:
    """An option for each field of a dataclass, with its docs: --max-tokens for ``max_tokens``."""
    docs = {item.arg_name: item.description for item in parse_docstring(options.__doc__ or "").params}
    hints = get_type_hints(options)
    for field in fields(options):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        kind: dict[str, Any] = {"type": hints[field.name], "default": default}
        if field.default is False:
            kind = {"action": "store_true"}
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=docs[field.name], **kind)


def _main() -> int:
    from rich.console import Console

    from saro.config import DEMO, DataConfig, ModelConfig
    from saro.quiet import quiet_libraries
    from saro.synth.public_sets import FORMATS
    from saro.tool_config import ChatConfig, CompareConfig, DoctorConfig, ExportConfig

    parser = Parser(prog="saro", description="Tools around the SaRO recipes, recipes/rw.py and recipes/srpo.py.")
    commands = parser.add_subcommands(required=True)

    inspect_parser = Parser(
        description="Show how long examples or preference pairs are, and which of their tokens are scored and shared."
    )
    inspect_parser.add_argument("--data", type=list[str] | str, default=[DEMO], help="JSONL file or files.")
    inspect_parser.add_argument("--pairs", action="store_true", help="Of the demo data, the pairs (SRPO).")
    inspect_parser.add_argument("--model", default=DEMO, help="Folder or hub name of a causal LM.")
    inspect_parser.add_argument("--show", type=int, default=3, help="How many of the first records to show.")
    inspect_parser.add_argument(
        "--ids", type=list[str] | str, default=[], help="Show the records of these ids instead."
    )
    of_training = {"train", "heldout", "weights", "group_by_prompt", "too_long"}
    names = [field.name for field in fields(DataConfig) if field.name not in of_training]
    inspect_parser.add_class_arguments(DataConfig, skip=of_training)
    commands.add_subcommand("inspect", inspect_parser, help="length report and coloured records")

    convert_parser = Parser(description="Convert a public data set to the native JSONL format.")
    convert_parser.add_argument("format", choices=sorted(FORMATS), help="What SOURCE is.")
    convert_parser.add_argument("source", help="The data set as published.")
    convert_parser.add_argument("target", help="The JSONL file to write.")
    convert_parser.add_argument("--overwrite", action="store_true", help="Replace the target if it exists.")
    commands.add_subcommand("convert", convert_parser, help="public data sets to native JSONL")

    export_parser = Parser(description="Write a run's model as others load it, verified by scoring records with it.")
    export_parser.add_argument("--run", required=True, help="Folder of a finished run.")
    _add_options(export_parser, ExportConfig)
    commands.add_subcommand("export", export_parser, help="a run's adapter, or a merged model, verified")

    chat_parser = Parser(description="Talk to the model of a run; its reasoning is dimmed.")
    chat_parser.add_argument("--run", required=True, help="Folder of a finished run.")
    _add_options(chat_parser, ChatConfig)
    commands.add_subcommand("chat", chat_parser, help="talk to a run's model")

    compare_parser = Parser(description="Measure several models on the same held-out records, in one table.")
    _add_options(compare_parser, CompareConfig)
    commands.add_subcommand("compare", compare_parser, help="several models on the same records, in one table")

    doctor_parser = Parser(description="Check kernels, packs, training and resuming on this machine and your model.")
    _add_options(doctor_parser, DoctorConfig)
    commands.add_subcommand("doctor", doctor_parser, help="is all right on this machine, with this model")

    parsed = parser.parse()
    options = parsed[parsed.subcommand]
    if parsed.subcommand == "convert":
        from saro.synth.public_sets import convert

        done = convert(options.format, options.source, options.target, overwrite=options.overwrite)
        print(f"{done.records:,} records in {options.target}")
        if done.left_out:
            print(f"{len(done.left_out):,} left out, without a chain of steps: {', '.join(done.left_out)}")
        return 0

    if parsed.subcommand == "export":
        from saro.tools.export import export

        quiet_libraries()
        config = ExportConfig(**{field.name: options[field.name] for field in fields(ExportConfig)})
        print(export(options.run, config, lambda line: print(line, file=sys.stderr, flush=True)))
        return 0

    if parsed.subcommand == "chat":
        from saro.tools.chat import chat

        quiet_libraries()
        config = ChatConfig(**{field.name: options[field.name] for field in fields(ChatConfig)})
        chat(options.run, config, Console())
        return 0

    if parsed.subcommand == "doctor":
        from saro.distributed.runtime import Runtime
        from saro.tools.doctor.doctor import doctor

        runtime = Runtime.start()
        config = DoctorConfig(**{field.name: options[field.name] for field in fields(DoctorConfig)})
        code = doctor(runtime, config, Console())
        runtime.end()
        return code

    from saro.demo import data_files

    if parsed.subcommand == "compare":
        from saro.tools.compare import compare

        quiet_libraries()
        config = CompareConfig(**{field.name: options[field.name] for field in fields(CompareConfig)})
        examples, pairs = ([names] if isinstance(names, str) else names for names in (config.examples, config.pairs))
        compare(config, data_files(examples, "rw_heldout"), data_files(pairs, "srpo_heldout"), Console())
        return 0

    from saro.errors import SaroError
    from saro.tools.inspect_data import inspect

    quiet_libraries()
    data = DataConfig(**{name: options[name] for name in names})
    files = [options.data] if isinstance(options.data, str) else options.data
    ids = [options.ids] if isinstance(options.ids, str) else options.ids
    if options.pairs and DEMO not in files:
        raise SaroError(
            "--pairs chooses among the demo data; a file of pairs is known by its fields: leave --pairs out"
        )
    files = data_files(files, "srpo_train" if options.pairs else "rw_train")
    inspect(ModelConfig(name=options.model), data, files, options.show, Console(), ids)
    return 0
