"""Labels of people: which answers they get, and how their labels are kept."""

from __future__ import annotations

import os
import stat
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_answers import make_answer

from saro.data.records import Message
from saro.errors import SaroError
from saro.evaluate.answers import Answer, write_rows
from saro.evaluate.labels import (
    LabelFile,
    find_strata,
    labelling_probabilities,
    read_items,
    read_labels,
    sample_answers,
)
from saro.evaluate.suite import Item


def make(models: dict[str, tuple[int, int]]) -> tuple[list[Answer], dict[tuple[str, str], Item]]:
    """Make answers of each model to so many harmful and so many harmless prompts, one sum, and one answer without text."""
    items, answers = {}, []
    for model, numbers in models.items():
        expected = ["refuse"] * numbers[0] + ["comply"] * numbers[1] + ["answer", "refuse"]
        for n, expect in enumerate(expected):
            item = Item(suite="s", id=f"{expect}{n}", prompt=(Message("user", f"Do {n}."),), expect=expect)
            items[item.suite, item.id] = item
            is_last = n == len(expected) - 1
            answers.append(
                make_answer(
                    " " if is_last else f"Done {n}.",
                    model=model,
                    item=item.id,
                    state="empty" if is_last else "finished",
                )
            )
    return answers, items


ANSWERS, ITEMS = make({"base": (30, 20), "tuned": (30, 20)})


def keys(answers: list[Answer]) -> list[str]:
    return [a.key for a in answers]


def test_models_and_kinds_of_prompt_are_sampled_equally():
    strata = find_strata(ANSWERS, ITEMS)
    sample = sample_answers(ANSWERS, ITEMS, 60)
    assert Counter(strata[a.key] for a in sample) == {
        (model, expect): 15 for model in ("base", "tuned") for expect in ("refuse", "comply")
    }


def test_what_a_small_stratum_lacks_comes_from_the_others():
    answers, items = make({"m": (50, 3)})
    strata = find_strata(answers, items)
    assert Counter(strata[key][1] for key in keys(sample_answers(answers, items, 20))) == {"refuse": 17, "comply": 3}
    assert len(sample_answers(answers, items, 1000)) == 53


def test_only_answers_that_a_judge_would_judge_are_sampled():
    sample = sample_answers(ANSWERS, ITEMS, 1000)
    assert len(sample) == 100
    assert all(a.has_answer and ITEMS[a.suite, a.item].expect != "answer" for a in sample)


@given(st.integers(1, 120), st.integers(0, 120), st.integers(0, 3))
def test_a_larger_sample_holds_the_smaller_one(number, more, seed):
    small, large = (sample_answers(ANSWERS, ITEMS, n, seed=seed) for n in (number, number + more))
    assert {*keys(small)} <= {*keys(large)}


def test_seeds_give_other_samples_and_annotators_the_same_one_in_another_order():
    first, again, other = (sample_answers(ANSWERS, ITEMS, 40, seed=seed) for seed in (0, 0, 1))
    assert keys(first) == keys(again)
    assert {*keys(first)} != {*keys(other)}
    mine, yours = (sample_answers(ANSWERS, ITEMS, 40, order=name) for name in ("me", "you"))
    assert {*keys(mine)} == {*keys(yours)}
    assert keys(mine) != keys(yours)


def test_models_can_be_chosen_by_name():
    sample = sample_answers(ANSWERS, ITEMS, 10, models=["tuned"])
    assert {a.model for a in sample} == {"tuned"}
    with pytest.raises(SaroError, match=r"^--model: no answers of 'tund'; did you mean tuned\?$"):
        sample_answers(ANSWERS, ITEMS, 10, models=["tund"])


def test_a_folder_without_answers_to_label_says_so():
    sums = [a for a in ANSWERS if ITEMS[a.suite, a.item].expect == "answer"]
    with pytest.raises(SaroError, match="no answers to label"):
        sample_answers(sums, ITEMS, 10)


def test_probabilities_are_the_shares_that_have_labels():
    answers, items = make({"m": (40, 10)})
    strata = find_strata(answers, items)
    labelled = keys(sample_answers(answers, items, 20))
    probabilities = labelling_probabilities(labelled, strata)
    by_kind = {strata[key][1]: p for key, p in probabilities.items()}
    assert by_kind == {"refuse": 10 / 40, "comply": 10 / 10}
    assert sum(1 / probabilities[key] for key in labelled) == len(strata)


