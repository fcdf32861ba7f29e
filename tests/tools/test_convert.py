"""`saro convert`: what it prints about a conversion. tests/synth/test_public_sets.py tests the conversions."""

from __future__ import annotations

import json
from functools import partial

import pytest
from command import run_saro


@pytest.fixture
def saro(monkeypatch, capsys):
    """Runs `saro convert` with arguments; returns exit code, stdout and stderr."""
    return partial(run_saro, monkeypatch, capsys, "convert")


def test_records_are_written_and_counted(saro, tmp_path):
    source = tmp_path / "gsm8k.jsonl"
    source.write_text(json.dumps({"question": "1 + 1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}) + "\n")
    code, out, _ = saro("gsm8k", str(source), str(tmp_path / "out.jsonl"))
    assert code == 0
    assert out.startswith("1 records")
    assert "left out" not in out
    assert json.loads((tmp_path / "out.jsonl").read_text())["kind"] == "general"


def test_records_that_are_left_out_are_named(saro, tmp_path):
    source = tmp_path / "pairs.jsonl"
    rows = [{"question": "1 + 1?", "correct": "1+1=2\nA: 2", "incorrect": wrong} for wrong in ("1+1=3\nA: 3", "3")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = saro("gsm8k-pairs", str(source), str(tmp_path / "out.jsonl"))
    assert code == 0
    assert out.splitlines() == [
        f"1 records in {tmp_path / 'out.jsonl'}",
        f"1 left out, without a chain of steps: {source}:2",
    ]


def test_an_existing_target_is_kept_unless_overwritten(saro, tmp_path):
    source, target = tmp_path / "gsm8k.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"question": "1 + 1?", "answer": "1+1=2\n#### 2"}) + "\n")
    target.write_text("mine")
    code, _, err = saro("gsm8k", str(source), str(target))
    assert code == 2
    assert err.startswith(f"error: {target}: exists already")
    assert target.read_text() == "mine"
    assert saro("gsm8k", str(source), str(target), "--overwrite")[0] == 0
    assert json.loads(target.read_text())["kind"] == "general"
