"""SRPO's objective equals a plain DPO, which this file implements in float64.

The plain DPO runs both full sequences of a pair, padded, through the model's own SDPA forward.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from float64 import in_float64
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from saro.config import PAIR_KINDS, PreferenceConfig
from saro.data.dataset import ExampleSet, PairSet
from saro.data.packs import PairLogps, lay_out
from saro.data.tree import ScoredSequence, build_tree
from saro.model.policy import Policy
from saro.train.losses import PAIR_LOSSES, orpo
from saro.train.srpo_objective import SRPOObjective
from saro_kernels import TokenStatistics

BETA, GAMMA = 0.3, 0.5
# Losses on mean log-probs of the policy, without a reference.
FREE = ("orpo", "simpo")


def _make_model(lora: bool) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation="sdpa").double()
    if lora:
        targets = ["q_proj", "v_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM"))
        model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module", params=["full", "lora"])
def model(request):
    return _make_model(request.param == "lora")


def _pair(prompt, shared, chosen, rejected, record=0) -> tuple[ScoredSequence, ScoredSequence]:
    """Make both sides of a pair; their responses begin with the tokens ``shared``."""

    def side(rest):
        tokens = np.array([*prompt, *shared, *rest], np.int32)
        return ScoredSequence(tokens, len(prompt), np.zeros(len(tokens) - len(prompt), np.uint8), record)

    return side(chosen), side(rejected)


PAIRS = [
    _pair([5, 6, 7], [8, 9], [10, 11, 12, 2], [13, 2], 0),
    _pair([5, 6, 7], [], [20, 2], [21, 22, 23, 2], 1),
    _pair([5, 6, 7], [8, 9, 10], [2], [14, 15, 2], 2),
]
REFERENCE = torch.tensor([[-20.0, -13.0], [-11.0, -26.0], [-17.0, -30.0]], dtype=torch.float64)


def _lm(model):
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _plain_logps(model, pair) -> list[torch.Tensor]:
    """Return the log-probs of the scored tokens of both sides, run as one right-padded batch."""
    longest = max(len(side.tokens) for side in pair)
    tokens = torch.zeros(2, longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for i, side in enumerate(pair):
        tokens[i, : len(side.tokens)] = torch.from_numpy(side.tokens.astype(np.int64))
        mask[i, : len(side.tokens)] = 1
    logits = model(input_ids=tokens, attention_mask=mask).logits
    logps = F.log_softmax(logits[:, :-1], -1).gather(2, tokens[:, 1:, None])[..., 0]
    return [logps[i, side.scored_from - 1 : len(side.tokens) - 1] for i, side in enumerate(pair)]


def _reference(pairs, sums) -> PairLogps:
    """Make a reference with the given sum for each side, spread unevenly over its tokens."""
    parts = []
    for pair, of_pair in zip(pairs, sums, strict=True):
        for side, total in zip(pair, of_pair, strict=True):
            share = np.arange(1.0, len(side.row_kinds) + 1)
            parts.append(float(total) * share / share.sum())
    return PairLogps(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))


def _plain_loss(name: str, smoothing: float, margin: torch.Tensor) -> torch.Tensor:
    reward = BETA * margin
    if name == "sigmoid":
        return -(1 - smoothing) * torch.log(reward.sigmoid()) - smoothing * torch.log((-reward).sigmoid())
    if name == "robust":
        good, bad = -torch.log(reward.sigmoid()), -torch.log((-reward).sigmoid())
        return ((1 - smoothing) * good - smoothing * bad) / (1 - 2 * smoothing)
    if name == "hinge":
        return torch.clamp(1 - reward, min=0)
    if name == "simpo":
        reward = reward - GAMMA
        return -(1 - smoothing) * torch.log(reward.sigmoid()) - smoothing * torch.log((-reward).sigmoid())
    return (margin - 1 / (2 * BETA)) ** 2


def _plain_odds_ratio(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """ORPO's eq. 7 on mean log-probs, by probabilities."""
    odds = [logp.exp() / (1 - logp.exp()) for logp in (chosen, rejected)]
    return -BETA * torch.log(torch.log(odds[0] / odds[1]).sigmoid())


