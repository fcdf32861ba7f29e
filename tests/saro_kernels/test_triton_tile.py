"""Compare Triton's tile op with the definition in float64.

The kernel runs in Triton's interpreter on any machine (see conftest.py). With TRITON_INTERPRET=0 on a GPU it is compiled.
"""

import pytest
import torch
from head_cases import (
    BUDGETED,
    VARIANTS,
    Watch,
    assert_within_budget,
    exact,
    inputs,
    split,
    values_and_gradients,
    why_no_interpreter,
)

from saro_kernels import float32_products, token_logps
from saro_kernels.definition import reference_token_logps
from saro_kernels.tiled import tiled_token_logps

triton = pytest.importorskip("triton", reason="the test extra brings triton for Linux")
import triton.language as tl  # noqa: E402

from saro_kernels.triton_tile import ALIGNMENT, MAX_BLOCK, MIN_BLOCK, TritonTile, _tanh_and_slope, block_size  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
# (rows, vocabulary) of tiles. Few rows, since the interpreter takes ten milliseconds for each; vocabularies near the
# block sizes and the alignment.
TILES = [(1, 1), (5, 1), (1, 16), (5, 2), (3, 97), (2, MIN_BLOCK - 1), (2, MIN_BLOCK), (2, MIN_BLOCK + 1)]
LARGE_TILES = [(2, MAX_BLOCK - 1), (2, MAX_BLOCK), (2, MAX_BLOCK + 1), (1, 50257), (1, 262144)]
# (rows, width, vocabulary) of heads. The errors of the two paths compare only over many numbers: over few, one is lucky.
HEADS = [(1, 1, 1), (7, 5, 1), (12, 40, 97), (12, 40, 300)]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        DEVICE == "cpu" and why_no_interpreter() is not None, reason=f"no GPU, and {why_no_interpreter()}"
    ),
]


def on_device(*tensors):
    return [None if x is None else x.to(DEVICE) for x in tensors]


def filled_tile(rows, vocab, dtype=torch.float32, **options):
    """Return a tile for hidden states of `dtype` with random products, random targets, and random upstream gradients."""
    rng = torch.Generator().manual_seed(0)
    products = 4 * torch.randn(rows, vocab, generator=rng)
    options = {"softcap": None, "scale": 1.0, "gradient": True} | options
    tile = TritonTile(rows, torch.empty(0, dtype=dtype, device=DEVICE), vocab, **options)
    tile.product.copy_(products)
    return tile, *on_device(torch.randint(vocab, (rows,), generator=rng), torch.rand(rows, generator=rng) - 0.3)


def plain_tile(products, targets, upstream, *, softcap, scale):
    """Return [logps, gradient of the products] by autograd, in float32, or in float64 for float64 products."""
    leaf = products.detach().requires_grad_()
    logits = leaf.to(torch.promote_types(leaf.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    # Subtract the maximum, so that float64 keeps its digits where logits are large.
    logps = (logits - logits.detach().amax(1, keepdim=True)).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    return [logps.detach(), *torch.autograd.grad(logps, leaf, upstream.to(logps.dtype))]


def check_tile(tile, targets, upstream):
    """Run a tile, assert that log-probs and gradients are within the error budget, and return them."""
    products, options = tile.product.clone(), {"softcap": tile.softcap, "scale": tile.scale}
    got = [tile.run(targets, upstream), tile.gradient]
    logps, gradient = plain_tile(products, targets, upstream, **options)
    plain = [logps, gradient.to(tile.gradient.dtype)]
    assert_within_budget(got, plain, plain_tile(products.double(), targets, upstream, **options))
    return got


def check_head(case, needs, rows=5, **options):
    """Run a head with this tile op, assert that its results are within the error budget, and return them."""
    case = on_device(*case)
    options = {"softcap": None, "scale": 1.0} | options
    got = values_and_gradients(tiled_token_logps, *case, needs, **options, rows=rows, tile_op="triton")
    plain = values_and_gradients(reference_token_logps, *case, needs, **options)
    assert_within_budget(got, plain, exact(*case, needs, **options))
    return got


@pytest.mark.parametrize("dtype", BUDGETED, ids=str)
@pytest.mark.parametrize("shape", TILES, ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"scale": 0.25}, {"softcap": 2.0, "scale": -1.7}], ids=str)
def test_error_budget_of_a_tile(dtype, shape, options):
    assert check_tile(*filled_tile(*shape, dtype, **options))[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LARGE_TILES, ids=str)
