"""Reading the folder of an evaluation: what is missing or damaged is one line."""

from __future__ import annotations

import json

import pytest
from evaluations import write_evaluation

from saro.errors import SaroError
from saro.report.evaluation_files import read_evaluation


@pytest.fixture
def folder(tmp_path):
    write_evaluation(tmp_path, 2, 6)
    return tmp_path


def test_answers_items_and_scores_are_found_by_their_names(folder):
    evaluation = read_evaluation(folder)
    assert evaluation.models == ["base", "rw"]
    assert evaluation.expects("twins") == ["refuse", "comply"]
    score = evaluation.score("harmful_compliance", "rw", "twins")
    assert score["id"] == "harmful_compliance/rw/twins/none"
    assert evaluation.difference("harmful_compliance", "rw", "base", "twins")["baseline"] == "base"
    assert evaluation.score("harmful_compliance", "rw", "twins", "unknown") is None


@pytest.mark.parametrize("name", ["scores.json", "items.jsonl", "answers.jsonl", "verdicts.jsonl", "manifest.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(SaroError, match=f"{name}: there is no such file; give the folder of a finished evaluation"):
        read_evaluation(folder)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(SaroError, match="nowhere: there is no such folder"):
        read_evaluation(tmp_path / "nowhere")


def test_a_damaged_line_is_named(folder):
    path = folder / "answers.jsonl"
    path.write_text(path.read_text() + '{"key": "ba')
    line = path.read_text().count("\n") + 1
    with pytest.raises(SaroError, match=rf"answers.jsonl:{line}: is not JSON"):
        read_evaluation(folder)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_scores_are_named(folder, text):
    (folder / "scores.json").write_text(text)
    with pytest.raises(SaroError, match=r"scores.json: is not "):
        read_evaluation(folder)


def test_an_answer_to_an_unknown_item_is_refused(folder):
    items = (folder / "items.jsonl").read_text().splitlines()
    (folder / "items.jsonl").write_text("\n".join(items[1:]) + "\n")
    with pytest.raises(SaroError, match=r"the item of base/\S+ is not in items.jsonl"):
        read_evaluation(folder)


def test_an_answer_of_an_unknown_model_is_refused(folder):
    scores = json.loads((folder / "scores.json").read_text())
    (folder / "scores.json").write_text(json.dumps({**scores, "models": ["base"]}))
    with pytest.raises(SaroError, match=r"the model of rw/\S+ is not in scores.json"):
        read_evaluation(folder)


def test_files_of_two_evaluations_are_refused(folder):
    scores = json.loads((folder / "scores.json").read_text())
    scores["outcomes"].popitem()
    (folder / "scores.json").write_text(json.dumps(scores))
    with pytest.raises(SaroError, match="the files are not those of one evaluation"):
        read_evaluation(folder)


def test_a_text_with_a_line_separator_is_one_line(folder):
    """Python's splitlines() would cut it there, JSON does not."""
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    rows[0]["answer"] = "one\u2028two"
    (folder / "answers.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert read_evaluation(folder).answers[0]["answer"] == "one\u2028two"
