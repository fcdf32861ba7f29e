"""Attention with capped scores against the definition in float64, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from head_cases import Watch, assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st

from saro.model import softcap_attention as module
from saro.model.softcap_attention import softcap_attention

SOFTCAP, SCALE = 1.5, 0.6

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(queries, keys, heads=4, groups=2, size=8, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    shapes = (heads, queries), (groups, keys), (groups, keys)
    return [torch.randn(1, n, length, size, generator=rng, dtype=torch.float64).to(dtype) for n, length in shapes]


def causal(queries, keys, window=None):
    """(queries, keys): the last query is the last key."""
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    return (distance >= 0) & (distance < (window or keys))


def definition(query, key, value, mask):
    """As transformers' eager attention computes it: the softmax in float32 or wider."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    scores = SOFTCAP * (query @ key.mT * SCALE / SOFTCAP).tanh()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).to(query.dtype) @ value


def capped(query, key, value, mask):
    return softcap_attention(query, key, value, softcap=SOFTCAP, scale=SCALE, attn_mask=mask, is_causal=mask is None)


def output_and_gradients(function, tensors, *args):
    leaves = [x.clone().requires_grad_() for x in tensors]
    output = function(*leaves, *args)
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return [output.detach(), *torch.autograd.grad((output * upstream).sum(), leaves)]


@settings(deadline=None, max_examples=60)
@given(
    queries=st.integers(1, 12),
    before=st.integers(0, 9),
    window=st.sampled_from([None, 1, 3, 8]),
    groups=st.sampled_from([1, 2, 4]),
    block=st.sampled_from([1, 100, 300, 2**22]),
)
def test_is_the_definition_for_any_shape_and_block(queries, before, window, groups, block):
    tensors = inputs(queries, before + queries, groups=groups)
    mask = causal(queries, before + queries, window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module._BLOCK, "cpu", block)
        found = output_and_gradients(capped, tensors, mask)
    for ours, expected in zip(found, output_and_gradients(definition, tensors, mask), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", [50, 2**22])
def test_without_a_mask_it_is_causal(monkeypatch, block):
    monkeypatch.setitem(module._BLOCK, "cpu", block)
    tensors = inputs(9, 9)
    for ours, expected in zip(
        output_and_gradients(capped, tensors, None),
        output_and_gradients(definition, tensors, causal(9, 9)),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_without_a_mask_it_must_be_causal():
    with pytest.raises(ValueError, match="takes a mask, or is_causal"):
        softcap_attention(*inputs(3, 3), softcap=SOFTCAP, scale=SCALE)


def test_gradcheck(monkeypatch):
    monkeypatch.setitem(module._BLOCK, "cpu", 60)
    tensors = [x.requires_grad_() for x in inputs(5, 8, size=3)]
    assert torch.autograd.gradcheck(lambda *x: capped(*x, causal(5, 8)), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_within_the_budget_of_the_plain_path(monkeypatch, dtype):
    monkeypatch.setitem(module._BLOCK, "cpu", 4 * 16 * 100)
    tensors, mask = inputs(100, 130, size=32, dtype=dtype), causal(100, 130)
    exact = output_and_gradients(definition, [x.double() for x in tensors], mask)
    assert_within_budget(
        output_and_gradients(capped, tensors, mask), output_and_gradients(definition, tensors, mask), exact
    )


def test_scores_far_beyond_the_cap_are_finite():
    tensors = [1e3 * x for x in inputs(6, 6)[:2]] + inputs(6, 6)[2:]
    found = output_and_gradients(capped, tensors, causal(6, 6))
    for ours, expected in zip(found, output_and_gradients(definition, tensors, causal(6, 6)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_of_queries_times_keys_nothing_outlives_a_block(monkeypatch):
    queries, heads, rows = 512, 4, 16
    monkeypatch.setitem(module._BLOCK, "cpu", heads * rows * queries)
    leaves = [x.requires_grad_() for x in inputs(queries, queries, heads=heads, dtype=torch.float32)]
    block, inputs_bytes = 4 * heads * rows * queries, sum(x.nbytes for x in leaves)
    with Watch() as forward:
        output = capped(*leaves, None)
    assert sum(forward.live.values()) <= inputs_bytes
    assert block < forward.peak_bytes <= 3 * block + inputs_bytes
    upstream = torch.ones_like(output)
    with Watch() as backward:
        torch.autograd.grad(output, leaves, upstream)
    assert block < backward.peak_bytes <= 4 * block + 2 * inputs_bytes
    # All scores would be this much.
    assert 4 * block + 2 * inputs_bytes < 4 * heads * queries**2 / 4
