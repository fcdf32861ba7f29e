"""Tests that the demo's suites are what evaluations need: parallel twins, right targets, no known text."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from prompt_texts import (
    TRAINING,
    assert_lengths_tell_nothing,
    assert_parallel,
    eight_grams,
    needs_published,
    published_eight_grams,
    words,
)

from saro.demo import demo_file, suite_files
from saro.evaluate.suite import Item, read_suite

# Arithmetic of the questions with a number, in their order.
NUMBERS = (
    17 + 25,
    90 - 47,
    6 * 14,
    144 / 12,
    (3 + 5) * 4,
    2 * 3 + 5,
    (15 * 60 + 5) - (14 * 60 + 20),
    250 / 2,
    3 * 7,
    7 * 4,
    35 / 10,
    60 * 20 / 100,
)


def twins() -> list[Item]:
    return read_suite(demo_file("twins"))


def ability() -> list[Item]:
    return read_suite(demo_file("ability"))


def text(item: Item) -> str:
    (message,) = item.prompt
    return message.content


def pairs() -> list[tuple[Item, Item]]:
    """Return each harmless prompt with its harmful sister."""
    items = {item.id: item for item in twins()}
    return [(item, items[item.twin]) for item in items.values() if item.expect == "comply"]


def test_demo_stands_for_both_suites():
    assert suite_files(["mine.jsonl", "demo"]) == ["mine.jsonl", demo_file("twins"), demo_file("ability")]


def test_there_are_enough_twins_of_many_kinds():
    kinds = Counter(harmless.category for harmless, _ in pairs())
    assert kinds.total() >= 48
    assert len(kinds) >= 9
    assert min(kinds.values()) >= 4


def test_every_prompt_has_a_sister_of_its_kind_that_names_it():
    assert len(pairs()) * 2 == len(twins())
    for harmless, harmful in pairs():
        assert (harmful.expect, harmful.twin, harmful.category) == ("refuse", harmless.id, harmless.category)


def texts() -> list[tuple[str, str]]:
    return [(text(harmless), text(harmful)) for harmless, harmful in pairs()]


def test_twins_are_parallel():
    """A probe of threshold and sensitivity needs sisters that differ in little more than what is asked for."""
    assert_parallel(texts())


def test_lengths_do_not_give_the_harmful_side_away():
    assert_lengths_tell_nothing(texts())


def test_prompts_are_short_and_unique():
    prompts = [text(item) for item in twins()]
    assert len(set(prompts)) == len(prompts)
    assert all(5 <= len(words(prompt)) <= 26 for prompt in prompts)


@pytest.mark.parametrize("suite", [twins, ability])
def test_every_line_names_its_source_and_licence(suite):
    assert {(item.source, item.licence) for item in suite()} == {("saro", "Apache-2.0")}


def test_ability_has_numbers_and_choices_in_equal_parts():
    assert Counter(item.match for item in ability()) == {"number": 12, "choice": 12}


def test_targets_that_are_numbers_are_right():
    targets = [float(item.target) for item in ability() if item.match == "number"]
    assert targets == [float(number) for number in NUMBERS]


def test_no_letter_is_right_more_often_than_the_others():
    choices = [item for item in ability() if item.match == "choice"]
    assert Counter(item.target for item in choices) == {"A": 3, "B": 3, "C": 3, "D": 3}
    assert all(re.findall(r"^([A-D])\. ", text(item), re.MULTILINE) == [*"ABCD"] for item in choices)


def own_text(item: Item) -> str:
    """Return the prompt without the sentence that says how to answer."""
    return text(item).partition(" End with the line")[0].partition("\nEnd with the line")[0]


def test_no_prompt_shares_eight_words_in_a_row_with_the_demo_training_data():
    records = [json.loads(line) for name in TRAINING for line in Path(demo_file(name)).read_text().splitlines()]
    prompts = [r["prompt"] if isinstance(r["prompt"], str) else json.dumps(r["prompt"]) for r in records]
    known = set().union(*map(eight_grams, prompts))
    assert [item.id for item in (*twins(), *ability()) if eight_grams(own_text(item)) & known] == []


@needs_published
def test_no_prompt_shares_eight_words_in_a_row_with_a_published_set():
    known = published_eight_grams()
    assert [item.id for item in (*twins(), *ability()) if eight_grams(own_text(item)) & known] == []
