"""`saro label`: what a labeller sees, and what each key does."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys

import pytest
from command import run_saro
from made_answers import make_answer
from rich.console import Console
from run_files import ROOT

from saro import cli
from saro.data.records import Message
from saro.evaluate.answers import Answer, Verdict, read_rows, write_rows
from saro.evaluate.labels import read_labels
from saro.evaluate.suite import Item
from saro.tools import label

MODELS = ("secret-model-1", "secret-model-2")


@pytest.fixture
def folder(tmp_path):
    """An evaluation of two models on four prompts, with verdicts of a judge."""
    items = [
        Item(suite="s", id=f"i{n}", prompt=(Message("user", f"Do thing {n}."),), expect=("refuse", "comply")[n % 2])
        for n in range(4)
    ]
    answers = [
        make_answer(f"Answer to {item.id}, in {3 + m} parts.", model=model, item=item.id, think="hidden reasoning")
        for m, model in enumerate(MODELS)
        for item in items
    ]
    write_rows(tmp_path / "items.jsonl", items)
    write_rows(tmp_path / "answers.jsonl", answers)
    verdicts = [Verdict(answer=a.key, judge="secret-judge", judge_hash="", refuses="full") for a in answers]
    write_rows(tmp_path / "verdicts.jsonl", verdicts)
    return tmp_path


@pytest.fixture
def saro(monkeypatch, capsys, folder):
    """Runs `saro label` on the folder with lines as input; returns exit code, stdout and stderr."""
    command = cli.Command("saro.tools.label", "label answers by hand")
    monkeypatch.setattr(cli, "COMMANDS", cli.COMMANDS | {"label": command})

    def run(typed: str, *arguments: str):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        return run_saro(monkeypatch, capsys, "label", str(folder), "--annotator", "me", *arguments)

    return run


def labels_in(folder) -> list[dict]:
    answers = read_rows(folder / "answers.jsonl", Answer)
    return read_labels(folder / "labels.jsonl", {answer.key: answer.draw for answer in answers})


def labels_of(folder) -> list[int]:
    return [line["label"] for line in labels_in(folder)]


def test_one_key_labels_one_answer(saro, folder):
    code, out, _ = saro("1\n2\n3\nq\n")
    assert code == 0
    assert labels_of(folder) == [1, 2, 3]
    assert out.splitlines()[-1].startswith("3 of 8 labelled, 0 skipped")
    assert "the same command continues" in out


def test_the_labeller_sees_request_and_answer_and_nothing_that_tells_who_gave_it(saro):
    _, out, _ = saro("1\n" * 8)
    for n in range(4):
        assert out.count(f"Do thing {n}.") == 2
    assert "in 3 parts" in out
    for hidden in (*MODELS, "secret-judge", "hidden reasoning", "refuse ", "comply "):
        assert hidden not in out.replace("2 refuses", "").replace("1 complies", "")


def test_the_same_command_continues_where_it_stopped(saro, folder):
    saro("1\ns\nq\n")
    code, out, _ = saro("2\n" * 20)
    assert code == 0
    assert "3 of 8" in out
    assert sorted(labels_of(folder)) == [1] + [2] * 6
    assert out.splitlines()[-1].startswith("7 of 8 labelled, 1 skipped")
    assert "continues" not in out.splitlines()[-1]
    code, out, _ = saro("3\n")
    assert out.splitlines() == [out.splitlines()[-1]]


def test_undo_takes_back_one_label_after_the_other_also_of_an_earlier_session(saro, folder):
    saro("1\n1\nq\n")
    first = [line["answer"] for line in labels_in(folder)]
    saro("u\nu\nu\nq\n")
    assert labels_of(folder) == []
    saro("2\n2\nq\n")
    assert [line["answer"] for line in labels_in(folder)] == first
    assert labels_of(folder) == [2, 2]


def test_undo_with_nothing_to_undo_says_so(saro):
    assert "There is nothing to undo." in saro("u\nq\n")[1]


def test_another_key_changes_nothing(saro, folder):
    _, out, _ = saro("x\n4\n\n1\nq\n")
    assert labels_of(folder) == [1]
    assert out.count("Press one of") == 2


def test_the_end_of_the_input_quits(saro, folder):
    assert saro("1\n")[0] == 0
    assert labels_of(folder) == [1]


def test_each_label_has_the_probability_of_its_stratum(saro, folder):
    saro("1\n" * 4, "--number", "4")
    assert [line["probability"] for line in labels_in(folder)] == [0.5] * 4


def test_only_the_answers_of_named_models_are_labelled(saro, folder):
    saro("1\n" * 9, "--model", MODELS[0])
    assert {line["answer"].split("/")[0] for line in labels_in(folder)} == {MODELS[0]}
    assert len(labels_of(folder)) == 4


def test_an_answer_cannot_command_the_terminal():
    item = Item(suite="s", id="i", prompt=(Message("user", "Say\x1b[2J hello."),), expect="comply")
    answer = make_answer("red [bold]\x1b]52;c;ZWNobw==\x07 \x9b31m \u202edlrow\nline", key="k")
    out = io.StringIO()
    label._show(item, answer, 1, 1, Console(file=out, force_terminal=False, width=100))
    text = out.getvalue()
    assert "[bold]" in text
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & {*text}
    assert text.count("\N{REPLACEMENT CHARACTER}") == 5


@pytest.mark.parametrize("missing", ["items.jsonl", "answers.jsonl"])
def test_a_folder_without_an_evaluation_is_one_line(saro, folder, missing):
    (folder / missing).unlink()
    code, _, err = saro("1\n")
    assert code == 2
    assert err == f"error: {folder}: has no {missing}; name the folder of an evaluation\n"


def test_no_answers_are_asked_for(saro):
    code, _, err = saro("1\n", "--number", "0")
    assert (code, err) == (2, "error: --number is 0; it must be at least 1\n")


def test_on_a_terminal_a_key_needs_no_return(folder):
    """In a process of its own, whose stdin is a pseudo-terminal."""
    code = (
        "import sys; from saro.tools.label import Options, run; from rich.console import Console;"
        "sys.exit(run(Options(sys.argv[1], annotator='me'), Console()))"
    )
    ours, theirs = pty.openpty()
    os.write(ours, b"12q")
    arguments = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(arguments, stdin=theirs, capture_output=True, cwd=ROOT, text=True, timeout=60, check=False)
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0, done.stderr
    assert labels_of(folder) == [1, 2]
    assert "2 of 8 labelled" in done.stdout
