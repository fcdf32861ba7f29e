"""Tests that a pack says which tokens are read, what is predicted from where, and for which sequence."""

from itertools import chain, pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saro.data.packs import (
    CHOSEN,
    REJECTED,
    Pack,
    PairLogps,
    Share,
    balance,
    best_fit_decreasing,
    lay_out,
    pack_trees,
    plan_step,
    record_cost,
)
from saro.data.tree import RowKind, ScoredSequence, build_tree


def scored(tokens, scored_from=1, record=0, think=0) -> ScoredSequence:
    kinds = np.full(len(tokens) - scored_from, RowKind.ANSWER, np.uint8)
    kinds[:think] = RowKind.THINK
    kinds[-1] = RowKind.STOP
    return ScoredSequence(np.array(tokens, np.int32), scored_from, kinds, record)


@st.composite
def families(draw) -> list[ScoredSequence]:
    """Draw 1 to 5 sequences. Most begin like an earlier one, so some are equal and some are a prefix of another."""
    made: list[list[int]] = []
    for _ in range(draw(st.integers(1, 5))):
        base = draw(st.sampled_from(made)) if made else []
        cut = draw(st.integers(0, len(base)))
        made.append(base[:cut] + draw(st.lists(st.integers(0, 3), min_size=max(0, 2 - cut), max_size=5)))
    sequences = []
    for tokens in made:
        scored_from = draw(st.integers(1, len(tokens) - 1))
        think = draw(st.integers(0, len(tokens) - scored_from))
        sequences.append(scored(tokens, scored_from, draw(st.integers(0, 99)), think))
    return sequences


# None to three trees
forests = st.lists(families(), max_size=3)
sizes = st.lists(st.integers(1, 40), max_size=30)


def segment_of(pack: Pack, position: int) -> int:
    (segment,) = [i for i, (start, stop, _) in enumerate(pack.segments) if start <= position < stop]
    return segment


def seen_from(pack: Pack, position: int) -> list[int]:
    """Return the positions that ``position`` may attend to: all of its ancestors, and its own segment causally."""
    segment = segment_of(pack, position)
    seen = list(range(pack.segments[segment][0], position + 1))
    while (segment := pack.segments[segment][2]) >= 0:
        start, stop, _ = pack.segments[segment]
        seen = list(range(start, stop)) + seen
    return seen


def rows_of(pack: Pack, sequence: int) -> list[int]:
    return pack.entry_row[pack.entry_sequence == sequence].tolist()


def flat(forest) -> list[ScoredSequence]:
    return [sequence for family in forest for sequence in family]


# Contents of a pack


@given(forests)
def test_each_row_predicts_the_next_token_of_its_sequence_from_all_tokens_before_it(forest):
    pack = lay_out([build_tree(family) for family in forest])
    for index, sequence in enumerate(flat(forest)):
        for row in rows_of(pack, index):
            seen = seen_from(pack, int(pack.row_hidden[row]))
            assert pack.input_ids[seen].tolist() == sequence.tokens[: len(seen)].tolist()
            assert pack.row_target[row] == sequence.tokens[len(seen)]


@given(forests)
def test_the_entries_of_a_sequence_are_its_scored_tokens_in_order(forest):
    pack = lay_out([build_tree(family) for family in forest])
    for index, sequence in enumerate(flat(forest)):
        rows = rows_of(pack, index)
        assert pack.row_target[rows].tolist() == sequence.tokens[sequence.scored_from :].tolist()
        before = range(sequence.scored_from - 1, len(sequence.tokens) - 1)
        assert pack.position_ids[pack.row_hidden[rows]].tolist() == list(before)


@given(forests)
def test_positions_count_the_tokens_that_a_token_sees(forest):
    pack = lay_out([build_tree(family) for family in forest])
    for position in range(pack.tokens):
        seen = seen_from(pack, position)
        assert pack.position_ids[seen].tolist() == list(range(len(seen)))


@given(forests.filter(len))
def test_a_prefix_is_stored_once_in_each_tree(forest):
    pack = lay_out([build_tree(family) for family in forest])
    distinct = [{tuple(s.tokens[:n].tolist()) for s in family for n in range(1, len(s.tokens))} for family in forest]
    assert pack.tokens == sum(map(len, distinct))
    # No two positions of a tree in the pack stand for the same prefix.
    roots = [i for i, (_, _, parent) in enumerate(pack.segments) if parent < 0]
    assert len(roots) >= len(forest)
    stored = [tuple(pack.input_ids[seen_from(pack, p)].tolist()) for p in range(pack.tokens)]
    assert sorted(stored) == sorted(prefix for prefixes in distinct for prefix in prefixes)