def test_error_budget_of_a_large_tile(dtype, shape):
    check_tile(*filled_tile(*shape, dtype))


@pytest.mark.parametrize("dtype", BUDGETED, ids=str)
@pytest.mark.parametrize("shape", HEADS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_error_budget_of_a_head(dtype, shape, variant, frozen):
    wants_bias, options = split(variant)
    needs = ["hidden"] if frozen else ["hidden", "weight"] + ["bias"] * wants_bias
    check_head(inputs(*shape, dtype, bias=wants_bias), needs, **options)


@pytest.mark.parametrize("dtype", BUDGETED, ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("needs", [["hidden"], ["hidden", "weight"]], ids=str)
def test_extreme_logits(dtype, softcap, needs):
    hidden = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=dtype)
    weight = torch.tensor([[1e4], [-1e4], [0.0], [9984.0]], dtype=dtype)
    case = (hidden, weight, torch.tensor([0, 0, 1, 1]), None, torch.ones(4, dtype=torch.float64))
    assert all(x.isfinite().all() for x in check_head(case, needs, softcap=softcap))


def test_log_probs_keep_their_digits_however_large_the_logits():
    """logit - logsumexp would cancel all but three of them."""
    tile, targets, _ = filled_tile(3, 40, gradient=False)
    tile.product.mul_(64).round_().div_(64).add_(1e4)
    want = tile.product.double().log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(tile.run(targets).double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [True, False])
def test_non_contiguous_inputs(dtype, frozen):
    case = inputs(5, 11, 53, dtype, bias=True)
    upstream = torch.tensor(0.7, device=DEVICE).expand(5)  # what the backward of a sum passes on
    hidden, weight, targets, bias = on_device(*case[:4])
    # On the device: a copy from another one would be contiguous.
    h = torch.stack([hidden, hidden], 2)[:, :, 0]
    w = weight.T.contiguous().T
    t = torch.stack([targets, targets], 1)[:, 0]
    b = torch.stack([bias, bias], 1)[:, 1]
    assert not any(x.is_contiguous() for x in (h, w, t, b, upstream))
    leaves = [h.requires_grad_()] if frozen else [h.requires_grad_(), w.requires_grad_(), b.requires_grad_()]
    logps = tiled_token_logps(h, w, t, bias=b, softcap=None, scale=1.0, rows=2, tile_op="triton")
    got = [logps.detach(), *torch.autograd.grad(logps, leaves, upstream)]
    needs = ["hidden"] if frozen else ["hidden", "weight", "bias"]
    case = (hidden, weight, targets, bias, upstream.double())
    plain = values_and_gradients(reference_token_logps, *case, needs, softcap=None, scale=1.0)
    assert_within_budget(got, plain, exact(*case, needs))


@pytest.mark.parametrize("needs", [["hidden"], ["hidden", "weight", "bias"]], ids=str)
def test_no_rows_have_zero_gradients(needs):
    hidden, weight, targets, bias, upstream = on_device(*inputs(0, 4, 9, bias=True))
    case = (hidden, weight, targets, bias, upstream)
    logps, *gradients = values_and_gradients(tiled_token_logps, *case, needs, softcap=None, scale=1.0, tile_op="triton")
    assert logps.shape == (0,)
    for name, gradient in zip(needs, gradients, strict=True):
        assert torch.equal(gradient, torch.zeros_like({"hidden": hidden, "weight": weight, "bias": bias}[name]))


def test_upstream_gradients_are_one_by_default():
    (tile, targets, _), (other, _, _) = filled_tile(3, 40), filled_tile(3, 40)
    assert torch.equal(tile.run(targets), other.run(targets, torch.ones(3, device=DEVICE)))
    assert torch.equal(tile.gradient, other.gradient)


@pytest.mark.parametrize("dtype", BUDGETED, ids=str)
def test_rows_beyond_the_targets_are_not_changed(dtype):
    tile, targets, _ = filled_tile(4, 40, dtype)
    before = tile.product.clone()
    tile.run(targets[:2])
    assert torch.equal(tile.product[2:], before[2:])
    assert tile.gradient[:2].sum(1).abs().max() < 0.01  # a gradient, no longer logits


def test_without_gradient_products_are_not_changed():
    tile, targets, _ = filled_tile(3, 40, gradient=False)
    before = tile.product.clone()
    tile.run(targets)
    tile.statistics(targets)
    assert torch.equal(tile.product, before)


@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 1000])
@pytest.mark.parametrize("dtype", BUDGETED, ids=str)
def test_rows_are_aligned(dtype, vocab):
    tile, _, _ = filled_tile(3, vocab, dtype)
    for tensor in (tile.product, tile.gradient):
        assert tensor.shape == (3, vocab)
        assert tensor.stride(0) % ALIGNMENT == 0
        assert tensor.storage_offset() % ALIGNMENT == 0
        assert tensor.stride(1) == 1 or vocab == 1


