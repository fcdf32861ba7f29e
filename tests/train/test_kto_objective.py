"""KTO equals its equations, which this file implements in float64 on one sequence at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from float64 import in_float64
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from saro.config import PAIR_KINDS, PreferenceConfig
from saro.data.packs import PairLogps, pack_trees
from saro.data.records import CHOSEN, REJECTED
from saro.data.steps import Schedule, Steps
from saro.data.unpaired_set import UnpairedSet
from saro.errors import SaroError
from saro.model.policy import Policy
from saro.train.check_start import check_start
from saro.train.kto_objective import KTOObjective
from saro.train.pair_log import PairLog, evaluate_heldout
from saro_kernels import TokenStatistics

OPTIONS = PreferenceConfig("kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
# Prompt and response of each record. Three are on one prompt, and two of these begin with the same tokens.
SEQUENCES = [([5, 6, 7], [8, 9, 10, 2]), ([5, 6, 7], [8, 9, 2]), ([5, 6, 7], [20, 2]), ([30, 31], [32, 33, 2])]
LABELS = [True, False, True, False]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation="sdpa").double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2)
    return model


def make_set(forms=()) -> UnpairedSet:
    tokens = [np.array([*prompt, *response], np.int32) for prompt, response in SEQUENCES]
    n = len(SEQUENCES)
    return UnpairedSet(
        tokens=np.concatenate(tokens),
        offsets=np.cumsum([0, *map(len, tokens)]),
        prompt_tokens=np.array([len(prompt) for prompt, _ in SEQUENCES], np.int32),
        think_tokens=np.zeros(n, np.int32),
        kinds=np.array([0, 1, 1, 0], np.uint8),
        ids=tuple(f"r{i}" for i in range(n)),
        labels=np.array(LABELS),
        prompts=np.array([0, 0, 0, 1], np.int32),
        others=np.array([3, 3, 3, 0]),
        forms=forms,
    )


def plain_logps(model, sequence) -> torch.Tensor:
    tokens = torch.from_numpy(sequence.tokens.astype(np.int64))
    logps = F.log_softmax(model(input_ids=tokens[None]).logits[0, :-1], -1)
    return logps.gather(1, tokens[1:, None])[sequence.scored_from - 1 :, 0]


def make_reference(model, data, moved) -> PairLogps:
    """Make a reference from which the policy has moved by ``moved[i][side]`` nats per token."""
    with torch.no_grad(), in_float64():
        model.set_attn_implementation("sdpa")
        parts = [
            plain_logps(model, sequence).numpy() - moved[record][side]
            for record in range(len(data))
            for side, sequence in enumerate(data.as_pairs.sequences(record))
        ]
    return PairLogps(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@in_float64()
def plain(model, data, reference, records) -> tuple[float, float, torch.Tensor]:
    """Return the reference point, the loss and its gradient."""
    model.set_attn_implementation("sdpa")
    model.zero_grad()
    with torch.no_grad():
        changes = [
            plain_logps(model, data.mismatched.sequence(i)).sum() - reference.side_logps(i, REJECTED).sum()
            for i in records
        ]
    z0 = max(0.0, sum(changes).item() / len(records))
    total = 0.0
    for i in records:
        r = plain_logps(model, data.sequence(i)).sum() - reference.side_logps(i, CHOSEN).sum()
        if data.labels[i]:
            total = total + OPTIONS.desirable_weight * (1 - torch.sigmoid(OPTIONS.beta * (r - z0)))
        else:
            total = total + OPTIONS.undesirable_weight * (1 - torch.sigmoid(OPTIONS.beta * (z0 - r)))
    loss = total / len(records)
    loss.backward()
    return z0, loss.item(), gradient(model)


@in_float64()
def ours(model, data, reference, records, pack_tokens, runtime) -> tuple[float, float, torch.Tensor]:
    policy = Policy(model)
    model.zero_grad()
    objective = KTOObjective(data, reference, OPTIONS, pack_tokens)
    trees = data.trees(records, pack_tokens)
    counts = objective.counts(trees)
    objective.start_step(runtime, policy, records)
    total, points = 0.0, []
    for pack in pack_trees(trees, pack_tokens):
        sums = objective(policy(pack, gradient_rows=objective.gradient_rows(pack)), pack)
        part = sum(value / counts[name] for name, value in sums.losses.items())
        part.backward()
        total += part.item()
        value, count = sums.metrics["kl"].tolist()
        points.append(value / count)
    assert len(set(points)) == 1
    return points[0], total, gradient(model)


@pytest.mark.parametrize("pack_tokens", [8, 64])
@pytest.mark.parametrize("records", [range(4), [1, 3], [2, 2, 0]], ids=str)
@pytest.mark.parametrize("direction", [1, -1])
def test_loss_gradients_and_reference_point_equal_the_equations(model, runtime, pack_tokens, records, direction):
    """In one pack with trees of a common prompt, and in several; a negative estimate of the reference point counts as 0."""
    data = make_set()
    moved = [[0.5, direction * 0.1], [-0.3, direction * 0.4], [1.0, 0.0], [0.2, direction * 0.7]]
    reference = make_reference(model, data, moved)
    expected = plain(model, data, reference, records)
    found = ours(model, data, reference, records, pack_tokens, runtime)
    assert found[:2] == pytest.approx(expected[:2], rel=1e-11, abs=1e-13)
    assert (found[0] > 0) == (direction > 0)
    assert (found[2] - expected[2]).norm() <= 1e-11 * expected[2].norm()


def test_metrics_match_values_by_hand(model, runtime, tmp_path):
    """Labelled responses have no margins, so none are written."""
    data = make_set(forms=("guided", None, None, "guided"))
    moved = [[0.5, 0.1], [-0.25, 0.1], [1.0, 0.1], [0.5, 0.1]]
    objective = KTOObjective(data, make_reference(model, data, moved), OPTIONS, 64)
    with in_float64():
        log = PairLog(runtime, data, "heldout", warn_share=0.0)
        means = evaluate_heldout(runtime, Policy(model), objective, data, 64, log=log, step=0, output=tmp_path)
    assert list(tmp_path.iterdir()) == []
    op, pp = PAIR_KINDS
    # Scored tokens of the records: 4, 3, 2, 3. Of the mismatched: 3, 3, 3, 4.
    assert means["eval/kl"] == pytest.approx(0.1 * 13 / 4)
    assert means["eval/rewards/chosen"] == pytest.approx(0.3 * (2 + 2) / 2)
    assert means["eval/rewards/rejected"] == pytest.approx(0.3 * (-0.75 + 1.5) / 2)
    assert means["eval/rewards/margins"] == means["eval/rewards/chosen"] - means["eval/rewards/rejected"]
    assert means[f"eval/{op}/rewards/chosen"] == pytest.approx(0.3 * 2)
    assert means[f"eval/{pp}/delta_logps/rejected"] == pytest.approx(-0.75)
    assert means["eval/guided/rewards/margins"] == pytest.approx(0.3 * (2 - 1.5))
    assert {"eval/entropy/chosen", "eval/mean_token_accuracy/rejected", "eval/logps/chosen"} <= means.keys()


def test_entropies_are_means_over_the_tokens_of_each_label(model):
    data = make_set()
    zeros = PairLogps.zeros(data.as_pairs.scored_tokens)
    (pack,) = pack_trees(data.trees(range(4), 64), 64)
    entropy = torch.arange(1.0, pack.rows + 1)
    metrics = KTOObjective(data, zeros, OPTIONS, 64).describe(TokenStatistics(-entropy, entropy, entropy > 3), pack)
    by_record = {
        record: entropy[pack.entry_row[pack.entry_sequence == place]] for place, record in enumerate(pack.records)
    }
    chosen = torch.cat([by_record[0], by_record[2]])
    assert metrics["entropy/chosen"].tolist() == [chosen.sum().item(), 6]
    assert metrics["mean_token_accuracy/rejected"][1] == 6


def test_the_check_of_the_start_compares_both_sides_with_the_reference(model, runtime):
    data = make_set()
    step = Steps(data.as_pairs, Schedule(data.kinds, 4, seed=0), 64)[0]

    @in_float64()
    def check(moved):
        objective = KTOObjective(data, make_reference(model, data, moved), OPTIONS, 64)
        return check_start(runtime, Policy(model), objective, step, data.as_pairs, 64)

    found = check([[0, 0]] * 4)
    assert found.loss is None
    assert found.describe().startswith("log-probs differ from the reference by ")
    for side in ([0.1, 0], [0, 0.1]):
        with pytest.raises(SaroError, match=r"of r[0-3] differ from the reference"):
            check([side] * 4)