@given(forests)
def test_a_scored_token_that_sequences_share_is_one_row(forest):
    pack = lay_out([build_tree(family) for family in forest])
    distinct = [
        {tuple(s.tokens[: n + 1].tolist()) for s in family for n in range(s.scored_from, len(s.tokens))}
        for family in forest
    ]
    assert pack.rows == sum(map(len, distinct))
    assert set(pack.entry_row.tolist()) == set(range(pack.rows)), "a row that belongs to no sequence"


@given(forests)
def test_a_row_has_the_kind_that_one_of_its_sequences_gives_it(forest):
    pack = lay_out([build_tree(family) for family in forest])
    kinds = [set() for _ in range(pack.rows)]
    for index, sequence in enumerate(flat(forest)):
        for row, kind in zip(rows_of(pack, index), sequence.row_kinds.tolist(), strict=True):
            kinds[row].add(kind)
    assert all(kind in of_row for kind, of_row in zip(pack.row_kind.tolist(), kinds, strict=True))


@given(forests)
def test_segments_are_contiguous_and_parents_come_first(forest):
    pack = lay_out([build_tree(family) for family in forest])
    assert pack.segments[0][0] == 0
    assert pack.segments[-1][1] == pack.tokens
    assert all(one[1] == two[0] for one, two in pairwise(pack.segments))
    assert all(start <= stop and parent < i for i, (start, stop, parent) in enumerate(pack.segments))


@given(forests)
def test_records_are_in_the_order_of_the_sequences(forest):
    pack = lay_out([build_tree(family) for family in forest])
    assert pack.records == tuple(s.record for s in flat(forest))


@given(forests.filter(len))
def test_trees_side_by_side_are_laid_out_like_each_by_itself(forest):
    trees = [build_tree(family) for family in forest]
    together, alone = lay_out(trees), [lay_out([tree]) for tree in trees]
    for name in ("input_ids", "position_ids"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(pack, name) for pack in alone])), name
    assert together.rows == sum(pack.rows for pack in alone)
    # Rows are compared by the entries that they have: which of them come last depends on the other trees of the pack.
    for name in ("row_target", "row_kind"):
        entries = [getattr(pack, name)[pack.entry_row] for pack in alone]
        assert torch.equal(getattr(together, name)[together.entry_row], torch.cat(entries)), name
    tokens = np.cumsum([0, *(pack.tokens for pack in alone)])
    hidden = [pack.row_hidden[pack.entry_row] + int(n) for pack, n in zip(alone, tokens, strict=False)]
    assert torch.equal(together.row_hidden[together.entry_row], torch.cat(hidden))


def test_a_pack_of_a_pair_by_hand():
    pair = [scored([1, 2, 3, 4, 9], 2, 7, think=2), scored([1, 2, 3, 9], 2, 8, think=1)]
    pack = lay_out([build_tree(pair)])
    assert pack.input_ids.tolist() == [1, 2, 3, 4]
    assert pack.position_ids.tolist() == [0, 1, 2, 3]
    # The second response has one token after the shared ones, which is not read: a segment without tokens.
    assert pack.segments == ((0, 3, -1), (3, 4, 0), (4, 4, 0))
    assert pack.row_target.tolist() == [3, 4, 9, 9]
    assert pack.row_hidden.tolist() == [1, 2, 3, 2]
    assert pack.row_kind.tolist() == [RowKind.THINK, RowKind.THINK, RowKind.STOP, RowKind.STOP]
    assert rows_of(pack, 0) == [0, 1, 2]
    assert rows_of(pack, 1) == [0, 3]
    assert pack.records == (7, 8)


def test_the_same_prompt_in_two_trees_is_not_shared():
    tree = build_tree([scored([1, 2, 3])])
    assert lay_out([tree, tree]).input_ids.tolist() == [1, 2, 1, 2]


