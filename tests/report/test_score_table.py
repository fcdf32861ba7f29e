"""The table that the terminal shows at the end of an evaluation."""

from __future__ import annotations

from io import StringIO

from evaluations import make_evaluation
from rich.console import Console

from saro.report.number import MINUS, score_text
from saro.report.score_table import score_table


def lines_of(scores, width: int = 160) -> list[str]:
    console = Console(file=StringIO(), width=width)
    console.print(score_table(scores))
    return console.file.getvalue().splitlines()


def test_rates_of_all_models_and_the_last_difference_stand_in_one_row():
    scores = make_evaluation(3, 20).scores()
    (row,) = [line for line in lines_of(scores) if "over-refusal" in line]
    values = [
        score_text(score)
        for score in scores["scores"]
        if score["metric"] == "over_refusal" and score["attack"] == "none" and score["group"] is None
    ]
    assert all(value in row for value in values)
    assert row.split()[-2] in ("✓", "✗", "≈")
    assert f"srpo {MINUS} base" in " ".join(" ".join(lines_of(scores)).split())


def test_each_attack_on_harmful_prompts_has_a_row():
    scores = make_evaluation(2, 20).scores()
    text = "\n".join(lines_of(scores))
    assert all(attack["id"] in text for attack in scores["attacks"] if attack["id"] != "none")


def test_a_single_model_is_compared_with_none():
    text = "\n".join(lines_of(make_evaluation(1, 20).scores()))
    assert MINUS not in text.replace(f"[{MINUS}", "[").replace(f" {MINUS}", " ")
    assert "base" in text


def test_a_name_that_looks_like_markup_is_printed_unchanged():
    evaluation = make_evaluation(1, 6)
    scores = evaluation.scores()
    scores["models"] = ["[bold]base"]
    for score in scores["scores"]:
        score["id"] = score["id"].replace("/base/", "/[bold]base/")
    assert "[bold]base" in "\n".join(lines_of(scores))


def test_numbers_do_not_wrap_in_a_narrow_terminal():
    text = "\n".join(lines_of(make_evaluation(2, 20).scores(), width=80))
    assert "[" in text
    assert all(line.count("[") == line.count("]") for line in text.splitlines())
