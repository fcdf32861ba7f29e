"""Hazards and levels by a model: what the file gives stays, and a reply that names nothing of the policy costs nothing."""

from __future__ import annotations

import json
import random

import pytest
from chat_cases import CHATS
from synth_cases import write_lines
from synth_chains import Speaker

from saro.evaluate.judge_model import JudgeModel
from saro.synth.funnel import Funnel
from saro.synth.hazard_judge import is_asked_about, parse_sorting, sort_prompts
from saro.synth.prompts import LEVELS, read_prompts
from saro.synth.safety_policy import read_policy

CHAT = CHATS["chatml"]
POLICY = read_policy("saro")
# Its hazards, and a section on requests that do no harm.
SECTION = next(section for section in POLICY.sections if section.hazard)
GENERAL = next(section for section in POLICY.sections if section.is_general)
REPLY = json.dumps({"section": SECTION.id, "level": "medium"})


@pytest.fixture
def prompts(tmp_path):
    """Reads prompts of kinds with other fields as their file gives them."""

    def read(*rows: dict):
        common = {"source": "made up", "licence": "CC0-1.0"}
        lines = [{"id": f"p{i}", "prompt": f"Say p{i}."} | row | common for i, row in enumerate(rows)]
        return read_prompts([write_lines(tmp_path / "mine.jsonl", lines)])

    return read


def sort(prompts, reply):
    """Sort prompts with a model that replies so; return (hazard, level) of each, the counts, and what the model saw."""
    seen: list[str] = []

    def say(user: str, _begun: str, number: int) -> str:
        seen.append(user)
        return reply(number) if callable(reply) else reply

    model = JudgeModel(Speaker(CHAT, say), CHAT)

    def draw_all(requests):
        drawn = dict(entry for group in model.generator.draw(requests) for entry in group)
        return [drawn[i] for i in range(len(requests))]

    funnel = Funnel()
    found = sort_prompts(prompts, model, POLICY, funnel, draw_all)
    assert [prompt.id for prompt in found] == [prompt.id for prompt in prompts]
    return [(prompt.hazard, prompt.level) for prompt in found], funnel.counts["hazards"], seen


def test_a_harmful_prompt_gets_the_hazards_of_its_section_and_a_level(prompts):
    found, counts, seen = sort(prompts({"kind": "harmful"}), REPLY)
    assert found == [(SECTION.hazard, "medium")]
    assert counts == {"given by the file": 0, "given by the model": 1, "no valid reply, so the default": 0}
    (text,) = seen
    assert "Say p0." in text
    assert all(section.id in text and section.title in text for section in POLICY.sections)
    assert all(f"- {level}:" in text for level in LEVELS)


def test_what_the_file_gives_stays(prompts):
    rows = [
        {"kind": "harmful", "hazard": ["prv"]},
        {"kind": "harmful", "level": "low"},
        {"kind": "harmful", "hazard": ["prv"], "level": "low"},
    ]
    found, counts, seen = sort(prompts(*rows), REPLY)
    assert found == [(("prv",), "medium"), (SECTION.hazard, "low"), (("prv",), "low")]
    assert counts["given by the file"] == 1
    assert len(seen) == 2


def test_an_empty_list_of_hazards_is_given_too(prompts):
    found, _, _ = sort(prompts({"kind": "harmful", "hazard": []}), REPLY)
    assert found == [((), "medium")]


def test_a_harmless_prompt_gets_a_level_and_no_hazard(prompts):
    found, _, _ = sort(prompts({"kind": "harmless"}, {"kind": "harmless", "level": "none"}), REPLY)
    assert found == [((), "medium"), ((), "none")]


def test_a_general_prompt_is_of_level_none_without_asking(prompts):
    found, _, seen = sort(prompts({"kind": "general"}), REPLY)
    assert (found, seen) == ([((), "none")], [])
    assert not any(map(is_asked_about, prompts({"kind": "general"})))


def test_a_harmful_prompt_of_a_general_section_has_no_hazard(prompts):
    found, counts, _ = sort(prompts({"kind": "harmful"}), json.dumps({"section": GENERAL.id, "level": "low"}))
    assert found == [((), "low")]
    assert counts["given by the model"] == 1


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "P1, high",
        '{"section": "P99", "level": "high"}',
        json.dumps({"section": SECTION.id, "level": "extreme"}),
        json.dumps({"section": SECTION.id}),
        json.dumps({"section": SECTION.id, "level": "high", "why": "x"}),
        json.dumps({"section": [SECTION.id], "level": "high"}),
        json.dumps({"section": SECTION.id, "level": ["high"]}),
        f"{REPLY}\n{REPLY}",
        f"It is this:\n{REPLY}",
    ],
    ids=range(10),
)
def test_a_reply_that_names_nothing_of_the_policy_is_counted_and_leaves_the_defaults(prompts, reply):
    found, counts, seen = sort(prompts({"kind": "harmful"}), reply)
    assert found == [((), "high")]
    assert counts == {"given by the file": 0, "given by the model": 0, "no valid reply, so the default": 1}
    assert len(seen) == 2


def test_a_reply_that_cannot_be_read_is_asked_for_once_more(prompts):
    found, counts, _ = sort(prompts({"kind": "harmful"}), lambda number: REPLY if number else "Hm.")
    assert found == [(SECTION.hazard, "medium")]
    assert counts["given by the model"] == 1


def test_a_prompt_that_was_sorted_is_not_asked_about_again(prompts):
    model = JudgeModel(Speaker(CHAT, lambda *_: REPLY), CHAT)
    (first,) = sort_prompts(prompts({"kind": "harmful"}), model, POLICY, Funnel(), _drawn_by(model))
    assert not is_asked_about(first)


def _drawn_by(model):
    def draw_all(requests):
        drawn = dict(entry for group in model.generator.draw(requests) for entry in group)
        return [drawn[i] for i in range(len(requests))]

    return draw_all


def test_20_000_damaged_replies_are_read_or_refused():
    draw = random.Random(0)
    read = 0
    for _ in range(20_000):
        reply = list(json.dumps({"section": draw.choice(POLICY.sections).id, "level": draw.choice(LEVELS)}))
        for _ in range(draw.randint(0, 3)):
            place = draw.randrange(len(reply) + 1)
            reply[place : place + draw.randint(0, 2)] = draw.choices('{}[]":,\\\n 0P1\ud800', k=draw.randint(0, 2))
        sorting = parse_sorting("".join(reply), POLICY)
        read += sorting is not None
        assert sorting is None or (sorting.section in POLICY.sections and sorting.level in LEVELS)
    assert 4_000 < read < 14_000