@pytest.mark.parametrize("vocab", [1, MIN_BLOCK, MIN_BLOCK + 1, 3 * MAX_BLOCK + 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_a_block_lies_before_its_logits(dtype, vocab):
    """Threads write it while others still read this block. The kernel waits only between blocks."""
    tile, _, _ = filled_tile(2, vocab, dtype)
    block = block_size(vocab)
    for row in range(2):
        for start in range(0, vocab, block):
            logits = tile.product[row, start:]
            gradient = tile.gradient[row, start : start + block]
            assert gradient.data_ptr() + block * gradient.itemsize <= logits.data_ptr()


@pytest.mark.parametrize("target", [-100, -1, 40, 47, 2**40])
def test_a_target_outside_the_vocabulary_makes_its_row_nan(target):
    tile, targets, _ = filled_tile(3, 40)
    targets[1] = target
    logps = tile.run(targets)
    assert logps.isnan().tolist() == [False, True, False]
    assert tile.gradient.isnan().all(1).tolist() == [False, True, False]
    assert tile.gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("column", [0, 1, 39])
def test_a_nan_product_makes_its_row_nan(column):
    tile, targets, _ = filled_tile(2, 40)
    tile.product[1, column] = float("nan")
    targets[:] = 5
    assert tile.run(targets).isnan().tolist() == [False, True]
    assert tile.gradient[1].isnan().any()


@pytest.mark.parametrize("masked", [[0], [3, 39], list(range(39))], ids=str)
def test_logits_of_minus_infinity_have_no_probability(masked):
    """A bias of -inf removes a token from the vocabulary."""
    tile, targets, _ = filled_tile(2, 40)
    targets[:] = torch.tensor([39, 2])
    masked = [token for token in masked if token != 2]
    tile.product[:, masked] = float("-inf")
    products = tile.product.double().requires_grad_()
    want = products.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    (gradient,) = torch.autograd.grad(want.sum(), products)
    _, entropies, _ = tile.statistics(targets)
    torch.testing.assert_close(tile.run(targets).double(), want.detach())
    torch.testing.assert_close(tile.gradient.double(), gradient, rtol=1e-5, atol=1e-6)
    probabilities = products.softmax(1)
    torch.testing.assert_close(entropies.double(), torch.special.entr(probabilities).sum(1), rtol=1e-5, atol=1e-5)


@triton.jit
def _tanh_kernel(x, tanh, slope, n, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tanh_value, slope_value = _tanh_and_slope(tl.load(x + lanes, mask=lanes < n, other=0.0))
    tl.store(tanh + lanes, tanh_value, mask=lanes < n)
    tl.store(slope + lanes, slope_value, mask=lanes < n)


def test_tanh_and_its_slope_are_exact_to_a_few_ulp():
    size = torch.logspace(-6, 1.5, 4000, dtype=torch.float64).float()
    x = torch.cat([-size, torch.zeros(1), size, torch.tensor([1e4, -1e4])]).to(DEVICE)
    tanh, slope = torch.empty_like(x), torch.empty_like(x)
    _tanh_kernel[(1,)](x, tanh, slope, len(x), BLOCK=8192)
    exact_tanh, exact_slope = x.double().tanh(), x.double().cosh().pow(-2)
    torch.testing.assert_close(tanh.double(), exact_tanh, rtol=5e-7, atol=0)
    torch.testing.assert_close(slope.double(), exact_slope.clamp_min(0), rtol=5e-6, atol=1e-37)


def test_results_are_bit_equal_when_repeated():
    case = on_device(*inputs(4, 12, 300))
    options = {"softcap": None, "scale": 1.0, "rows": 3, "tile_op": "triton"}
    first, second = (values_and_gradients(tiled_token_logps, *case, ["hidden", "weight"], **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_peak_memory_is_one_tile_and_the_outputs(monkeypatch, dtype, softcap):
    n, d, v, rows = 6, 4, 20000, 2
    hidden, weight, targets, _, _ = on_device(*inputs(n, d, v, dtype))
    options = {"bias": None, "softcap": softcap, "scale": 1.0, "rows": rows, "tile_op": "triton"}
    # The tile is one buffer, in which the gradient is written over the logits: none for the softcap's slope.
    tile_bytes = rows * v * 4
    small_bytes = n * 64 + 2 * n * d * 4
    if dtype == torch.bfloat16:
        small_bytes += rows * MAX_BLOCK // 2 * 4
        # Only a GPU writes float32 products of bfloat16 factors. A CPU casts blocks of the weight and the gradient.
        monkeypatch.setattr(float32_products, "BLOCK_BYTES", 4096)
        small_bytes += 4096 if DEVICE == "cpu" else 0
    with Watch() as frozen:
        output = tiled_token_logps(hidden.requires_grad_(), weight, targets, **options)
        torch.autograd.grad(output.sum(), hidden)
    assert tile_bytes <= frozen.peak_bytes <= tile_bytes + small_bytes
    with Watch() as forward:
        output = tiled_token_logps(hidden, weight.requires_grad_(), targets, **options)
    assert tile_bytes <= forward.peak_bytes <= tile_bytes + small_bytes
    # Watch the backward separately: the interpreter keeps the last arguments of the forward for a while.
    with Watch() as backward:
        torch.autograd.grad(output.sum(), [hidden, weight])
    # d weight in float32 and its rounded copy.
    weight_bytes = v * d * (4 + (2 if dtype == torch.bfloat16 else 0))
    assert backward.peak_bytes <= tile_bytes + weight_bytes + small_bytes


def test_token_logps_runs_it_by_name():
    hidden, weight, targets, bias, _ = on_device(*inputs(3, 5, 30, bias=True))
    got = token_logps(hidden, weight, targets, bias=bias, softcap=3.0, scale=0.5, impl="tiled-triton")
    want = token_logps(hidden, weight, targets, bias=bias, softcap=3.0, scale=0.5, impl="reference")
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("vocab", "block"), [(1, 1024), (1025, 2048), (4096, 4096), (262144, 4096)])
def test_a_block_has_an_element_for_every_thread(vocab, block):
    assert block_size(vocab) == block
