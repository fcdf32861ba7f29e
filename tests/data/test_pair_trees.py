"""Tests that pairs on one prompt share a tree, up to the budget, and that shared tokens are scored once."""

from __future__ import annotations

from datetime import date

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import IM_END, tiny_tokenizer

from saro.config import DataConfig
from saro.data.chat_format import ChatFormat
from saro.data.dataset import PairSet
from saro.data.encode_files import encode_pair_files
from saro.data.tree import build_tree

CHAT = ChatFormat(tiny_tokenizer(), frozenset([IM_END]), date(2024, 7, 26))


def pair(prompt: str, shared: list[str], chosen: str, rejected: str) -> dict:
    sides = ({"reasoning": [*shared, text], "answer": text} for text in (chosen, rejected))
    return {"prompt": prompt} | dict(zip(("chosen", "rejected"), sides, strict=True))


@pytest.fixture
def encoded(records_file):
    def encode(records: list[dict], max_tokens: int = 10_000) -> PairSet:
        return encode_pair_files([records_file(records)], CHAT, DataConfig(pack_tokens=max_tokens))

    return encode


def members(trees) -> list[list[int]]:
    return [[s.record for s in tree.sequences[0::2]] for tree in trees]


RECORDS = [
    pair("One", ["step"], "yes", "no"),
    pair("Two", ["step"], "yes", "no"),
    pair("One", ["step", "more"], "good", "bad"),
    pair("One", [], "far", "near"),
]


def test_pairs_on_one_prompt_have_one_number(encoded):
    assert encoded(RECORDS).prompts.tolist() == [0, 1, 0, 0]


def test_pairs_on_one_prompt_share_a_tree_and_others_do_not(encoded):
    data = encoded(RECORDS)
    trees = data.trees([3, 1, 0, 2], 10_000)
    assert members(trees) == [[3, 0, 2], [1]]
    alone = sum(build_tree(data.sequences(i)).tokens for i in (0, 2, 3))
    assert trees[0].tokens < alone - 2 * len(CHAT.prompt_ids("")) - 20
    for tree in trees:
        sides = [
            data.sequences(r)[side].tokens.tolist() for r in (s.record for s in tree.sequences[0::2]) for side in (0, 1)
        ]
        assert [s.tokens.tolist() for s in tree.sequences] == sides


def test_a_tree_over_the_budget_is_split_between_pairs(encoded):
    data = encoded(RECORDS)
    three = data.trees([0, 2, 3], 10_000)[0].tokens
    trees = data.trees([0, 2, 3], three - 1)
    assert members(trees) == [[0, 2], [3]]
    assert all(tree.tokens < three for tree in trees)
    assert members(data.trees([0, 2, 3], int(data.lengths.max()))) == [[0], [2], [3]]


def test_the_length_of_a_pair_is_the_size_of_its_tree(encoded):
    data = encoded(RECORDS)
    for i in range(len(data)):
        nodes = build_tree(data.sequences(i)).nodes
        assert data.lengths[i] == sum(len(node.tokens) for node in nodes)
        assert data.shared_tokens[i] == len(nodes[0].tokens)


def test_a_pair_fits_if_its_tree_fits(encoded):
    longest = int(encoded(RECORDS).lengths.max())
    assert len(encoded(RECORDS, longest)) == len(RECORDS)
    with pytest.raises(Exception, match=f"{longest} tokens, more than the {longest - 1} allowed"):
        encoded(RECORDS, longest - 1)


def test_divergent_pairs_are_scored_from_the_token_where_their_sides_diverge(encoded):
    data = encoded(RECORDS)
    parted = data.divergent()
    assert np.array_equal(parted.lengths, data.lengths)
    assert np.array_equal(parted.prompts, data.prompts)
    for i in range(len(data)):
        for whole, side in zip(data.sequences(i), parted.sequences(i), strict=True):
            assert side.scored_from == data.shared_tokens[i]
            assert side.tokens.tolist() == whole.tokens.tolist()
            assert side.row_kinds.tolist() == whole.row_kinds[side.scored_from - whole.scored_from :].tolist()


words = st.lists(st.sampled_from(["a", "b"]), max_size=4)
drawn = st.lists(st.tuples(st.sampled_from(["x", "y"]), words, words, words), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn, st.integers(0, 60), st.randoms(use_true_random=False))
def test_every_pair_is_in_one_tree_within_the_budget(encoded, drawn, room, random):
    records = [pair(p, s, "c" + "".join(c), "d" + "".join(r)) for p, s, c, r in drawn]
    data = encoded(records)
    budget = int(data.lengths.max()) + room
    order = list(range(len(data)))
    random.shuffle(order)
    trees = data.trees(order, budget)
    assert sorted(r for tree in members(trees) for r in tree) == sorted(order)
    assert all(tree.tokens <= budget for tree in trees)
    assert all(len({int(data.prompts[r]) for r in tree}) == 1 for tree in members(trees))
