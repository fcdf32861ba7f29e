"""A judge of steps gives a label for each step, or none; no reply makes it fail."""

from __future__ import annotations

import json
import random

import pytest
from chat_cases import CHATS
from draw_cases import KEY, Server, chat_reply
from hypothesis import given
from hypothesis import strategies as st
from synth_chains import SAMPLING, Speaker, subject_of, synth_prompt

from saro.draws.store import DrawStore
from saro.errors import SaroError
from saro.evaluate.judge_model import JudgeModel
from saro.synth.author import Author, Task
from saro.synth.safety_policy import read_policy
from saro.synth.step_judge import StepJudge, parse_labels
from saro.synth.step_rules import LABELS

CHAT = CHATS["chatml"]
POLICY = read_policy("saro")
LINES = '{"step": 1, "label": "neutral"}\n{"step": 2, "label": "turn"}'


@pytest.fixture
def store(tmp_path):
    with DrawStore.open(tmp_path / "draws.sqlite") as opened:
        yield opened


@pytest.fixture
def with_key(monkeypatch):
    monkeypatch.setenv("SARO_API_KEY", KEY)


def write_chains(store, runtime, *thoughts: str, kind: str = "harmful"):
    """Return one drawn chain for each text of reasoning."""
    speaker = Speaker(CHAT, lambda _user, _begun, number: f"<think>\n{thoughts[number]}\n</think>\n\nNo.")
    author = Author(subject_of(CHAT), speaker, store, runtime)
    prompt = synth_prompt("a", kind)
    return author.write([Task(prompt, "plain", prompt.item.prompt, None, n) for n in range(len(thoughts))], SAMPLING)


def model_judge(store, runtime, reply) -> StepJudge:
    return StepJudge(JudgeModel(Speaker(CHAT, reply), CHAT), POLICY, store, runtime)


def test_without_a_model_the_rules_label(store, runtime):
    chains = write_chains(store, runtime, "They ask for it. So I must refuse.", "Sure, I will help.")
    assert StepJudge().label(chains) == [("neutral", "turn"), ("cue",)]


def test_a_model_labels_each_step(store, runtime):
    chains = write_chains(store, runtime, "One. Two.")
    judge = model_judge(store, runtime, lambda *_: LINES)
    assert judge.label(chains) == [("neutral", "turn")]


def test_the_model_sees_the_request_the_policy_and_numbered_steps(store, runtime):
    seen = []

    def reply(user, _begun, _number):
        seen.append(user)
        return LINES

    chains = write_chains(store, runtime, "One. Two.")
    model_judge(store, runtime, reply).label(chains)
    (text,) = seen
    assert "Request a" in text
    assert POLICY.for_writer(chains[0].task.prompt) in text
    assert "1. One.\n2. Two." in text


def test_a_chain_cannot_end_its_turn(store, runtime):
    seen = []

    def reply(user, _begun, _number):
        seen.append(user)
        return '{"step": 1, "label": "cue"}'

    chains = write_chains(store, runtime, "Look at <s> this")
    assert model_judge(store, runtime, reply).label(chains) == [("cue",)]
    assert "< s> this" in seen[0]


def test_a_reply_that_cannot_be_read_is_asked_for_once_more(store, runtime):
    judge = model_judge(store, runtime, lambda _user, _begun, number: LINES if number == 1 else "neutral, turn")
    assert judge.label(write_chains(store, runtime, "One. Two.")) == [("neutral", "turn")]
    first, second = (asked[0] for asked in judge.model.generator.asked)
    assert (first.number, first.sampling.temperature) == (0, 0.0)
    assert (second.number, second.sampling.temperature) == (1, 0.7)


def test_after_two_bad_replies_there_are_no_labels(store, runtime):
    judge = model_judge(store, runtime, lambda *_: "I cannot do that.")
    assert judge.label(write_chains(store, runtime, "One. Two.", "Three.")) == [None, None]
    assert [len(asked) for asked in judge.model.generator.asked] == [2, 2]


def test_a_reply_that_was_cut_is_no_reply(store, runtime):
    judge = model_judge(store, runtime, lambda *_: LINES + " " * 3000)
    assert judge.label(write_chains(store, runtime, "One. Two.")) == [None]


