"""Test the GEMMs with a float32 result, the calls of accelerators by a stand-in, and the settings that they run with."""

from contextlib import suppress

import pytest
import torch
from head_cases import assert_within_budget, exact, inputs, interpreted, split, values_and_gradients

from saro_kernels import float32_products
from saro_kernels.definition import reference_token_logps
from saro_kernels.float32_products import add_product, precise_products
from saro_kernels.tiled import tiled_token_logps

pytestmark = pytest.mark.usefixtures("one_thread")

LOW = [torch.bfloat16, torch.float16]


@pytest.fixture
def out_dtype(monkeypatch):
    """Make products on the CPU take the calls of an accelerator, computed in float64. Lists the calls' dtypes.

    The meta device checks shapes and dtypes as PyTorch does for an accelerator; by `mm`, since that of torch 2.11 does
    not know `out_dtype` in `addmm`.
    """
    calls, addmm = [], torch.addmm

    def stand_in(into, a, b, *, beta, out, out_dtype=None):
        if out_dtype is None:
            return addmm(into, a, b, beta=beta, out=out)
        assert into is out
        torch.mm(a.to("meta"), b.to("meta"), out_dtype=out_dtype, out=out.to("meta"))
        assert out.stride(1) == 1 or out.shape[1] == 1
        calls.append((a.dtype, out.dtype))
        added = out.double() if beta else 0
        return out.copy_(a.double() @ b.double() + added)

    monkeypatch.setattr(torch, "addmm", stand_in)
    monkeypatch.setattr(float32_products, "OUT_DTYPE_DEVICES", ("cpu",))
    return calls


@pytest.mark.parametrize("tile_op", ["torch", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("variant", [{}, {"bias": True, "softcap": 3.0}], ids=str)
def test_on_an_accelerator_gemms_write_float32(out_dtype, variant, dtype, tile_op):
    wants_bias, options = split(variant)
    case = inputs(10, 16, 97, dtype, bias=wants_bias)
    for needs in (["hidden"], ["hidden", "weight"] + ["bias"] * wants_bias):
        out_dtype.clear()
        got = values_and_gradients(tiled_token_logps, *case, needs, **options, rows=5, tile_op=tile_op)
        plain = values_and_gradients(reference_token_logps, *case, needs, **options)
        assert_within_budget(got, plain, exact(*case, needs, **options))
        # Per tile: the logits; with a trainable head also the logits of the backward and d weight.
        products_per_tile = 1 if needs == ["hidden"] else 3
        assert out_dtype == [(dtype, torch.float32)] * 2 * products_per_tile


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("shape", [(5, 7, 90), (90, 7, 5), (1, 1, 1), (3, 400, 2)], ids=str)
@pytest.mark.parametrize("block_bytes", [1, 200, 2**20])
def test_blocks_add_up_to_the_product(monkeypatch, block_bytes, shape, beta, dtype):
    monkeypatch.setattr(float32_products, "BLOCK_BYTES", block_bytes)
    m, k, n = shape
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(m, k, generator=rng).to(dtype), torch.randn(k, n, generator=rng).to(dtype)
    out = torch.randn(m, n, generator=rng) if beta else torch.full((m, n), float("nan"))
    want = a.double() @ b.double() + (out.double() if beta else 0)
    with precise_products(out.device, dtype):
        add_product(out, a, b, beta=beta)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("setting", ["none", "ieee", "tf32", "bf16"])
@pytest.mark.parametrize("fails", [False, True])
def test_settings_of_the_cpu_are_restored(monkeypatch, fails, setting):
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = setting
    try:
        with suppress(KeyError), precise_products(torch.device("cpu"), torch.bfloat16):
            assert matmul.fp32_precision == "bf16"
            if fails:
                raise KeyError
        assert matmul.fp32_precision == setting
    finally:
        matmul.fp32_precision = before


def test_an_inherited_setting_of_the_cpu_stays_inherited():
    matmul = torch.backends.mkldnn.matmul
    assert matmul.fp32_precision == torch.backends.fp32_precision == "none"
    torch.backends.fp32_precision = "tf32"
    try:
        with precise_products(torch.device("cpu"), torch.bfloat16):
            pass
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision = "none"
    assert matmul.fp32_precision == "none"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_factors_that_bfloat16_would_round_keep_the_setting_of_the_cpu(dtype):
    before = torch.backends.mkldnn.matmul.fp32_precision
    with precise_products(torch.device("cpu"), dtype):
        assert torch.backends.mkldnn.matmul.fp32_precision == before


REDUCED = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@pytest.fixture
def matmul():
    """PyTorch's settings for matrix products on CUDA; restored after the test."""
    settings = torch.backends.cuda.matmul
    before = {name: (getattr(settings, name), getattr(settings, f"{name}_split_k")) for name in REDUCED}
    before["allow_fp16_accumulation"] = settings.allow_fp16_accumulation
    yield settings
    for name, value in before.items():
        setattr(settings, name, value)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("allowed", [(True, True), (False, True), (False, False)], ids=str)
def test_on_cuda_products_accumulate_in_float32_whatever_the_settings(matmul, allowed, fails):
    for name in REDUCED:
        setattr(matmul, name, allowed)
    matmul.allow_fp16_accumulation = allowed[0]
    with suppress(KeyError), precise_products(torch.device("cuda"), torch.bfloat16):
        assert not any(getattr(matmul, name) for name in (*REDUCED, "allow_fp16_accumulation"))
        if fails:
            raise KeyError
    assert [(getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in REDUCED] == [allowed] * 2
    assert matmul.allow_fp16_accumulation == allowed[0]
