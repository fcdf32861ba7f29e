"""`saro judge-check`: the table that it prints and the file that it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from command import run_saro

from saro import cli
from saro.draws.request import Draw


@pytest.fixture
def saro(monkeypatch, capsys, tmp_path):
    """Runs `saro judge-check` in a folder of its own; returns exit code, stdout and stderr."""
    command = cli.Command("saro.tools.judge_check", "how far a judge agrees with people")
    monkeypatch.setattr(cli, "COMMANDS", cli.COMMANDS | {"judge-check": command})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    return lambda *arguments: run_saro(monkeypatch, capsys, "judge-check", *arguments)


def report_of(folder) -> dict:
    return json.loads((folder / "gold.json").read_text())


def test_the_rules_are_checked_without_model_and_gold_of_ones_own(saro, tmp_path):
    code, out, _ = saro("rules")
    assert code == 0
    report = report_of(tmp_path)
    figures = report["agreement"]["refusal"]["all"]
    assert f"{figures['accuracy']['value']:.3f}" in out
    assert (report["judge"], report["model"], figures["n"]) == ("rules", None, 20)
    assert [file["rows"] for file in report["files"]] == [20]
    assert len(report["files"][0]["sha256"]) == 64
    assert report["agreement"]["refusal_three_ways"]["all"]["confusion"]["partial"]["partial"] == 4


def test_the_same_check_writes_the_same_bytes(saro, tmp_path):
    saro("rules", "--output", "a.json")
    saro("rules", "--output", "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("names", ['["a.jsonl", "b.jsonl"]', "*.jsonl"])
def test_several_files_may_use_the_same_ids(saro, tmp_path, names):
    for name in "ab":
        row = {"id": "1", "prompt": name, "answer": "I cannot help with that.", "refuses": name == "a"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    code, _, _ = saro("rules", "--gold", names)
    assert code == 0
    figures = report_of(tmp_path)["agreement"]["refusal"]
    assert {name: f["accuracy"]["value"] for name, f in figures.items()} == {"all": 0.5, "a": 1, "b": 0}


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["rule"], 'unknown judge "rule"; did you mean rules?'),
        (["rules", "--gold", "none.csv"], "none.csv: there is no such file"),
        (["rules", "--gold", "none*.csv"], "--gold none*.csv: no file has such a name"),
        (["rules", "--output", "none/gold.json"], "--output: none/gold.json is not a file in an existing folder"),
        (["rules", "--judge.model", "org/model"], "--judge rules needs no model"),
        (["rules", "--seed", "-1"], "--seed is -1"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(saro, tmp_path, arguments, fault):
    code, _, err = saro(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert fault in err
    assert err.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


@pytest.fixture
def judge_model(monkeypatch, tmp_path) -> Callable:
    """Lets a function, prompt -> reply, answer in place of a judge's model at a server."""
    pytest.importorskip("saro.draws.draw_all")
    from saro.evaluate import judge_model

    def replace_with(reply: Callable[[str], str]) -> list[str]:
        prompts: list[str] = []

        class Scripted:
            identity = {"kind": "scripted"}  # noqa: RUF012

            def order(self, requests):
                return [*range(len(requests))]

            def draw(self, requests):
                for index, request in enumerate(requests):
                    prompts.append(request.messages[-1].content)
                    yield [(index, Draw(text=reply(prompts[-1]), finish="stop"))]

        opened = SimpleNamespace(generator=Scripted(), chat=None)
        monkeypatch.setattr(judge_model, "open_judge_model", lambda *args, **options: opened)
        monkeypatch.setenv("SARO_CACHE", str(tmp_path / "cache"))
        return prompts

    return replace_with


def test_a_judge_with_a_model_is_asked_and_its_replies_are_kept(saro, judge_model, tmp_path):
    prompts = judge_model(lambda prompt: "CLASS: REFUSES")
    assert saro("xstest-rubric")[0] == 0
    report = report_of(tmp_path)
    assert (len(prompts), report["model"]) == (20, {"kind": "scripted"})
    assert len(report["prompt_hashes"]) == 3
    assert report["agreement"]["refusal"]["all"]["confusion"]["complies"] == {"refuses": 11, "complies": 0}
    saro("xstest-rubric")
    assert len(prompts) == 20


def test_a_judge_that_abstains_too_often_fails_after_its_figures_are_written(saro, judge_model, tmp_path):
    judge_model(lambda prompt: "Hm." if "e-mails" in prompt else "CLASS: COMPLIES")
    code, _, err = saro("xstest-rubric")
    assert code == 2
    assert err.startswith("error: judge xstest-rubric: abstains on 2 of 20 answers (10%): parse 2; ")
    assert "the store of draws" in err
    assert report_of(tmp_path)["agreement"]["refusal"]["all"]["abstained"] == 2


def test_a_rubric_without_a_model_asks_for_one(saro):
    pytest.importorskip("saro.draws.draw_all")
    code, _, err = saro("xstest-rubric")
    assert code == 2
    assert err == "error: judge xstest-rubric: works with any instruction model; name one with --judge.model\n"
