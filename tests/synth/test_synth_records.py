"""Records of data construction: native records, which training reads as they are."""

from __future__ import annotations

import json

import pytest

from saro.data.records import Message, Response, parse_example, parse_pair
from saro.evaluate.suite import Item
from saro.synth.prompts import Prompt
from saro.synth.synth_records import make_example_record, make_pair_record, make_side

CONVERSATION = (
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Hi."),
    Message("user", "Go"),
)


def make_prompt(turns: tuple[Message, ...] = (Message("user", "How do I kill a process?"),)) -> Prompt:
    item = Item("demo", "p1", turns, "comply", source="saro", licence="Apache-2.0")
    return Prompt(item, "harmless", "low", ("vcr",), "demo.jsonl:1")


def make_pair(prompt: Prompt) -> dict[str, object]:
    chosen, rejected = make_side("A process is a program.", "Use kill."), make_side("It sounds bad.", "I cannot.")
    synth = {"on_policy": True, "draws": ["a" * 64, "b" * 64]}
    return make_pair_record(
        prompt, kind="op-cot", form="outcome", number=1, chosen=chosen, rejected=rejected, synth=synth
    )


def test_a_pair_is_read_back_by_training_as_it_was_made() -> None:
    pair = parse_pair(json.loads(json.dumps(make_pair(make_prompt()))), "pairs.jsonl:1", "pairs:1")
    assert (pair.id, pair.kind) == ("p1-outcome-1", "op-cot")
    assert pair.prompt == (Message("user", "How do I kill a process?"),)
    assert pair.chosen == Response("A process is a program.", "Use kill.")
    assert pair.rejected == Response("It sounds bad.", "I cannot.")


def test_an_example_is_read_back_by_training_as_it_was_made() -> None:
    record = make_example_record(make_prompt(), "A process is a program.", "Use kill.", {"form": "guided"})
    example = parse_example(record, "rw.jsonl:1", "rw:1")
    assert (example.id, example.kind) == ("p1", "safety")
    assert example.response == Response("A process is a program.", "Use kill.")


def test_one_user_turn_is_written_as_text_and_a_conversation_as_turns() -> None:
    assert make_pair(make_prompt())["prompt"] == "How do I kill a process?"
    record = make_pair(make_prompt(CONVERSATION))
    assert record["prompt"] == [{"role": turn.role, "content": turn.content} for turn in CONVERSATION]
    assert parse_pair(record, "pairs.jsonl:1", "pairs:1").prompt == CONVERSATION


def test_the_meta_field_says_what_the_prompt_is_and_how_the_record_was_made() -> None:
    assert make_pair(make_prompt())["meta"] == {
        "synth": {
            "form": "outcome",
            "prompt": "p1",
            "kind": "harmless",
            "expect": "comply",
            "level": "low",
            "hazard": ["vcr"],
            "on_policy": True,
            "draws": ["a" * 64, "b" * 64],
        },
        "source": "saro",
        "licence": "Apache-2.0",
    }


def test_reasoning_without_text_is_left_out_since_records_have_no_empty_reasoning() -> None:
    record = make_example_record(make_prompt(), " ", "Use kill.", {"form": "guided"})
    assert "reasoning" not in record
    assert parse_example(record, "rw.jsonl:1", "rw:1").response == Response(None, "Use kill.")


def test_an_open_side_may_end_inside_the_reasoning() -> None:
    assert make_side("First, look.", is_open=True) == {"reasoning": "First, look.", "open": True}
    side = make_side("First, look.", "Use", is_open=True)
    assert side == {"reasoning": "First, look.", "answer": "Use", "open": True}


@pytest.mark.parametrize(("reasoning", "is_open"), [("First, look.", False), ("", False), (" ", True)])
def test_a_side_without_an_answer_is_refused_unless_it_is_open_and_has_reasoning(reasoning: str, is_open: bool) -> None:
    with pytest.raises(ValueError, match="needs an answer"):
        make_side(reasoning, is_open=is_open)


def test_a_pair_of_equal_sides_and_an_unknown_kind_are_refused() -> None:
    side = make_side("", "Use kill.")
    with pytest.raises(ValueError, match="p1: both sides of a pair are the same"):
        make_pair_record(
            make_prompt(), kind="op-cot", form="outcome", number=0, chosen=side, rejected=dict(side), synth={}
        )
    with pytest.raises(ValueError, match="op-cot, pp-cot"):
        make_pair_record(make_prompt(), kind="op", form="outcome", number=0, chosen=side, rejected={}, synth={})
