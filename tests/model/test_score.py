"""Packs scored without gradient: by the policy, and by a model's own forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saro.data.packs import lay_out
from saro.data.records import CHOSEN, REJECTED
from saro.data.tree import build_tree
from saro.model.score import score_natively, score_packs, score_pairs, score_trees, split_pairs
from saro.model.unmodified import unmodified

pytestmark = pytest.mark.usefixtures("cache", "one_thread")


def test_an_empty_pack_scores_nothing(world):
    _, policy, _ = world()
    ((pack, entries),) = score_packs(policy, [lay_out([])])
    assert list(split_pairs(pack, entries)) == []


def test_the_sides_of_a_pack_are_split_by_their_number(world):
    _, policy, data = world()
    pack = lay_out(data.trees([3, 2], 512))
    ((_, entries),) = score_packs(policy, [pack])
    parts = dict(split_pairs(pack, entries))
    assert sorted(parts) == [4, 5, 6, 7]
    for pair in (2, 3):
        for side, sequence in zip((CHOSEN, REJECTED), data.sequences(pair), strict=True):
            ((_, single),) = score_packs(policy, [lay_out([build_tree([sequence])])])
            np.testing.assert_allclose(parts[2 * pair + side], single, atol=1e-5)


def test_scoring_in_packs_and_natively_gives_the_same_tokens_in_the_same_order(world):
    _, policy, data = world()
    pairs = score_pairs(policy, data, data.trees(range(len(data)), 256), 256)
    number, trees = 0, []
    for pair in range(4):
        sequences = []
        for sequence in data.sequences(pair):
            sequences.append(type(sequence)(sequence.tokens, sequence.scored_from, sequence.row_kinds, number))
            number += 1
        trees.append(build_tree(sequences))
    packed = score_trees(policy, trees, 256)
    with unmodified(policy):
        native = score_natively(policy.causal_lm, trees)
    torch.testing.assert_close(packed, native, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed, torch.from_numpy(pairs.logps[: len(packed)]).double(), rtol=0, atol=1e-5)


def test_dropout_is_off_and_the_mode_is_kept(world):
    _, policy, data = world(lora_dropout=0.5)
    packs = [lay_out(data.trees([0], 512))]
    ((_, first),), ((_, second),) = score_packs(policy.train(), packs), score_packs(policy, packs)
    np.testing.assert_array_equal(first, second)
    assert policy.training