def _nll_weight(name: str, given: float) -> float:
    return given or float(name == "orpo")


def _gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@in_float64()
def _plain(model, pairs, reference, name, smoothing=0.0, nll=0.0, normalize=False) -> tuple[float, torch.Tensor]:
    _lm(model).set_attn_implementation("sdpa")
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    rows = sum(len(chosen.row_kinds) for chosen, _ in pairs)
    for (chosen, rejected), (ref_chosen, ref_rejected) in zip(pairs, reference, strict=True):
        lp_chosen, lp_rejected = (logps.sum() for logps in _plain_logps(model, (chosen, rejected)))
        up, down = lp_chosen, lp_rejected
        if name not in FREE:
            up, down = up - ref_chosen, down - ref_rejected
        if normalize or name in FREE:
            up, down = up / len(chosen.row_kinds), down / len(rejected.row_kinds)
        preference = _plain_odds_ratio(up, down) if name == "orpo" else _plain_loss(name, smoothing, up - down)
        total = total + preference / len(pairs) - _nll_weight(name, nll) * lp_chosen / rows
    total.backward()
    return total.item(), _gradient(model)


@in_float64()
def _ours(model, pairs, reference, loss, packs=None, **options) -> tuple[float, torch.Tensor]:
    policy = Policy(model)
    model.zero_grad()
    preference = PreferenceConfig(beta=BETA, loss=loss, **options)
    reference = _reference(pairs, reference) if preference.needs_reference else None
    objective = SRPOObjective(np.zeros(len(pairs)), reference, preference)
    trees = [build_tree(pair) for pair in pairs] if packs is None else packs
    counts = objective.counts(trees)
    total = 0.0
    for tree in [trees] if packs is None else [[tree] for tree in packs]:
        pack = lay_out(tree)
        sums = objective(policy(pack, gradient_rows=objective.gradient_rows(pack)), pack)
        part = sum(value / counts[name] for name, value in sums.losses.items())
        part.backward()
        total += part.item()
    return total, _gradient(model)


def _assert_equal(ours, plain):
    assert ours[0] == pytest.approx(plain[0], rel=1e-12)
    assert (ours[1] - plain[1]).norm() <= 1e-11 * plain[1].norm()


@pytest.mark.parametrize(
    ("loss", "smoothing"),
    [
        ("sigmoid", 0.0),
        ("sigmoid", 0.2),
        ("robust", 0.2),
        ("hinge", 0.0),
        ("ipo", 0.0),
        ("simpo", 0.0),
        ("simpo", 0.2),
        ("orpo", 0.0),
    ],
)
def test_loss_and_gradients_equal_those_of_plain_dpo(model, loss, smoothing):
    ours = _ours(model, PAIRS, REFERENCE, loss, label_smoothing=smoothing)
    _assert_equal(ours, _plain(model, PAIRS, REFERENCE, loss, smoothing))


@pytest.mark.parametrize(("loss", "nll"), [("sigmoid", 0.5), ("orpo", 0.0), ("simpo", 0.0)])
def test_each_term_is_divided_by_its_count_over_all_packs_of_a_step(model, loss, nll):
    packs = [build_tree(pair) for pair in PAIRS]
    ours = _ours(model, PAIRS, REFERENCE, loss, packs=packs, nll=nll)
    _assert_equal(ours, _plain(model, PAIRS, REFERENCE, loss, nll=nll))


def test_length_normalisation_divides_by_each_sides_tokens(model):
    ours = _ours(model, PAIRS, REFERENCE, "ipo", length_normalize=True)
    _assert_equal(ours, _plain(model, PAIRS, REFERENCE, "ipo", normalize=True))


