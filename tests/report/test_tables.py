"""The printed tables show the numbers of plain data, and nothing more."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from sets import by_hand, pairs_by_hand

from saro.data.lengths import LengthReport
from saro.report.tables import before_after_tables, print_lengths


def printed(report: LengthReport, title: str = "train") -> str:
    console = Console(file=StringIO(), width=90)
    print_lengths(console, title, report.as_dict())
    return console.file.getvalue()


def test_the_printed_report_has_the_numbers():
    text = printed(LengthReport.of(by_hand(dropped=("x",))))
    assert "train: 5 records (4 general, 1 safety); 1 dropped as too long" in text
    row = next(line for line in text.splitlines() if "whole record" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == ["whole record", "5", "7", "12", "12", "38"]
    assert all(name in text for name in ("prompt", "reasoning", "scored"))


def test_the_printed_report_does_not_mention_dropped_records_if_there_are_none():
    assert "dropped" not in printed(LengthReport.of(by_hand()))


def test_the_printed_report_counts_records_that_repeat_others():
    same = by_hand(offsets=np.array([0, 5, 10, 15, 20, 38]), prompt_tokens=np.array([1, 1, 1, 2, 2], np.int32))
    text = printed(LengthReport.of(same, train=by_hand(prompt_tokens=np.array([2] * 5, np.int32))), "heldout")
    assert "; 2 exact duplicates of another one; 2 with the prompt of a training record" in " ".join(text.split())


def test_the_printed_report_does_not_mention_repeated_records_if_there_are_none():
    data = by_hand()
    text = printed(LengthReport.of(data, train=data))
    assert "duplicates" not in text
    assert "prompt of a training record" not in text


def test_the_printed_report_says_that_raw_text_gets_no_template():
    text = " ".join(printed(LengthReport.of(by_hand(raw=2))).split())
    assert "train: 2 records are raw text and get no chat template; for a chat model give messages" in text
    assert "raw text" not in printed(LengthReport.of(by_hand()))


def test_the_printed_report_says_that_no_record_has_reasoning():
    without = by_hand(think_tokens=np.zeros(5, np.int32))
    assert "train: no record has reasoning; RW is meant for chains" in printed(LengthReport.of(without))
    assert "no record has reasoning" not in printed(LengthReport.of(by_hand()))
    assert "no record has reasoning" not in printed(LengthReport.of(pairs_by_hand()))


def test_a_file_name_that_looks_like_markup_is_printed_unchanged():
    assert "[bold]a.jsonl: 5 records" in printed(LengthReport.of(by_hand()), "[bold]a.jsonl")


def test_the_printed_report_on_pairs_says_how_much_sharing_saves():
    text = printed(LengthReport.of(pairs_by_hand()))
    assert "train: 3 pairs (1 op-cot, 2 pp-cot)" in text
    assert "pair, shared part once" in text
    # Sharing saves 7 of 27 tokens within pairs, and 11 if pairs on one prompt share a tree.
    assert "Sharing saves 25.9 % of 27 tokens, and up to 40.7 % if pairs on one prompt come into one step" in text


def test_the_printed_report_does_not_mention_prompts_if_each_has_one_pair():
    text = printed(LengthReport.of(replace(pairs_by_hand(), prompts=np.arange(3, dtype=np.int32))))
    assert "Sharing saves 25.9 % of 27 tokens\n" in text


def test_the_printed_report_counts_open_sides():
    is_open = np.array([True, False, True])
    pairs = replace(pairs_by_hand(), rejected=replace(pairs_by_hand().rejected, is_open=is_open))
    assert "train: 3 pairs (1 op-cot, 2 pp-cot); 2 open sides" in " ".join(printed(LengthReport.of(pairs)).split())
    assert "open" not in printed(LengthReport.of(pairs_by_hand()))


# The tables at the end of a run


def text_of(tables) -> str:
    console = Console(file=StringIO(), width=120)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def token_metrics(loss: float) -> dict[str, float]:
    return {f"eval/{name}{kind}": loss for name in ("loss", "entropy", "mean_token_accuracy") for kind in ("", "/stop")}


def pair_metrics(margin: float) -> dict[str, float]:
    names = ("loss", "rewards/accuracies", "logps/chosen", "logps/rejected", "chosen_fell")
    return {f"eval/{name}": 0.25 for name in names} | {"eval/rewards/margins": margin}


def test_a_run_of_stage_1_ends_with_a_row_for_each_kind_of_token():
    before, after = ({"answers": [], "metrics": token_metrics(loss)} for loss in (0.5, 0.25))
    text = text_of(before_after_tables(before, after, [], ["held.jsonl"]))
    assert "0.500 → 0.250" in text
    assert "50.0% → 25.0%" in text
    assert [line.strip("│ ").split()[0] for line in text.splitlines() if "→ 25.0%" in line] == ["all", "stop"]


def test_a_run_of_stage_2_ends_with_its_preferences():
    before, after = ({"answers": [], "metrics": pair_metrics(margin)} for margin in (0.5, 1.5))
    text = text_of(before_after_tables(before, after, [], ["held.jsonl"]))
    assert "Held-out pairs" in text
    assert "1.500" in text
    assert "entropy" not in text  # a metric that was not measured has no row


@pytest.mark.parametrize(("margin", "accuracy"), [(0.0, "-"), (0.9e-3, "-"), (1.1e-3, "0.250")])
def test_an_accuracy_at_the_reference_is_not_shown(margin, accuracy):
    before, after = ({"answers": [], "metrics": pair_metrics(m)} for m in (margin, 1.5))
    row = next(
        line
        for line in text_of(before_after_tables(before, after, [], ["held.jsonl"])).splitlines()
        if "accuracy" in line
    )
    assert [cell.strip() for cell in row.strip("│").split("│")][1:] == [accuracy, "0.250"]


def test_forms_of_pairs_have_rows_of_their_own():
    def metrics(margin: float) -> dict[str, float]:
        groups = ("op-cot/", "pp-cot/", "mirror/", "earlier/")
        by_group = {f"eval/{g}{n}": margin for g in groups for n in ("rewards/margins", "rewards/accuracies", "loss")}
        return pair_metrics(margin) | by_group

    before, after = ({"answers": [], "metrics": metrics(margin)} for margin in (0.0, 0.75))
    text = text_of(before_after_tables(before, after, [], ["held.jsonl"]))
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if ": " in line]
    assert rows[1:] == [
        ["earlier: accuracy", "-", "0.750"],
        ["earlier: reward margin", "0.000", "0.750"],
        ["mirror: accuracy", "-", "0.750"],
        ["mirror: reward margin", "0.000", "0.750"],
    ]
    assert "op-cot" not in text


@pytest.mark.parametrize("metrics", [token_metrics(0.5), pair_metrics(0.5)], ids=["tokens", "pairs"])
def test_every_table_names_the_files_of_its_figures(metrics):
    measured = {"answers": ["a"], "metrics": metrics}
    text = text_of(before_after_tables(measured, measured, [("id", None)], ["a.jsonl", "[b].jsonl"]))
    assert " ".join(text.split()).count(" of a.jsonl, [b].jsonl") == 2


def test_without_held_out_records_there_are_no_tables():
    assert before_after_tables({"answers": [], "metrics": {}}, {"answers": [], "metrics": {}}, [], []) == []


def test_answers_have_the_id_of_their_prompt_and_its_text_only_if_given():
    before, after = ({"answers": [f"{word} [b]"] * 2, "metrics": {}} for word in ("old", "new"))
    text = text_of(
        before_after_tables(before, after, [("first", None), ("second", "Why [b]?")], ["a.jsonl", "[b].jsonl"])
    )
    assert all(word in text for word in ("first", "second", "Why [b]?", "old [b]", "new [b]"))
