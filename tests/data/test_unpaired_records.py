"""Tests that labelled responses are read in each form, and that every error says where and what to do."""

import json

import pytest

from saro.data.records import Message, Response, read_examples, read_pairs
from saro.data.unpaired_records import Unpaired, read_unpaired
from saro.errors import SaroError

SECRET = "do not print me"
USER = (Message("user", "Why?"),)
PAIR = {"id": "p", "prompt": "Why?", "chosen": {"reasoning": "a", "answer": "b"}, "rejected": {"answer": "c"}}


@pytest.fixture
def read(tmp_path):
    """Return a function that reads records from a file named data.jsonl."""

    def from_records(*records):
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return list(read_unpaired(file))

    return from_records


def test_trls_unpaired_records_and_ours_are_read(read, tmp_path):
    turns = [{"role": "user", "content": "Why?"}], [{"role": "assistant", "content": "So."}]
    records = read(
        {"prompt": "Why?", "completion": " So.", "label": True},
        {"prompt": turns[0], "completion": turns[1], "label": False, "kind": "pp-cot", "id": 7},
        {"prompt": "Why?", "reasoning": "Because.", "answer": "So.", "label": False},
    )
    where = [f"{tmp_path}/data.jsonl:{line}" for line in (1, 2, 3)]
    assert records == [
        Unpaired("data:1", "op-cot", "Why?", Response(None, " So."), where[0], label=True),
        Unpaired("7", "pp-cot", USER, Response(None, "So."), where[1], label=False),
        Unpaired("data:3", "op-cot", USER, Response("Because.", "So."), where[2], label=False),
    ]


def test_each_side_of_a_pair_is_a_record(read, tmp_path):
    pair = PAIR | {"kind": "pp-cot", "meta": {"synth": {"form": "guided"}}}
    where = f"{tmp_path}/data.jsonl:1"
    assert read(pair) == [
        Unpaired("p/chosen", "pp-cot", USER, Response("a", "b"), where, label=True, form="guided"),
        Unpaired("p/rejected", "pp-cot", USER, Response(None, "c"), where, label=False, form="guided"),
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": SECRET, "completion": "b"}, "neither a label nor a pair; give each response its label"),
        ({"prompt": SECRET, "completion": "b", "label": 1}, "label is a number; give true or false"),
        ({"prompt": SECRET, "label": True}, 'field "answer" is missing; add it'),
        ({"prompt": SECRET, "completion": "b", "label": True, "kind": "safety"}, 'kind is "safety"; valid are op-cot'),
        (PAIR | {"label": True}, "a pair has a label; the label of its sides is known"),
        (PAIR | {"rejected": {"answer": "c", "open": True}}, "rejected is open, and kto takes whole responses"),
        (PAIR | {"rejected": PAIR["chosen"]}, "chosen equals rejected; drop this pair"),
    ],
)
def test_a_faulty_record_is_named_in_one_line(read, tmp_path, record, message):
    with pytest.raises(SaroError) as caught:
        read({"prompt": "Why?", "completion": "b", "label": True}, record)
    assert str(caught.value).startswith(f"{tmp_path}/data.jsonl:2: {message}")
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_id_is_used_once(read):
    with pytest.raises(SaroError, match='jsonl:2: id "p/chosen" is already used on line 1'):
        read(PAIR, {"id": "p/chosen", "prompt": "Why?", "completion": "b", "label": True})


@pytest.mark.parametrize(
    ("read_others", "message"),
    [(read_examples, "with --preference.loss kto"), (read_pairs, "with --preference.loss kto")],
)
def test_a_labelled_response_is_never_read_as_something_else(tmp_path, read_others, message):
    """As an example, an undesirable response would be learned."""
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": "Why?", "completion": "b", "label": False}))
    with pytest.raises(SaroError, match=f'field "label" makes this a labelled response.*{message}'):
        list(read_others(file))
