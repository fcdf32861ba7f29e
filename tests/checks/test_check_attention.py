"""check_attention measures the backend in the run's precision, and refuses one that errs in a single row."""

from __future__ import annotations

import pytest
import torch
from attention_cases import VarlenOnCPU
from loaded import DATA, examples_of, load
from sets import pairs_by_hand
from tiny import tiny_config
from torch.nn.attention import varlen

from saro.checks.check_attention import HeadShape, check_attention, head_shapes
from saro.data.tree import build_tree
from saro.errors import SaroError
from saro.model import attention
from saro.model.attention_backend import EITHER

pytestmark = pytest.mark.usefixtures("one_thread")

TREES = [build_tree([DATA.sequence(i)]) for i in range(3)]
PAIRS = [build_tree(pairs_by_hand().sequences(i)) for i in range(3)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "gemma2", "minicpm3"])
@pytest.mark.parametrize("trees", [TREES, PAIRS], ids=["examples", "pairs"])
def test_packed_attention_is_as_exact_as_plain_attention(tiny_model, kind, dtype, trees):
    assert 0 < check_attention(load(tiny_model(kind), dtype=dtype), trees) < 2


def test_the_shapes_are_those_of_the_models_layers():
    assert head_shapes(tiny_config("llama")) == [HeadShape(4, 2, 8, 8, None, None)]
    assert head_shapes(tiny_config("mistral")) == [HeadShape(4, 2, 8, 8, 8, None)]
    assert head_shapes(tiny_config("gemma3")) == [HeadShape(4, 2, 8, 8, 8, None), HeadShape(4, 2, 8, 8, None, None)]
    assert head_shapes(tiny_config("gemma2"))[0].softcap == 1.5
    latent = tiny_config("minicpm3")
    (shape,) = head_shapes(latent)
    assert (shape.size, shape.value_size) == (latent.qk_nope_head_dim + latent.qk_rope_head_dim, latent.v_head_dim)


def in_bfloat16_only(change):
    """Return a function that sabotages the attention of single segments, but not in float32, where the layout is checked."""

    def sabotage(patch):
        original = attention._attend

        def attend(query, key, value, **options):
            if query.dtype != torch.bfloat16:
                return original(query, key, value, **options)
            return change(original, query, key, value, options)

        patch.setattr(attention, "_attend", attend)

    return sabotage


def wrong_last_row(attend, query, key, value, options):
    out = attend(query, key, value, **options)
    return torch.cat([out[:, :, :-1], 1.1 * out[:, :, -1:]], dim=2)


def scale_off_by_five_percent(attend, query, key, value, options):
    return attend(query, key, value, **options | {"scale": options["scale"] * 1.05})


def mask_without_the_first_key(attend, query, key, value, options):
    keys, queries = key.shape[2], query.shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    mask[1:, 0] = False
    return attend(query, key, value, **options | {"attn_mask": mask, "is_causal": False})


def no_gradient_of_keys(attend, query, key, value, options):
    return attend(query, key.detach() + 0 * key, value, **options)


def gradient_of_values_lacks_a_row(attend, query, key, value, options):
    return attend(query, key, torch.cat([value[:, :, :1].detach(), value[:, :, 1:]], dim=2), **options)


def values_that_are_not_numbers(attend, query, key, value, options):
    return attend(query, key, value, **options) * torch.nan


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (wrong_last_row, "outputs"),
        (scale_off_by_five_percent, "outputs"),
        (mask_without_the_first_key, "outputs"),
        (no_gradient_of_keys, "gradients of keys"),
        (gradient_of_values_lacks_a_row, "gradients of values"),
        (values_that_are_not_numbers, "outputs"),
    ],
    ids=lambda x: x.__name__.replace("_", " ") if callable(x) else "",
)
def test_a_backend_that_errs_in_bfloat16_only_is_refused(tiny_model, monkeypatch, change, what):
    policy = load(tiny_model(), dtype="bfloat16")
    in_bfloat16_only(change)(monkeypatch)
    message = rf"^the sdpa attention of packs is wrong on this machine: its {what} over 4 heads of size 8 in torch.bfloat16 err"
    with pytest.raises(SaroError, match=message):
        check_attention(policy, TREES)


