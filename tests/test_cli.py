"""The command `saro`: its table of tools, and the spelling of their options."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, is_dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from typing import get_type_hints

import pytest
from command import run_saro
from docstring_parser import parse as parse_docstring

from saro.cli import COMMANDS, main
from saro.program import parse_tool

# Option -> its old spelling, for every option of every tool that has one.
RESPELLED = {
    "inspect": {
        "--data.train": ["--data"],
        "--model.name": ["--model"],
        "--data.pack_tokens": ["--pack_tokens", "--pack-tokens"],
        "--data.think_tags": ["--think_tags", "--think-tags"],
        "--data.chat_template": ["--chat_template", "--chat-template"],
        "--data.template_date": ["--template_date", "--template-date"],
        "--data.template_variables": ["--template_variables", "--template-variables"],
    },
    "doctor": {
        "--model.name": ["--model"],
        "--model.method": ["--method"],
        "--model.dtype": ["--dtype"],
        "--model.attention": ["--attention"],
        "--model.liger": ["--liger"],
        "--data.pack_tokens": ["--pack-tokens", "--pack_tokens"],
    },
    "compare": {
        "--load.method": ["--method"],
        "--max_tokens": ["--max-tokens"],
        "--data.pack_tokens": ["--pack-tokens", "--pack_tokens"],
        "--data.template_date": ["--template-date", "--template_date"],
    },
    "chat": {"--max_tokens": ["--max-tokens"], "--data.think_tags": ["--think-tags", "--think_tags"]},
    "export": {"--allow_shift": ["--allow-shift"]},
}
REQUIRED = {"chat": ["--run", "x"], "export": ["--run", "x"]}


@pytest.fixture
def saro(monkeypatch, capsys):
    """Runs the command in this process; returns exit code, stdout and stderr."""
    return partial(run_saro, monkeypatch, capsys)


def option_names(options: type) -> list[str]:
    """Return the names of a tool's options, and of its positional arguments."""
    names = []
    for field in fields(options):
        hint = get_type_hints(options)[field.name]
        if is_dataclass(hint):
            shown = field.metadata.get("shown", [item.name for item in fields(hint)])
            names += [f"--{field.name}.{name}" for name in shown]
        else:
            # A positional argument is called by its name, or by its choices if it has some.
            choices = field.metadata.get("choices")
            positional = f"{{{','.join(choices)}}}" if choices else field.name
            names.append(positional if field.metadata.get("positional") else f"--{field.name}")
    return names


def test_the_console_script_is_installed():
    (script,) = entry_points(group="console_scripts", name="saro")
    assert script.load() is main