@pytest.mark.parametrize("loss", ["sigmoid", *FREE])
def test_pairs_on_one_prompt_may_share_one_tree(model, loss):
    tree = build_tree([side for pair in PAIRS for side in pair])
    assert tree.tokens < sum(build_tree(pair).tokens for pair in PAIRS)
    ours = _ours(model, PAIRS, REFERENCE, loss, packs=[tree])
    _assert_equal(ours, _plain(model, PAIRS, REFERENCE, loss))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_trees_of_every_depth(model, depth):
    """Pairs on one prompt that branch off one after the other, each node below the last."""
    trunk = [10, 11, 12, 13, 14, 15]
    pairs = [_pair([5, 6, 7], trunk[:n], [20 + n, 30, 2], [40 + n, 2], n - 1) for n in range(1, depth + 1)]
    tree = build_tree([side for pair in pairs for side in pair])
    assert max(map(len, tree.paths)) == depth + 1
    sums = torch.linspace(-30, -5, 2 * depth, dtype=torch.float64).view(-1, 2)
    _assert_equal(_ours(model, pairs, sums, "sigmoid", packs=[tree]), _plain(model, pairs, sums, "sigmoid"))


def test_a_response_of_two_pairs_is_one_path(model):
    pairs = [PAIRS[0], (PAIRS[0][0], _pair([5, 6, 7], [8], [30, 2], [31, 2], 1)[1])]
    pairs[1] = tuple(replace(side, record=1) for side in pairs[1])
    tree = build_tree([side for pair in pairs for side in pair])
    assert tree.paths[0] == tree.paths[2]
    sums = REFERENCE[:2]
    _assert_equal(_ours(model, pairs, sums, "ipo", packs=[tree]), _plain(model, pairs, sums, "ipo"))


tokens = st.lists(st.integers(4, 40), max_size=6)
# Only two different tokens, so that random sequences share prefixes of any length.
few = st.lists(st.integers(4, 5), max_size=5)
losses = st.sampled_from([(name, 0.0) for name in PAIR_LOSSES] + [("sigmoid", 0.2), ("robust", 0.2), ("simpo", 0.2)])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([([], [25, 25, 19, 23, 31, 26], [], [4, 4, 4, 4])], ("sigmoid", 0.0))  # its norms round differently in float32
@given(st.lists(st.tuples(tokens, tokens, tokens, tokens), min_size=1, max_size=3), losses)
def test_any_pairs_give_the_loss_and_gradients_of_plain_dpo(model, drawn, loss):
    """If a remainder is empty, the child is a single token, the stop."""
    pairs = [_pair([3, *p], s, [41, *c, 2], [42, *r, 2], i) for i, (p, s, c, r) in enumerate(drawn)]
    _assert_any(model, pairs, loss, None)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(few, few), min_size=1, max_size=4), losses)
def test_any_pairs_on_one_prompt_in_one_tree_give_those_of_plain_dpo_too(model, drawn, loss):
    pairs = [_pair([3, 3], [], [*c, 2], [*r, 2], i) for i, (c, r) in enumerate((c, r) for c, r in drawn if c != r)]
    if pairs:
        _assert_any(model, pairs, loss, [build_tree([side for pair in pairs for side in pair])])


def _assert_any(model, pairs, loss, packs):
    name, smoothing = loss
    sums = torch.arange(2.0 * len(pairs), dtype=torch.float64).view(-1, 2) * -7
    plain = _plain(model, pairs, sums, name, smoothing)
    ours = _ours(model, pairs, sums, name, packs=packs, label_smoothing=smoothing)
    assert ours[0] == pytest.approx(plain[0], rel=1e-12, abs=1e-13)
    assert (ours[1] - plain[1]).norm() <= 1e-11 * plain[1].norm() + 1e-12


@pytest.mark.parametrize(
    ("loss", "value"), [("sigmoid", math.log(2)), ("robust", math.log(2)), ("hinge", 1.0), ("ipo", 1 / (4 * BETA**2))]
)
def test_at_the_reference_every_loss_has_its_value_for_margin_zero(model, loss, value):
    """allenai/open-instruct#1900: the loss was not ln 2 at step 0."""
    with torch.no_grad(), in_float64():
        _lm(model).set_attn_implementation("sdpa")
        sums = torch.stack([torch.stack([logps.sum() for logps in _plain_logps(model, pair)]) for pair in PAIRS])
    total, _ = _ours(model, PAIRS, sums, loss)
    assert total == pytest.approx(value, rel=1e-12)
    objective = SRPOObjective(np.zeros(3), _reference(PAIRS, sums), PreferenceConfig(beta=BETA, loss=loss))
    assert objective.loss_of(0) == pytest.approx(value)