@pytest.mark.parametrize(("left", "is_refused"), [(1e-7, False), (1e-4, True)])
def test_gradients_that_must_be_zero_may_be_off_by_rounding_only(tiny_model, monkeypatch, left, is_refused):
    """A token that attends only to itself has no gradient of its query; some CPUs leave the rounding of what cancels."""
    original = attention._attend

    def attend(query, key, value, **options):
        return original(query, key, value, **options) + left * (query - query.detach())

    monkeypatch.setattr(attention, "_attend", attend)
    policy, single = load(tiny_model(), "full"), [build_tree([examples_of(2).sequence(0)])]
    if is_refused:
        with pytest.raises(SaroError, match="gradients of queries over 4 heads"):
            check_attention(policy, single)
    else:
        assert check_attention(policy, single) < 2


def test_a_row_of_many_keys_has_an_error_of_its_own(tiny_model, monkeypatch):
    """The average of many values is small: an error of it is smaller than those of the first rows."""
    long = [build_tree([examples_of(3000).sequence(0)])]
    policy = load(tiny_model(), dtype="bfloat16")
    check_attention(policy, long)

    def wrong_last_row(attend, query, key, value, options):
        out = attend(query, key, value, **options)
        return torch.cat([out[:, :, :-1], out[:, :, -1:] + 0.1 * out[:, :, -2:-1]], dim=2)

    in_bfloat16_only(wrong_last_row)(monkeypatch)
    with pytest.raises(SaroError, match="its outputs over 4 heads"):
        check_attention(policy, long)


def test_it_leaves_the_random_numbers_alone(tiny_model):
    policy = load(tiny_model())
    state = torch.get_rng_state()
    check_attention(policy, TREES)
    assert torch.equal(torch.get_rng_state(), state)


# A policy that chooses the backend for each pack: both are checked, whatever the trees are.


@pytest.fixture
def either(tiny_model, monkeypatch):
    """A policy whose attention is either backend, on a CPU."""
    monkeypatch.setattr(varlen, "varlen_attn", stand_in := VarlenOnCPU())
    policy = load(tiny_model(), dtype="bfloat16")
    policy.attention = EITHER
    return policy, stand_in.calls


@pytest.mark.parametrize("trees", [TREES, [build_tree([examples_of(40).sequence(0)])]], ids=["trees", "one sequence"])
def test_either_backend_is_checked_whatever_the_trees_are(either, monkeypatch, trees):
    policy, varlen_calls = either
    assert 0 < check_attention(policy, trees) < 2
    assert varlen_calls
    in_bfloat16_only(scale_off_by_five_percent)(monkeypatch)
    with pytest.raises(
        SaroError, match=r"^the sdpa attention of packs is wrong .*; set --model.attention varlen, and report it"
    ):
        check_attention(policy, trees)


@pytest.mark.parametrize("trees", [TREES, [build_tree([examples_of(40).sequence(0)])]], ids=["trees", "one sequence"])
def test_a_wrong_varlen_backend_is_refused_whatever_the_trees_are(either, monkeypatch, trees):
    policy, _ = either
    right = varlen.varlen_attn

    def wrong(query, *arguments, **options):
        return right(query * 1.05, *arguments, **options)

    monkeypatch.setattr(varlen, "varlen_attn", wrong)
    monkeypatch.setattr(attention, "_has_enable_gqa", lambda _: True)
    with pytest.raises(
        SaroError, match=r"^the varlen attention of packs is wrong .*; set --model.attention sdpa, and report it"
    ):
        check_attention(policy, trees)
