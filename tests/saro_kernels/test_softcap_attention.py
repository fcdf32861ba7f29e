"""Compare attention with capped scores with its definition in float64, and check how much memory it takes."""

from __future__ import annotations

import pytest
import torch
from attention_cases import definition, output_and_gradients
from head_cases import Watch, assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st

from saro_kernels import softcap_attention as module
from saro_kernels.softcap_attention import softcap_attention

SOFTCAP, SCALE = 1.5, 0.6

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(queries, keys, heads=4, groups=2, size=8, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    shapes = (heads, queries), (groups, keys), (groups, keys)
    return [torch.randn(1, n, length, size, generator=rng, dtype=torch.float64).to(dtype) for n, length in shapes]


def causal(queries, keys, window=None):
    """Return a causal mask (queries, keys) in which the last query is at the position of the last key."""
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    return (distance >= 0) & (distance < (window or keys))


def plain(query, key, value, mask):
    return definition(query, key, value, mask, SCALE, SOFTCAP)


def capped(query, key, value, mask):
    return softcap_attention(query, key, value, softcap=SOFTCAP, scale=SCALE, attn_mask=mask, is_causal=mask is None)


def run(function, tensors, mask):
    leaves = [x.clone().requires_grad_() for x in tensors]
    return output_and_gradients(function(*leaves, mask), leaves)


@settings(deadline=None, max_examples=60)
@given(
    queries=st.integers(1, 12),
    before=st.integers(0, 9),
    window=st.sampled_from([None, 1, 3, 8]),
    groups=st.sampled_from([1, 2, 4]),
    block=st.sampled_from([1, 100, 300, 2**22]),
)
def test_equals_the_definition_for_any_shape_and_block(queries, before, window, groups, block):
    tensors = inputs(queries, before + queries, groups=groups)
    mask = causal(queries, before + queries, window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_scores_per_block", lambda _: block)
        results = run(capped, tensors, mask)
    for ours, expected in zip(results, run(plain, tensors, mask), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", [50, 2**22])
def test_without_a_mask_it_is_causal(monkeypatch, block):
    monkeypatch.setattr(module, "_scores_per_block", lambda _: block)
    tensors = inputs(9, 9)
    for ours, expected in zip(
        run(capped, tensors, None),
        run(plain, tensors, causal(9, 9)),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_neither_a_mask_nor_causal_is_an_error():
    with pytest.raises(ValueError, match="pass exactly one of them"):
        softcap_attention(*inputs(3, 3), softcap=SOFTCAP, scale=SCALE)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(module, "_scores_per_block", lambda _: 60)
    tensors = [x.requires_grad_() for x in inputs(5, 8, size=3)]
    assert torch.autograd.gradcheck(lambda *x: capped(*x, causal(5, 8)), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(monkeypatch, dtype):
    monkeypatch.setattr(module, "_scores_per_block", lambda _: 4 * 16 * 100)
    tensors, mask = inputs(100, 130, size=32, dtype=dtype), causal(100, 130)
    exact = run(plain, [x.double() for x in tensors], mask)
    assert_within_budget(run(capped, tensors, mask), run(plain, tensors, mask), exact)


def test_scores_far_beyond_the_cap_are_finite():
    tensors = [1e3 * x for x in inputs(6, 6)[:2]] + inputs(6, 6)[2:]
    results = run(capped, tensors, causal(6, 6))
    for ours, expected in zip(results, run(plain, tensors, causal(6, 6)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_no_tensor_of_queries_times_keys_outlives_a_block(monkeypatch):
    queries, heads, rows = 512, 4, 16
    monkeypatch.setattr(module, "_scores_per_block", lambda _: heads * rows * queries)
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
    # The bounds above are far below the memory of all scores.
    assert 4 * block + 2 * inputs_bytes < 4 * heads * queries**2 / 4
