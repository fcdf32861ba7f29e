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
from saro.tools.doctor.finding import Check, Finding, within
from saro.tools.doctor.subject import Subject
from saro.train.check_start import check_start
from saro.train.engine import evaluate
from saro.train.rw_objective import RWObjective
from saro.train.srpo_objective import SRPOObjective

# Tokens to generate: enough to run the model's decoding path.
_GENERATED = 4

ATTENTION = "attention backends"


def model_checks(subject: Subject) -> list[Check]:
    """Return checks that leave the model as it was."""
    return [
        Check("packs of examples", partial(_packs, "packs of examples", subject, subject.examples)),
        Check("packs of pair trees", partial(_packs, "packs of pair trees", subject, subject.pairs)),
        Check(ATTENTION, partial(_attention, subject)),
        Check("qlora after generation", partial(_qlora, subject)),
        Check("margins at the start", partial(_start, subject)),
    ]


def _packs(name: str, subject: Subject, data: ExampleSet | PairSet) -> Finding:
    deviation = check_packs(subject.policy, data)
    logps = deviation.logps / deviation.logps_floor
    gradients = deviation.gradients / deviation.gradients_floor
    # check_packs has the limit: it raises above it.
    return Finding(
        name, True, f"{logps:.2g} (gradients {gradients:.2g}) times what rounding makes", f"at most {NOISE_FACTOR:.0f}"
    )


@torch.no_grad()
def _attention(subject: Subject) -> Finding:
    """Check that both attention backends give the same log-probs."""
    policy = subject.policy
    try:
        for backend in BACKENDS:
            choose_backend(backend, policy.causal_lm.device, policy.compute_dtype, policy.causal_lm.config)
    except ValueError as error:
        return Finding(ATTENTION, None, str(error))
    trees = subject.pairs.trees(range(len(subject.pairs)), subject.pack_tokens)
    before = policy.attention
    logps, noises = [], []
    try:
        for backend in BACKENDS:
            policy.attention = backend
            noise = layout_noise(policy, trees, subject.pack_tokens)
            logps.append(noise.logps)
            noises.append(noise.mean)
    finally:
        policy.attention = before
    difference = float(np.abs(logps[0] - logps[1]).mean())
    return within(ATTENTION, difference, NOISE_FACTOR * max(noises), "nats per token apart")


def _qlora(subject: Subject) -> Finding:
    """Check that evaluation and generation leave the gradients of a QLoRA policy as they were.

    If the backend does not repeat itself to the bit, its own differences are the limit.
    """
    name, policy = "qlora after generation", subject.policy
    if subject.model.method != "qlora":
        return Finding(name, None, f"only for method qlora; this is {subject.model.method}")
    first, again = _gradients(subject), _gradients(subject)
    packs = pack_trees(subject.example_trees([0]), subject.pack_tokens)
    evaluate(subject.runtime, policy, RWObjective(subject.examples.kinds), packs)
    _generate(subject)
    after = _gradients(subject)
    noise = ((again - first).norm() / first.norm()).item()
    difference = ((after - first).norm() / first.norm()).item()
    exact = not noise and difference <= 0
    limit = "the same bits" if not noise else f"at most {NOISE_FACTOR * noise:.2g}, it repeats itself to {noise:.2g}"
    return Finding(name, exact or difference <= NOISE_FACTOR * noise, f"gradients differ by {difference:.2g}", limit)


def _gradients(subject: Subject) -> torch.Tensor:
    """Return the gradients of one example's log-probs in all trainable parameters, concatenated, float64."""
    policy = subject.policy
    pack = lay_out(subject.example_trees([0])).to(policy.causal_lm.device)
    with policy.evaluating():
        gradients = torch.autograd.grad(policy(pack).sum(), list(policy.trainable().values()))
    return torch.cat([g.double().flatten() for g in gradients])


def _generate(subject: Subject) -> None:
    """Generate a few tokens after the prompt of the first example."""
    sequence = subject.examples.sequence(0)
    prompt = sequence.tokens[: sequence.scored_from].tolist()
    # Any token will do as the stop token: the model's own need not exist.
    generate(subject.policy, [prompt], stop_ids={prompt[0]}, max_tokens=_GENERATED)


def _start(subject: Subject) -> Finding:
    """Check that the margins of a policy against itself are zero."""
    policy, pairs, budget = subject.policy, subject.pairs, subject.pack_tokens
    # Score the reference pair by pair, in another layout than the packs of the check.
    trees = [tree for i in range(len(pairs)) for tree in pairs.trees([i], budget)]
    reference = score_pairs(policy, pairs, trees, budget)
    objective = SRPOObjective(pairs.kinds, reference, PreferenceConfig())
    start = check_start(subject.runtime, policy, objective, subject.pair_steps()[0], pairs, budget)
    figure = f"{start.margin:.2g} nats, loss {start.loss:.6g}"
    return Finding("margins at the start", True, figure, f"at most {start.allowed_margin:.2g} nats, ln 2")
