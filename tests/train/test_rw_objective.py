"""RWObjective's sums, counts and metrics match values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saro.config import KINDS, PARTS, DataConfig, RWConfig, SRPOConfig
from saro.data.packs import lay_out
from saro.data.tree import RowKind, ScoredSequence, build_tree
from saro.errors import SaroError
from saro.train.losses import nll_sum
from saro.train.rw_objective import RWObjective
from saro_kernels import TokenStatistics

T, A, S = RowKind.THINK, RowKind.ANSWER, RowKind.STOP
METRICS = {"loss", *(f"loss/{name}" for name in (*KINDS, "think", "answer", "stop"))}


def sequence(tokens, kinds, record):
    return ScoredSequence(np.array(tokens, np.int32), len(tokens) - len(kinds), np.array(kinds, np.uint8), record)


def objective(*kinds):
    """Make the objective for records of these kinds."""
    return RWObjective(np.array([KINDS.index(kind) for kind in kinds], np.uint8))


def test_parts_of_a_response_have_the_names_of_row_kinds():
    assert tuple(kind.name.lower() for kind in RowKind) == PARTS


def means(metrics):
    return {name: (float(total), float(count)) for name, (total, count) in metrics.items()}


@pytest.fixture
def trees():
    """Two records in separate trees, one with reasoning and one without."""
    return [
        build_tree([sequence([10, 11, 12, 13, 14, 15], [T, T, A, S], 0)]),
        build_tree([sequence([20, 21, 22, 23], [A, S], 1)]),
    ]


LOGPS = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0])


def test_nll_sum_is_minus_the_sum():
    assert nll_sum(LOGPS).item() == 63.0
    assert nll_sum(torch.empty(0)).item() == 0.0


def test_the_loss_is_divided_by_the_number_of_scored_tokens_of_the_step(trees):
    assert objective("general", "safety").counts(trees) == {"rows": 6}
    assert objective("general", "safety").counts([]) == {"rows": 0}


def test_the_loss_is_the_sum_over_scored_tokens(trees):
    sums = objective("general", "safety")(LOGPS, lay_out(trees))
    assert {name: value.item() for name, value in sums.losses.items()} == {"rows": 63.0}


def test_losses_and_divisors_have_the_same_names(trees):
    rw = objective("general", "safety")
    assert rw(LOGPS, lay_out(trees)).losses.keys() == rw.counts(trees).keys()


def test_metrics_by_kind_of_record_and_by_part(trees):
    sums = objective("general", "safety")(LOGPS, lay_out(trees))
    assert means(sums.metrics) == {
        "loss": (63.0, 6.0),
        "loss/general": (15.0, 4.0),
        "loss/safety": (48.0, 2.0),
        "loss/think": (3.0, 2.0),
        "loss/answer": (20.0, 2.0),
        "loss/stop": (40.0, 2.0),
    }


def test_the_kind_belongs_to_the_record_not_to_its_place_in_the_pack(trees):
    """Pack record 1 by itself, then both records in another order."""
    rw = objective("general", "safety")
    alone = means(rw(LOGPS[4:], lay_out(trees[1:])).metrics)
    assert (alone["loss/general"], alone["loss/safety"]) == ((0.0, 0.0), (48.0, 2.0))
    turned = means(rw(LOGPS.roll(2), lay_out(trees[::-1])).metrics)
    assert (turned["loss/general"], turned["loss/safety"]) == ((15.0, 4.0), (48.0, 2.0))


def test_entropy_and_accuracy_by_kind_of_record_and_by_part(trees):
    statistics = TokenStatistics(LOGPS, -LOGPS / 2, torch.tensor([True, False, True, True, False, True]))
    rw = objective("general", "safety")
    assert means(rw.describe(statistics, lay_out(trees))) == {
        "entropy": (31.5, 6.0),
        "entropy/general": (7.5, 4.0),
        "entropy/safety": (24.0, 2.0),
        "entropy/think": (1.5, 2.0),
        "entropy/answer": (10.0, 2.0),
        "entropy/stop": (20.0, 2.0),
        "mean_token_accuracy": (4.0, 6.0),
        "mean_token_accuracy/general": (3.0, 4.0),
        "mean_token_accuracy/safety": (1.0, 2.0),
        "mean_token_accuracy/think": (1.0, 2.0),
        "mean_token_accuracy/answer": (1.0, 2.0),
        "mean_token_accuracy/stop": (2.0, 2.0),
    }


@pytest.fixture
def shared():
    """Records 0 and 1 share the scored tokens 11 and 12: four rows, six entries."""
    return [build_tree([sequence([10, 11, 12, 13], [T, T, S], 0), sequence([10, 11, 12, 14], [T, T, A], 1)])]


def test_shared_rows_count_for_both_sequences(shared):
    pack = lay_out(shared)
    assert (pack.rows, len(pack.entry_row)) == (4, 6)
    rw = objective("general", "safety")
    sums = rw(torch.tensor([-1.0, -2.0, -4.0, -8.0]), pack)
    assert sums.losses["rows"].item() == 18.0  # 1 + 2 + 4 and 1 + 2 + 8
    assert rw.counts(shared) == {"rows": 6}
    assert means(sums.metrics) == {
        "loss": (18.0, 6.0),
        "loss/general": (7.0, 3.0),
        "loss/safety": (11.0, 3.0),
        "loss/think": (6.0, 4.0),
        "loss/answer": (8.0, 1.0),
        "loss/stop": (4.0, 1.0),
    }


def test_the_gradient_of_a_shared_row_is_the_sum_over_its_sequences(shared):
    logps = torch.zeros(4, requires_grad=True)
    objective("general", "safety")(logps, lay_out(shared)).losses["rows"].backward()
    assert logps.grad.tolist() == [-2.0, -2.0, -1.0, -1.0]


def test_metrics_carry_no_graph(trees):
    logps = LOGPS.clone().requires_grad_()
    sums = objective("general", "safety")(logps, lay_out(trees))
    assert sums.losses["rows"].requires_grad
    assert not any(torch.as_tensor(t).requires_grad for pair in sums.metrics.values() for t in pair)


def test_the_empty_pack_has_all_names_and_adds_nothing(trees):
    logps = torch.zeros(0, requires_grad=True)
    sums = objective("general", "safety")(logps, lay_out([]))
    assert sums.losses["rows"].item() == 0.0
    assert sums.losses["rows"].requires_grad
    assert means(sums.metrics) == dict.fromkeys(METRICS, (0.0, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_summed_in_the_dtype_of_the_logps(trees, dtype):
    assert objective("general", "safety")(LOGPS.to(dtype), lay_out(trees)).losses["rows"].dtype == dtype


def test_metric_sums_do_not_lose_digits():
    """A running sum of 10,000 rows of -0.1 in float32 would be off in the fourth digit."""
    n = 10_000
    tree = build_tree([sequence([5, *[6] * n], [A] * n, 0)])
    total, count = objective("safety")(torch.full((n,), -0.1), lay_out([tree])).metrics["loss/safety"]
    assert count == n
    assert abs(total.item() / n - np.float32(0.1)) <= 1e-12


@st.composite
def records(draw):
    """Draw kinds, sequences (some share a prefix), and the number of sequences per pack."""
    n = draw(st.integers(1, 6))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=n, max_size=n))
    sequences = []
    for record in range(n):
        tokens = draw(st.lists(st.integers(0, 2), min_size=2, max_size=8))
        scored = draw(st.integers(1, len(tokens) - 1))
        # Derive a token's part from its position, so that a shared row has only one part.
        sequences.append(sequence(tokens, [p % 3 for p in range(len(tokens) - scored, len(tokens))], record))
    return kinds, sequences, draw(st.integers(1, n))


@settings(deadline=None, max_examples=60)
@given(records())
def test_sums_over_packs_are_sums_over_sequences(drawn):
    """However trees are packed, each metric is a sum over every sequence's own tokens.

    Log-probs are small integers, so the sums are exact.
    """
    kinds, sequences, size = drawn
    rw = objective(*kinds)

    def logp(s, position):
        return -float((int(s.tokens[: position + 1] @ np.arange(1, position + 2)) * 7 + position) % 11)

    expected = {name: [0.0, 0.0] for name in METRICS}
    for s in sequences:
        for position in range(s.scored_from, len(s.tokens)):
            part = RowKind(s.row_kinds[position - s.scored_from]).name.lower()
            for name in ("loss", f"loss/{kinds[s.record]}", f"loss/{part}"):
                expected[name][0] -= logp(s, position)
                expected[name][1] += 1

    summed = {name: [0.0, 0.0] for name in METRICS}
    loss = rows = 0
    for start in range(0, len(sequences), size):
        tree = build_tree(sequences[start : start + size])
        pack = lay_out([tree])
        logps = torch.full((pack.rows,), torch.nan)
        for i, s in enumerate(tree.sequences):
            mine = pack.entry_row[pack.entry_sequence == i]
            logps[mine] = torch.tensor([logp(s, p) for p in range(s.scored_from, len(s.tokens))])
        sums = rw(logps, pack)
        loss += sums.losses["rows"].item()
        rows += rw.counts([tree])["rows"]
        for name, (total, count) in means(sums.metrics).items():
            summed[name][0] += total
            summed[name][1] += count
    assert summed == expected
    assert [loss, rows] == expected["loss"]


# Weights of tokens


WEIGHTS = {"think": 0.5, "answer": 2.0, "safety/answer": 3.0}


def weighted(*kinds):
    return RWObjective(np.array([KINDS.index(kind) for kind in kinds], np.uint8), WEIGHTS)


def test_with_weights_the_loss_is_divided_by_the_sum_of_the_weights_of_the_step(trees):
    # general: two of think, one of answer, the stop; safety: one of answer, the stop
    assert weighted("general", "safety").counts(trees) == {"row_weights": 0.5 + 0.5 + 2 + 1 + 3 + 1}
    assert weighted("general", "safety").counts([]) == {"row_weights": 0}


def test_a_weight_of_kind_and_part_counts_before_one_of_the_part(trees):
    sums = weighted("general", "safety")(LOGPS, lay_out(trees))
    expected = 0.5 * (1 + 2) + 2 * 4 + 8 + 3 * 16 + 32
    assert {name: value.item() for name, value in sums.losses.items()} == {"row_weights": expected}


def test_with_weights_only_the_loss_is_weighted_and_the_plain_one_has_another_name(trees):
    plain = means(objective("general", "safety")(LOGPS, lay_out(trees)).metrics)
    metrics = means(weighted("general", "safety")(LOGPS, lay_out(trees)).metrics)
    expected = 0.5 * (1 + 2) + 2 * 4 + 8 + 3 * 16 + 32
    assert metrics == plain | {"loss": (expected, 8.0), "loss/unweighted": plain["loss"]}


def test_the_gradient_of_a_token_is_its_weight(trees):
    logps = LOGPS.clone().requires_grad_()
    weighted("general", "safety")(logps, lay_out(trees)).losses["row_weights"].backward()
    assert logps.grad.tolist() == [-0.5, -0.5, -2, -1, -3, -1]


def test_a_row_of_two_records_has_the_weights_of_both(shared):
    logps = torch.zeros(4, requires_grad=True)
    rw = RWObjective(np.array([0, 1]), {"think": 0.25, "safety/think": 2.0, "answer": 0.0})
    rw(logps, lay_out(shared)).losses["row_weights"].backward()
    assert logps.grad.tolist() == [-2.25, -2.25, -1.0, 0.0]
    assert rw.counts(shared) == {"row_weights": 0.25 * 2 + 1 + 2 * 2 + 0}


def test_equal_weights_give_the_loss_without_weights(trees):
    rw = RWObjective(np.array([0, 1]), {"think": 2.0, "answer": 2.0, "stop": 2.0})
    sums = rw(LOGPS, lay_out(trees))
    assert sums.losses["row_weights"].item() / rw.counts(trees)["row_weights"] == 63.0 / 6
    assert sums.losses["row_weights"].dtype == LOGPS.dtype


def test_the_empty_pack_has_all_names_with_weights_too():
    logps = torch.zeros(0, requires_grad=True)
    sums = weighted("general", "safety")(logps, lay_out([]))
    assert sums.losses["row_weights"].item() == 0.0
    assert means(sums.metrics) == dict.fromkeys(METRICS | {"loss/unweighted"}, (0.0, 0.0))


@settings(deadline=None, max_examples=60)
@given(records())
def test_the_weighted_loss_does_not_depend_on_packs(drawn):
    kinds, sequences, size = drawn
    rw = weighted(*kinds)
    loss = divisor = expected = 0.0
    for s in sequences:
        parts = [RowKind(part).name.lower() for part in s.row_kinds]
        kind = kinds[s.record]
        own = [WEIGHTS.get(f"{kind}/{part}", WEIGHTS.get(part, 1.0)) for part in parts]
        expected += sum(w * token for w, token in zip(own, s.tokens[s.scored_from :].tolist(), strict=True))
    for start in range(0, len(sequences), size):
        tree = build_tree(sequences[start : start + size])
        pack = lay_out([tree])
        sums = rw(-pack.row_target.double(), pack)
        loss += sums.losses["row_weights"].item()
        divisor += sums.metrics["loss"][1].item()
    assert loss == expected
    assert divisor == rw.counts([build_tree(sequences)])["row_weights"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"thinking": 1.0}, "data.row_weights: unknown part 'thinking'; did you mean think?"),
        ({"safty/think": 1.0}, "data.row_weights: unknown part 'safty/think'; did you mean safety/think?"),
        ({"op-cot/think": 1.0}, "data.row_weights: unknown part 'op-cot/think'"),
        ({"think": -1.0}, "data.row_weights: think is -1.0; it must be at least 0"),
        ({"stop": float("nan")}, "data.row_weights: stop is nan; it must be at least 0"),
        ({"answer": 0.0, "safety/stop": 0.0}, "data.row_weights: safety records have no weight on answer and stop"),
    ],
)
def test_wrong_weights_are_refused(weights, message):
    with pytest.raises(SaroError) as caught:
        RWConfig(data=DataConfig(row_weights=weights))
    assert str(caught.value).startswith(message)


def test_weights_of_tokens_are_for_examples_only():
    with pytest.raises(SaroError, match=r"data\.row_weights is for RW; weigh kinds of pairs with --data\.weights"):
        SRPOConfig(data=DataConfig(row_weights={"answer": 2.0}))