def _metrics(kinds, moved_of, options=None, pairs=PAIRS[:2], forms=()):
    """Return average metrics, values by pair and the pack if tokens of side s of pair i moved by ``moved_of[i][s]``."""
    pack = lay_out([build_tree(pair) for pair in pairs])
    logps = -torch.arange(1.0, pack.rows + 1, dtype=torch.float64)
    moved = torch.tensor(moved_of, dtype=torch.float64).flatten()[pack.entry_sequence]
    entries = logps[pack.entry_row]
    offsets = np.cumsum([0, *np.bincount(pack.entry_sequence)])
    reference = PairLogps((entries - moved).numpy(), offsets)
    sums = SRPOObjective(np.array(kinds), reference, options, forms)(logps, pack)
    return (
        {name: (total / count).item() for name, (total, count) in sums.metrics.items() if count},
        sums.pair_values,
        pack,
    )


def test_metrics_match_values_by_hand():
    # Scored tokens: 6 and 4 of the first pair, 2 and 4 of the second.
    means, pairs, pack = _metrics([0, 1], [[0.5, 0.25], [-1.0, 1.0]], PreferenceConfig(beta=0.5))
    assert np.bincount(pack.entry_sequence).tolist() == [6, 4, 2, 4]
    assert means["rewards/chosen"] == pytest.approx(0.5 * (3 - 2) / 2)
    assert means["rewards/rejected"] == pytest.approx(0.5 * (1 + 4) / 2)
    assert means["rewards/margins"] == pytest.approx(0.5 * (2 - 6) / 2)
    assert means["rewards/accuracies"] == 0.5
    assert means["op-cot/rewards/margins"] == pytest.approx(1.0)
    assert means["pp-cot/rewards/margins"] == pytest.approx(-3.0)
    assert means["delta_logps/chosen"] == pytest.approx(0.5)
    assert means["op-cot/delta_logps/chosen"] == pytest.approx(3)
    assert means["delta_logps/rejected"] == pytest.approx(2.5)
    assert means["chosen_fell"] == 0.5
    assert means["pp-cot/chosen_fell"] == 1
    assert means["loss"] == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(3))) / 2)
    sums = torch.zeros(4, dtype=torch.float64).index_add(
        0, pack.entry_sequence, -torch.arange(1.0, pack.rows + 1, dtype=torch.float64)[pack.entry_row]
    )
    assert means["logps/chosen"] == pytest.approx(sums[0::2].mean().item())
    assert pairs["margin"].tolist() == pytest.approx([2.0, -6.0])
    assert pairs["chosen_fell"].tolist() == [False, True]


@pytest.mark.parametrize("loss", FREE)
def test_a_loss_without_a_reference_has_the_metrics_of_mean_log_probs(loss):
    logps = -torch.arange(1.0, 17, dtype=torch.float64)
    pack = lay_out([build_tree(pair) for pair in PAIRS[:2]])
    options = PreferenceConfig(beta=0.5, loss=loss)
    objective = SRPOObjective(np.array([0, 1]), None, options)
    sums = objective(logps[: pack.rows], pack)
    means = {name: (total / count).item() for name, (total, count) in sums.metrics.items() if count}
    sides = [logps[pack.entry_row[pack.entry_sequence == i]].mean().item() for i in range(4)]
    assert means["rewards/chosen"] == pytest.approx(0.5 * (sides[0] + sides[2]) / 2)
    assert means["rewards/rejected"] == pytest.approx(0.5 * (sides[1] + sides[3]) / 2)
    assert means["rewards/margins"] == pytest.approx(means["rewards/chosen"] - means["rewards/rejected"])
    assert sums.pair_values["margin"].tolist() == pytest.approx([sides[0] - sides[1], sides[2] - sides[3]])
    assert not [name for name in means if "delta" in name or "fell" in name]
    if loss == "orpo":
        odds = [math.log(math.exp(s) / (1 - math.exp(s))) for s in sides]
        ratios = [odds[0] - odds[1], odds[2] - odds[3]]
        assert means["log_odds_chosen"] == pytest.approx(sum(ratios) / 2)
        assert means["log_odds_ratio"] == pytest.approx(-sum(math.log1p(math.exp(-r)) for r in ratios) / 2)
        assert objective.combine(means)["loss"] == pytest.approx(means["loss"] + means["loss/nll"])