# The table


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_options_and_runs(name, saro, monkeypatch):
    tool = import_module(COMMANDS[name].module)
    received = []
    monkeypatch.setattr("saro.cli.parse_tool", lambda *arguments: received.append(arguments) or "options")

    def run(options, console) -> int:
        """Run."""
        received.append(options)
        return 3

    monkeypatch.setattr(tool, "run", run)
    assert saro(name, "--an", "argument") == (3, "", "")
    assert received == [(tool.Options, f"saro {name}", "Run.", ["--an", "argument"]), "options"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_option_with_its_meaning(name, saro):
    code, out, err = saro(name, "--help")
    assert (code, err) == (0, "")
    tool = import_module(COMMANDS[name].module)
    descriptions = [item.description for item in parse_docstring(tool.Options.__doc__).params]
    assert len(descriptions) == len(fields(tool.Options))
    sentences = [sentence for description in descriptions for sentence in description.split(". ")]
    # Compare without spaces: the help breaks lines at spaces and hyphens.
    text = "".join(out.split())
    for part in [tool.run.__doc__.split("\n")[0], *option_names(tool.Options), *sentences]:
        assert "".join(part.rstrip(".").split()) in text


def test_help_of_all_commands_is_the_table_and_imports_no_tool():
    code = (
        "import sys, saro.cli; sys.argv = ['saro', '--help']\n"
        "try: saro.cli.main()\n"
        "except SystemExit: print([name for name in sys.modules if name.startswith(('saro.tools', 'transformers.'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text = " ".join(done.stdout.split())
    for name, command in COMMANDS.items():
        assert f" {name} {command.help}" in text
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == ""


def test_without_a_command_the_commands_are_listed(saro):
    code, out, err = saro()
    assert (code, out) == (2, "")
    assert all(f" {name} " in err for name in COMMANDS)


def test_help_starts_as_a_process():
    done = subprocess.run([sys.executable, "-m", "saro", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "inspect" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspct"], "unknown subcommand 'inspct'; did you mean inspect?"),
        (["--hlep"], "unknown option --hlep; did you mean --help?"),
        (["convert", "gsm8", "a", "b"], "unknown format 'gsm8'; did you mean gsm8k?"),
        (["convert", "gsm8k", "a"], "missing target; see saro convert --help"),
        (["export", "--merge"], "missing --run; see saro export --help"),
        (["compare", "--model", "demo"], "unknown option --model; did you mean --models?"),
        (["evaluate", "--model", "demo"], "unknown option --model; did you mean --models?"),
        (["evaluate", "--models", "a", "b"], "--models takes one value; write several as --models '[a, b]'"),
        (["plan", "--model", "demo"], "unknown option --model; it is spelled --model.name"),
        (["doctor", "--data", "my.jsonl"], "unknown option --data; see saro doctor --help"),
        (["doctor", "--model.liger"], "argument --model.liger: expected one argument"),
        (["chat", "--run", "x", "--max_tokens", "null"], "--max_tokens: Expected a int. Got value: None"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(saro, arguments, message):
    code, _, err = saro(*arguments)
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


# One spelling


@pytest.mark.parametrize("form", ["--option value", "--option=value"])
@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        (command, old, new)
        for command, spellings in RESPELLED.items()
        for new, olds in spellings.items()
        for old in olds
    ],
)
def test_an_old_spelling_is_refused_and_the_new_one_named(saro, tmp_path, command, old, new, form):
    # A file that exists: jsonargparse would read --model FILE as options of a group.
    file = tmp_path / "options.yaml"
    file.write_text("name: demo\n")
    given = [old, str(file)] if form == "--option value" else [f"{old}={file}"]
    code, _, err = saro(command, *REQUIRED.get(command, []), *given)
    assert (code, err) == (2, f"error: unknown option {old}; it is spelled {new}\n")


@pytest.mark.parametrize("command", RESPELLED)
def test_every_new_spelling_is_an_option(command):
    assert set(RESPELLED[command]) <= set(option_names(import_module(COMMANDS[command].module).Options))


def test_old_entries_of_a_dict_name_the_new_option(saro):
    code, _, err = saro("inspect", "--template_variables.enable_thinking", "true")
    assert (code, err.endswith("did you mean --data.template_variables?\n")) == (2, True)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_has_a_hyphen(name):
    assert not [o for o in option_names(import_module(COMMANDS[name].module).Options) if "-" in o.removeprefix("--")]


def test_options_shared_with_the_recipes_arrive_in_their_groups():
    options = import_module(COMMANDS["inspect"].module).Options
    arguments = ["--data.train", "a.jsonl", "--data.think_tags", "[<a>, </a>]", "--model.trust_remote_code", "true"]
    parsed = parse_tool(
        options, "saro inspect", "Inspect.", [*arguments, "--data.template_variables.enable_thinking", "true"]
    )
    assert (parsed.data.train, parsed.data.think_tags) == (["a.jsonl"], ("<a>", "</a>"))
    assert parsed.data.template_variables == {"enable_thinking": True}
    assert parsed.model.trust_remote_code is True
    assert parsed.data.heldout == options().data.heldout


def test_an_option_that_a_tool_does_not_show_is_unknown(saro):
    code, _, err = saro("doctor", "--model.lora_rank", "3")
    assert code == 2
    assert err.startswith("error: unknown option --model.lora_rank; ")


# The import of the package


def test_importing_saro_fetches_no_kernel(tmp_path):
    """If the PyPI package `kernels` is installed, bitsandbytes downloads a binary when it is imported."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*a, **k): raise SystemExit('tried a download')")
    code = "import saro, sys; assert 'bitsandbytes' in sys.modules; import kernels; print(kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"PYTHONPATH": str(tmp_path)}
    )
    assert done.stdout.strip() == str(tmp_path / "kernels.py")
    assert (done.returncode, done.stderr) == (0, "")
