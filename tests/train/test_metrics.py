"""Metrics and margins are in files that a kill cannot damage, and Progress shows metrics."""

from __future__ import annotations

import io
import json
import sys
from contextlib import suppress

import pytest

from saro.errors import SaroError
from saro.train.metrics import MetricsFile, Progress, drop_later_results, format_metrics, write_margins

# metrics.jsonl.


def test_each_line_is_a_json_object_with_its_step_first(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write({"step": 1, "loss": 0.5})
    file.write({"step": 2, "loss": 0.25})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": s / 2}) + "\n" for s in (1, 2, 2, 3, 4)))
    MetricsFile(path, 2).write({"step": 3, "loss": 9.0})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 9.0},
    ]


@pytest.mark.parametrize("half", ['{"step": 3, "lo', "{", '{"step": 2', "\0\0\0"])
def test_an_incomplete_last_line_is_dropped(tmp_path, half):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.5}\n' + half)
    MetricsFile(path, 2).write({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_last_line_without_a_line_break_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    MetricsFile(path, 2).write({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("line", ["\0\0\0{}", '{"loss": 1}', "[1]", "nonsense}"])
def test_a_line_that_is_not_whole_is_dropped_wherever_it_is(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    MetricsFile(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_model_of_a_finished_run_that_goes_on_gets_another_name(tmp_path):
    """Under its old name it would pass as the model of the longer run."""
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "weights").write_text("of step 4")
    (tmp_path / "after.json").write_text("{}")
    drop_later_results(tmp_path, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final.step_000004"]
    assert (tmp_path / "final.step_000004" / "weights").read_text() == "of step 4"


def test_a_new_run_starts_with_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsFile(path, 0)
    assert path.read_text() == ""


def test_resuming_creates_a_missing_file(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl", 5)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_line_is_in_the_file_when_write_returns(tmp_path):
    """A kill -9 right after the call must not lose the line."""
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write({"step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


# margins.jsonl.


def steps_of(output) -> list[tuple[int, str]]:
    return [(line["step"], line["id"]) for line in map(json.loads, (output / "margins.jsonl").read_text().splitlines())]


def test_evaluations_are_appended_to_one_file(tmp_path):
    for step in (0, 4):
        write_margins(tmp_path, step, [{"step": step, "id": i, "margin": 0.5} for i in "ab"])
    assert steps_of(tmp_path) == [(0, "a"), (0, "b"), (4, "a"), (4, "b")]


def test_an_evaluation_repeated_after_a_kill_replaces_the_first(tmp_path):
    for step in (0, 4, 8, 4):
        write_margins(tmp_path, step, [{"step": step, "id": "a"}])
    assert steps_of(tmp_path) == [(0, "a"), (4, "a")]


# The terminal.


def test_values_are_shown_on_one_line_with_four_digits():
    assert format_metrics({"loss": 1.23456, "lr": 2e-5, "n": 3}) == "loss 1.235  lr 2e-05  n 3"


def test_without_a_terminal_there_is_a_line_for_each_interval(capsys):
    with Progress(10, 0, True) as progress:
        progress.step()
        progress.line(1, {"loss": 2.0})
    out, err = capsys.readouterr()
    assert (out, err) == ("", "step 1/10  loss 2\n")


def test_only_the_main_process_shows_progress(capsys):
    with Progress(10, 0, False) as progress:
        progress.step()
        progress.line(1, {"loss": 2.0})
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_bar_starts_at_the_resumed_step(monkeypatch):
    monkeypatch.delenv("NO_PROGRESS", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(10, 4, True) as progress:
        progress.step()
        progress.line(5, {"loss": 2.0})
    assert "5/10" in sys.stderr.getvalue()
    assert "loss 2" in sys.stderr.getvalue()


def test_an_error_ends_the_line_of_the_bar(monkeypatch):
    monkeypatch.delenv("NO_PROGRESS", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with suppress(SaroError), Progress(10, 0, True) as progress:
        progress.step()
        assert not sys.stderr.getvalue().endswith("\n")
        raise SaroError("the loss is not finite")
    assert sys.stderr.getvalue().endswith("\n")
