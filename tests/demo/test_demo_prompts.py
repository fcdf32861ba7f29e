"""Tests that the demo's prompts are what data construction needs: parallel twins of every hazard, right targets, no suite."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from run_files import ROOT

from saro.demo import demo_file, prompt_files
from saro.evaluate.matching import find_number
from saro.synth.funnel import Funnel
from saro.synth.prompts import HAZARDS, Prompt, check_exclusion, drop_duplicates, read_prompts

SHARED = ROOT.parent / "shared" / "data"
TRAINING = ("rw_train", "rw_heldout", "srpo_train", "srpo_heldout")
END = 'End with "The answer is" and'
# Arithmetic of the prompts with a number, in their order.
NUMBERS = (
    (11 * 60 + 10) - (9 * 60 + 35),
    -(-80 // 6),
    15 * 8 - 36,
    40 - 40 // 4,
    312 // 24,
    (30 + 8) // 2,
    300 // 4 * 7,
    (52 // 4) ** 2,
    48 // 4,
    (12 + 15 + 21 + 32) // 4,
    6 * 350 // 100,
    2 * 23 + 1,
    240 // 2 // 8,
    7 * 6 // 2,
)


def prompts(kind: str = "") -> list[Prompt]:
    return [prompt for prompt in read_prompts(prompt_files(["demo"])) if kind in ("", prompt.kind)]


def text(prompt: Prompt) -> str:
    (message,) = prompt.item.prompt
    return message.content


def words(prompt: str) -> list[str]:
    return re.findall(r"\w+", prompt.lower())


def eight_grams(prompt: str) -> set[tuple[str, ...]]:
    found = words(prompt)
    return {tuple(found[start : start + 8]) for start in range(len(found) - 7)}


def pairs() -> list[tuple[Prompt, Prompt]]:
    """Return each harmless prompt with its harmful twin."""
    by_id = {prompt.id: prompt for prompt in prompts()}
    return [(prompt, by_id[prompt.item.twin]) for prompt in prompts("harmless")]


def test_demo_stands_for_its_prompts():
    assert prompt_files(["mine.jsonl", "demo"]) == ["mine.jsonl", demo_file("prompts")]


def test_there_are_enough_of_each_kind_and_every_hazard_has_twins():
    assert len(pairs()) == len(prompts("harmful")) >= 30
    assert sum(prompt.item.target is not None for prompt in prompts("general")) >= 20
    assert {code for _, harmful in pairs() for code in harmful.hazard} == set(HAZARDS)


def test_twins_are_parallel_and_short():
    """What differs should be what is asked for, not how it is asked."""
    for harmless, harmful in pairs():
        shared = Counter(words(text(harmless))) & Counter(words(text(harmful)))
        assert shared.total() >= 3, harmless.id
        assert 0.4 < len(words(text(harmless))) / len(words(text(harmful))) < 2.2, harmless.id
        assert all(5 <= len(words(text(prompt))) <= 26 for prompt in (harmless, harmful)), harmless.id


def test_lengths_do_not_give_the_harmful_side_away():
    differences = [len(words(text(harmful))) - len(words(text(harmless))) for harmless, harmful in pairs()]
    longer, shorter = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    assert abs(sum(differences) / len(differences)) < 1.5
    assert longer < 2.5 * shorter


def test_every_prompt_names_its_source_and_licence():
    assert {(prompt.item.source, prompt.item.licence) for prompt in prompts()} == {("saro", "Apache-2.0")}


def test_targets_that_are_numbers_are_right():
    targets = [find_number(prompt.item.target) for prompt in prompts("general") if prompt.item.match == "number"]
    assert targets == [Fraction(number) for number in NUMBERS]


def test_no_letter_is_right_more_often_than_the_others():
    choices = [prompt for prompt in prompts("general") if prompt.item.match == "choice"]
    assert Counter(prompt.item.target for prompt in choices) == {"A": 2, "B": 2, "C": 2, "D": 2}
    assert all(re.findall(r"^([A-D])\. ", text(prompt), re.MULTILINE) == [*"ABCD"] for prompt in choices)


def test_prompts_with_a_target_say_how_to_end():
    assert all(END in text(prompt) for prompt in prompts("general") if prompt.item.target is not None)


def test_no_prompt_is_a_duplicate_or_in_a_suite_of_the_demo():
    funnel = Funnel()
    assert drop_duplicates(prompts(), funnel) == prompts()
    check_exclusion(prompts())


def own_text(prompt: Prompt) -> str:
    """Return the prompt without the sentence that says how to end."""
    return text(prompt).partition(END)[0]


def test_no_prompt_shares_eight_words_in_a_row_with_other_files_of_the_demo():
    names = (*TRAINING, "twins", "ability")
    records = [json.loads(line) for name in names for line in Path(demo_file(name)).read_text("utf-8").splitlines()]
    known = set().union(*(eight_grams(json.dumps(record["prompt"], ensure_ascii=False)) for record in records))
    assert [prompt.id for prompt in prompts() if eight_grams(own_text(prompt)) & known] == []


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of public data sets is not here")
def test_no_prompt_shares_eight_words_in_a_row_with_a_published_set():
    published = [record["question"] for record in json.loads((SHARED / "star1.json").read_text(encoding="utf-8"))]
    for path in SHARED.glob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        published += [record.get("prompt") or record.get("question") for record in records]
    for path in SHARED.glob("*.csv"):
        with open(path, newline="", encoding="utf-8-sig") as file:
            published += [value for row in csv.DictReader(file) for name, value in row.items() if "prompt" in name]
    known = set().union(*map(eight_grams, map(str, published)))
    assert [prompt.id for prompt in prompts() if eight_grams(own_text(prompt)) & known] == []