@pytest.mark.parametrize(("loss", "has_reference"), [("simpo", True), ("orpo", True), ("sigmoid", False)])
def test_a_reference_is_given_exactly_to_the_losses_that_have_one(loss, has_reference):
    reference = _reference(PAIRS, REFERENCE) if has_reference else None
    with pytest.raises(ValueError, match="reference"):
        SRPOObjective(np.zeros(3), reference, PreferenceConfig(loss=loss))


def test_responses_that_are_certain_have_a_finite_odds_ratio():
    scores = torch.zeros(1, 2, requires_grad=True)
    orpo(scores, PreferenceConfig(loss="orpo")).sum().backward()
    assert scores.grad.isfinite().all()


def test_entropy_and_accuracy_by_side_and_by_kind_of_pair():
    # Scored tokens: 6 and 4 of the first pair, 2 and 4 of the second. Both sides of the first pair share the first token.
    pack = lay_out([build_tree(pair) for pair in PAIRS[:2]])
    objective = SRPOObjective(np.array([0, 1]), _reference(PAIRS[:2], [[0, 0]] * 2), PreferenceConfig())
    entropy = torch.arange(1.0, pack.rows + 1)
    top1 = torch.arange(pack.rows) == pack.entry_row[0]
    metrics = objective.describe(TokenStatistics(-entropy, entropy, top1), pack)
    entropies = [entropy[pack.entry_row[pack.entry_sequence == i]].tolist() for i in range(4)]
    assert [len(of) for of in entropies] == [6, 4, 2, 4]
    totals = {name: (total.item(), int(count)) for name, (total, count) in metrics.items()}
    op, pp = PAIR_KINDS
    assert totals == {
        "entropy/chosen": (sum(entropies[0] + entropies[2]), 8),
        "entropy/rejected": (sum(entropies[1] + entropies[3]), 8),
        f"{op}/entropy/chosen": (sum(entropies[0]), 6),
        f"{op}/entropy/rejected": (sum(entropies[1]), 4),
        f"{pp}/entropy/chosen": (sum(entropies[2]), 2),
        f"{pp}/entropy/rejected": (sum(entropies[3]), 4),
        "mean_token_accuracy/chosen": (1, 8),
        "mean_token_accuracy/rejected": (1, 8),
        f"{op}/mean_token_accuracy/chosen": (1, 6),
        f"{op}/mean_token_accuracy/rejected": (1, 4),
        f"{pp}/mean_token_accuracy/chosen": (0, 2),
        f"{pp}/mean_token_accuracy/rejected": (0, 4),
    }


def test_delta_logps_are_split_into_reasoning_and_the_rest():
    thinking = [
        replace(side, row_kinds=np.array([0] * 3 + [1] * (len(side.row_kinds) - 4) + [2], np.uint8))
        for side in PAIRS[0]
    ]
    means, _, _ = _metrics([0], [[0.5, 0.25]], PreferenceConfig(), [tuple(thinking)])
    assert means["delta_logps/chosen/think"] == pytest.approx(1.5)
    assert means["delta_logps/chosen/answer"] == pytest.approx(1.5)
    assert means["delta_logps/rejected/think"] == pytest.approx(0.75)
    assert means["delta_logps/rejected/answer"] == pytest.approx(0.25)


def test_a_loss_of_probability_within_rounding_is_not_a_fall():
    _, pairs, _ = _metrics([0, 1], [[-9e-4, 0.0], [-1.1e-3, 0.0]], PreferenceConfig())
    assert pairs["chosen_fell"].tolist() == [False, True]


def test_every_metric_is_also_reported_for_each_kind_of_pair():
    means, _, _ = _metrics([0, 1], [[0.5, 0.25], [-1.0, 1.0]], PreferenceConfig())
    overall = {name for name in means if name.split("/")[0] not in PAIR_KINDS}
    assert set(means) == overall | {f"{kind}/{name}" for kind in PAIR_KINDS for name in overall}
    assert {"loss", "rewards/chosen", "logps/rejected", "delta_logps/chosen/think", "chosen_fell"} <= overall


MOVED = [[0.5, 0.25], [-1.0, 1.0], [2.0, 1.0]]


