"""Compare the log-probs, entropies and top-1 flags of every implementation of token_statistics with float64."""

import math

import pytest
import torch
from head_cases import BUDGETED, VARIANTS, Watch, inputs, interpreted, split

from saro_kernels import TokenStatistics, token_statistics
from saro_kernels.tiled import tiled_token_statistics

IMPLS = ["reference", "tiled-torch", pytest.param("tiled-triton", marks=interpreted)]
SHAPES = [(1, 1, 1), (3, 4, 2), (3, 8, 97), (2, 6, 1025)]

pytestmark = pytest.mark.usefixtures("one_thread")


def distributions(hidden, weight, bias=None, *, softcap=None, scale=1.0):
    """Return log-probs (N, V), computed in float64 from the values that the inputs have in their dtype."""
    bias = None if bias is None else bias.double()
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), bias) * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return logits.log_softmax(1)


@pytest.mark.parametrize("dtype", BUDGETED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_equals_the_definition(impl, dtype, shape, variant):
    wants_bias, options = split(variant)
    hidden, weight, targets, bias, _ = inputs(*shape, dtype, bias=wants_bias)
    got = token_statistics(hidden, weight, targets, bias=bias, **options, impl=impl)
    logps = distributions(hidden, weight, bias, **options)
    assert isinstance(got, TokenStatistics)
    assert got.logps.dtype == got.entropy.dtype == torch.float32
    target_logps = logps.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(got.logps.double(), target_logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy.double(), -(logps.exp() * logps).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "tiled-torch"])
def test_float64(impl):
    hidden, weight, targets, bias, _ = inputs(9, 8, 97, torch.float64, bias=True)
    got = token_statistics(hidden, weight, targets, bias=bias, softcap=3.0, impl=impl)
    logps = distributions(hidden, weight, bias, softcap=3.0)
    assert got.entropy.dtype == torch.float64
    torch.testing.assert_close(got.entropy, -(logps.exp() * logps).sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 1, -1])
@pytest.mark.parametrize("impl", IMPLS)
def test_top1_is_only_the_likeliest_token(impl, rank):
    hidden, weight, _, _, _ = inputs(3, 8, 97)
    targets = distributions(hidden, weight).argsort(1, descending=True)[:, rank]
    assert token_statistics(hidden, weight, targets, impl=impl).top1.tolist() == [rank == 0] * 3


@pytest.mark.parametrize("impl", IMPLS)
def test_equally_likely_tokens_are_all_top1(impl):
    hidden, weight = torch.ones(3, 1), torch.tensor([[2.0], [2.0], [1.0]])
    assert token_statistics(hidden, weight, torch.tensor([0, 1, 2]), impl=impl).top1.tolist() == [True, True, False]


@pytest.mark.parametrize("impl", IMPLS)
def test_entropy_of_uniform_and_certain_distributions(impl):
    weight = torch.zeros(50, 1)
    weight[7] = 1e4
    entropy = token_statistics(torch.tensor([[0.0], [1.0]]), weight, torch.tensor([7, 7]), impl=impl).entropy
    torch.testing.assert_close(entropy, torch.tensor([math.log(50), 0.0]))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl):
    hidden, weight, targets, _, _ = inputs(0, 4, 9)
    assert [len(x) for x in token_statistics(hidden, weight, targets, impl=impl)] == [0, 0, 0]


@pytest.mark.parametrize("impl", IMPLS)
def test_has_no_gradient(impl):
    hidden, weight, targets, _, _ = inputs(2, 4, 9)
    got = token_statistics(hidden.requires_grad_(), weight.requires_grad_(), targets, impl=impl)
    assert not any(x.requires_grad for x in got)


@pytest.mark.parametrize("tile_op", ["torch", pytest.param("triton", marks=interpreted)])
def test_any_tiling_gives_the_same_statistics(tile_op):
    hidden, weight, targets, _, _ = inputs(5, 4, 60)
    options = {"bias": None, "softcap": None, "scale": 1.0, "tile_op": tile_op}
    one, many = (tiled_token_statistics(hidden, weight, targets, **options, rows=rows) for rows in (5, 2))
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory_is_one_tile_and_each_tile_takes_one_product(dtype):
    n, v, rows = 64, 4000, 16
    hidden, weight, targets, _, _ = inputs(n, 8, v, dtype)
    with Watch() as watch:
        tiled_token_statistics(hidden, weight, targets, bias=None, softcap=None, scale=1.0, rows=rows)
    tile_bytes = rows * v * 4
    # Float32 copies of the factors; of a long weight they are made by blocks.
    cast_bytes = (rows + v) * 8 * 4 if dtype == torch.bfloat16 else 0
    assert tile_bytes <= watch.peak_bytes <= tile_bytes + cast_bytes + n * 32
    assert watch.products == n / rows
