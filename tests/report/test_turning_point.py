"""Where a chain of reasoning first speaks of safety: a rule over words and sentences."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saro.report.turning_point import SAFETY_WORDS, find_turn


def test_the_place_is_that_of_the_sentence_in_characters():
    think = "We look at the prompt. Nothing yet. This could cause harm."
    assert find_turn(think) == pytest.approx(think.index(" This") / len(think))


@pytest.mark.parametrize(
    "think", ["", "   ", "We add two numbers. They are four.", "The pharmacy is near.", "Harmony."]
)
def test_a_chain_without_a_word_of_safety_has_no_place(think):
    assert find_turn(think) is None


def test_words_count_in_any_case_and_with_any_apostrophe():
    assert find_turn("HARMFUL.") == 0
    assert find_turn("I can\u2019t help with it.") == 0


@given(st.text(max_size=200), st.sampled_from(SAFETY_WORDS), st.text(max_size=50))
def test_a_chain_with_a_word_of_safety_has_a_place_before_it(before, word, after):
    think = f"{before} {word} {after}"
    place = find_turn(think)
    assert place is not None
    assert 0 <= place * len(think) <= len(before) + 1
