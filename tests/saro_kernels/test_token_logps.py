"""Compare token_logps with its definition in float64; check its memory, its matrix products and its error messages."""

import pytest
import torch
from head_cases import (
    BUDGETED,
    DTYPES,
    SHAPES,
    VARIANTS,
    Watch,
    assert_within_budget,
    exact,
    inputs,
    interpreted,
    split,
    values_and_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from saro_kernels import float32_products, token_logps
from saro_kernels.definition import reference_token_logps
from saro_kernels.tiled import tiled_token_logps
from saro_kernels.torch_tile import ROUNDED_FIRST

IMPLS = ["reference", "tiled-torch", pytest.param("tiled-triton", marks=interpreted)]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("impl", ["auto", "reference", "tiled"])
def test_equals_the_definition_in_float64(shape, variant, impl):
    wants_bias, options = split(variant)
    case = inputs(*shape, torch.float64, bias=wants_bias)
    for needs in (["hidden"], ["hidden", "weight"] + ["bias"] * wants_bias):
        got = values_and_gradients(token_logps, *case, needs, **options, impl=impl)
        for ours, truth in zip(got, exact(*case, needs, **options), strict=True):
            assert ours.dtype == torch.float64
            torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", BUDGETED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_error_budget(dtype, shape, variant):
    wants_bias, options = split(variant)
    case = inputs(*shape, dtype, bias=wants_bias)
    for needs in (["hidden"], ["hidden", "weight"] + ["bias"] * wants_bias):
        got = values_and_gradients(tiled_token_logps, *case, needs, **options, rows=16)
        plain = values_and_gradients(reference_token_logps, *case, needs, **options)
        assert_within_budget(got, plain, exact(*case, needs, **options))
        assert got[0].dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 40),
    d=st.integers(1, 20),
    v=st.integers(1, 70),
    rows=st.integers(1, 41),
    dtype=st.sampled_from(DTYPES),
    variant=st.sampled_from(VARIANTS),
    seed=st.integers(0, 1000),
)
def test_any_tiling_equals_one_tile(n, d, v, rows, dtype, variant, seed):
    # Equal up to the GEMM's order of summation, which depends on the rows of the tile.
    wants_bias, options = split(variant)
    case = inputs(n, d, v, dtype, bias=wants_bias, seed=seed)
    tolerance = 8 * torch.finfo(dtype).eps
    for needs in (["hidden"], ["hidden", "weight"] + ["bias"] * wants_bias):
        one = values_and_gradients(tiled_token_logps, *case, needs, **options, rows=max(n, 1))
        many = values_and_gradients(tiled_token_logps, *case, needs, **options, rows=rows)
        for a, b in zip(one, many, strict=True):
            scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_log_probs_of_low_precision_inputs_have_the_error_of_float32(impl, variant, dtype):
    """Logits rounded to bfloat16 would be off by hundredths of a nat, and the sum over a response by about a nat."""
    wants_bias, options = split(variant)
    hidden, weight, targets, bias, upstream = inputs(160, 64, 3000, dtype, bias=wants_bias, spread=6.0)
    (want,) = exact(hidden, weight, targets, bias, upstream, [], **options)
    got = token_logps(hidden, weight, targets, bias=bias, **options, impl=impl)
    assert (got - want).abs().max() < 2e-5
    assert abs((got - want).sum()) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_extreme_logits(dtype, softcap):
    hidden = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=dtype)
    weight = torch.tensor([[1e4], [-1e4], [0.0], [9984.0]], dtype=dtype)
    targets = torch.tensor([0, 0, 1, 1])
    upstream = torch.ones(4, dtype=torch.float64)
    case, needs = (hidden, weight, targets, None, upstream), ["hidden", "weight"]
    want = exact(*case, needs, softcap=softcap)
    got = values_and_gradients(token_logps, *case, needs, softcap=softcap)
    frozen = values_and_gradients(token_logps, *case, ["hidden"], softcap=softcap)
    plain = values_and_gradients(token_logps, *case, needs, softcap=softcap, impl="reference")
    assert all(x.isfinite().all() for x in got + frozen)
    if dtype == torch.float64:
        for ours, truth in zip(got + frozen, want + want[:2], strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-12, atol=4 * torch.finfo(dtype).eps * 1e4)
    else:
        assert_within_budget(got, plain, want)
        assert_within_budget(frozen, plain[:2], want[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_contiguous_inputs(dtype):
    hidden, weight, targets, bias, upstream = inputs(37, 11, 53, dtype, bias=True)
    strided = (
        torch.stack([hidden, hidden], 2)[:, :, 0],
        torch.stack([weight, weight], 2)[:, :, 1],
        torch.stack([targets, targets], 1)[:, 0],
        torch.stack([bias, bias], 1)[:, 1],
    )
    assert not any(x.is_contiguous() for x in strided)
    for h, w, t, b in (strided, (hidden.T.contiguous().T, weight.T.contiguous().T, targets, bias)):
        for frozen in (True, False):
            h, w, b = h.detach().requires_grad_(), w.detach(), b.detach()
            leaves = [h] if frozen else [h, w.requires_grad_(), b.requires_grad_()]
            logps = tiled_token_logps(h, w, t, bias=b, softcap=None, scale=1.0, rows=8)
            got = [logps.detach(), *torch.autograd.grad(logps @ upstream.float(), leaves)]
            needs = ["hidden"] if frozen else ["hidden", "weight", "bias"]
            case = (hidden, weight, targets, bias, upstream)
            plain = values_and_gradients(reference_token_logps, *case, needs, softcap=None, scale=1.0)
            assert_within_budget(got, plain, exact(*case, needs))


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_no_rows_have_zero_gradients(impl):
    hidden, weight, targets, bias, _ = inputs(0, 4, 9, bias=True)
    for leaves in ([hidden], [hidden, weight, bias]):
        for leaf in leaves:
            leaf.requires_grad_()
        logps = token_logps(hidden, weight, targets, bias=bias, impl=impl)
        assert logps.shape == (0,)
        for leaf, gradient in zip(leaves, torch.autograd.grad(logps.sum(), leaves), strict=True):
            assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs", [["weight"], ["bias"], ["weight", "bias"], ["hidden", "bias"]], ids=str)
def test_any_subset_of_gradients(dtype, needs):
    case = inputs(21, 6, 31, dtype, bias=True)
    options = {"softcap": 4.0, "scale": 0.5}
    got = values_and_gradients(tiled_token_logps, *case, needs, **options, rows=8)
    plain = values_and_gradients(reference_token_logps, *case, needs, **options)
    assert_within_budget(got, plain, exact(*case, needs, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_master_weights(dtype):
    hidden, weight, targets, bias, upstream = inputs(50, 12, 41, dtype, bias=True)
    case, needs = (hidden, weight.float(), targets, bias.float(), upstream), ["hidden", "weight", "bias"]
    got = values_and_gradients(tiled_token_logps, *case, needs, softcap=None, scale=1.0, rows=8)
    plain = values_and_gradients(reference_token_logps, *case, needs, softcap=None, scale=1.0)
    assert [x.dtype for x in got] == [torch.float32, dtype, torch.float32, torch.float32]
    # The gradient of the logits is rounded before it is summed. The plain path does not round that of a float32 bias.
    plain[3] = plain[3].to(dtype).float()
    assert_within_budget(got, plain, exact(*case, needs))


def test_weight_gradient_of_many_tiles_is_summed_in_float32():
    # A sum of 1,024 halves, one per tile: in bfloat16 it would stop growing at 128.
    hidden, weight, targets = torch.ones(1024, 1).bfloat16(), torch.zeros(2, 1).bfloat16(), torch.zeros(1024).long()
    case = (hidden, weight, targets, None, torch.ones(1024))
    _, gradient = values_and_gradients(tiled_token_logps, *case, ["weight"], softcap=None, scale=1.0, rows=1)
    assert gradient.flatten().tolist() == [512, -512]


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("needs", [["hidden"], ["hidden", "weight"]], ids=str)
def test_autocast_casts_as_for_a_linear_layer(impl, needs):
    case = inputs(20, 8, 33)
    hidden, weight, targets, _, upstream = case
    low = (hidden.bfloat16(), weight, targets, None, upstream)

    def under_autocast(*args, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return token_logps(*args, **options)

    got = values_and_gradients(under_autocast, *case, needs, impl=impl)
    want = values_and_gradients(token_logps, *low, needs, impl=impl)
    assert [x.dtype for x in got] == [torch.float32] * len(got)
    assert all(torch.equal(a, b.float()) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_autocast_does_not_cast_a_bfloat16_hidden(impl):
    hidden, weight, targets, _, _ = inputs(20, 8, 33, torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        got = token_logps(hidden, weight, targets, impl=impl)
    assert torch.equal(got, token_logps(hidden, weight, targets, impl=impl))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("frozen", [True, False])
def test_gradcheck(variant, frozen):
    wants_bias, options = split(variant)
    hidden, weight, targets, bias, _ = inputs(7, 3, 5, torch.float64, bias=wants_bias)
    leaves = [hidden] if frozen else [x for x in (hidden, weight, bias) if x is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    torch.autograd.gradcheck(
        lambda *_: tiled_token_logps(hidden, weight, targets, bias=bias, **options, rows=3), leaves
    )


@pytest.mark.parametrize("frozen", [True, False])
def test_a_second_derivative_is_an_error(frozen):
    hidden, weight, targets, _, _ = inputs(4, 3, 5, torch.float64)
    weight.requires_grad_(not frozen)
    logps = token_logps(hidden.requires_grad_(), weight, targets)
    (gradient,) = torch.autograd.grad(logps.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("needs", [["hidden"], ["hidden", "weight"]], ids=str)
def test_a_second_backward_gives_the_same_gradients(needs):
    hidden, weight, targets, _, _ = inputs(9, 3, 5)
    leaves = [x.requires_grad_() for k, x in {"hidden": hidden, "weight": weight}.items() if k in needs]
    loss = token_logps(hidden, weight, targets).sum()
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_peak_memory_is_one_tile_and_the_outputs(monkeypatch, dtype, softcap):
    n, d, v, rows = 256, 8, 4000, 16
    hidden, weight, targets, _, _ = inputs(n, d, v, dtype)
    statistics_bytes = 8 if dtype == torch.float64 else 4
    # The gradient is written over the logits. That of a softcap needs a buffer for tanh's slope.
    tile_bytes = rows * v * statistics_bytes
    slope_bytes = rows * v * statistics_bytes if softcap else 0
    # Per tile, a few numbers per row; if the factors are bfloat16, float32 copies of its hidden rows and of a block of
    # the weight or of the gradient, and the first columns of the gradient.
    small_bytes = n * 8 * statistics_bytes
    if dtype == torch.bfloat16:
        monkeypatch.setattr(float32_products, "BLOCK_BYTES", 4096)
        small_bytes += rows * d * 4 + 4096 + rows * ROUNDED_FIRST * 2
    options = {"bias": None, "softcap": softcap, "scale": 1.0, "rows": rows}

    def watched(function, *args, **kwargs):
        with Watch() as watch:
            result = function(*args, **kwargs)
        return result, watch

    _, scoring = watched(tiled_token_logps, hidden, weight, targets, **options)
    assert tile_bytes <= scoring.peak_bytes <= tile_bytes + small_bytes

    output, forward = watched(tiled_token_logps, hidden.requires_grad_(), weight, targets, **options)
    hidden_bytes = hidden.numel() * hidden.element_size()
    assert forward.peak_bytes <= tile_bytes + slope_bytes + hidden_bytes + small_bytes
    _, backward = watched(torch.autograd.grad, output.sum(), hidden)
    assert backward.peak_bytes <= 2 * hidden_bytes + small_bytes

    output, forward = watched(tiled_token_logps, hidden, weight.requires_grad_(), targets, **options)
    assert forward.peak_bytes <= tile_bytes + small_bytes
    _, backward = watched(torch.autograd.grad, output.sum(), [hidden, weight])
    # d weight is summed in float32. Its rounded copy is made at the end, while the tile is still in memory.
    weight_bytes = weight.numel() * (statistics_bytes + (2 if dtype == torch.bfloat16 else 0))
    assert backward.peak_bytes <= tile_bytes + slope_bytes + hidden_bytes + weight_bytes + small_bytes

    for watch in (scoring, forward, backward):
        assert watch.largest_bytes <= max(rows * v, weight.numel()) * statistics_bytes < n * v * 2


def test_the_watch_sees_the_memory_of_the_plain_path():
    # A control for the test above: the watch does see all logits if they exist.
    hidden, weight, targets, _, _ = inputs(256, 8, 4000)
    with Watch() as watch:
        reference_token_logps(hidden, weight, targets, bias=None, softcap=None, scale=1.0)
    assert watch.largest_bytes == 256 * 4000 * 4
    assert watch.peak_bytes >= 2 * watch.largest_bytes


@pytest.mark.parametrize("bias", [False, True])
def test_matrix_products_per_tile(bias):
    hidden, weight, targets, offset, _ = inputs(40, 4, 9, bias=bias)
    options = {"bias": offset, "softcap": None, "scale": 1.0, "rows": 8}

    def products(function):
        with Watch() as watch:
            result = function()
        return result, watch.products / 5

    assert products(lambda: tiled_token_logps(hidden, weight, targets, **options))[1] == 1
    hidden.requires_grad_()
    with torch.no_grad():
        assert products(lambda: tiled_token_logps(hidden, weight, targets, **options))[1] == 1
    logps, forward = products(lambda: tiled_token_logps(hidden, weight, targets, **options))
    assert forward == 2
    assert products(lambda: torch.autograd.grad(logps.sum(), hidden))[1] == 0
    weight.requires_grad_()
    logps, forward = products(lambda: tiled_token_logps(hidden, weight, targets, **options))
    assert forward == 1
    assert products(lambda: torch.autograd.grad(logps.sum(), [hidden, weight]))[1] == 3


def test_results_are_bit_equal_when_repeated():
    case = inputs(70, 12, 300)
    first, second = (
        values_and_gradients(tiled_token_logps, *case, ["hidden", "weight"], softcap=None, scale=1.0, rows=32)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_impl_reference_holds_all_logits():
    hidden, weight, targets, _, _ = inputs(4, 3, 5)
    with Watch() as watch:
        token_logps(hidden, weight, targets, impl="reference")
    assert watch.largest_bytes == 4 * 5 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"need hidden \(N, D\)"),
        ({"weight": torch.zeros(5, 4)}, r"got \(2, 3\) and \(5, 4\)"),
        ({"weight": torch.zeros(0, 3)}, "V > 0"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"shape \(2,\); got \(3,\)"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, "must be int64, not torch.int32"),
        ({"bias": torch.zeros(4)}, r"shape \(5,\); got \(4,\)"),
        ({"hidden": torch.zeros(2, 3, dtype=torch.int64)}, "hidden must be float32"),
        ({"weight": torch.zeros(5, 3, dtype=torch.bfloat16)}, "weight is torch.bfloat16, hidden torch.float32; cast"),
        ({"bias": torch.zeros(5, dtype=torch.float64)}, "bias is torch.float64, hidden torch.float32; cast"),
        ({"weight": torch.zeros(5, 3, device="meta")}, "weight is on meta, hidden on cpu"),
        ({"targets": torch.tensor([0, 5])}, r"from 0 to 5, outside \[0, 5\)"),
        ({"targets": torch.tensor([-100, 1])}, r"from -100 to 1, outside \[0, 5\)"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"softcap": float("inf")}, "softcap must be positive"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_bad_arguments(change, message, impl):
    arguments = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "targets": torch.tensor([0, 4])} | change
    with pytest.raises(ValueError, match=message):
        token_logps(**arguments, impl=impl)
