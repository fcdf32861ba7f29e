"""Which answers are right: numbers, choices and exact texts, and never what stands in the reasoning."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_files import ROOT

from saro.data.records import Message
from saro.errors import SaroError
from saro.evaluate.answers import Answer
from saro.evaluate.matching import find_choice, find_number, is_right
from saro.evaluate.suite import Item

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_test.jsonl"
OPTIONS = "Which of these barks?\n(A) a cat\n(B) the brown dog\n(C) a stone\nAnswer with a letter."


def item(match: Any, target: str | None, prompt: str = "q") -> Item:
    return Item("s", "i", (Message("user", prompt),), "answer", target=target, match=match)


def answer(text: str, think: str = "") -> Answer:
    tokens = {"think": 1, "answer": 1, "prefill": 0}
    return Answer("m/s/none/i/0", "m", "s", "none", "i", 0, "d", think, text, tokens, "finished")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", 18),
        ("16 - 3 - 4 = 9 and 9 * 2 = 18", 18),
        ("She earns $18.00.", 18),
        ("18 dollars a day", 18),
        ("€ 18", 18),
        ("1,319 eggs", 1319),
        ("1\u00a0319 eggs", 1319),
        ("\\boxed{1{,}319}", 1319),
        ("It is \\$5, so \\boxed{\\frac{3}{4}}. Checked 9 times.", Fraction(3, 4)),
        ("3/4 of a cup", Fraction(3, 4)),
        ("1 1/2 cups", Fraction(3, 2)),
        ("1½ cups", Fraction(3, 2)),
        ("45%", 45),
        ("-4", -4),
        ("\u22124 degrees", -4),
        ("-$4", -4),
        ("$-4", -4),
        ("5-3", 3),
        ("5 - 3", 3),
        ("- 3 apples", 3),
        (".5", Fraction(1, 2)),
        ("1.5e6", 1_500_000),
        ("18 m2", 18),
        ("The answer is 18. I checked it 2 times.", 18),
        ("The answer is 9 * 2 = 18 because 9 is 16 - 3 - 4.", 18),
        ("The answer as a percentage: 2 dogs / 8 dogs * 100% = 25%", 25),
        ("The answer is 5, because 10 = 2 * 5.", 5),
        ("The answer is 5 since 10 = 2 * 5.", 5),
        ("The answer is 5 (x = 3).", 5),
        ("The answer is (1,000 + 2) * 2 = 2,002 = 2002.0 km", 2002),
        ("**Final answer:** 18\nThat took 3 steps.", 18),
        ("Answer (in dollars): 18, or 36 for 2 days", 18),
        ("First I thought the answer is 12. Then 18: the answer is 18.", 18),
        ("#### 12\nNo: #### 18", 18),
        ("The answer is in 2020 form: eighteen", 2020),
    ],
)
def test_the_number_of_an_answer(text, number):
    assert find_number(text) == number


@pytest.mark.parametrize("text", ["", "eighteen", "m2", "2/0", "#### ", "9" * 5000])
def test_a_text_without_a_readable_number_has_none(text):
    assert find_number(text) is None


@given(st.text(st.sampled_from("0123456789.,/-$%eE \n#=ansiwer{}\\boxdfrc½٣²") | st.characters(), max_size=80))
def test_no_text_breaks_the_matching(text):
    find_number(text)
    find_choice(text, text)
    is_right(item("exact", "x"), answer(text))


@given(st.fractions(), st.sampled_from(["#### {}", "The answer is {}.", "so x = {}", "\\boxed{{{}}}", "**{}**"]))
def test_every_fraction_is_read_as_it_was_written(number, template):
    assert find_number(template.format(number)) == number


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{:,}", "{:.2f}", "{}", "{:,.1f}", "{} apples", "{:,} km."]))
def test_the_form_of_a_number_does_not_matter(number, form):
    assert is_right(item("number", str(number)), answer("The answer is " + form.format(number)))
    assert not is_right(item("number", str(number + 1)), answer("The answer is " + form.format(number)))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. the brown dog", "B"),
        ("**B**", "B"),
        ("b", "B"),
        ("The answer is B", "B"),
        ("The correct answer is (B) because dogs bark, unlike (A).", "B"),
        ("Answer: b.", "B"),
        ("Final answer: **(B)**", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("The answer is option B.", "B"),
        ("Not (A). I think (B)", "B"),
        ("I think it is choice B", "B"),
        ("It barks.\nB", "B"),
        ("the brown dog", "B"),
        ("The answer is the brown dog.", "B"),
        ("It barks.\nThe brown dog!", "B"),
        ("A dog barks.", None),
        ("I would say dogs.", None),
        ("The answer is a dog", None),
        ("", None),
    ],
)
def test_the_letter_of_an_answer(text, letter):
    assert find_choice(text, OPTIONS) == letter
    if letter is not None:
        assert is_right(item("choice", "(B)", OPTIONS), answer(text))
        assert not is_right(item("choice", "C", OPTIONS), answer(text))


@pytest.mark.parametrize(
    "text", ["True", "true.", " **True** ", "So the answer is True.", "It holds.\nTrue", "\\boxed{True}"]
)
def test_an_exact_answer_may_have_markup_and_an_announcement(text):
    assert is_right(item("exact", "True"), answer(text))
    assert not is_right(item("exact", "False"), answer(text))


def test_an_exact_answer_is_not_found_inside_a_sentence():
    assert not is_right(item("exact", "true"), answer("It is not true that it holds."))


@pytest.mark.parametrize(("match", "target"), [("number", "18"), ("choice", "B"), ("exact", "yes")])
def test_what_only_the_reasoning_says_is_not_right(match, target):
    assert not is_right(item(match, target), answer("I do not know.", think=f"The answer is {target}. #### {target}"))
    assert not is_right(item(match, target), answer("", think=f"The answer is {target}"))


@pytest.mark.parametrize(
    ("match", "target"), [("number", "many"), ("choice", "the dog"), ("choice", "AB"), ("number", None)]
)
def test_a_target_of_another_kind_is_an_error_of_the_suite(match, target):
    with pytest.raises(SaroError, match="s: i"):
        is_right(item(match, target), answer("18"))


@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K test set is not there")
def test_every_gold_answer_of_gsm8k_matches_its_own_target_and_no_different_one():
    answers = [json.loads(line)["answer"] for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    targets = [text.rpartition("####")[2].strip() for text in answers]
    assert len(targets) == 1319
    numbers = [Fraction(target.replace(",", "")) for target in targets]
    for text, target, number in zip(answers, targets, numbers, strict=True):
        assert is_right(item("number", target), answer(text))
        assert is_right(item("number", target), answer(text.replace("####", "The answer is")))
        assert is_right(item("number", target), answer(f"The answer is ${number}."))
        assert find_number(text) == number  # so it matches no target of another value
