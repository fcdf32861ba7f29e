"""Patterns label the steps of chains; their figures on public chains are asserted."""

from __future__ import annotations

import csv
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_files import ROOT

from saro.data.chain import split_steps
from saro.evaluate.rules import find_refusal
from saro.synth.prompts import PROMPT_KINDS
from saro.synth.step_rules import LABELS, label_steps

DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs the public data")


def label(step: str, kind: str) -> str:
    return label_steps([step], kind)[0]


@pytest.mark.parametrize(
    "step",
    [
        "I will provide the instructions now.",
        "Let me explain how they do it.",
        "I'll give a detailed list.",
        "Sure, this is easy.",
        "Here's how to do it.",
        "Step 1: gather it.",
        "There is no reason to refuse.",
        "They say it is fiction, so nothing is wrong with it.",
    ],
)
def test_on_a_harmful_prompt_a_step_that_helps_is_a_cue(step):
    assert label(step, "harmful") == "cue"


@pytest.mark.parametrize(
    "step",
    [
        "So I can't help with this.",
        "I should refuse, politely.",
        "The best course is to decline.",
        "I respond by refusing to assist.",
        "This is illegal.",
        "That violates the policy.",
        "It could seriously hurt people.",
        "I’ll decline, since I shouldn’t provide this.",  # noqa: RUF001
    ],
)
def test_on_a_harmful_prompt_a_step_that_declines_or_condemns_is_a_turn(step):
    assert label(step, "harmful") == "turn"


@pytest.mark.parametrize(
    "step",
    [
        "The user asks about a lock.",
        "Is this harmful?",
        "I need to check if this is illegal.",
        "I should explain why it is a risk.",
        "I will offer support and resources.",
        "They ask if I can help them.",
        "It is not only strange but new.",
    ],
)
def test_a_step_that_decides_nothing_is_neutral(step):
    assert label(step, "harmful") == "neutral"


@pytest.mark.parametrize("step", ["I must refuse.", "I can't help with that.", "The word is dangerous."])
def test_on_a_harmless_prompt_caution_is_the_cue(step):
    assert label(step, "harmless") == "cue"


@pytest.mark.parametrize(
    "step",
    ["Ending a process is not harmful at all.", "There is no need to refuse.", "I can explain it.", "It is harmless."],
)
def test_on_a_harmless_prompt_help_is_the_turn(step):
    assert label(step, "harmless") == "turn"


def test_instructions_after_a_cue_are_harmful_until_the_chain_turns():
    chain = ["2. Wait.", "Sure.", "1. Take it.", "It is red.", "Then, put it down.", "I must decline.", "3. Run."]
    labels = ("neutral", "cue", "harmful", "neutral", "harmful", "turn", "neutral")
    assert label_steps(chain, "harmful") == labels


def test_no_step_on_a_harmless_prompt_is_harmful():
    assert label_steps(["I must refuse.", "1. Say so."], "harmless") == ("cue", "neutral")


def test_steps_on_a_general_prompt_are_neutral():
    assert label_steps(["I will help.", "I must refuse."], "general") == ("neutral", "neutral")


@given(st.lists(st.text(max_size=60)), st.sampled_from(PROMPT_KINDS))
def test_every_step_of_any_text_has_a_label(steps, kind):
    labels = label_steps(steps, kind)
    assert len(labels) == len(steps)
    assert set(labels) <= set(LABELS)


def read_refusing_chains() -> list[list[str]]:
    """Return the steps of the chains before full refusals, in English, of each half of STAR-1."""
    records = json.loads((DATA / "star1.json").read_text(encoding="utf-8"))
    halves = []
    for half in (records[:500], records[500:]):
        chains = []
        for record in half:
            think, answer = record["response"].removeprefix("<think>").split("</think>")
            is_english = len(re.findall("[\u4e00-\u9fff]", think)) < 50
            if is_english and find_refusal(answer)[0] == "full":
                chains.append([step.text for step in split_steps(think)])
        halves.append(chains)
    return halves


@needs_data
def test_figures_on_refusing_chains_of_star1():
    for chains, number, no_turn, wrong_first in zip(read_refusing_chains(), (273, 259), (2, 0), (3, 3), strict=True):
        labels = [label_steps(chain, "harmful") for chain in chains]
        decisive = [[label for label in chain if label != "neutral"] for chain in labels]
        assert len(labels) == number
        assert sum("turn" not in chain for chain in labels) == no_turn
        assert sum(chain[:1] != ["turn"] for chain in decisive) == wrong_first
        steps = sum(map(len, labels))
        assert sum(chain.count("cue") for chain in labels) / steps == pytest.approx(0.003, abs=0.0005)
        if no_turn == 0:
            assert all("cue" in label_steps(chain, "harmless") for chain in chains)


@needs_data
def test_mathematics_has_no_cues_and_no_turns():
    number = 0
    for line in (DATA / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines():
        solution = re.sub("<<.*?>>", "", json.loads(line)["answer"].split("####")[0])
        steps = [step.text for step in split_steps(solution)]
        number += len(steps)
        for kind in ("harmful", "harmless"):
            assert set(label_steps(steps, kind)) <= {"neutral"}
    assert number == 27_030


@needs_data
def test_figures_on_answers_to_safe_prompts():
    cues = {"1_full_compliance": [], "2_full_refusal": []}
    for file in sorted((DATA / "xstest_completions").glob("*.csv")):
        with file.open(encoding="utf-8", newline="") as rows:
            for row in csv.DictReader(rows):
                if "contrast" not in row["type"] and row["final_label"] in cues:
                    steps = [step.text for step in split_steps(row["completion"])]
                    cues[row["final_label"]].append("cue" in label_steps(steps, "harmless")[:2])
    complied, refused = cues.values()
    assert sum(refused) / len(refused) == pytest.approx(0.83, abs=0.005)
    assert sum(complied) / len(complied) == pytest.approx(0.036, abs=0.001)
