"""`saro export-eval`: what it prints. tests/evaluate/test_export_suites.py tests the files."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from saro.errors import SaroError
from saro.program import parse_tool
from saro.tools.export_eval import Options, run


def export(*arguments: str) -> list[str]:
    """Run the tool; return the lines that it prints."""
    options = parse_tool(Options, "saro export-eval", run.__doc__, arguments)
    console = Console(file=io.StringIO())
    assert run(options, console) == 0
    return console.file.getvalue().splitlines()


def test_tasks_are_counted_and_the_next_command_is_shown(tmp_path):
    suite = tmp_path / "mine.jsonl"
    suite.write_text('{"id": "a", "prompt": "Hello?", "expect": "comply"}\n')
    out = export("demo", str(suite), "--to", "lm-eval", "--output", str(tmp_path / "out"))
    assert out == [
        "saro_twins_comply: 60 items",
        "saro_twins_refuse: 60 items",
        "saro_ability_number: 12 items",
        "saro_ability_choice: 12 items",
        "saro_mine_comply: 1 items",
        f"written to {tmp_path / 'out'}; lm_eval --include_path {tmp_path / 'out'} --tasks saro --apply_chat_template",
    ]
    assert (tmp_path / "out" / "saro_mine_comply.yaml").exists()


def test_items_that_are_left_out_are_counted_by_reason(tmp_path):
    out = export("demo", "--to", "harmbench", "--output", str(tmp_path / "out"))
    assert out[:2] == [
        "saro_behaviors.csv: 60 items",
        "84 left out, not harmful: HarmBench scores harmful behaviours",
    ]


def test_an_unknown_tool_is_an_error(tmp_path):
    with pytest.raises(SaroError, match="--to"):
        export("demo", "--to", "helm", "--output", str(tmp_path / "out"))


def test_a_faulty_suite_is_an_error_and_makes_no_folder(tmp_path):
    suite = tmp_path / "mine.jsonl"
    suite.write_text('{"id": "a", "prompt": "Hello?"}\n')
    with pytest.raises(SaroError, match=r'mine\.jsonl:1: field "expect" is missing'):
        export(str(suite), "--to", "inspect", "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
