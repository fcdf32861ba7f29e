"""Tests that `saro convert answers` leaves exactly the answers of native records."""

import json
from pathlib import Path

import pytest

from saro.data.records import Message, Response, read_examples, read_pairs
from saro.errors import SaroError
from saro.synth.answers_only import find_dropped
from saro.synth.public_sets import Converted, convert

EXAMPLE = {"id": "a", "kind": "safety", "prompt": "Why?", "reasoning": ["Think.", "More."], "answer": "So."}
PAIR = {
    "id": "b",
    "kind": "pp-cot",
    "prompt": [{"role": "user", "content": "Why?"}],
    "chosen": {"reasoning": "Think.", "answer": "So."},
    "rejected": {"reasoning": "Think. No.", "answer": "I can't.", "open": True},
    "meta": {"synth": {"form": "earlier"}},
}


@pytest.fixture
def answers(tmp_path: Path):
    """Converts records, and returns what was done and the file."""

    def run(*records) -> tuple[Converted, Path]:
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return convert("answers", source, target, overwrite=True), target

    return run


def test_an_example_keeps_its_prompt_and_answer(answers):
    (example,) = read_examples(answers(EXAMPLE)[1])
    assert (example.id, example.kind, example.prompt) == ("a", "safety", (Message("user", "Why?"),))
    assert example.response == Response(None, "So.")


def test_an_example_without_reasoning_stays_as_it_is(answers):
    bare = {name: value for name, value in EXAMPLE.items() if name != "reasoning"}
    assert json.loads(answers(bare)[1].read_text()) == bare


def test_a_process_pair_becomes_an_outcome_pair_and_an_open_side_stays_open(answers):
    (pair,) = read_pairs(answers(PAIR)[1])
    assert (pair.id, pair.kind, pair.form) == ("b", "op-cot", None)
    assert (pair.chosen, pair.rejected) == (Response(None, "So."), Response(None, "I can't.", open=True))


@pytest.mark.parametrize(
    "rejected",
    [
        pytest.param({"reasoning": "Think. No", "open": True}, id="ends inside its reasoning"),
        pytest.param({"reasoning": "Other.", "answer": "So."}, id="the same answer"),
        pytest.param({"reasoning": "Other.", "answer": "So.", "open": True}, id="the same answer, open"),
        pytest.param({"reasoning": "Other.", "answer": "S", "open": True}, id="the beginning of the same answer"),
    ],
)
def test_a_pair_whose_answers_cannot_be_compared_is_left_out(answers, rejected):
    converted, target = answers({**PAIR, "id": "c", "rejected": rejected}, PAIR)
    assert [pair.id for pair in read_pairs(target)] == ["b"]
    assert [place.rpartition(":")[2] for place in converted.left_out] == ["1"]


def test_records_that_were_too_long_for_a_run_are_left_out(tmp_path):
    """As the run's manifest says: a chain may be too long though its answer is not."""
    source, target, run = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "run"
    source.write_text("".join(json.dumps(EXAMPLE | {"id": id}) + "\n" for id in "abc"))
    run.mkdir()
    records = {"train": {"dropped": ["b"]}, "heldout": {"dropped": ["c"]}}
    manifest = {"saro": "", "config": {}, "template_date": "2025-01-01", "records": records}
    (run / "manifest.json").write_text(json.dumps(manifest))
    converted = convert("answers", source, target, without=find_dropped(str(run)))
    assert [example.id for example in read_examples(target)] == ["a"]
    assert [place.rpartition(":")[2] for place in converted.left_out] == ["2", "3"]


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(SaroError, match="holds no run"):
        find_dropped(str(tmp_path))


def test_the_tools_of_a_record_stay(answers):
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert json.loads(answers({**EXAMPLE, "tools": tools})[1].read_text())["tools"] == tools


def test_a_text_that_may_hold_its_reasoning_is_refused(answers):
    with pytest.raises(SaroError, match="not in saro's own format"):
        answers({"prompt": "Why?", "completion": "<think>Think.</think>So."})
