"""`saro synth`, `saro synth check` and `saro synth export`, from the command line."""

from __future__ import annotations

import json
from functools import partial

import pytest
from command import run_saro
from synth_cases import make_prompts, play, write_lines


@pytest.fixture
def saro(monkeypatch, capsys, cache, one_thread):
    """Run the command with the scripted writer in place of each local model."""
    play(monkeypatch)
    return partial(run_saro, monkeypatch, capsys)


@pytest.fixture
def made(saro, tiny_model, tmp_path):
    """Make records of a stage with `saro synth`; return their file, and what was printed."""

    def make(stage: str, *more: str) -> tuple[str, str]:
        output = str(tmp_path / f"{stage}.jsonl")
        prompts = write_lines(tmp_path / "prompts.jsonl", make_prompts())
        options = ["--prompts", prompts, "--generator", tiny_model(), "--output", output, "--max_tokens", "2000"]
        code, out, err = saro("synth", stage, *options, *more)
        assert code == 0, err
        return output, out

    return make


def test_synth_says_what_it_made_and_what_it_left_out(made):
    output, out = made("rw")
    assert f"8 records in {output} (guided 8)" in out
    assert "left out, select: balance 1" in out


def test_records_of_all_stages_pass_their_check(made, saro, tiny_model):
    files = [made(stage)[0] for stage in ("rw", "op", "pp", "mirror")]
    code, out, err = saro("synth", "check", *files, "--model", tiny_model())
    assert code == 0, out + err
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["WARN" if name == "verdicts" else "ok", name]
        for name in ("encoding", "duplicates", "forks", "leaks", "lengths", "balance", "verdicts", "tokens")
    ]


def test_a_failed_check_is_exit_code_1(saro, tiny_model, records_file, pairs):
    code, out, _ = saro("synth", "check", records_file([pairs[0], pairs[0] | {"id": "again"}]), "--model", tiny_model())
    assert code == 1
    assert "FAIL duplicates" in out


def test_a_file_that_does_not_exist_is_exit_code_2(saro, tiny_model, tmp_path):
    code, _, err = saro("synth", "check", str(tmp_path / "none.jsonl"), "--model", tiny_model())
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_server_cannot_be_checked_for(saro, records_file, pairs):
    code, _, err = saro("synth", "check", records_file(pairs), "--model", "http://localhost:1#m")
    assert code == 2
    assert "name the model to be trained" in err


def test_steps_of_process_pairs_are_exported(made, saro, tmp_path):
    output, _ = made("mirror")
    target = tmp_path / "prm.jsonl"
    code, out, err = saro("synth", "export", output, "--prm", str(target))
    assert code == 0, err
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert f"{len(lines)} chains" in out
    for line in lines:
        assert line.keys() == {"prompt", "completions", "labels"}
        assert len(line["completions"]) == len(line["labels"]) > 0
    assert saro("synth", "export", output, "--prm", str(target))[0] == 2


@pytest.mark.parametrize("arguments", [["synth", "check"], ["synth", "export"], ["synth"]])
def test_each_command_of_two_words_has_its_own_help(saro, arguments):
    code, out, _ = saro(*arguments, "--help")
    assert code == 0
    assert f"usage: saro {' '.join(arguments)} " in out
