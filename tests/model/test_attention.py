"""Packed tree attention matches a dense mask in float64. Also its refusals, and switching it on and off."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_cases import VarlenOnCPU, VarlenOnCPUOf211, dense, output_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IM_END
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import saro.model.attention as attention
from saro.data.packs import lay_out
from saro.data.tree import ScoredSequence, build_tree
from saro.model.attention import (
    PACKED,
    AttentionPlan,
    native_attention,
    packed_attention,
    use_packed_attention,
)
from saro.model.attention_backend import EITHER

CAUSAL = SimpleNamespace(is_causal=True)
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tiny_model):
    """A tiny model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(tiny_model("mistral"), attn_implementation="sdpa")


def sequence(*tokens, scored_from=1):
    tokens = np.array(tokens, np.int32)
    return ScoredSequence(tokens, scored_from, np.zeros(len(tokens) - scored_from, np.uint8), 0)


@st.composite
def packs(draw):
    """Draw a pack of 1 to 3 trees of 1 to 4 sequences. Tails of one token make segments without a token."""
    trees = []
    for _ in range(draw(st.integers(1, 3))):
        rows = [draw(st.lists(st.integers(0, 2), min_size=2, max_size=12))]
        for _ in range(draw(st.integers(0, 3))):
            base = draw(st.sampled_from(rows))
            cut = draw(st.integers(1, len(base)))
            rows.append(base[:cut] + draw(st.lists(st.integers(0, 2), min_size=1, max_size=6)))
        trees.append(build_tree([sequence(*row) for row in rows]))
    return lay_out(trees)


def tensors(pack, heads=4, groups=2, size=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, n, pack.tokens, size, generator=rng, dtype=torch.float64, requires_grad=True)
        for n in (heads, groups, groups)
    ]


def dense_mask(pack, window):
    """Return the (T, T) mask by definition: all of each ancestor, itself causally, and nothing beyond the window."""
    segment_of = np.repeat(np.arange(len(pack.segments)), [stop - start for start, stop, _ in pack.segments])
    ancestors = []
    for _, _, parent in pack.segments:
        ancestors.append({parent} | ancestors[parent] if parent >= 0 else set())
    mask = torch.zeros(pack.tokens, pack.tokens, dtype=torch.bool)
    for q in range(pack.tokens):
        for k in range(pack.tokens):
            distance = int(pack.position_ids[q] - pack.position_ids[k])
            same = segment_of[q] == segment_of[k] and k <= q
            mask[q, k] = (same or segment_of[k] in ancestors[segment_of[q]]) and (window is None or distance < window)
    return mask