def test_a_pack_without_trees_reads_one_token_and_scores_nothing():
    pack = lay_out([])
    assert (pack.tokens, pack.rows, pack.records) == (1, 0, ())
    assert pack.segments == ((0, 1, -1),)
    assert pack.position_ids.tolist() == [0]
    for name in ("row_hidden", "row_target", "row_kind", "entry_row", "entry_sequence"):
        assert len(getattr(pack, name)) == 0, name


TENSORS = ("input_ids", "position_ids", "row_hidden", "row_target", "row_kind", "entry_row", "entry_sequence")


@pytest.mark.parametrize("trees", [[], [build_tree([scored([1, 2, 3])])]], ids=["empty", "one tree"])
def test_all_tensors_are_int64(trees):
    pack = lay_out(trees)
    assert {getattr(pack, name).dtype for name in TENSORS} == {torch.int64}


@pytest.mark.parametrize("device", ["meta", torch.device("meta")], ids=["name", "device"])
def test_to_moves_every_tensor_and_leaves_the_pack_itself(device):
    pack = lay_out([build_tree([scored([1, 2, 3], record=4)])])
    moved = pack.to(device)
    assert {getattr(moved, name).device.type for name in TENSORS} == {"meta"}
    assert {getattr(pack, name).device.type for name in TENSORS} == {"cpu"}
    assert (moved.segments, moved.records, moved.tokens, moved.rows) == (pack.segments, (4,), 2, 2)


def test_to_keeps_the_values():
    pack = lay_out([build_tree([scored([1, 2, 3]), scored([1, 4])])])
    moved = pack.to("cpu")
    assert all(torch.equal(getattr(moved, name), getattr(pack, name)) for name in TENSORS)


# Best-fit decreasing


@given(sizes)
def test_bins_hold_every_item_once_and_never_more_than_the_budget(tokens):
    bins = best_fit_decreasing(tokens, 40)
    assert sorted(i for items in bins for i in items) == list(range(len(tokens)))
    assert all(0 < sum(tokens[i] for i in items) <= 40 for items in bins)


@given(sizes)
def test_no_two_bins_fit_into_one(tokens):
    loads = sorted(sum(tokens[i] for i in items) for items in best_fit_decreasing(tokens, 40))
    assert len(loads) < 2 or loads[0] + loads[1] > 40


@given(st.lists(st.lists(st.integers(1, 9), min_size=1), max_size=6))
def test_bins_are_at_most_eleven_ninths_of_the_fewest(parts):
    # Each list fills one bin, so the minimum is known. 11/9 OPT + 6/9 is Dosa's bound (2007).
    full = [[*items, 100 - sum(items)] for items in parts if sum(items) < 100]
    tokens = [size for items in full for size in items]
    assert len(best_fit_decreasing(tokens, 100)) <= 11 / 9 * len(full) + 6 / 9


def test_the_input_order_does_not_waste_a_bin():
    # In input order, 4 and 4 would share a bin and three bins would be needed.
    bins = best_fit_decreasing([4, 4, 6, 6], 10)
    assert [sorted(tokens) for tokens in bins] == [[0, 2], [1, 3]]


def test_an_item_goes_where_it_leaves_the_least_room():
    # 7 and 6 open bins; 3 fits into both and fills the first.
    assert best_fit_decreasing([6, 7, 3], 10) == [[1, 2], [0]]


def test_an_item_as_large_as_the_budget_gets_a_bin_of_its_own():
    assert best_fit_decreasing([10, 10], 10) == [[0], [1]]


def test_no_items_need_no_bin():
    assert best_fit_decreasing([], 10) == []


@given(sizes, st.integers(41, 99), st.integers(0, 30))
def test_an_item_over_the_budget_is_an_error(tokens, over, at):
    with pytest.raises(ValueError, match=rf"{over} tokens does not fit the budget of 40"):
        best_fit_decreasing([*tokens[:at], over, *tokens[at:]], 40)


# Balance over ranks


@given(sizes, st.integers(1, 5))
def test_every_item_goes_to_one_rank(tokens, ranks):
    dealt = balance(tokens, ranks)
    assert len(dealt) == ranks
    assert sorted(i for items in dealt for i in items) == list(range(len(tokens)))


@given(sizes.filter(len), st.integers(1, 5))
def test_no_rank_exceeds_its_share_by_more_than_part_of_one_item(tokens, ranks):
    # Graham 1966: the last item of the fullest rank was dealt when that rank had the least.
    most = max(sum(tokens[i] for i in items) for items in balance(tokens, ranks))
    assert most * ranks <= sum(tokens) + (ranks - 1) * max(tokens)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 3))