def test_every_metric_is_also_reported_for_each_form_of_pair():
    plain, _, _ = _metrics([0, 1, 1], MOVED, PreferenceConfig(), PAIRS)
    means, _, _ = _metrics([0, 1, 1], MOVED, PreferenceConfig(), PAIRS, ("guided", "mirror", None))
    overall = {name for name in plain if name.split("/")[0] not in PAIR_KINDS}
    assert set(means) == set(plain) | {f"{form}/{name}" for form in ("guided", "mirror") for name in overall}
    assert {name: means[name] for name in plain} == plain
    # Each form has one pair: the pair of kind op-cot, and one of the two of kind pp-cot.
    assert means["guided/rewards/margins"] == pytest.approx(plain["op-cot/rewards/margins"])
    alone, _, _ = _metrics([0, 1], MOVED[:2], PreferenceConfig(), PAIRS[:2])
    assert means["mirror/rewards/margins"] == pytest.approx(alone["pp-cot/rewards/margins"])
    assert means["mirror/loss"] == pytest.approx(alone["pp-cot/loss"])


def test_every_pack_has_the_names_of_all_forms():
    """Ranks add their metrics up by name, so that a rank without pairs of a form needs its name too."""
    forms = ("guided", None, "mirror")
    objective = SRPOObjective(np.array([0, 1, 1]), _reference(PAIRS, REFERENCE), PreferenceConfig(), forms)
    packs = [lay_out([build_tree(pair) for pair in PAIRS[i:j]]) for i, j in ((0, 1), (1, 3), (0, 0))]
    names = [set(objective(torch.zeros(pack.rows), pack).metrics) for pack in packs]
    assert names[0] == names[1] == names[2]
    assert {"guided/rewards/margins", "mirror/loss"} <= names[0]
    sums = objective(torch.zeros(packs[0].rows), packs[0])
    assert (sums.metrics["guided/loss"][1], sums.metrics["mirror/loss"][1]) == (1, 0)
    statistics = [TokenStatistics(*[torch.zeros(pack.rows)] * 3) for pack in packs]
    described = [set(objective.describe(s, pack)) for s, pack in zip(statistics, packs, strict=True)]
    assert described[0] == described[1] == described[2]
    assert "mirror/entropy/chosen" in described[0]


def test_a_pair_that_is_not_finite_does_not_spoil_the_metrics_of_other_groups():
    pack = lay_out([build_tree(pair) for pair in PAIRS])
    logps = torch.zeros(pack.rows)
    logps[pack.entry_row[pack.entry_sequence == 1]] = -torch.inf
    objective = SRPOObjective(np.array([0, 1, 1]), _reference(PAIRS, REFERENCE), PreferenceConfig(), ("a", "b", "b"))
    metrics = objective(logps, pack).metrics
    assert metrics["b/logps/rejected"][0].item() == 0
    assert metrics["a/logps/rejected"][0].item() == -torch.inf


def test_shared_reasoning_cancels_in_the_margin():
    """Tokens that both sides share have no gradient: the gradient of the margin comes from the remainders only."""
    pack = lay_out([build_tree(PAIRS[0])])
    logps = torch.zeros(pack.rows, requires_grad=True)
    reference = _reference(PAIRS[:1], [[0.0, 0.0]])
    SRPOObjective(np.zeros(1), reference, PreferenceConfig())(logps, pack).losses["pairs"].backward()
    shared = torch.bincount(pack.entry_row, minlength=pack.rows) == 2
    assert shared.sum() == 2
    assert torch.equal(logps.grad[shared], torch.zeros(2))
    assert (logps.grad[~shared] != 0).all()


