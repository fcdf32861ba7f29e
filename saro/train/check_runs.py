"""The runs that the start-up check compares: by the model's own forward, and packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature

import numpy as np
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from saro.data.packs import Pack
from saro.data.tree import ScoredSequence
from saro.model.load import dropout_options
from saro.model.policy import Policy

# Entries of lora_B in the check: a layer's output then changes by a few per cent, far more than rounding.
_AWAKE = 0.005


def native_run(
    policy: Policy, sequences: Sequence[ScoredSequence], rows: torch.Tensor, softmax: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs (R,) of ``rows`` and embedding gradients (T, D) by the model's own forward on a right-padded batch."""
    lm = policy.causal_lm
    longest = max(len(s.tokens) for s in sequences) - 1
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, s in enumerate(sequences):
        n = len(s.tokens) - 1
        ids[i, :n] = torch.from_numpy(s.tokens[:-1].astype(np.int64))
        mask[i, :n] = 1
    rows = rows[rows < longest]
    # A batch of one goes without a mask, as transformers' own fast path does.
    arguments = {} if len(sequences) == 1 else {"attention_mask": mask.to(lm.device)}
    # A model with code of its own may have no such option, or take a number alone.
    transformers_own = type(lm).__module__.startswith("transformers.models.")
    can_choose = transformers_own and "logits_to_keep" in signature(lm.forward).parameters
    if can_choose:
        arguments["logits_to_keep"] = rows.to(lm.device)
    with _embeddings(policy) as captured, policy.precision():
        logits = lm(input_ids=ids.to(lm.device), use_cache=False, **arguments).logits
        if not can_choose:
            logits = logits[:, rows.to(lm.device)]
    logps = []
    for i, s in enumerate(sequences):
        here = rows[rows < len(s.tokens) - 1]
        targets = torch.from_numpy(s.tokens.astype(np.int64))[here + 1].to(lm.device)
        logps.append(logits[i, : len(here)].to(softmax).log_softmax(-1).gather(1, targets[:, None])[:, 0])
    result = torch.cat(logps)
    (gradient,) = torch.autograd.grad(result.sum(), captured)
    return result.detach(), torch.cat([gradient[i, : len(s.tokens) - 1] for i, s in enumerate(sequences)])


def packed_run(policy: Policy, pack: Pack, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the policy: log-probs (R,) of these rows of the pack, gradients (T, D)."""
    with _embeddings(policy) as captured:
        logps = policy(pack)[rows]
    (gradient,) = torch.autograd.grad(logps.sum(), captured)
    return logps.detach(), gradient[0]


@contextmanager
def awake(policy: Policy) -> Iterator[None]:
    """Inside, a new adapter changes the model a little: at zero, what it does wrong would not show."""
    asleep = [p for name, p in policy.trainable().items() if "lora_B" in name and not p.any()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in asleep:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * _AWAKE)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in asleep:
                parameter.zero_()


@contextmanager
def recomputing_layers(policy: Policy) -> Iterator[None]:
    """Inside, layers that compute their activations again in the backward do, though the policy is not in training.

    A sequence that fits in training then fits here. Not where the model has dropout, which a layer in training applies.
    """
    lm = policy.causal_lm
    dropout = any(dropout_options(lm.config).values())
    layers = [m for m in lm.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    layers = [] if dropout else layers
    for layer in layers:
        # Of the layer alone: train() would turn on whatever is in it.
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


@contextmanager
def rounded_otherwise(policy: Policy) -> Iterator[None]:
    """Inside, each entry of each layer's output, and of its gradient, is off by at most half a unit of rounding.

    A padded batch can agree with single sequences to the bit, where one kernel computes both. Another kernel, as near to
    the truth, does not: its roundings are these, and the layers above make of them what they make of any.
    """
    eps = torch.finfo(policy.autocast or policy.causal_lm.dtype).eps

    def round_otherwise(layer: int, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        if isinstance(output, tuple):
            return round_otherwise(layer, output[0]), *output[1:]
        # Seeded, and by a generator of its own, so that the check finds the same twice and leaves torch's alone.
        off = torch.rand(output.shape, generator=torch.Generator().manual_seed(layer)).sub_(0.5).mul_(eps)
        return (output * (1 + off.to(output.device))).to(output.dtype)

    number = policy.causal_lm.config.num_hidden_layers
    lists = [m for m in policy.causal_lm.modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    layers = [layer for of_model in lists for layer in of_model]
    handles = [
        layer.register_forward_hook(lambda _, __, output, i=i: round_otherwise(i, output))
        for i, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _embeddings(policy: Policy) -> Iterator[list[torch.Tensor]]:
    """Inside, the output of the input embeddings is a leaf of the graph, put into the list."""
    captured: list[torch.Tensor] = []

    def make_leaf(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        captured.append(output.detach().requires_grad_())
        return captured[-1]

    handle = policy.causal_lm.get_input_embeddings().register_forward_hook(make_leaf)
    try:
        yield captured
    finally:
        handle.remove()
