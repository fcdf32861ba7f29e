"""A judge of drawn texts: a reply that cannot be read costs one text, and too many of them end the run."""

from __future__ import annotations

import pytest
from chat_cases import CHATS
from selection_cases import HELP, REFUSAL, make_drawn, make_judged, make_prompt
from synth_chains import Speaker

from saro.draws.store import DrawStore
from saro.errors import SaroError
from saro.evaluate.judge_model import JudgeModel
from saro.evaluate.judge_spec import read_gate, read_judge
from saro.synth.author import Drawn
from saro.synth.funnel import Funnel
from saro.synth.judgement import Judge, JudgedGate

CHAT = CHATS["chatml"]
PROMPT = make_prompt("p1")
SAFE = "VIOLATION: 0\nREFUSAL: FULL"


@pytest.fixture
def judge(tmp_path, runtime):
    """A judge that gives no verdict on texts with the word "mute"."""

    def reply(user: str, *_: object) -> str:
        return "I would rather not say." if "mute" in user else SAFE

    with DrawStore.open(tmp_path / "draws.sqlite") as store:
        yield Judge(read_judge("policy"), JudgeModel(Speaker(CHAT, reply), CHAT), store, runtime)


def texts(number: int, mute: int = 0, name: str = "k") -> list[Drawn]:
    """Return texts on one prompt, of which the first ``mute`` get no verdict."""
    return [
        make_drawn(PROMPT, answer=f"{REFUSAL} {name}{i} {'mute' * (i < mute)}", key=f"{name}{i}", suite="demo")
        for i in range(number)
    ]


def test_a_text_without_a_verdict_is_neither_good_nor_bad(judge):
    first, second = judge.judge(texts(2, mute=1))
    assert (first.outcome, first.is_good, first.is_bad) == ("unjudged", False, False)
    assert second.outcome == "safe"


def test_small_rounds_with_a_reply_that_cannot_be_read_do_not_end_the_run(judge):
    for n in range(5):
        judge.judge(texts(2, mute=1, name=f"round{n}-"))
    judge.judge(texts(60, name="more"))
    funnel = Funnel()
    judge.finish(funnel)
    assert funnel.counts["verdicts"] == {"given": 65, "none": 5}


def test_a_text_that_is_read_again_counts_once(judge):
    for _ in range(9):
        judge.judge(texts(1, mute=1))
    judge.finish(Funnel())


def test_a_judge_that_gives_no_verdict_on_many_texts_ends_the_run_in_words_of_its_own(judge):
    judge.judge(texts(60, mute=6))
    with pytest.raises(
        SaroError, match=r"--judge policy: gives no verdict on 6 of 101 texts \(parse 6\); its"
    ) as raised:
        judge.judge(texts(41, name="more"))
    assert "verdicts.jsonl" not in str(raised.value)


def test_at_the_end_a_few_texts_are_checked_too(judge):
    judge.judge(texts(8, mute=6))
    with pytest.raises(SaroError, match="no verdict on 6 of 8 texts"):
        judge.finish(Funnel())


def test_the_rules_give_a_verdict_on_all(tmp_path, runtime):
    with DrawStore.open(tmp_path / "draws.sqlite") as store:
        rules = Judge(read_judge("rules"), None, store, runtime)
        (judged,) = rules.judge([make_drawn(PROMPT, answer=HELP, suite="demo")])
        funnel = Funnel()
        rules.finish(funnel)
    assert judged.outcome == "harmful"
    assert funnel.counts == {}


def test_a_gate_accepts_refuses_or_does_not_know_and_reads_no_text_without_reasoning(tmp_path, runtime):
    asked = []

    def reply(user: str, *_: object) -> str:
        asked.append(user)
        said = {"odd": "RELEVANT: NO", "mute": "I would rather not say."}
        return next((line for word, line in said.items() if word in user), "RELEVANT: YES")

    given = {"fine": "A fine thought.", "odd": "An odd thought.", "mute": "A mute thought.", "none": " "}
    with DrawStore.open(tmp_path / "draws.sqlite") as store:
        judge = Judge(read_gate("relevance"), JudgeModel(Speaker(CHAT, reply), CHAT), store, runtime)
        gate, funnel = JudgedGate("relevance", judge), Funnel()
        judged = [make_judged(PROMPT, "safe", think, key=key, suite="demo") for key, think in given.items()]
        accepted = gate.select(judged, funnel)
        gate.finish(funnel)
    assert [text.drawn.key for text in accepted] == ["fine", "none"]
    assert [(one.stage, one.reason, one.draw) for one in funnel.left_out] == [
        ("relevance", "not accepted", "odd"),
        ("relevance", "unjudged", "mute"),
    ]
    assert funnel.counts == {"relevance": {"accepted": 2}, "verdicts on relevance": {"given": 2, "none": 1}}
    assert len(asked) == 4  # the mute one twice
