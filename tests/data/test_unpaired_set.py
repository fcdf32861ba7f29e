"""Tests that each labelled response is encoded as in training, and stands beside a response to another prompt."""

import json
from datetime import date
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from saro.config import PAIR_KINDS, DataConfig
from saro.data import unpaired_set
from saro.data.chat_format import ChatFormat
from saro.data.encode_files import encode_pair_files
from saro.data.unpaired_set import encode_unpaired_files
from saro.errors import SaroError

CHAT = ChatFormat(tiny_tokenizer(), frozenset([2]), date(2024, 7, 26))


@pytest.fixture
def encode(tmp_path):
    """Return a function that encodes records."""

    def from_records(records, encoder=encode_unpaired_files, **options):
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return encoder([str(file)], CHAT, DataConfig(**{"pack_tokens": 512} | options))

    return from_records


def record(prompt: str, completion: str, label: bool = True) -> dict:
    return {"prompt": prompt, "completion": completion, "label": label}


def test_the_sides_of_pairs_have_the_tokens_of_pairs(encode, pairs):
    data, as_pairs = encode(pairs), encode(pairs, encode_pair_files)
    assert data.labels.tolist() == [True, False] * len(pairs)
    assert data.kind_names[data.kinds[2]] == PAIR_KINDS[as_pairs.kinds[1]]
    for i in range(len(data)):
        expected = as_pairs.sequences(i // 2)[i % 2]
        assert data.sequence(i).tokens.tolist() == expected.tokens.tolist()
        assert data.sequence(i).row_kinds.tolist() == expected.row_kinds.tolist()


def test_a_pair_whose_sides_are_the_same_tokens_is_an_error_or_left_out_whole(encode, pairs):
    same = pairs[0] | {"id": "same", "chosen": {"reasoning": "a", "answer": "b"}}
    same["rejected"] = {"answer": "<think>\na\n</think>\n\nb"}
    with pytest.raises(SaroError, match="chosen and rejected are the same tokens"):
        encode([same, *pairs])
    equal = same | {"id": "equal", "rejected": same["chosen"]}
    data = encode([same, equal, *pairs], equal_sides="drop")
    assert data.equal == ("same/chosen", "same/rejected", "equal/chosen", "equal/rejected")
    assert len(data) == 2 * len(pairs)


def test_a_mismatched_sequence_is_the_prompt_and_the_whole_response_of_the_other_record(encode, pairs):
    data = encode(pairs)
    for i, other in enumerate(data.others.tolist()):
        own, response, mismatch = data.sequence(i), data.sequence(other), data.mismatched.sequence(i)
        assert mismatch.record == i
        assert mismatch.tokens[: mismatch.scored_from].tolist() == own.tokens[: own.scored_from].tolist()
        assert mismatch.tokens[mismatch.scored_from :].tolist() == response.tokens[response.scored_from :].tolist()
        assert mismatch.row_kinds.tolist() == response.row_kinds.tolist()
        assert data.as_pairs.sequences(i)[1].tokens.tolist() == mismatch.tokens.tolist()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 30)), min_size=2, max_size=12), st.integers(40, 120))
def test_every_record_has_another_that_fits_or_is_dropped(encode, drawn, pack_tokens):
    records = [record(str(prompt), "a" * length + str(i)) for i, (prompt, length) in enumerate(drawn)]
    data, refusal = None, ""
    try:
        data = encode(records, pack_tokens=pack_tokens, too_long="drop")
    except SaroError as error:
        refusal = str(error)
    if data is None:
        assert "on two prompts or more" in refusal or "records are longer than" in refusal
        return
    assert len(data) + len(data.dropped) == len(records)
    assert (data.prompts[data.others] != data.prompts).all()
    assert max(tree.tokens for tree in data.as_pairs.trees(range(len(data)), pack_tokens)) <= pack_tokens
    most = np.bincount(data.prompts).max()
    if pack_tokens > 100 and 2 * most <= len(data):
        assert sorted(data.others.tolist()) == list(range(len(data))), "each response is taken once"


def test_records_on_one_prompt_share_a_tree(encode):
    data = encode([record("p", "ab"), record("q", "c"), record("p", "ad", label=False)])
    trees = data.trees([0, 1, 2], 512)
    assert [[s.record for s in tree.sequences] for tree in trees] == [[0, 2], [1]]
    assert trees[0].tokens < len(data.sequence(0).tokens) + len(data.sequence(2).tokens) - 2
    assert [len(tree.sequences) for tree in data.trees([0, 2], 3)] == [1, 1]
    assert [len(tree.sequences) for tree in data.mismatched_trees([0, 2, 2], 512)] == [3]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([record("p", "a"), record("p", "b")], "data.jsonl:1: all records are on one prompt"),
        ([record("p", "a" * 60), record("q", "b" * 60)], "data.jsonl:1: 62 tokens, more than the 40 allowed"),
        (
            [record("p", "a" * 30), record("q", "b" * 20)],
            "data.jsonl:1: beside any response to another prompt, over 40",
        ),
    ],
)
def test_what_cannot_be_compared_is_named_in_one_line(encode, records, message):
    with pytest.raises(SaroError) as caught:
        encode(records, pack_tokens=40)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_if_all_are_too_long_the_error_says_so(encode):
    with pytest.raises(SaroError, match="all 2 records are longer than 5 tokens"):
        encode([record("p", "a" * 30), record("q", "b" * 20)], pack_tokens=5, too_long="drop")


def test_the_check_sees_the_records_that_are_kept_and_the_file_is_read_once(encode, monkeypatch):
    seen, reads = [], []
    read = unpaired_set.read_unpaired_files
    monkeypatch.setattr(
        unpaired_set, "read_unpaired_files", lambda paths, **options: reads.append(paths) or read(paths)
    )
    long = record("r", "c" * 400)
    encoder = partial(encode_unpaired_files, check=lambda data, chat, records: seen.append((data.ids, records)))
    data = encode([record("p", "a"), long, record("q", "b")], encoder, pack_tokens=200, too_long="drop")
    ((ids, records),) = seen
    assert ids == data.ids == tuple(record.id for record in records) == ("data:1", "data:3")
    assert len(reads) == 1