def test_the_fullest_rank_is_within_a_third_of_the_best(tokens, ranks):
    # Graham 1969, checked against all assignments: largest first is at most 4/3 - 1/(3 ranks) of the best.
    def fullest(dealt):
        return max(sum(t for t, to in zip(tokens, dealt, strict=True) if to == rank) for rank in range(ranks))

    best = min(fullest(dealt) for dealt in product(range(ranks), repeat=len(tokens)))
    most = max(sum(tokens[i] for i in items) for items in balance(tokens, ranks))
    assert 3 * ranks * most <= (4 * ranks - 1) * best


def test_equal_items_are_spread_evenly():
    assert sorted(map(len, balance([5] * 8, 4))) == [2, 2, 2, 2]


# A step's plan


@given(sizes, st.integers(1, 5))
def test_a_plan_has_every_item_once_within_the_budget(tokens, ranks):
    plan = plan_step(tokens, 40, ranks)
    assert sorted(i for packs in plan for pack in packs for i in pack) == list(range(len(tokens)))
    assert all(sum(tokens[i] for i in pack) <= 40 for packs in plan for pack in packs)


@given(sizes, st.integers(1, 5))
def test_every_rank_has_a_pack_and_an_empty_one_only_without_work(tokens, ranks):
    plan = plan_step(tokens, 40, ranks)
    assert len(plan) == ranks
    assert all(packs == [[]] or (packs and all(packs)) for packs in plan)
    assert sum(packs == [[]] for packs in plan) == max(0, ranks - len(tokens))


def loads_of(tokens, packs) -> list[float]:
    return [sum(record_cost(tokens[i]) for i in pack) for pack in packs]


@given(sizes, st.integers(1, 5), st.booleans())
def test_each_rank_packs_the_items_that_balance_gives_it(tokens, ranks, is_even):
    """Work is balanced, or tokens if ranks wait for each other in each pack."""
    plan = plan_step(tokens, 40, ranks, is_even)
    dealt = balance(tokens if is_even else [record_cost(size) for size in tokens], ranks)
    assert [sorted(i for pack in packs for i in pack) for packs in plan] == [sorted(items) for items in dealt]


@given(sizes, st.integers(1, 5), st.booleans())
def test_a_rank_runs_the_packs_with_most_work_first(tokens, ranks, is_even):
    for packs in plan_step(tokens, 40, ranks, is_even):
        assert loads_of(tokens, packs) == sorted(loads_of(tokens, packs), reverse=True)


@given(sizes, st.integers(1, 5), st.booleans(), st.randoms(use_true_random=False))
def test_the_order_of_the_records_does_not_change_the_sizes_of_the_packs(tokens, ranks, is_even, random):
    shuffled = random.sample(tokens, len(tokens))
    of_each = [
        [sorted(these[i] for i in pack) for packs in plan_step(these, 40, ranks, is_even) for pack in packs]
        for these in (tokens, shuffled)
    ]
    assert of_each[0] == of_each[1]


def test_long_records_count_with_their_attention():
    """One of 16,384 tokens is as much work as 21 short ones of 1,024, not as 16."""
    tokens = [16384] + [1024] * 21
    alone, others = plan_step(tokens, 32768, 2)
    assert alone == [[0]]
    assert len(others[0]) == 21
    shared, _ = plan_step(tokens, 32768, 2, is_even=True)
    assert len(shared[0]) > 1


def test_one_item_for_three_ranks_leaves_two_with_an_empty_pack():
    assert plan_step([7], 10, 3) == [[[0]], [[]], [[]]]


def test_a_plan_of_nothing_is_an_empty_pack():
    assert plan_step([], 10) == [[[]]]


def test_a_plan_refuses_an_item_that_no_pack_can_hold():
    with pytest.raises(ValueError, match="11 tokens does not fit the budget of 10"):
        plan_step([3, 11], 10, 2)


# Pairs


def pair_tree(record, shared, chosen, rejected):
    sequences = [scored([*shared, *tail], len(shared), record) for tail in (chosen, rejected)]
    return build_tree(sequences)


