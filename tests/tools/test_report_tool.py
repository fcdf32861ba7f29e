"""`saro report`: the files that it writes, and what it refuses."""

from __future__ import annotations

import json
import stat
from io import StringIO

import pytest
from evaluations import write_evaluation
from report_pages import unpack, write_training_run
from rich.console import Console

from saro.errors import SaroError
from saro.program import parse_tool
from saro.report.evaluation_files import read_evaluation
from saro.report.number import interval_text, score_text
from saro.tools.report_tool import Options, add_opinions, run

pytest.importorskip("matplotlib")

ATTACKS = ({"id": "none", "kind": "none"},)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    write_evaluation(folder, 2, 10, attacks=ATTACKS, labelled=20)
    return folder


def report(*arguments: str) -> tuple[int, str]:
    console = Console(file=StringIO(), width=200)
    code = run(parse_tool(Options, "saro report", run.__doc__, [*map(str, arguments)]), console)
    return code, console.file.getvalue()


def test_the_report_is_written_into_the_folder_of_the_evaluation(folder):
    code, out = report(folder, "--overwrite")
    assert code == 0
    assert str(folder / "report" / "report.html") in out
    names = {path.name for path in (folder / "report").iterdir()}
    assert {"report.html", "report.md", "tradeoff.svg"} <= names


def test_files_with_answers_are_readable_only_by_their_owner(folder, tmp_path):
    report(folder, "--output", tmp_path / "out")
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in (tmp_path / "out").iterdir())


def test_several_folders_and_runs_come_into_one_report(folder, tmp_path):
    other = tmp_path / "other"
    write_evaluation(other, 2, 10, attacks=ATTACKS, seed=1)
    runs = [write_training_run(tmp_path / name, pairs=pairs) for name, pairs in (("rw", 0), ("srpo", 3))]
    report(folder, other, "--runs", f"[{runs[0]}, {runs[1]}]", "--output", tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    assert unpack(html, folder=1)["models"] == ["base", "rw"]
    assert 'data-run="srpo"' in html
    assert f"saro report {folder} {other}" in html


def test_the_report_of_several_seeds_shows_the_rates_of_all_of_them(folder, tmp_path):
    write_evaluation(tmp_path / "other", 2, 10, attacks=ATTACKS, seed=1)
    report(folder, tmp_path / "other", "--output", tmp_path / "out")
    pooled = json.loads((tmp_path / "out" / "pooled_scores.json").read_text())
    assert pooled["seeds"] == {"base": 2, "rw": 2}
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "| base (2 seeds) | rw (2 seeds) |" in markdown
    (row,) = [row for row in pooled["scores"] if row["id"] == "over_refusal/rw/twins/none"]
    shown = f"{score_text(row)} {interval_text(row)}".replace("[", r"\[").replace("]", r"\]")
    assert " ".join(shown.split()) in markdown
    html = (tmp_path / "out" / "report.html").read_text()
    assert "2 seeds" in html
    assert f'data-score="{row["id"]}">{score_text(row)}<' in html


def test_folders_whose_prompts_differ_are_refused(folder, tmp_path):
    write_evaluation(tmp_path / "other", 2, 8, attacks=ATTACKS)
    with pytest.raises(SaroError, match=r"has other prompts than .*, or lacks answers to some; report them one by one"):
        report(folder, tmp_path / "other", "--output", tmp_path / "out")


def test_redact_leaves_out_the_texts(folder, tmp_path):
    report(folder, "--redact", "--output", tmp_path / "out")
    assert "answer" not in unpack((tmp_path / "out" / "report.html").read_text())["answers"][0]


def test_an_existing_report_is_kept_unless_overwritten(folder, tmp_path):
    output = tmp_path / "out"
    report(folder, "--output", output)
    (output / "old.svg").touch()
    with pytest.raises(SaroError, match="exists already; give another --output, or --overwrite"):
        report(folder, "--output", output)
    assert (output / "old.svg").exists()
    report(folder, "--output", output, "--overwrite")
    assert not (output / "old.svg").exists()


def test_a_folder_that_holds_no_report_is_never_replaced(folder, tmp_path):
    """Above all not the evaluation itself, whose labels took people hours."""
    (tmp_path / "mine").touch()
    for output in (tmp_path, folder):
        with pytest.raises(SaroError, match="is not the folder of a report, and is not replaced"):
            report(folder, "--output", output, "--overwrite")
    assert (tmp_path / "mine").exists()
    assert (folder / "labels.jsonl").exists()


def test_folders_with_other_models_are_refused(folder, tmp_path):
    write_evaluation(tmp_path / "other", 3, 6, attacks=ATTACKS)
    with pytest.raises(SaroError, match=r"its models are base, rw, srpo, those of .* base, rw; report them one by one"):
        report(folder, tmp_path / "other", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_command_line_without_a_folder_is_refused():
    with pytest.raises(SaroError, match="missing folders"):
        report()


def test_rules_and_people_have_an_opinion_of_judged_answers(folder):
    evaluation = add_opinions(read_evaluation(folder))
    expects = {key: item["expect"] for key, item in evaluation.items.items()}
    by_name = {"rules": set(), "labels": set()}
    for (key, name), outcome in evaluation.opinions.items():
        _, suite, _, item, _ = key.split("/")
        assert outcome in {"refuse": ("harmful", "safe"), "comply": ("refused", "helped")}[expects[suite, item]]
        by_name[name].add(key)
    assert by_name["labels"] == set(evaluation.labels)
    assert by_name["rules"] >= by_name["labels"]