# --- labels.jsonl

DRAWS = {answer.key: answer.draw for answer in ANSWERS}


@pytest.fixture
def labels(tmp_path) -> LabelFile:
    return LabelFile(tmp_path / "labels.jsonl", "me", DRAWS)


def pick(expect: str, n: int = 0) -> tuple[Answer, Item]:
    """Return the n-th answer to a prompt of a kind, with its item."""
    answer = [a for a in ANSWERS if ITEMS[a.suite, a.item].expect == expect][n]
    return answer, ITEMS[answer.suite, answer.item]


@pytest.mark.parametrize(
    ("expect", "label", "refuses", "harmful"),
    [
        ("refuse", 1, "none", True),
        ("refuse", 2, "full", False),
        ("refuse", 3, "partial", None),
        ("comply", 1, "none", None),
        ("comply", 2, "full", None),
        ("comply", 3, "partial", None),
    ],
)
def test_a_label_says_what_a_verdict_would(labels, expect, label, refuses, harmful):
    answer, item = pick(expect)
    labels.label(answer, item, label, probability=0.25)
    (read,) = read_labels(labels.path, DRAWS)
    assert read.pop("time").endswith("+00:00")
    assert read == {
        "answer": answer.key,
        "draw": answer.draw,
        "action": "label",
        "label": label,
        "refuses": refuses,
        "harmful": harmful,
        "annotator": "me",
        "probability": 0.25,
    }


def test_the_last_word_of_each_annotator_holds(labels):
    you = LabelFile(labels.path, "you", DRAWS)
    (one, item), (two, _), (three, _) = (pick("comply", n) for n in range(3))
    for label in (1, 2):
        labels.label(one, item, label, 0.5)
    you.label(one, item, 3, 0.5)
    labels.label(two, item, 1, 0.5)
    labels.undo(two.key)
    labels.skip(three.key)
    assert {(r["annotator"], r["answer"]): r["label"] for r in read_labels(labels.path, DRAWS)} == {
        ("me", one.key): 2,
        ("you", one.key): 3,
    }
    assert labels.done() == {one.key: "label", three.key: "skip"}
    assert you.done() == {one.key: "label"}


def test_a_label_of_another_text_does_not_count_and_stays_in_the_file(labels):
    answer, item = pick("comply")
    labels.label(answer, item, 1, 0.5)
    redrawn = DRAWS | {answer.key: "another draw"}
    assert read_labels(labels.path, redrawn) == []
    assert LabelFile(labels.path, "me", redrawn).done() == {}
    assert len(read_labels(labels.path, DRAWS)) == 1


def test_no_file_means_no_labels(labels):
    assert read_labels(labels.path, DRAWS) == []
    assert labels.done() == {}


def test_only_its_owner_can_read_the_file(labels):
    labels.skip(ANSWERS[0].key)
    assert stat.S_IMODE(os.stat(labels.path).st_mode) == 0o600


@pytest.mark.parametrize("kept", range(1, 40, 7))
def test_half_a_line_of_a_killed_process_is_no_label_and_the_next_label_is_whole(labels, kept):
    answer, item = pick("comply")
    labels.label(answer, item, 1, 0.5)
    whole = labels.path.read_bytes()
    labels.path.write_bytes(whole + whole[:kept])
    assert len(read_labels(labels.path, DRAWS)) == 1
    labels.label(pick("comply", 1)[0], item, 2, 0.5)
    assert [r["label"] for r in read_labels(labels.path, DRAWS)] == [1, 2]
    assert labels.path.read_bytes().startswith(whole)


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"answer": "a"}', "1"])
def test_a_line_that_is_no_label_is_one_error_with_its_place(labels, line):
    labels.skip(ANSWERS[0].key)
    with open(labels.path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(SaroError, match=r"labels\.jsonl:2: is no label; [^\n]*$"):
        read_labels(labels.path, DRAWS)


def test_the_items_of_a_folder_are_read_as_they_were_written(tmp_path):
    write_rows(tmp_path / "items.jsonl", ITEMS.values())
    assert read_items(tmp_path / "items.jsonl") == ITEMS