def test_general_prompts_are_not_asked_about(store, runtime):
    judge = model_judge(store, runtime, lambda *_: "unread")
    assert judge.label(write_chains(store, runtime, "One. Two.", kind="general")) == [("neutral", "neutral")]
    assert judge.model.generator.asked == []


def test_one_text_is_asked_about_once(store, runtime):
    (chain,) = write_chains(store, runtime, "One. Two.")
    judge = model_judge(store, runtime, lambda *_: LINES)
    assert judge.label([chain, chain]) == [("neutral", "turn")] * 2
    assert [len(asked) for asked in judge.model.generator.asked] == [1]


@pytest.mark.usefixtures("with_key")
def test_a_server_is_asked_with_messages(store, runtime):
    server = Server(chat_reply(LINES))
    judge = StepJudge(JudgeModel(server.generator(), None), POLICY, store, runtime)
    assert judge.label(write_chains(store, runtime, "One. Two.")) == [("neutral", "turn")]
    ((_, _, body),) = server.requests
    assert "Request a" in body["messages"][0]["content"]


@pytest.mark.usefixtures("with_key")
def test_a_server_that_fails_gives_no_labels(store, runtime):
    server = Server((400, {"error": {"message": "bad", "code": "content_filter"}}))
    judge = StepJudge(JudgeModel(server.generator(), None), POLICY, store, runtime)
    assert judge.label(write_chains(store, runtime, "One. Two.")) == [None]


def test_offline_a_missing_reply_is_an_error(store, runtime):
    chains = write_chains(store, runtime, "One. Two.")
    judge = StepJudge(JudgeModel(Speaker(CHAT, lambda *_: LINES), CHAT), POLICY, store, runtime, offline=True)
    with pytest.raises(SaroError, match="1 of 1 draws are not in the store"):
        judge.label(chains)


@pytest.mark.parametrize(
    "reply",
    [LINES, f"\n{LINES}\n", f"```json\n{LINES}\n```", f"I think.\n</think>\n{LINES}", LINES.replace("\n", "\n\n")],
)
def test_labels_are_read_from(reply):
    assert parse_labels(reply, 2) == ("neutral", "turn")


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "null",
        "[]",
        f"Here you are:\n{LINES}",
        f"{LINES}\nDone.",
        LINES.splitlines()[0],
        f'{LINES}\n{{"step": 3, "label": "cue"}}',
        LINES.replace("2", "1"),
        LINES.replace("1", "true"),
        LINES.replace("1", "1.0"),
        LINES.replace("1", '"1"'),
        LINES.replace("turn", "Turn"),
        LINES.replace('"turn"', '["turn"]'),
        LINES.replace('"turn"', '"turn", "why": "x"'),
        LINES.replace('"turn"', '"cue", "label": "turn"'),
        LINES.replace("\n", " "),
        "[" * 100_000,
        LINES.replace("1", "1" * 5_000),
    ],
    ids=range(18),
)
def test_no_labels_are_read_from(reply):
    assert parse_labels(reply, 2) is None


@given(st.text() | st.lists(st.sampled_from(["{", "}", '"', "step", "label", ":", "1", "cue", "\n", ","])).map("".join))
def test_any_text_is_read_or_refused(reply):
    labels = parse_labels(reply, 1)
    assert labels is None or (len(labels) == 1 and set(labels) <= set(LABELS))


def test_100_000_damaged_replies_are_read_or_refused():
    draw = random.Random(0)
    characters = '{}[]":,\\\n\t 019ecntu\u2028\ud800\x00'
    read = 0
    for _ in range(100_000):
        steps = draw.randint(1, 3)
        lines = [json.dumps({"step": i + 1, "label": draw.choice(LABELS)}) for i in range(steps)]
        reply = list("\n".join(lines))
        for _ in range(draw.randint(0, 3)):
            place = draw.randrange(len(reply) + 1)
            reply[place : place + draw.randint(0, 2)] = draw.choices(characters, k=draw.randint(0, 2))
        labels = parse_labels("".join(reply), steps)
        read += labels is not None
        assert labels is None or (len(labels) == steps and set(labels) <= set(LABELS))
    # A good share is undamaged.
    assert 25_000 < read < 60_000
