"""Agreement with people: reading of labelled answers, and the figures against closed cases."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from saro.errors import SaroError
from saro.evaluate.answers import Verdict
from saro.evaluate.judge_gold import GOLD, Gold, as_answers, measure_agreement, read_gold


def write_csv(path: Path, columns: list[str], rows: list[list[str]], head: str = "") -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(head)
        csv.writer(file).writerows([columns, *rows])
    return path


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


XSTEST = ["id", "type", "prompt", "completion", "annotation_1", "annotation_2", "agreement", "final_label"]
PYRIT = ["objective", "assistant_response", "human_score", "data_type"]


def test_xstest_is_read_as_published(tmp_path):
    rows = [["v2-1", "homonyms", "P", "A\n\nB", "", "", "", label] for label in ("1_full_compliance",)]
    rows += [
        ["v2-2", "x", "P", "", "", "", "", "2_full_refusal"],
        ["v2-3", "x", "P", "C", "", "", "", "3_partial_refusal"],
    ]
    gold = read_gold(write_csv(tmp_path / "xstest_completions_gpt4.csv", XSTEST, rows))
    assert [(g.id, g.answer, g.refuses, g.group) for g in gold] == [
        ("v2-1", "A\n\nB", "none", "gpt4"),
        ("v2-2", "", "full", "gpt4"),
        ("v2-3", "C", "partial", "gpt4"),
    ]
    assert {g.harmful for g in gold} == {None}


def test_pyrit_is_read_as_published_with_its_comments(tmp_path):
    head = "# dataset_version=1.0\n# More words\n"
    rows = [["O", "No, I will not.", "1", "text"], ["O", "Here, with a comma", "0", "text"]]
    gold = read_gold(write_csv(tmp_path / "refusal.csv", PYRIT, rows, head))
    assert [(g.id, g.prompt, g.refuses, g.group) for g in gold] == [
        ("1", "O", "full", "refusal"),
        ("2", "O", "none", "refusal"),
    ]


def test_jsonl_says_refusal_harm_or_both(tmp_path):
    rows = [
        {"id": "a", "prompt": "P", "answer": "A", "refuses": "partial", "group": "g"},
        {"id": "b", "prompt": "P", "answer": "A", "refuses": True},
        {"prompt": "P", "answer": "A", "harmful": False},
    ]
    gold = read_gold(write_jsonl(tmp_path / "mine.jsonl", *rows))
    assert [(g.id, g.refuses, g.harmful, g.group) for g in gold] == [
        ("a", "partial", None, "g"),
        ("b", "full", None, "mine"),
        ("3", None, False, "mine"),
    ]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "P", "answer": "A"}, "neither refuses nor harmful"),
        ({"prompt": "P", "answer": "A", "refuses": "maybe"}, "refuses has no valid value"),
        ({"prompt": "P", "answer": "A", "harmful": "yes"}, "harmful is a string"),
        ({"prompt": "P", "answer": "A", "refuse": True}, "did you mean refuses"),
        ({"prompt": "P", "refuses": True}, "answer is null"),
        ({"prompt": "", "answer": "A", "refuses": True}, "prompt is empty"),
    ],
)
def test_a_faulty_line_is_one_error_with_its_place(tmp_path, row, fault):
    path = write_jsonl(tmp_path / "gold.jsonl", {"id": "a", "prompt": "P", "answer": "A", "refuses": True}, row)
    with pytest.raises(SaroError, match=rf"^{path}:2: [^\n]*{fault}[^\n]*$"):
        read_gold(path)


@pytest.mark.parametrize(
    ("columns", "row", "fault"),
    [
        (["a", "b"], ["1", "2"], "neither XSTest's columns nor PyRIT's"),
        (XSTEST, ["1", "t", "P", "A", "", "", "", "4_else"], "row 1: final_label"),
        (PYRIT, ["O", "A", "0.5", "text"], "row 1: human_score"),
    ],
)
def test_a_faulty_table_is_one_error(tmp_path, columns, row, fault):
    path = write_csv(tmp_path / "gold.csv", columns, [row])
    with pytest.raises(SaroError, match=fault) as error:
        read_gold(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_an_id_that_is_used_twice_is_an_error(tmp_path):
    row = {"id": "a", "prompt": "P", "answer": "A", "refuses": True}
    with pytest.raises(SaroError, match='id "a" is used twice'):
        read_gold(write_jsonl(tmp_path / "gold.jsonl", row, row))


def test_another_kind_of_file_is_an_error(tmp_path):
    with pytest.raises(SaroError, match=r"ends with \.csv or \.jsonl"):
        read_gold(tmp_path / "gold.xlsx")


def test_the_gold_answers_that_come_with_saro_hold_every_kind():
    gold = read_gold(GOLD)
    assert len(gold) == 20
    assert {g.refuses for g in gold} == {"full", "partial", "none"}
    assert {g.group for g in gold} == {"refusal", "partial", "help", "empty"}
    # None of them does what a harmful request asks: the file is shipped.
    assert {g.harmful for g in gold} == {False}


# --- Figures


def pairs(
    table: dict[tuple[str, str | None], int], group: str = "g", prompts: int = 10**6
) -> list[tuple[Gold, Verdict]]:
    """Make labelled answers and verdicts from (label, verdict) -> number; a verdict of None is an abstention."""
    cells = [cell for cell, number in table.items() for _ in range(number)]
    return [
        (
            Gold(f"{group}{n}", f"prompt {n % prompts}", "A", label, None, group),
            Verdict(answer=str(n), judge="j", judge_hash="", refuses=verdict, abstained=None if verdict else "parse"),
        )
        for n, (label, verdict) in enumerate(cells)
    ]


TABLE = {("full", "full"): 20, ("full", "none"): 5, ("none", "full"): 10, ("none", "none"): 15}


def test_figures_of_a_tabulated_case():
    """20, 5, 10, 15: accuracy 0.7 and kappa (0.7 - 0.5) / 0.5 = 0.4, the example of Cohen's kappa in many textbooks."""
    figures = measure_agreement(pairs(TABLE))["refusal"]["all"]
    assert figures["accuracy"]["value"] == pytest.approx(0.7)
    assert figures["kappa"]["value"] == pytest.approx(0.4)
    assert figures["f1"]["value"] == pytest.approx(40 / 55, rel=1e-5)
    assert figures["confusion"] == {
        "refuses": {"refuses": 20, "complies": 5},
        "complies": {"refuses": 10, "complies": 15},
    }
    assert (figures["n"], figures["abstained"]) == (50, 0)


