"""Tests that records in the formats of Alpaca and ShareGPT are converted whole. All texts are made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saro.data.records import Example, Message, Response, read_examples
from saro.errors import SaroError
from saro.synth.public_sets import convert

ALPACA = {"instruction": "Name a colour.", "input": "", "output": "Red."}
TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}, {"from": "human", "value": "Why?"}]
SHAREGPT = {"id": "x_0", "conversations": [*TALK, {"from": "gpt", "value": "So."}]}


def converted(tmp_path: Path, source_format: str, *records: dict) -> list[Example]:
    source = tmp_path / "in.json"
    source.write_text(json.dumps(records))
    convert(source_format, source, tmp_path / "out.jsonl")
    return list(read_examples(tmp_path / "out.jsonl"))


def error(tmp_path: Path, source_format: str, record: dict) -> str:
    with pytest.raises(SaroError) as caught:
        converted(tmp_path, source_format, record)
    assert not (tmp_path / "out.jsonl").exists()
    return str(caught.value).removeprefix(f"{tmp_path}/in.json: ")


def test_an_instruction_of_alpaca_is_the_prompt(tmp_path):
    (example,) = converted(tmp_path, "alpaca", ALPACA)
    assert (example.id, example.kind) == ("alpaca-000001", "general")
    assert (example.prompt, example.response) == ((Message("user", "Name a colour."),), Response(None, "Red."))


def test_the_input_of_alpaca_follows_the_instruction_on_a_line_of_its_own(tmp_path):
    (example,) = converted(tmp_path, "alpaca", ALPACA | {"input": "Not blue."})
    assert example.prompt == (Message("user", "Name a colour.\nNot blue."),)


def test_system_and_history_of_alpaca_come_before_the_instruction(tmp_path):
    (example,) = converted(tmp_path, "alpaca", ALPACA | {"system": "Be brief.", "history": [["Hi", "Hello"]]})
    roles = [turn.role for turn in example.prompt]
    assert (roles, example.prompt[1].content) == (["system", "user", "assistant", "user"], "Hi")


def test_a_record_of_alpaca_without_an_output_is_left_out_and_named(tmp_path):
    source = tmp_path / "in.json"
    source.write_text(json.dumps([ALPACA, ALPACA | {"output": ""}]))
    result = convert("alpaca", source, tmp_path / "out.jsonl")
    assert (result.records, result.left_out) == (1, (f"{source}: record 2",))


def test_the_speakers_of_sharegpt_are_roles(tmp_path):
    turns = [{"from": "system", "value": "Be brief."}, *SHAREGPT["conversations"]]
    (example,) = converted(tmp_path, "sharegpt", SHAREGPT | {"conversations": turns})
    assert example.id == "sharegpt-000001"
    assert [turn.role for turn in example.prompt] == ["system", "user", "assistant", "user"]
    assert example.response == Response(None, "So.")


@pytest.mark.parametrize("turns", [TALK, SHAREGPT["conversations"][1:], []])
def test_a_conversation_of_sharegpt_that_was_cut_is_left_out(tmp_path, turns):
    (example,) = converted(tmp_path, "sharegpt", SHAREGPT, SHAREGPT | {"conversations": turns})
    assert example.id == "sharegpt-000001"


@pytest.mark.parametrize(
    ("source_format", "record", "expected"),
    [
        ("alpaca", {"output": "Red."}, 'record 1: field "instruction" is missing; check that this is the format'),
        ("alpaca", ALPACA | {"output": None}, 'record 1: field "output" is null; give a string'),
        ("alpaca", ALPACA | {"input": 3}, 'record 1: field "input" is a number; give a string'),
        ("alpaca", ALPACA | {"history": ["Hi"]}, "record 1: history is not a list of [question, answer]"),
        ("alpaca", ALPACA | {"history": [["Hi", None]]}, "record 1: messages: message 2: content is null"),
        ("sharegpt", {"messages": []}, "record 1: conversations is null; check that this is the format"),
        ("sharegpt", {"conversations": ["Hi"]}, "record 1: turn 1: is a string; check that this is the format"),
        (
            "sharegpt",
            {"conversations": [{"from": "humn", "value": "Hi"}]},
            'turn 1: unknown speaker "humn"; did you mean',
        ),
        ("sharegpt", {"conversations": [{"from": "human"}]}, 'record 1: turn 1: field "value" is missing'),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "f"}]}, 'unknown speaker "function_call"'),
        ("sharegpt", SHAREGPT | {"tools": "[{}]"}, 'record 1: field "tools" would change the prompt; drop the record'),
    ],
)
def test_a_record_that_does_not_follow_its_format_is_an_error(tmp_path, source_format, record, expected):
    assert expected in error(tmp_path, source_format, record)
