"""`saro runs`: what it prints of runs."""

from __future__ import annotations

from functools import partial

import pytest
from command import run_saro
from report_pages import write_training_run


@pytest.fixture
def saro(monkeypatch, capsys):
    """Runs `saro runs` with arguments; returns exit code, stdout and stderr."""
    return partial(run_saro, monkeypatch, capsys, "runs")


@pytest.fixture
def folders(tmp_path) -> list[str]:
    """Folders of two runs, of five steps and of six."""
    return [str(write_training_run(tmp_path / name, steps)) for name, steps in (("srpo", 5), ("dpo", 6))]


def test_a_line_has_the_records_by_kind_and_the_steps(saro, folders):
    lines = "srpo: 1,200 op-cot, 2 pp-cot; 5 optimizer steps\ndpo: 1,200 op-cot, 2 pp-cot; 6 optimizer steps\n"
    assert saro(*folders) == (0, lines, "")


def test_runs_are_called_by_the_names_that_are_given(saro, folders):
    _, out, _ = saro(*folders, "--names", "[RW+op, DPO]")
    assert [line.partition(":")[0] for line in out.splitlines()] == ["RW+op", "DPO"]


def test_a_script_gets_the_steps_alone(saro, folders):
    assert saro("--steps", *folders) == (0, "5\n6\n", "")


def test_a_name_for_each_run_or_none(saro, folders):
    code, out, err = saro(*folders, "--names", "[RW]")
    assert (code, out) == (2, "")
    assert err == "error: --names names 1 runs, and there are 2 folders; give one for each\n"


def test_a_folder_without_a_run_is_refused_before_anything_is_printed(saro, folders, tmp_path):
    code, out, err = saro(*folders, str(tmp_path))
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path}: holds no training run; give the output folder of a recipe\n"
