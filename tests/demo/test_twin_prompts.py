"""Tests that the twin prompts teach the difference in what is asked for: all else is alike on both sides."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from prompt_texts import (
    TRAINING,
    assert_lengths_tell_nothing,
    eight_grams,
    needs_published,
    published_eight_grams,
    words,
)

from saro.demo import demo_file, prompt_files
from saro.synth.funnel import Funnel
from saro.synth.prompts import HAZARDS, Prompt, check_exclusion, drop_duplicates, read_prompts

PROMPTS = read_prompts(prompt_files(["demo", "twins"]))
TWINS = [prompt for prompt in PROMPTS if prompt.id.startswith("twin-")]


def text(prompt: Prompt) -> str:
    (message,) = prompt.item.prompt
    return message.content


def texts() -> list[tuple[str, str]]:
    by_id = {prompt.id: prompt for prompt in TWINS}
    return [(text(prompt), text(by_id[prompt.item.twin])) for prompt in TWINS if prompt.kind == "harmless"]


def test_half_of_them_are_harmless_and_every_hazard_has_some():
    assert Counter(prompt.kind for prompt in TWINS) == {"harmless": 940, "harmful": 940}
    assert {code for prompt in TWINS for code in prompt.hazard} == set(HAZARDS)


def test_twins_are_parallel_and_of_one_length():
    shared = [(Counter(words(harmless)) & Counter(words(harmful))).total() for harmless, harmful in texts()]
    assert min(shared) >= 1
    assert sum(count >= 3 for count in shared) >= 0.9 * len(shared)
    assert all(6 <= len(words(prompt)) <= 40 for twins in texts() for prompt in twins)
    assert all(0.6 < len(words(harmless)) / len(words(harmful)) < 1.6 for harmless, harmful in texts())


def test_lengths_do_not_give_the_harmful_side_away():
    assert_lengths_tell_nothing(texts())


def test_first_words_do_not_give_the_harmful_side_away():
    """A rule that reads only the first word is right for hardly more than half of them."""
    first = [Counter(words(prompt)[0] for prompt in side) for side in zip(*texts(), strict=True)]
    right = sum(max(first[0][word], first[1][word]) for word in first[0] | first[1])
    assert right <= 0.56 * len(TWINS)


def test_every_prompt_names_its_source_and_licence():
    assert {(prompt.item.source, prompt.item.licence) for prompt in TWINS} == {("saro", "Apache-2.0")}


def test_no_prompt_is_a_duplicate_or_in_a_suite_of_the_demo():
    assert drop_duplicates(PROMPTS, Funnel()) == PROMPTS
    check_exclusion(PROMPTS)


def test_no_prompt_shares_eight_words_in_a_row_with_other_files_of_the_demo():
    names = (*TRAINING, "prompts", "twins", "ability")
    records = [json.loads(line) for name in names for line in Path(demo_file(name)).read_text("utf-8").splitlines()]
    known = set().union(*(eight_grams(json.dumps(record["prompt"], ensure_ascii=False)) for record in records))
    assert [prompt.id for prompt in TWINS if eight_grams(text(prompt)) & known] == []


@needs_published
def test_no_prompt_shares_eight_words_in_a_row_with_a_published_set():
    known = published_eight_grams()
    assert [prompt.id for prompt in TWINS if eight_grams(text(prompt)) & known] == []
