"""Gates: each planted fault is found, by its own reason, and good texts pass."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from run_files import ROOT
from selection_cases import HELP, MEDIUM, REFUSAL, SHORT, make_drawn, make_prompt, tiny_chat

from saro.synth.funnel import Funnel
from saro.synth.gates import Gates, gives_in, leaks, repeats
from saro.synth.prompts import Prompt
from saro.synth.safety_policy import read_policy
from saro.synth.templates import read_template

DATA = ROOT.parent / "shared" / "data"
POLICY = read_policy("saro")
HARMFUL = make_prompt("p1")
HARMLESS = make_prompt("p2", "harmless")
# 13 sentences, one more than level medium accepts.
LONG = (
    "They ask me. The wish is plain. Some lists are fine. This one is not. A friend could fall. Trust would go. "
    "Money may be lost. Law forbids it too. Yet they seem sad. Kindness helps here. So I decline. Then comfort follows. "
    "Done."
)


def reason_of(prompt: Prompt = HARMFUL, think: str = MEDIUM, answer: str = REFUSAL, **changes: object) -> str | None:
    return Gates(tiny_chat(), POLICY).find_fault(make_drawn(prompt, think, answer, **changes))


def test_a_good_text_passes() -> None:
    assert reason_of() is None
    assert reason_of(HARMLESS, SHORT, HELP) is None


@pytest.mark.parametrize("state", ["failed", "empty", "unfinished", "looped", "cut"])
def test_a_text_that_is_not_finished_is_left_out_by_its_state(state: str) -> None:
    assert reason_of(state=state) == state


def test_a_finished_text_without_an_answer_is_empty() -> None:
    assert reason_of(answer=" ") == "empty"


@pytest.mark.parametrize("tag", ["<think>", "</think>"])
def test_a_tag_in_the_reasoning_or_the_answer_is_found(tag: str) -> None:
    assert reason_of(think=f"{MEDIUM} {tag}") == "tags"
    assert reason_of(answer=f"{REFUSAL} {tag}") == "tags"


def test_without_a_chat_format_the_given_tags_are_those_that_may_not_occur() -> None:
    text = make_drawn(HARMFUL, f"{MEDIUM} [/r]")
    assert Gates(None, POLICY, tags=("[r]", "[/r]")).find_fault(text) == "tags"
    assert Gates(None, POLICY).find_fault(text) is None


def test_a_text_that_the_chat_format_refuses_is_found() -> None:
    assert reason_of(answer=f"{REFUSAL} <|im_start|>") == "encode"


def test_reasoning_outside_the_band_of_its_level_is_found() -> None:
    assert reason_of(think="No.") == "band"
    assert reason_of(think=LONG) == "band"
    assert reason_of(replace(HARMFUL, level="high"), LONG) is None


def test_the_band_can_be_left_out() -> None:
    assert Gates(tiny_chat(), POLICY, banded=False).find_fault(make_drawn(HARMFUL, LONG)) is None


def test_only_prompts_of_level_none_without_a_right_answer_may_do_without_reasoning() -> None:
    trivial = make_prompt("p3", "general", expect="comply")
    assert reason_of(trivial, "", HELP, state="no-think") is None
    assert reason_of(make_prompt("p4", "general"), "", "4", state="no-think") == "no-think"
    assert reason_of(HARMLESS, "", HELP, state="no-think") == "no-think"
    assert reason_of(think="", state="no-think") == "no-think"


def test_a_sentence_that_stands_three_times_is_a_repetition() -> None:
    once, twice = "It could hurt somebody.", "It could hurt somebody. IT COULD HURT SOMEBODY!"
    assert reason_of(think=f"{MEDIUM} {once}") is None
    assert reason_of(think=f"{MEDIUM} {twice}") == "repetition"


def test_a_text_that_ends_in_a_loop_is_a_repetition() -> None:
    assert reason_of(think=f"{MEDIUM} {'no, ' * 40}") == "repetition"
    assert reason_of(answer=f"{REFUSAL} {'no, ' * 40}") == "repetition"


def test_reasoning_that_says_the_same_in_few_words_is_a_repetition_and_worked_sums_may_do_it() -> None:
    think = " ".join(f"They ask for list {i} of the lists of lists that they ask for." for i in range(9))
    assert repeats(think, "safety")
    sums = "\n".join(
        f"Day {i} has {7 * i} + {i} = {8 * i} apples, so by then there are {3 * i} of them." for i in range(2, 9)
    )
    assert not repeats(sums, "general")


@pytest.mark.parametrize(
    "leak",
    [
        "The policy above says no.",
        "This breaks the policies provided.",
        "By the given guidelines I say no.",
        "As instructed, I say no.",
        "My instructions that I was given say no.",
        "The system prompt says no.",
        "P2.1 says no.",
        "By rule P2.1, no.",
        "Section P2 says no.",
        "I should think about this in 2 to 3 sentences.",
        "I must reason in four short sentences.",
    ],
)
def test_words_that_speak_of_what_only_the_writer_saw_are_a_leak(leak: str) -> None:
    assert reason_of(think=f"{MEDIUM} {leak}") == "leak"
    assert reason_of(answer=f"{REFUSAL} {leak}") == "leak"


@pytest.mark.parametrize("name", ["guided", "turn"])
def test_a_line_copied_from_a_template_is_a_leak(name: str) -> None:
    lines = [line for _, content in read_template(name).turns for line in content.splitlines() if "{" not in line]
    copied = max(lines, key=len)
    assert leaks(f"{MEDIUM} {copied.upper()}", POLICY)


@pytest.mark.parametrize(
    "fine",
    [
        "The privacy policy of a firm must be given on request.",
        "Take the medicine as directed by a doctor.",
        "Follow the instructions in the box, and the rules of the road.",
        "The P2 visa is for artists, and P3.15 is a port.",
        "Version P2.1.3 is old.",
        "He wrote two sentences.",
    ],
)
def test_ordinary_words_are_no_leak(fine: str) -> None:
    assert not leaks(f"{MEDIUM} {fine}", POLICY)


def test_the_first_reason_is_the_one_that_is_cheapest_to_find() -> None:
    faults = {"think": "P2.1 says no. <think>", "answer": "no, " * 40}
    assert reason_of(state="unfinished", **faults) == "unfinished"
    assert reason_of(**faults) == "tags"
    assert reason_of(**faults | {"think": "P2.1 says no."}) == "band"
    assert reason_of(**faults | {"think": f"{MEDIUM} P2.1."}) == "repetition"


def test_the_funnel_notes_each_text_that_does_not_pass_without_its_words() -> None:
    funnel = Funnel()
    texts = [make_drawn(HARMFUL, key="good"), make_drawn(HARMFUL, "No.", key="short")]
    assert [text.key for text in Gates(tiny_chat(), POLICY).select(texts, funnel)] == ["good"]
    assert [vars(one) for one in funnel.left_out] == [{"id": "p1", "stage": "gates", "reason": "band", "draw": "short"}]


@pytest.mark.skipif(not DATA.is_dir(), reason="the public data is not here")
def test_of_public_chains_none_repeats_itself_and_few_leak() -> None:
    responses = [row["response"] for row in json.loads((DATA / "star1.json").read_text())]
    parts = [response.removeprefix("<think>").partition("</think>") for response in responses]
    assert not any(repeats(think.strip(), "safety") for think, _, _ in parts)
    assert sum(leaks(think, POLICY) for think, _, _ in parts) == 49
    assert not any(leaks(answer, POLICY) for _, _, answer in parts)
    risky = replace(HARMFUL, level="high")
    reasons = Counter(
        Gates(None, POLICY).find_fault_of_parts(risky, think.strip(), answer.strip()) for think, _, answer in parts
    )
    assert reasons == {None: 935, "band": 21, "leak": 44}
    with open(DATA / "gsm8k_train.jsonl", encoding="utf-8") as file:
        answers = [json.loads(line)["answer"].rpartition("\n####")[0] for line in file]
    solutions = [re.sub("<<[^<>]*>>", "", answer) for answer in answers]
    assert not any(repeats(text, "general") or leaks(text, POLICY) for text in solutions)


@pytest.mark.parametrize(
    ("kind", "think", "found"),
    [
        ("harmful", "They ask for harm. I must refuse.", False),
        ("harmful", "They ask for harm. I will explain how to do it. No, I must refuse.", True),
        ("harmful", "Sure, I will explain it. Then, go on.", True),
        ("harmless", "They ask for a list. I will explain how to do it.", False),
        ("harmful", "", False),
    ],
)
def test_reasoning_that_gives_in_on_a_harmful_prompt_is_found_wherever_it_turns(kind, think, found):
    assert gives_in(think, kind) == found
