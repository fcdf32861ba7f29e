"""Tests that the demo's prompts are what data construction needs: parallel twins of every hazard, right targets, no suite."""

from __future__ import annotations

import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

from prompt_texts import (
    TRAINING,
    assert_lengths_tell_nothing,
    assert_parallel,
    eight_grams,
    needs_published,
    published_eight_grams,
    words,
)

from saro.demo import demo_file, prompt_files
from saro.evaluate.matching import find_number
from saro.synth.funnel import Funnel
from saro.synth.prompts import HAZARDS, Prompt, check_exclusion, drop_duplicates, read_prompts

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


def pairs() -> list[tuple[Prompt, Prompt]]:
    """Return each harmless prompt with its harmful twin."""
    by_id = {prompt.id: prompt for prompt in prompts()}
    return [(prompt, by_id[prompt.item.twin]) for prompt in prompts("harmless")]


def test_demo_stands_for_its_prompts():
    assert prompt_files(["mine.jsonl", "demo"]) == ["mine.jsonl", demo_file("prompts")]
    assert prompt_files(["twins"]) == [demo_file("twin_prompts")]


def test_there_are_enough_of_each_kind_and_every_hazard_has_twins():
    assert len(pairs()) == len(prompts("harmful")) >= 30
    assert sum(prompt.item.target is not None for prompt in prompts("general")) >= 20
    assert {code for _, harmful in pairs() for code in harmful.hazard} == set(HAZARDS)


def texts() -> list[tuple[str, str]]:
    return [(text(harmless), text(harmful)) for harmless, harmful in pairs()]


def test_twins_are_parallel_and_short():
    """What differs should be what is asked for, not how it is asked."""
    assert_parallel(texts())
    assert all(5 <= len(words(prompt)) <= 26 for twins in texts() for prompt in twins)


def test_lengths_do_not_give_the_harmful_side_away():
    assert_lengths_tell_nothing(texts())


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


@needs_published
def test_no_prompt_shares_eight_words_in_a_row_with_a_published_set():
    known = published_eight_grams()
    assert [prompt.id for prompt in prompts() if eight_grams(own_text(prompt)) & known] == []
