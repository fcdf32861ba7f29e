"""check_kernels measures the head and the fused LoRA layers on the model's own weights, gradients included."""

from __future__ import annotations

import pytest
import torch
from loaded import load

from saro.checks import check_kernels as module
from saro.checks.check_kernels import check_kernels, nonzero_adapter
from saro.errors import SaroError
from saro_kernels import tiled

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def checked(policy):
    with policy.evaluating(), nonzero_adapter(policy):
        return check_kernels(policy)


@DTYPES
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "minicpm3"])
def test_the_kernels_are_as_exact_as_plain_pytorch(tiny_model, kind, method, dtype):
    assert 0 < checked(load(tiny_model(kind), method, dtype=dtype)) <= 2


@DTYPES
def test_without_kernels_there_is_nothing_to_check(tiny_model, dtype):
    assert checked(load(tiny_model(), dtype=dtype, head="reference", fused_lora=False)) == 0


def head_gradients(patch, change):
    """Sabotage what the head's backward returns: the gradients of hidden states and weight."""
    for function in (tiled._FrozenHead, tiled._TrainableHead):
        original = function.backward
        patch.setattr(function, "backward", staticmethod(lambda ctx, grad, run=original: change(*run(ctx, grad))))


@DTYPES
@pytest.mark.parametrize(
    "change",
    [
        lambda hidden, weight, *others: (1.05 * hidden, weight, *others),
        lambda hidden, weight, *others: (hidden, None if weight is None else 1.05 * weight, *others),
        lambda hidden, weight, *others: (
            hidden,
            None if weight is None else weight * (torch.arange(len(weight)) > 0)[:, None],
            *others,
        ),
    ],
    ids=["hidden states", "weight", "one row of the weight"],
)
def test_wrong_gradients_of_a_trainable_head_are_refused(tiny_model, monkeypatch, change, dtype):
    policy = load(tiny_model(), "full", dtype=dtype)
    head_gradients(monkeypatch, change)
    with pytest.raises(SaroError, match=r"^the head tiled-torch errs by .* set --model.head reference"):
        checked(policy)


@DTYPES
def test_wrong_gradients_under_a_frozen_head_are_refused(tiny_model, monkeypatch, dtype):
    policy = load(tiny_model(), "lora", dtype=dtype)
    head_gradients(monkeypatch, lambda hidden, *others: (1.05 * hidden, *others))
    with pytest.raises(SaroError, match=r"^the head tiled-torch errs by"):
        checked(policy)


@DTYPES
def test_log_probs_from_rounded_logits_are_refused(tiny_model, monkeypatch, dtype):
    """In bfloat16, a GEMM that writes bfloat16 would make such logits."""
    policy = load(tiny_model(), "lora", dtype=dtype)
    original = module.token_logps

    def rounded(hidden, weight, targets, *, impl, **options):
        logps = original(hidden, weight, targets, impl=impl, **options)
        return logps + (logps.bfloat16().float() - logps).detach()

    monkeypatch.setattr(module, "token_logps", rounded)
    with pytest.raises(SaroError, match=r"^the head tiled-torch errs by"):
        checked(policy)


def test_the_last_layer_is_checked_too(tiny_model, monkeypatch):
    policy = load(tiny_model(), "lora")
    last = policy.causal_lm.get_decoder().layers[-1].self_attn.v_proj
    original = type(last).forward
    monkeypatch.setitem(last.scaling, "default", 2.0)
    fused = last.forward
    assert fused.__func__ is not original
    from saro.model import fused_lora

    parts = fused_lora._parts
    monkeypatch.setattr(
        fused_lora,
        "_parts",
        lambda layer: (
            parts(layer) if layer is not last else type(parts(layer))(*list(vars(parts(layer)).values())[:3], 1.0)
        ),
    )
    with pytest.raises(SaroError, match=r"^the fused .*layers\.1\.self_attn\.v_proj errs by"):
        checked(policy)


def test_it_leaves_no_gradients_and_no_random_state(tiny_model):
    policy = load(tiny_model(), "lora")
    state = torch.get_rng_state()
    checked(policy)
    assert all(p.grad is None for p in policy.parameters())
    assert torch.equal(torch.get_rng_state(), state)