class Operators(TorchDispatchMode):
    """Counts the operators that run in this context, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[operator.overloadpacket.__name__] += 1
        return operator(*args, **(kwargs or {}))


def assert_same(actual, expected, budget):
    """Check that outputs and gradients differ by at most ``budget`` in absolute terms; their entries are about 1."""
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= budget


@pytest.fixture
def varlen_calls(monkeypatch):
    stand_in = VarlenOnCPU()
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    return stand_in.calls


# The plan.


def test_plan_lists_segments_that_have_tokens_with_their_ancestors():
    pack = lay_out(
        [
            build_tree([sequence(5, 6, 7, 8), sequence(5, 6, 9, 10, 11), sequence(5, 6, 9, 12)]),
            build_tree([sequence(1, 2)]),
        ]
    )
    plan = AttentionPlan.of(pack, "sdpa")
    # 5 6 | 7 | 9 | 10 | (12 is never an input) | 1
    assert plan.lengths == (2, 1, 1, 1, 1)
    assert plan.paths == ((0,), (0, 1), (0, 2), (0, 2, 3), (4,))


def test_plan_without_isolation_is_one_causal_sequence():
    pack = lay_out([build_tree([sequence(5, 6, 7), sequence(5, 6, 8, 9)]), build_tree([sequence(1, 2, 3)])])
    plan = AttentionPlan.of(pack, "sdpa", isolated=False)
    assert plan.lengths == (pack.tokens,)
    assert plan.paths == ((0,),)


def test_root_segment_needs_a_mask_only_beyond_the_window():
    plan = AttentionPlan.of(lay_out([build_tree([sequence(*range(9))])]), "sdpa")
    assert plan.mask(0, None, torch.bool) is None
    assert plan.mask(0, 8, torch.bool) is None
    assert plan.mask(0, 7, torch.bool) is not None


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float_mask_is_minus_infinity_exactly_where_the_bool_mask_is_false(dtype, window):
    plan = AttentionPlan.of(lay_out([build_tree([sequence(1, 2, 3, 4, 5), sequence(1, 2, 6, 7, 8)])]), "sdpa")
    mask = plan.mask(1, window, dtype)
    assert mask.dtype == dtype
    assert torch.equal(mask == 0, plan.mask(1, window, torch.bool))
    assert set(mask.unique().tolist()) == {0, -torch.inf}
    assert mask.stride(0) % 8 == 0  # else memory-efficient attention would copy it in each call


def test_torchs_attention_gets_the_float_mask_that_was_made_for_the_first_layer(monkeypatch):
    pack = lay_out([build_tree([sequence(1, 2, 3, 4), sequence(1, 2, 5, 6)])])
    inputs, plan, masks = tensors(pack), AttentionPlan.of(pack, "sdpa"), []
    sdpa = attention.F.scaled_dot_product_attention

    def spy(*args, attn_mask, **options):
        masks.append(attn_mask)
        return sdpa(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    for _ in range(2):
        packed_attention(CAUSAL, *inputs, None, plan=plan)
    first, second = masks[:3], masks[3:]  # 1 2 | 3 | 5
    assert first[0] is None
    assert [mask.dtype for mask in first[1:]] == [torch.float64, torch.float64]
    assert all(a is b for a, b in zip(first, second, strict=True))


def test_masks_are_made_once_for_all_layers():
    plan = AttentionPlan.of(lay_out([build_tree([sequence(1, 2, 3, 4), sequence(1, 2, 5, 6)])]), "sdpa")
    assert plan.mask(1, 3, torch.float32) is plan.mask(1, 3, torch.float32)
    assert plan.mask(1, 3, torch.float32) is not plan.mask(1, None, torch.float32)


# The numbers.


@settings(deadline=None, max_examples=40)
@given(pack=packs(), window=st.sampled_from([None, 1, 2, 3, 8]), groups=st.sampled_from([1, 2, 4]))
def test_sdpa_backend_equals_the_dense_definition(pack, window, groups):
    inputs = tensors(pack, groups=groups)
    output, weights = packed_attention(
        CAUSAL, *inputs, None, plan=AttentionPlan.of(pack, "sdpa"), scaling=0.4, sliding_window=window
    )
    assert weights is None
    assert output.shape == (1, pack.tokens, 4, 8)
    expected = dense(*inputs, dense_mask(pack, window), 0.4)
    assert_same(output_and_gradients(output, inputs), output_and_gradients(expected, inputs), 1e-12)


@settings(deadline=None, max_examples=40)
@given(
    pack=packs(),
    window=st.sampled_from([None, 1, 2, 3, 8]),
    groups=st.sampled_from([1, 2, 4]),
    stand_in=st.sampled_from([VarlenOnCPU, VarlenOnCPUOf211]),
)
def test_varlen_backend_equals_the_sdpa_backend(pack, window, groups, stand_in):
    inputs = tensors(pack, groups=groups)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", stand_in())
        for backend in ("sdpa", "varlen"):
            plan = AttentionPlan.of(pack, backend)
            output, _ = packed_attention(CAUSAL, *inputs, None, plan=plan, scaling=0.4, sliding_window=window)
            assert output.shape == (1, pack.tokens, 4, 8)
            results.append(output_and_gradients(output, inputs))
    assert_same(*results, 1e-12)


@pytest.mark.parametrize("backend", ["sdpa", "varlen"])
def test_the_default_scaling_is_one_over_the_root_of_the_head_size(backend, varlen_calls):
    pack = lay_out([build_tree([sequence(1, 2, 3, 4), sequence(1, 2, 5, 6)])])
    inputs = tensors(pack, size=8)
    output, _ = packed_attention(CAUSAL, *inputs, None, plan=AttentionPlan.of(pack, backend))
    assert (output - dense(*inputs, dense_mask(pack, None), 8**-0.5)).abs().max() <= 1e-12


@settings(deadline=None, max_examples=20)
@given(pack=packs(), window=st.sampled_from([None, 1, 3]), backend=st.sampled_from(["sdpa", "varlen"]))
def test_with_a_softcap_both_backends_equal_the_dense_definition(pack, window, backend):
    inputs, softcap = tensors(pack), 1.5
    plan = AttentionPlan.of(pack, backend)
    output, _ = packed_attention(CAUSAL, *inputs, None, plan=plan, scaling=0.4, sliding_window=window, softcap=softcap)
    expected = dense(*inputs, dense_mask(pack, window), 0.4, softcap)
    assert_same(output_and_gradients(output, inputs), output_and_gradients(expected, inputs), 1e-12)


def test_a_softcap_with_dropout_is_refused(call):
    with pytest.raises(ValueError, match=r"softcapped attention has no dropout; set --model.dropout false"):
        call(softcap=2.0, dropout=0.1)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("backend", ["sdpa", "varlen"])
def test_under_autocast_both_backends_compute_in_one_dtype(backend, softcap, varlen_calls):
    """With float32 master weights, the rotary embedding returns float32 queries and keys, while values are bfloat16."""
    pack = lay_out([build_tree([sequence(1, 2, 3, 4), sequence(1, 2, 5, 6)])])
    query, key, value = (x.detach().float() for x in tensors(pack))
    plan = AttentionPlan.of(pack, backend)
    low = [x.bfloat16() for x in (query, key, value)]
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = packed_attention(CAUSAL, query, key, low[2], None, plan=plan, softcap=softcap)
    expected, _ = packed_attention(CAUSAL, *low, None, plan=plan, softcap=softcap)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_values_may_have_another_size_than_keys():
    pack = lay_out([build_tree([sequence(1, 2, 3, 4), sequence(1, 2, 5, 6)])])
    query, key, _ = tensors(pack)
    value = torch.randn(1, 2, pack.tokens, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output, _ = packed_attention(CAUSAL, query, key, value, None, plan=AttentionPlan.of(pack, "sdpa"), scaling=0.3)
    assert (output - dense(query, key, value, dense_mask(pack, None), 0.3)).abs().max() <= 1e-12


# Arguments of varlen_attn, which runs on CUDA only.


@pytest.mark.parametrize(("window", "passed"), [(None, (-1, 0)), (4, (3, 0)), (1, (0, 0))])
def test_the_varlen_window_does_not_count_the_token_itself(window, passed, varlen_calls):
    pack = lay_out([build_tree([sequence(*range(7))])])
    packed_attention(CAUSAL, *tensors(pack), None, plan=AttentionPlan.of(pack, "varlen"), sliding_window=window)
    assert [call.window for call in varlen_calls] == [passed]


@pytest.mark.parametrize(
    ("rows", "window", "backend"),
    [
        ([[1, 2, 3, 4, 5, 0]], None, "sdpa"),
        ([[1, 2, 3, 4, 5, 0]], 5, "sdpa"),
        ([[1, 2, 3, 4, 5, 0]], 4, "varlen"),  # SDPA would need a mask
        ([[1, 2, 3, 0], [4, 5, 0]], None, "varlen"),
        ([[1, 2, 3, 0], [1, 2, 4, 0]], None, "varlen"),
        ([[1, 2, 3, 0], [4, 0]], 5, "varlen"),
    ],
    ids=["one sequence", "within the window", "beyond the window", "two sequences", "a tree", "two within the window"],
)
def test_either_backend_is_sdpa_for_one_sequence_and_varlen_for_all_else(rows, window, backend, varlen_calls):
    trees = [build_tree([sequence(*row) for row in rows])] if rows[0][:2] == rows[-1][:2] else None
    pack = lay_out(trees or [build_tree([sequence(*row)]) for row in rows])
    plan = AttentionPlan.of(pack, EITHER)
    assert plan.backend_of(window) == backend
    inputs = tensors(pack)
    output, _ = packed_attention(CAUSAL, *inputs, None, plan=plan, sliding_window=window)
    assert len(varlen_calls) == (backend == "varlen")
    expected, _ = packed_attention(CAUSAL, *inputs, None, plan=AttentionPlan.of(pack, "sdpa"), sliding_window=window)
    assert_same([output], [expected], 1e-12)


def test_a_layer_with_a_window_and_one_without_may_run_different_backends(varlen_calls):
    plan = AttentionPlan.of(lay_out([build_tree([sequence(1, 2, 3, 4, 5, 0)])]), EITHER)
    assert [plan.backend_of(window) for window in (None, 2)] == ["sdpa", "varlen"]


@pytest.mark.parametrize("backend", ["sdpa", "varlen"])
def test_a_backend_that_was_asked_for_runs_all_packs(backend):
    for rows in ([[1, 2, 0]], [[1, 2, 0], [3, 0]]):
        plan = AttentionPlan.of(lay_out([build_tree([sequence(*row)]) for row in rows]), backend)
        assert {plan.backend_of(window) for window in (None, 1)} == {backend}


def test_varlen_gets_int32_bounds_and_the_longest_query_and_key(varlen_calls):
    tree = build_tree([sequence(1, 2, 3, 4, 5), sequence(1, 2, 3, 6, 7, 8)])
    pack = lay_out([tree, build_tree([sequence(9, 9, 9)])])
    packed_attention(CAUSAL, *tensors(pack), None, plan=AttentionPlan.of(pack, "varlen"))
    (call,) = varlen_calls  # one call for the whole pack
    assert call.q.dtype == call.k.dtype == torch.int32
    assert call.q.tolist() == [0, 3, 4, 6, 8]  # 1 2 3 | 4 | 6 7 | 9 9
    assert call.k.tolist() == [0, 3, 7, 12, 14]  # each path: its ancestors, then itself
    assert (call.max_q, call.max_k) == (3, 5)
    assert type(call.max_q) is type(call.max_k) is int


def test_varlen_copies_no_keys_if_nothing_is_shared(varlen_calls):
    pack = lay_out([build_tree([sequence(1, 2, 3)]), build_tree([sequence(4, 5)])])
    assert AttentionPlan.of(pack, "varlen").varlen().gather is None
    inputs = tensors(pack)
    output, _ = packed_attention(CAUSAL, *inputs, None, plan=AttentionPlan.of(pack, "varlen"), scaling=0.4)
    expected = dense(*inputs, dense_mask(pack, None), 0.4)
    assert_same(output_and_gradients(output, inputs), output_and_gradients(expected, inputs), 1e-12)


@pytest.mark.parametrize("window", [None, 2])
def test_keys_are_repeated_if_no_kernel_can_share_them(monkeypatch, window):
    """This happens on CUDA in float32 or with a mask, where a kernel would otherwise materialise queries x keys."""
    pack = lay_out([build_tree([sequence(1, 2, 3, 4), sequence(1, 2, 5, 6)])])
    inputs, plan, calls = tensors(pack), AttentionPlan.of(pack, "sdpa"), []
    sdpa = attention.F.scaled_dot_product_attention

    def spy(query, key, value, **options):
        calls.append((key.shape[1], value.shape[1], options["enable_gqa"]))
        return sdpa(query, key, value, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    results = []
    for shares in (True, False):
        monkeypatch.setattr(attention, "_shares_keys", lambda query, mask, shares=shares: shares)
        output, _ = packed_attention(CAUSAL, *inputs, None, plan=plan, sliding_window=window)
        results.append(output_and_gradients(output, inputs))
    assert set(calls) == {(2, 2, True), (4, 4, False)}
    assert_same(*results, 1e-12)


def test_varlen_indices_are_made_once_for_all_layers():
    plan = AttentionPlan.of(lay_out([build_tree([sequence(1, 2, 3)])]), "varlen")
    assert plan.varlen() is plan.varlen()


def test_torchs_varlen_attn_has_the_parameters_of_one_of_our_stand_ins():
    def parameters(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters(varlen.varlen_attn) in (parameters(VarlenOnCPU()), parameters(VarlenOnCPUOf211()))


# The gradients of keys that several paths read.


@st.composite
def key_gradients(draw):
    """Draw a pack whose paths share keys, with the gradients (K, 2, 8) of all copies of its keys."""
    pack = draw(packs().filter(lambda pack: AttentionPlan.of(pack, "varlen").varlen().gather is not None))
    copies = len(AttentionPlan.of(pack, "varlen").varlen().gather.tokens)
    rng = torch.Generator().manual_seed(draw(st.integers(0, 100)))
    return pack, torch.randn(2, copies, 2, 8, generator=rng, dtype=torch.float64)


def gradients_of_gathered_keys(pack, upstream):
    """Return the gradients (2, T, 2, 8) of keys and values of which varlen attention reads copies."""
    leaves = [torch.zeros(1, 2, pack.tokens, 8, dtype=upstream.dtype, requires_grad=True) for _ in range(2)]
    query = torch.zeros(1, 2, pack.tokens, 8, dtype=upstream.dtype)

    def attend(query, key, value, *args, **options):
        return (key * upstream[0]).sum() + (value * upstream[1]).sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", attend)
        loss, _ = packed_attention(CAUSAL, query, *leaves, None, plan=AttentionPlan.of(pack, "varlen"))
    return torch.stack([x[0].transpose(0, 1) for x in torch.autograd.grad(loss.sum(), leaves)])


def copies_summed(pack, upstream):
    """Return the same gradients by definition, in float64."""
    tokens = AttentionPlan.of(pack, "varlen").varlen().gather.tokens
    return torch.zeros(2, pack.tokens, 2, 8, dtype=torch.float64).index_add(1, tokens, upstream.double())


@settings(deadline=None, max_examples=40)
@given(key_gradients())
def test_the_gradient_of_a_shared_key_is_the_sum_over_its_copies(case):
    pack, upstream = case
    error = gradients_of_gathered_keys(pack, upstream) - copies_summed(pack, upstream)
    assert error.abs().max() <= 1e-14


@settings(deadline=None, max_examples=40)
@given(key_gradients())
def test_the_gradient_of_a_shared_key_is_rounded_to_bfloat16_once(case):
    pack, upstream = case
    upstream = upstream.bfloat16()
    exact = copies_summed(pack, upstream)
    # Half a bfloat16 ulp of the sum, and float32's error of summands of a few units.
    budget = exact.abs() * 2**-8 + 1e-5
    assert ((gradients_of_gathered_keys(pack, upstream).double() - exact).abs() <= budget).all()


def test_gradients_of_shared_keys_have_the_same_bits_each_time():
    pack = lay_out([build_tree([sequence(*range(30), last, last) for last in range(30, 37)])])
    copies = len(AttentionPlan.of(pack, "varlen").varlen().gather.tokens)
    upstream = torch.randn(2, copies, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    first = gradients_of_gathered_keys(pack, upstream)
    assert all(torch.equal(gradients_of_gathered_keys(pack, upstream), first) for _ in range(3))


def test_the_gradient_of_shared_keys_takes_one_kernel_for_keys_and_one_for_values(varlen_calls):
    pack = lay_out([build_tree([sequence(1, 2, 3, 4), sequence(1, 2, 5, 6)])])
    output, _ = packed_attention(CAUSAL, *(inputs := tensors(pack)), None, plan=AttentionPlan.of(pack, "varlen"))
    with Operators() as operators:
        output.sum().backward(inputs=inputs)
    assert operators.counts["_embedding_bag_forward_only"] == 2
    assert operators.counts["index_add"] == operators.counts["index_add_"] == 0


def test_varlen_with_dropout_is_refused(varlen_calls):
    pack = lay_out([build_tree([sequence(1, 2, 3)])])
    with pytest.raises(ValueError, match=r"no dropout; set --model.attention sdpa or --model.dropout false"):
        packed_attention(CAUSAL, *tensors(pack), None, plan=AttentionPlan.of(pack, "varlen"), dropout=0.1)
    assert not varlen_calls


# Refusals.


@pytest.fixture
def call():
    """Return a function that calls packed_attention on a small pack, with the given arguments."""
    pack = lay_out([build_tree([sequence(1, 2, 3)])])

    def run(module=CAUSAL, attention_mask=None, **arguments):
        arguments = {"plan": AttentionPlan.of(pack, "sdpa")} | arguments
        return packed_attention(module, *tensors(pack), attention_mask, **arguments)

    return run


@pytest.mark.parametrize("name", ["alibi_slopes", "is_causal", "head_mask", "position_bias", "never_heard_of"])
def test_an_unknown_argument_is_refused_by_name(call, name):
    with pytest.raises(ValueError, match=f"does not know the argument {name} of SimpleNamespace"):
        call(**{name: 0.0})


def test_an_unknown_argument_that_is_none_changes_nothing(call):
    assert torch.equal(call(softcap=None, head_mask=None)[0], call()[0])


def test_arguments_without_effect_are_accepted(call):
    others = {"position_ids": torch.arange(2)[None], "use_cache": False, "cache_position": torch.arange(2)}
    assert torch.equal(call(**others)[0], call()[0])


def test_a_mask_is_refused(call):
    with pytest.raises(ValueError, match="does not know the argument attention_mask"):
        call(attention_mask=torch.zeros(1, 1, 2, 2))


def test_a_module_that_is_not_causal_is_refused(call):
    with pytest.raises(ValueError, match="SimpleNamespace is not causal"):
        call(SimpleNamespace(is_causal=False))


def test_a_call_without_a_plan_is_refused(call):
    with pytest.raises(ValueError, match="got no plan of a pack; call the model through Policy"):
        call(plan=None)


def test_the_model_itself_refuses_tokens_without_a_plan(model):
    use_packed_attention(model)
    with pytest.raises(ValueError, match="MistralAttention got no plan"):
        model(input_ids=torch.ones(1, 3, dtype=torch.int64))


# Dropout.


def test_dropout_zeroes_attention_weights_and_scales_the_others():
    pack = lay_out([build_tree([sequence(*range(41)), sequence(*range(20), *range(50, 71))])])
    query, key, _ = tensors(pack, heads=1, groups=1)
    value = torch.eye(pack.tokens, dtype=torch.float64)[None, None]  # the output is the row of weights
    plan = AttentionPlan.of(pack, "sdpa")
    kept, _ = packed_attention(CAUSAL, query, key, value, None, plan=plan)
    torch.manual_seed(0)
    dropped, _ = packed_attention(CAUSAL, query, key, value, None, plan=plan, dropout=0.25)
    allowed = dense_mask(pack, None)
    kept, dropped = kept[0, :, 0][allowed], dropped[0, :, 0][allowed]
    gone = dropped == 0
    assert (dropped[~gone] - kept[~gone] / 0.75).abs().max() <= 1e-12
    # The share of dropped weights is binomial with mean 0.25; allow five standard deviations.
    assert abs(gone.double().mean().item() - 0.25) <= 5 * (0.25 * 0.75 / len(gone)) ** 0.5


def test_zero_dropout_draws_no_random_number(call):
    state = torch.get_rng_state()
    call()
    assert torch.equal(torch.get_rng_state(), state)


# Switching a model between its own attention and packed attention.


def test_native_attention_is_the_models_own_until_the_block_ends(model):
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        own = model(input_ids=ids).logits
        use_packed_attention(model)
        with native_attention(model):
            assert torch.equal(model(input_ids=ids).logits, own)
    assert model.config._attn_implementation == PACKED
    with pytest.raises(ValueError, match="got no plan"):
        model(input_ids=ids)


def test_native_attention_also_ends_after_an_exception(model):
    use_packed_attention(model)
    with pytest.raises(RuntimeError, match="inside"), native_attention(model):
        raise RuntimeError("inside")
    assert model.config._attn_implementation == PACKED


def test_generation_in_native_attention_equals_the_unmodified_model(model):
    ids = torch.tensor([[70, 71, 72, 73, 74]])
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": IM_END, "pad_token_id": 0}
    own = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    use_packed_attention(model)
    with native_attention(model):
        assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **arguments), own)
    assert own.shape[1] > 8 + 1  # longer than the window


def test_saving_in_packed_mode_leaves_no_trace_of_it(model, tmp_path):
    ids = torch.arange(4, 14)[None]
    with torch.no_grad():
        own = model(input_ids=ids).logits
        use_packed_attention(model)
        model.save_pretrained(tmp_path)
        assert PACKED not in (tmp_path / "config.json").read_text()
        assert not any("attn_implementation" in key for key in json.loads((tmp_path / "config.json").read_text()))
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits, own)
