"""Records that repeat others are found by their tokens, whatever their format."""

from __future__ import annotations

from datetime import date

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sets import a_side
from tiny import IM_END, tiny_tokenizer

from saro.config import DataConfig
from saro.data.chat_format import ChatFormat
from saro.data.dataset import ExampleSet, PairSet
from saro.data.encode_files import encode_files, encode_pair_files
from saro.data.repeats import count_duplicates, find_overlap

CHAT = ChatFormat(tiny_tokenizer(), frozenset({IM_END}), date(1999, 7, 4))
OPTIONS = DataConfig(pack_tokens=512)

# One record in three formats.
NATIVE = {"prompt": "Why?", "reasoning": ["Because."], "answer": "So."}
REPLY = {"role": "assistant", "content": "<think>\nBecause.\n</think>\n\nSo."}
CONVERSATION = {"prompt": [{"role": "user", "content": "Why?"}], "completion": [REPLY]}
MESSAGES = {"messages": [{"role": "user", "content": "Why?"}, REPLY]}

PAIR = {"prompt": "Why?", "chosen": {"answer": "So."}, "rejected": {"answer": "No."}}


@pytest.fixture
def encode(records_file):
    """Return a function that encodes records, pairs if they have two sides."""

    def make(*records: dict, name: str = "records.jsonl") -> ExampleSet | PairSet:
        read = encode_pair_files if "chosen" in records[0] else encode_files
        return read([records_file(list(records), name)], CHAT, OPTIONS)

    return make


def test_records_that_differ_are_not_duplicates(encode):
    assert count_duplicates(encode(NATIVE, NATIVE | {"answer": "So"}, NATIVE | {"prompt": "Why"})) == 0


def test_every_repetition_of_a_record_is_counted_in_any_format(encode):
    assert count_duplicates(encode(NATIVE, CONVERSATION, NATIVE | {"prompt": "How?"}, MESSAGES)) == 2


def test_the_same_text_scored_from_elsewhere_is_not_a_duplicate(encode):
    assert count_duplicates(encode({"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "bc"})) == 0


def test_id_and_kind_do_not_make_records_different(encode):
    assert count_duplicates(encode(NATIVE | {"id": "a"}, NATIVE | {"id": "b", "kind": "safety"})) == 1


def test_a_pair_repeats_another_only_with_both_sides(encode):
    other_chosen = PAIR | {"chosen": {"answer": "Yes."}}
    other_rejected = PAIR | {"rejected": {"answer": "Never."}}
    swapped = PAIR | {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    assert count_duplicates(encode(PAIR, other_chosen, other_rejected, swapped)) == 0
    assert count_duplicates(encode(PAIR, other_chosen, PAIR, other_chosen, PAIR)) == 3


def test_a_prompt_is_found_in_the_training_records_in_any_format(encode):
    train = encode(NATIVE | {"prompt": "How?"}, CONVERSATION, NATIVE, name="train.jsonl")
    heldout = encode(MESSAGES | {"id": "x"}, NATIVE | {"prompt": "Who?"}, NATIVE | {"answer": "Another."})
    assert find_overlap(heldout, train) == [(0, 1), (2, 1)]


def test_a_prompt_that_only_begins_like_another_is_another(encode):
    longer = {"messages": [*MESSAGES["messages"], {"role": "user", "content": "Why?"}, REPLY]}
    assert find_overlap(encode(longer), encode(NATIVE, name="train.jsonl")) == []


def test_prompts_of_pairs_are_compared_like_those_of_examples(encode):
    train = encode(PAIR, PAIR | {"prompt": "How?"}, name="train.jsonl")
    heldout = encode(PAIR | {"prompt": "Who?"}, PAIR | {"prompt": "How?", "chosen": {"answer": "Other."}})
    assert find_overlap(heldout, train) == [(1, 1)]


# Few tokens and short sequences, so that many of them are alike.
sequences = st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=2, max_size=4), st.integers(1, 3)), min_size=1)


def set_of(records: list[tuple[list[int], int]]) -> ExampleSet:
    tokens = [record for record, _ in records]
    prompts = tuple(min(prompt, len(record) - 1) for record, prompt in records)
    kinds = np.zeros(len(records), np.uint8)
    return a_side(*tokens, prompts=prompts, kinds=kinds, ids=tuple(map(str, range(len(records)))))


@given(sequences, sequences)
def test_the_hashes_find_what_comparing_all_records_finds(heldout, train):
    one, two = set_of(heldout), set_of(train)

    def prompt(data, i):
        return data.tokens[data.offsets[i] :][: data.prompt_tokens[i]].tolist()

    prompts = [prompt(two, j) for j in range(len(two))]
    found = [(i, prompts.index(prompt(one, i))) for i in range(len(one)) if prompt(one, i) in prompts]
    assert find_overlap(one, two) == found
    whole = [(prompt(one, i), one.sequence(i).tokens.tolist()) for i in range(len(one))]
    assert count_duplicates(one) == sum(record in whole[:i] for i, record in enumerate(whole))