def test_partial_refusals_count_as_refusals_and_are_measured_three_ways_too():
    agreement = measure_agreement(pairs({("partial", "full"): 10, ("full", "full"): 10, ("none", "none"): 20}))
    assert agreement["refusal"]["all"]["accuracy"]["value"] == 1
    three = agreement["refusal_three_ways"]["all"]
    assert three["accuracy"]["value"] == pytest.approx(0.75)
    # Chance: (10 * 20 + 20 * 20) / 40**2 = 0.375.
    assert three["kappa"]["value"] == pytest.approx((0.75 - 0.375) / 0.625)
    assert "f1" not in three


def test_three_ways_are_left_out_if_people_distinguished_two():
    assert [*measure_agreement(pairs(TABLE))] == ["refusal"]


def test_abstentions_count_in_no_figure_but_their_own():
    figures = measure_agreement(pairs(TABLE | {("full", None): 7}))["refusal"]["all"]
    assert (figures["n"], figures["abstained"]) == (50, 7)
    assert figures["accuracy"]["value"] == pytest.approx(0.7)


def test_harm_counts_from_one_half():
    gold = [Gold(str(n), str(n), "A", None, harmful, "g") for n, harmful in enumerate((True, True, False, False))]
    verdicts = [Verdict(answer="", judge="j", judge_hash="", harmful=p) for p in (0.5, 0.4, 0.6, 0.0)]
    figures = measure_agreement([*zip(gold, verdicts, strict=True)])["harm"]["all"]
    assert figures["confusion"] == {"harmful": {"harmful": 1, "harmless": 1}, "harmless": {"harmful": 1, "harmless": 1}}


def test_each_group_has_its_own_figures():
    given = [*pairs({("full", "full"): 9, ("full", "none"): 1}, "a"), *pairs({("full", "none"): 10}, "b")]
    figures = measure_agreement(given)["refusal"]
    assert {name: f["accuracy"]["value"] for name, f in figures.items()} == {"all": 0.45, "a": 0.9, "b": 0}


def test_figures_without_a_value_are_null_and_json():
    """All labels and verdicts are the same: chance alone agrees fully, and kappa is 0 / 0."""
    figures = measure_agreement(pairs({("none", "none"): 5}))["refusal"]["all"]
    assert figures["kappa"] == {"value": None, "low": None, "high": None}
    assert figures["f1"]["value"] is None
    json.dumps(figures, allow_nan=False)


def test_the_same_seed_gives_the_same_intervals():
    assert measure_agreement(pairs(TABLE), seed=3) == measure_agreement(pairs(TABLE), seed=3)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """95 % intervals of accuracy 0.7 on 60 answers, 40 times: within 4 standard errors of 38."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(40):
        right = int(rng.binomial(60, 0.7))
        figure = measure_agreement(pairs({("full", "full"): right, ("full", "none"): 60 - right}))
        held += (ends := figure["refusal"]["all"]["accuracy"])["low"] <= 0.7 <= ends["high"]
    assert held >= 33


def test_answers_to_one_prompt_are_not_independent():
    """The same 5 answers to each of 10 prompts tell no more of other prompts than one would: the interval is wider."""
    alone = measure_agreement(pairs({("full", "full"): 35, ("full", "none"): 15}))["refusal"]["all"]["accuracy"]
    rows = pairs({("full", "full"): 35, ("full", "none"): 15})
    by_prompt = [(Gold(g.id, f"prompt {n // 5}", "A", g.refuses, None, g.group), v) for n, (g, v) in enumerate(rows)]
    together = measure_agreement(by_prompt)["refusal"]["all"]["accuracy"]
    assert together["value"] == alone["value"]
    assert together["high"] - together["low"] > 1.8 * (alone["high"] - alone["low"])


def test_an_answer_without_text_that_no_judge_was_asked_about_is_left_out():
    given = pairs({("full", "full"): 3})
    assert measure_agreement([*given, (given[0][0], None)])["refusal"]["all"]["n"] == 3


def test_labelled_answers_become_what_a_judge_is_asked_about():
    answers, items = as_answers(read_gold(GOLD), "gold")
    assert len({a.key for a in answers}) == len(items) == 20
    assert all(items[a.suite, a.item].expect != "answer" for a in answers)
