"""Checks of the loaded model before it is trained: packs, attention, generation, margins."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from saro.checks.check_packs import check_packs
from saro.checks.noise import NOISE_FACTOR, layout_noise
from saro.config import PreferenceConfig
from saro.data.dataset import ExampleSet, PairSet
from saro.data.packs import lay_out, pack_trees
from saro.model.attention_backend import BACKENDS, choose_backend
from saro.model.generate import generate
from saro.model.score import score_pairs
from saro.tools.doctor.checked_model import CheckedModel
from saro.tools.doctor.finding import Check, Finding, within
from saro.train.check_start import check_start
from saro.train.engine import evaluate
from saro.train.rw_objective import RWObjective
from saro.train.srpo_objective import SRPOObjective

# Tokens to generate: enough to run the model's decoding path.
_GENERATED = 4

ATTENTION = "attention backends"


def model_checks(checked: CheckedModel) -> list[Check]:
    """Return checks that leave the model as it was."""
    return [
        Check("packs of examples", partial(_packs, "packs of examples", checked, checked.examples)),
        Check("packs of pair trees", partial(_packs, "packs of pair trees", checked, checked.pairs)),
        Check(ATTENTION, partial(_attention, checked)),
        Check("qlora after generation", partial(_qlora, checked)),
        Check("margins at the start", partial(_start, checked)),
    ]


def _packs(name: str, checked: CheckedModel, data: ExampleSet | PairSet) -> Finding:
    deviation = check_packs(checked.policy, data)
    logps = deviation.logps / deviation.logps_floor
    gradients = deviation.gradients / deviation.gradients_floor
    # check_packs has the limit: it raises above it.
    return Finding(
        name, True, f"{logps:.2g} (gradients {gradients:.2g}) times what rounding makes", f"at most {NOISE_FACTOR:.0f}"
    )


@torch.no_grad()
def _attention(checked: CheckedModel) -> Finding:
    """Check that both attention backends give the same log-probs."""
    policy = checked.policy
    try:
        for backend in BACKENDS:
            choose_backend(backend, policy.causal_lm.device, policy.compute_dtype, policy.causal_lm.config)
    except ValueError as error:
        return Finding(ATTENTION, None, str(error))
    trees = checked.pairs.trees(range(len(checked.pairs)), checked.pack_tokens)
    before = policy.attention
    logps, noises = [], []
    try:
        for backend in BACKENDS:
            policy.attention = backend
            noise = layout_noise(policy, trees, checked.pack_tokens)
            logps.append(noise.logps)
            noises.append(noise.mean)
    finally:
        policy.attention = before
    difference = float(np.abs(logps[0] - logps[1]).mean())
    return within(ATTENTION, difference, NOISE_FACTOR * max(noises), "nats per token apart")


def _qlora(checked: CheckedModel) -> Finding:
    """Check that evaluation and generation leave the gradients of a QLoRA policy as they were.

    If the backend does not repeat itself to the bit, its own differences are the limit.
    """
    name, policy = "qlora after generation", checked.policy
    if checked.model.method != "qlora":
        return Finding(name, None, f"only for method qlora; this is {checked.model.method}")
    first, again = _gradients(checked), _gradients(checked)
    packs = pack_trees(checked.example_trees([0]), checked.pack_tokens)
    evaluate(checked.runtime, policy, RWObjective(checked.examples.kinds), packs)
    _generate(checked)
    after = _gradients(checked)
    noise = ((again - first).norm() / first.norm()).item()
    difference = ((after - first).norm() / first.norm()).item()
    exact = not noise and difference <= 0
    limit = "the same bits" if not noise else f"at most {NOISE_FACTOR * noise:.2g}, it repeats itself to {noise:.2g}"
    return Finding(name, exact or difference <= NOISE_FACTOR * noise, f"gradients differ by {difference:.2g}", limit)


def _gradients(checked: CheckedModel) -> torch.Tensor:
    """Return the gradients of one example's log-probs in all trainable parameters, concatenated, float64."""
    policy = checked.policy
    pack = lay_out(checked.example_trees([0])).to(policy.causal_lm.device)
    with policy.evaluating():
        gradients = torch.autograd.grad(policy(pack).sum(), list(policy.trainable().values()))
    return torch.cat([g.double().flatten() for g in gradients])


def _generate(checked: CheckedModel) -> None:
    """Generate a few tokens after the prompt of the first example."""
    sequence = checked.examples.sequence(0)
    prompt = sequence.tokens[: sequence.scored_from].tolist()
    # Any token will do as the stop token: the model's own need not exist.
    generate(checked.policy, [prompt], stop_ids={prompt[0]}, max_tokens=_GENERATED)


def _start(checked: CheckedModel) -> Finding:
    """Check that the margins of a policy against itself are zero."""
    policy, pairs, budget = checked.policy, checked.pairs, checked.pack_tokens
    # Score the reference pair by pair, in another layout than the packs of the check.
    trees = [tree for i in range(len(pairs)) for tree in pairs.trees([i], budget)]
    reference = score_pairs(policy, pairs, trees, budget)
    objective = SRPOObjective(pairs.kinds, reference, PreferenceConfig())
    start = check_start(checked.runtime, policy, objective, checked.pair_steps()[0], pairs, budget)
    figure = f"{start.margin:.2g} nats, loss {start.loss:.6g}"
    return Finding("margins at the start", True, figure, f"at most {start.allowed_margin:.2g} nats, ln 2")