@pytest.mark.parametrize(
    ("options", "shared_rows_count"),
    [
        ({}, False),
        ({"loss": "ipo"}, False),
        ({"nll": 0.5}, True),
        ({"length_normalize": True}, True),
        ({"loss": "simpo"}, True),
        ({"loss": "orpo"}, True),
    ],
    ids=str,
)
def test_shared_rows_need_a_gradient_only_where_they_do_not_cancel(options, shared_rows_count):
    """The loss has a gradient in exactly the first ``gradient_rows`` rows."""
    pack = lay_out([build_tree(pair) for pair in PAIRS])
    options = PreferenceConfig(**options)
    reference = _reference(PAIRS, REFERENCE) if options.needs_reference else None
    objective = SRPOObjective(np.zeros(3), reference, options)
    logps = -torch.rand(pack.rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logps.requires_grad_()
    sum(objective(logps, pack).losses.values()).backward()
    assert pack.margin_rows < pack.rows
    rows = objective.gradient_rows(pack)
    assert rows == (pack.rows if shared_rows_count else pack.margin_rows)
    assert (logps.grad[:rows] != 0).all()
    assert not logps.grad[rows:].any()


@pytest.mark.parametrize("loss", sorted(PAIR_LOSSES.keys() - FREE))
def test_scoring_only_divergent_tokens_gives_the_same_loss_and_gradients(model, loss):
    pairs = _pair_set(PAIRS)
    parted = pairs.divergent()
    full, short = [pairs.sequences(i) for i in range(3)], [parted.sequences(i) for i in range(3)]
    assert [len(side.row_kinds) for pair in short for side in pair] == [4, 2, 2, 4, 1, 3]
    assert lay_out(pairs.trees(range(3), 100)).rows > lay_out(parted.trees(range(3), 100)).rows
    zeros = torch.zeros(3, 2, dtype=torch.float64)
    _assert_equal(_ours(model, short, zeros, loss, scored="divergent"), _ours(model, full, zeros, loss))


def test_with_divergent_scoring_the_nll_term_is_that_of_the_chosen_tokens_after_the_fork(model):
    parted = [_pair_set(PAIRS).divergent().sequences(i) for i in range(3)]
    zeros = torch.zeros(3, 2, dtype=torch.float64)
    ours = _ours(model, parted, zeros, "sigmoid", scored="divergent", nll=0.5)
    plain = _plain(model, PAIRS, zeros, "sigmoid")
    model.zero_grad()
    with in_float64():
        rows = [len(chosen.row_kinds) for chosen, _ in parted]
        kept = zip(PAIRS, rows, strict=True)
        term = -0.5 * sum(_plain_logps(model, pair)[0][-n:].sum() for pair, n in kept) / sum(rows)
        term.backward()
    _assert_equal(ours, (plain[0] + term.item(), plain[1] + _gradient(model)))


def test_an_open_side_may_be_the_beginning_of_another_pairs_side(model):
    """Without stop tokens: the open side of the first pair ends inside the path of the second pair's rejected side."""
    cut = _pair([5, 6, 7], [8, 9], [10, 11, 2], [13, 14], 0)
    whole = _pair([5, 6, 7], [8], [20, 2], [9, 13, 14, 15, 2], 1)
    tree = build_tree([*cut, *whole])
    sums = REFERENCE[:2]
    _assert_equal(_ours(model, [cut, whole], sums, "ipo", packs=[tree]), _plain(model, [cut, whole], sums, "ipo"))


def test_scoring_only_divergent_tokens_reports_no_absolute_values():
    parted = _pair_set(PAIRS[:2]).divergent()
    options = PreferenceConfig(scored="divergent")
    means, pairs, _ = _metrics([0, 1], [[0.5, 0.25], [-1.0, 1.0]], options, [parted.sequences(i) for i in range(2)])
    kinds = {name for name in means if name.split("/")[0] not in PAIR_KINDS}
    assert kinds == {"loss", "rewards/margins", "rewards/accuracies"}
    assert set(pairs) == {"margin"}


def _pair_set(pairs) -> PairSet:
    sides = []
    for side in (0, 1):
        sequences = [pair[side] for pair in pairs]
        lengths = [len(s.tokens) for s in sequences]
        prompts = np.array([s.scored_from for s in sequences], np.int32)
        tokens, offsets = np.concatenate([s.tokens for s in sequences]), np.cumsum([0, *lengths])
        kinds, think = np.zeros(len(pairs), np.uint8), np.zeros(len(pairs), np.int32)
        sides.append(ExampleSet(tokens, offsets, prompts, think, kinds, tuple(f"p{i}" for i in range(len(pairs)))))
    return PairSet(*sides, np.arange(len(pairs), dtype=np.int32))
