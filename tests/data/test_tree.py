"""Tests that sequences become a trie in which every shared token prefix is stored once."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saro.data.tree import RowKind, ScoredSequence, build_tree


def scored(tokens, scored_from=1, record=0) -> ScoredSequence:
    kinds = np.full(len(tokens) - scored_from, RowKind.ANSWER, np.uint8)
    kinds[-1:] = RowKind.STOP
    return ScoredSequence(np.array(tokens, np.int32), scored_from, kinds, record)


@st.composite
def families(draw) -> list[ScoredSequence]:
    """Draw 1 to 5 sequences. Most begin like an earlier one, so some are equal and some are a prefix of another."""
    made: list[list[int]] = []
    for _ in range(draw(st.integers(1, 5))):
        base = draw(st.sampled_from(made)) if made else []
        cut = draw(st.integers(0, len(base)))
        made.append(base[:cut] + draw(st.lists(st.integers(0, 3), min_size=max(0, 2 - cut), max_size=5)))
    return [scored(tokens, draw(st.integers(1, len(tokens) - 1)), i) for i, tokens in enumerate(made)]


def prefixes(sequence: ScoredSequence, longest: int | None = None) -> set[tuple[int, ...]]:
    """Return all prefixes of a sequence, up to ``longest`` tokens."""
    tokens = tuple(sequence.tokens.tolist())
    return {tokens[:n] for n in range(1, (longest or len(tokens)) + 1)}


def node_tokens(tree, path) -> list[list[int]]:
    return [tree.nodes[i].tokens.tolist() for i in path]


# Properties of every tree


@given(families())
def test_the_nodes_of_a_path_spell_its_sequence(family):
    tree = build_tree(family)
    assert [list(chain(*node_tokens(tree, path))) for path in tree.paths] == [s.tokens.tolist() for s in family]


@given(families())
def test_every_prefix_is_stored_once(family):
    stored = sum(len(node.tokens) for node in build_tree(family).nodes)
    assert stored == len(set().union(*(prefixes(s) for s in family)))


@given(families())
def test_the_model_reads_every_prefix_that_predicts_something_once(family):
    read = set().union(*(prefixes(s, len(s.tokens) - 1) for s in family))
    assert build_tree(family).tokens == len(read)


@given(families())
def test_a_node_starts_where_its_parent_stops_and_parents_come_first(family):
    tree = build_tree(family)
    for index, node in enumerate(tree.nodes):
        assert node.parent < index
        parent = tree.nodes[node.parent] if node.parent >= 0 else None
        assert node.start == (parent.start + len(parent.tokens) if parent else 0)


@given(families())
def test_a_path_leads_from_a_root_from_parent_to_child(family):
    tree = build_tree(family)
    for path in tree.paths:
        assert [tree.nodes[i].parent for i in path] == [-1, *path[:-1]]


@given(families())
def test_nodes_are_as_long_as_possible(family):
    tree = build_tree(family)
    ends = {path[-1] for path in tree.paths}
    for index in range(len(tree.nodes)):
        children = [node for node in tree.nodes if node.parent == index]
        assert len(children) != 1 or index in ends, "a node with one child, where no sequence ends, should be one run"
        assert len({int(child.tokens[0]) for child in children}) == len(children), "siblings share a token"


@given(families())
def test_the_model_reads_all_tokens_but_the_last_of_each_leaf(family):
    tree = build_tree(family)
    parents = {node.parent for node in tree.nodes}
    for index, node in enumerate(tree.nodes):
        assert node.fed_tokens == len(node.tokens) - (index not in parents)


@given(families())
def test_a_tree_keeps_its_sequences_in_the_callers_order(family):
    tree = build_tree(family)
    assert len(tree.sequences) == len(family)
    assert all(kept is given for kept, given in zip(tree.sequences, family, strict=True))


@given(families(), st.randoms(use_true_random=False))
def test_the_order_of_the_sequences_changes_no_path(family, random):
    tree = build_tree(family)
    order = random.sample(range(len(family)), len(family))
    shuffled = build_tree([family[i] for i in order])
    assert [node_tokens(shuffled, path) for path in shuffled.paths] == [node_tokens(tree, tree.paths[i]) for i in order]


# Cases by hand


def test_one_sequence_is_one_node_whose_last_token_is_not_read():
    tree = build_tree([scored([5, 6, 7])])
    assert len(tree.nodes) == 1
    assert tree.nodes[0].tokens.tolist() == [5, 6, 7]
    assert (tree.nodes[0].parent, tree.nodes[0].start, tree.nodes[0].fed_tokens) == (-1, 0, 2)
    assert tree.tokens == 2


def test_a_pair_shares_its_longest_common_prefix():
    tree = build_tree([scored([1, 2, 3, 4, 9]), scored([1, 2, 3, 5, 6, 9])])
    assert node_tokens(tree, range(3)) == [[1, 2, 3], [4, 9], [5, 6, 9]]
    assert [node.parent for node in tree.nodes] == [-1, 0, 0]
    assert [node.fed_tokens for node in tree.nodes] == [3, 1, 2]
    assert tree.paths == ((0, 1), (0, 2))


def test_a_child_of_one_token_is_predicted_but_not_read():
    tree = build_tree([scored([1, 2, 3]), scored([1, 2, 4])])
    assert [node.fed_tokens for node in tree.nodes] == [2, 0, 0]


def test_equal_sequences_are_one_path():
    tree = build_tree([scored([1, 2, 3]), scored([1, 2, 3])])
    assert tree.paths == ((0,), (0,))
    assert tree.tokens == 2


def test_a_sequence_that_another_continues_ends_inside_the_tree():
    tree = build_tree([scored([1, 2]), scored([1, 2, 3, 4])])
    assert tree.paths == ((0,), (0, 1))
    assert [node.fed_tokens for node in tree.nodes] == [2, 1]


def test_sequences_with_nothing_in_common_are_two_roots():
    tree = build_tree([scored([1, 2]), scored([2, 2])])
    assert [node.parent for node in tree.nodes] == [-1, -1]


def test_three_levels_of_sharing():
    # Two pairs on one prompt: all share the prompt, and the two sides of a pair share its reasoning.
    tree = build_tree([scored(t) for t in ([1, 1, 2, 2, 3], [1, 1, 2, 2, 4], [1, 1, 5, 5, 3], [1, 1, 5, 5, 4])])
    assert tree.paths == ((0, 1, 2), (0, 1, 3), (0, 4, 5), (0, 4, 6))
    assert tree.tokens == 6


def test_no_sequence_is_an_empty_tree():
    tree = build_tree([])
    assert (tree.nodes, tree.paths, tree.tokens) == ((), (), 0)


# Faulty sequences


@pytest.mark.parametrize("scored_from", [-1, 0, 3, 4])
def test_a_sequence_must_have_a_prompt_and_something_scored(scored_from):
    with pytest.raises(ValueError, match=rf"scored_from is {scored_from}, must lie in 1\.\.2"):
        ScoredSequence(np.array([1, 2, 3], np.int32), scored_from, np.zeros(max(0, 3 - scored_from), np.uint8), 0)


@pytest.mark.parametrize("kinds", [0, 1, 3])
def test_a_sequence_must_have_a_kind_for_each_scored_token(kinds):
    with pytest.raises(ValueError, match="one entry for each scored token"):
        ScoredSequence(np.array([1, 2, 3], np.int32), 1, np.zeros(kinds, np.uint8), 0)
