"""Chains are split into steps: lines and sentences, which cover the text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_files import ROOT

from saro.data.chain import split_steps

DATA = ROOT.parent / "shared" / "data"

pieces = st.sampled_from(
    [
        "So. ",
        "Why? ",
        "e.g. ",
        "1. ",
        "\n",
        "\n\n",
        "```\n",
        "`a. B`",
        "`",
        " ",
        "3.14 ",
        "Mr. ",
        "I. ",
        "然后。",
        "x",
        "Then",
    ]
)
chains = st.lists(pieces | st.text(max_size=3)).map("".join)


def texts(think: str) -> list[str]:
    return [step.text for step in split_steps(think)]


def test_lines_and_sentences_are_steps():
    assert texts("First, I read it. Then I think!\nThe request is plain.\n\nSo what? I answer.") == [
        "First, I read it.",
        "Then I think!",
        "The request is plain.",
        "So what?",
        "I answer.",
    ]


@pytest.mark.parametrize(
    "sentence",
    [
        "Mr. Smith asks, e.g. Tuesday, or i.e. Monday at 5 p.m. GMT.",
        "The sum is 3.14 and not 2.71.",
        "J. R. Miller wrote it.",
        "See Fig. 2 and Eq. 5 for it.",
        "Call `run(). Then` to begin.",
        "Wait... it may be fine.",
        "The file is a.txt and no other.",
    ],
)
def test_a_mark_inside_a_sentence_does_not_end_it(sentence):
    assert texts(f"{sentence} Next one.") == [sentence, "Next one."]


@pytest.mark.parametrize("number", ["1.", "12.", "a.", "iv.", "- 2.", "(3).", "**4."])
def test_the_number_of_an_item_is_no_step(number):
    assert texts(f"{number} Add them. Done.") == [f"{number} Add them.", "Done."]


def test_items_in_one_line_are_steps():
    assert texts("I do it so. 1. Add them. 2. Done.") == ["I do it so.", "1. Add them.", "2. Done."]


def test_i_ends_a_sentence():
    assert texts("So do I. They ask.") == ["So do I.", "They ask."]


def test_closing_quotes_and_emphasis_stay_with_their_sentence():
    assert texts('He says "stop." **It ends here.** (It does.) Well.') == [
        'He says "stop."',
        "**It ends here.**",
        "(It does.)",
        "Well.",
    ]


def test_a_block_of_code_is_one_step():
    block = "```python\na = 1. \nprint(a)\n\n# Done. Really.\n```"
    assert texts(f"I write it.\n{block}\nIt works.") == ["I write it.", block, "It works."]


def test_a_block_that_is_not_closed_runs_to_the_end():
    assert texts("Code:\n```\na. B\nc") == ["Code:", "```\na. B\nc"]


def test_full_width_marks_end_a_sentence_without_white_space():
    assert texts("我想想。好的！行") == ["我想想。", "好的！", "行"]  # noqa: RUF001


@pytest.mark.parametrize("empty", ["", " ", "\n \n"])
def test_a_chain_without_text_has_no_steps(empty):
    assert split_steps(empty) == ()


@given(chains)
def test_steps_cover_the_chain(think):
    steps = split_steps(think)
    assert "".join(think[step.start : step.stop] for step in steps) == (think if think.strip() else "")
    for step in steps:
        assert step.text
        assert step.text == think[step.start : step.stop].strip()


@given(chains, st.integers(0, 20))
def test_a_chain_cut_at_the_end_of_a_step_has_the_same_steps(think, index):
    steps = split_steps(think)
    if index < len(steps):
        assert split_steps(think[: steps[index].stop]) == steps[: index + 1]


@pytest.mark.skipif(not DATA.exists(), reason="needs the public data")
def test_steps_of_public_chains_are_sentences():
    responses = [r["response"] for r in json.loads((DATA / "star1.json").read_text(encoding="utf-8"))]
    steps = [step for r in responses for step in split_steps(r.removeprefix("<think>").split("</think>")[0])]
    words = [len(step.text.split()) for step in steps]
    assert len(steps) == pytest.approx(15_000, rel=0.02)
    assert sum(n == 1 for n in words) < 0.05 * len(words)
    assert sum(n > 60 for n in words) < 0.01 * len(words)