def test_a_pack_of_pairs_names_each_pair():
    pack = lay_out([pair_tree(7, [1, 2], [3, 4, 5], [6]), pair_tree(2, [1], [3], [4, 5])])
    assert pack.records == (7, 7, 2, 2)
    assert pack.pairs == (7, 2)


def test_an_empty_pack_has_no_pairs():
    assert lay_out([]).pairs == ()


def test_log_probs_of_pairs_are_found_by_pair_and_side_and_in_the_order_of_a_pack():
    # Three pairs with 1, 2; 3, 1; and 2, 2 scored tokens on their sides.
    logps = PairLogps(np.arange(11.0), np.cumsum([0, 1, 2, 3, 1, 2, 2]))
    assert logps.side_logps(1, CHOSEN).tolist() == [3, 4, 5]
    assert logps.side_logps(1, REJECTED).tolist() == [6]
    assert logps.side_sums(REJECTED).tolist() == [1 + 2, 6, 9 + 10]
    pack = lay_out([pair_tree(2, [1], [2, 3], [4, 5]), pair_tree(0, [1], [2], [3, 4])])
    assert logps.pack_logps(pack).tolist() == [7, 8, 9, 10, 0, 1, 2]
    assert logps.pack_logps(lay_out([])).tolist() == []


# The packs of a rank


@given(forests, st.integers(1, 3))
def test_the_ranks_share_all_trees_and_each_gets_a_pack(forest, ranks):
    trees = [build_tree(family) for family in forest]
    budget = max([1, *(tree.tokens for tree in trees)])
    packs = [list(pack_trees(trees, budget, Share(rank, ranks))) for rank in range(ranks)]
    assert all(packs)
    every_pack = list(chain(*packs))
    records = [record for pack in every_pack for record in pack.records]
    assert sorted(records) == sorted(s.record for tree in trees for s in tree.sequences)
    assert all(pack.tokens <= budget for pack in every_pack)


# Rows that cancel in a margin.


@st.composite
def pair_forests(draw):
    """Draw 0 to 3 trees of 1 to 3 pairs on one prompt of two tokens, of which all are scored from the same token on."""
    forest, record = [], 0
    for _ in range(draw(st.integers(0, 3))):
        family = []
        for _ in range(draw(st.integers(1, 3))):
            sides = [[7, 7, *draw(st.lists(st.integers(0, 1), min_size=1, max_size=5))] for _ in range(2)]
            family += [scored(side, 2, record) for side in sides]
            record += 1
        forest.append(family)
    return forest


@given(pair_forests())
def test_the_first_rows_are_those_that_a_margin_depends_on(forest):
    pack = lay_out([build_tree(family) for family in forest])
    for row in range(pack.rows):
        sequences = pack.entry_sequence[pack.entry_row == row].tolist()
        sides = [{s % 2 for s in sequences if s // 2 == pair} for pair in {s // 2 for s in sequences}]
        assert (row < pack.margin_rows) == any(len(of_pair) == 1 for of_pair in sides)


def test_rows_shared_by_both_sides_come_last():
    pack = lay_out([build_tree([scored([1, 2, 3, 4], 1), scored([1, 2, 5, 6], 1)])])
    # 2 is shared; chosen is 3 4, rejected 5 6
    assert pack.margin_rows == 4
    assert pack.row_target.tolist() == [3, 4, 5, 6, 2]
    assert pack.row_hidden.tolist() == [1, 2, 1, 3, 0]
    assert pack.entry_row.tolist() == [4, 0, 1, 4, 2, 3]


def test_every_row_of_examples_counts_although_they_share_a_beginning():
    pack = lay_out([build_tree([scored([1, 2, 3], 1, record=0), scored([1, 2, 4], 1, record=1)])])
    assert pack.margin_rows == pack.rows == 3
    assert pack.row_target.tolist() == [2, 3, 4]


def test_a_row_that_another_pair_needs_has_a_gradient():
    """2 is shared by both sides of pair 0, but it is only in the chosen side of pair 1."""
    pair_0 = [scored([1, 2, 3], 1, record=0), scored([1, 2, 4], 1, record=0)]
    pair_1 = [scored([1, 2, 5], 1, record=1), scored([1, 6, 5], 1, record=1)]
    pack = lay_out([build_tree(pair_0 + pair_1)])
    assert pack.margin_rows == pack.rows
