"""Reading what a training run wrote."""

from __future__ import annotations

import pytest
from report_pages import write_training_run

from saro.errors import SaroError
from saro.report.training_files import read_training_run


def test_a_run_has_its_metrics_and_margins(tmp_path):
    run = read_training_run(write_training_run(tmp_path / "srpo", steps=3, pairs=5))
    assert run.name == "srpo"
    assert run.series("loss") == ([1, 2, 3], [3, 1.5, 1])
    assert run.last("loss") == 1
    steps, margins = run.margins
    assert steps.tolist() == [0, 3]
    assert margins.shape == (2, 5)


def test_a_metric_that_was_not_written_is_empty(tmp_path):
    run = read_training_run(write_training_run(tmp_path / "rw", pairs=0))
    assert run.margins is None
    assert run.series("rewards/margins") == ([], [])
    assert run.last("rewards/margins") is None


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(SaroError, match="holds no training run; give the output folder of a recipe"):
        read_training_run(tmp_path)


def test_a_run_that_has_not_begun_is_refused(tmp_path):
    folder = write_training_run(tmp_path / "rw")
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(SaroError, match="the run has not begun to train"):
        read_training_run(folder)


def test_a_damaged_line_is_refused(tmp_path):
    folder = write_training_run(tmp_path / "rw")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    with pytest.raises(SaroError, match=r"metrics.jsonl: is damaged; resume the run"):
        read_training_run(folder)
