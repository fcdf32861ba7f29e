"""Compare our NF4 kernel with the definition and with bitsandbytes, bit for bit, and test when it is used.

The kernel runs in Triton's interpreter on any machine (see conftest.py). With TRITON_INTERPRET=0 on a GPU it is compiled.
"""

import copy

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Params4bit
from head_cases import why_no_interpreter

from saro_kernels import FrozenLinear, nf4, tile_ops

triton = pytest.importorskip("triton", reason="the test extra brings triton for Linux")

from saro_kernels import triton_nf4  # noqa: E402
from saro_kernels.triton_nf4 import WORDS, dequantize_nf4  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
DOUBLE = pytest.mark.parametrize("double", [False, True], ids=["scales", "8-bit scales"])
# Less than a block; a last block that is not full; a last program that is not full; whole programs; more than 256 blocks.
SHAPES = [(1, 8), (5, 8), (7, 72), (3, 1000), (2, 8 * WORDS), (3, 8 * WORDS + 64), (130, 256)]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        DEVICE == "cpu" and why_no_interpreter() is not None, reason=f"no GPU, and {why_no_interpreter()}"
    ),
]


def quantized(shape, dtype=torch.float32, *, double=True, **options):
    """Return (packed, state) of a random weight. Its numbers are of many sizes, so that the scales of blocks differ."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=rng) * torch.rand(shape[0], 1, generator=rng).exp()
    weight = weight.to(DEVICE, dtype)
    return quantize_4bit(weight, **{"quant_type": "nf4", "compress_statistics": double} | options)


def rounded(exact, dtype):
    """Return float32 numbers in `dtype` as the kernel writes them. Triton's interpreter cuts off what bfloat16 cannot hold."""
    if INTERPRETED and dtype == torch.bfloat16:
        exact = (exact.view(torch.int32) & -0x10000).view(torch.float32)
    return exact.to(dtype)


def definition(packed, state):
    """Return the weight by the definition, in float32."""
    scales = state.absmax
    if state.nested:
        nested_scales = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(scales)]
        scales = state.state2.code[scales.int()] * nested_scales + state.offset
    codes = packed.view(torch.uint8).flatten().int()
    codes = torch.stack([codes >> 4, codes & 15], dim=1).flatten()
    return (state.code[codes] * scales.repeat_interleave(state.blocksize)[: len(codes)]).view(state.shape)


def assert_same_bits(got, want):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    bits = torch.int32 if got.dtype == torch.float32 else torch.int16
    assert (got.view(bits) != want.view(bits)).sum() == 0


@DOUBLE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", nf4.DTYPES, ids=str)
def test_the_kernel_has_the_bits_of_the_definition(shape, dtype, double):
    packed, state = quantized(shape, dtype, double=double)
    assert_same_bits(dequantize_nf4(packed, state), rounded(definition(packed, state), dtype))


@DOUBLE
@pytest.mark.parametrize("blocksize", nf4.BLOCK_SIZES)
def test_the_kernel_has_the_bits_of_the_definition_for_every_block_size(blocksize, double):
    packed, state = quantized((9, 1368), blocksize=blocksize, double=double)
    assert state.blocksize == blocksize
    assert_same_bits(dequantize_nf4(packed, state), definition(packed, state))


@DOUBLE
@pytest.mark.parametrize("shape", [(5, 64), (3, 1024), (65, 4096)], ids=str)
@pytest.mark.parametrize("dtype", nf4.DTYPES, ids=str)
def test_the_kernel_has_the_bits_of_bitsandbytes(shape, dtype, double):
    """Rows hold whole blocks: bitsandbytes 0.50.2 computes other rows wrongly on a CPU."""
    packed, state = quantized(shape, dtype, double=double)
    if dtype == torch.bfloat16 and INTERPRETED:
        in_float32 = copy.copy(state)
        in_float32.dtype = torch.float32
        assert_same_bits(dequantize_nf4(packed, state), rounded(dequantize_4bit(packed, in_float32), dtype))
    else:
        assert_same_bits(dequantize_nf4(packed, state), dequantize_4bit(packed, state))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_the_packed_numbers_may_be_stored_in_another_dtype(storage):
    packed, state = quantized((48, 128))
    other, state_of_other = quantized((48, 128), quant_storage=storage)
    assert other.dtype == storage
    assert nf4.layout_problem(other, state_of_other) is None
    assert_same_bits(dequantize_nf4(other, state_of_other), dequantize_nf4(packed, state))


@DOUBLE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_frozen_layer_has_the_weight_that_bitsandbytes_dequantizes(dtype, double):
    """On a GPU it is our kernel's."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    parameter = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=double).to(DEVICE)
    dense = FrozenLinear(parameter, parameter.quant_state).dense(dtype)
    assert type(dense) is torch.Tensor
    assert dense.dtype == dtype
    assert torch.equal(dense, dequantize_4bit(parameter.data, parameter.quant_state).to(dtype))


@pytest.fixture
def launches(monkeypatch):
    """Return a list that gets the state of each weight that our kernel dequantizes."""
    states = []

    def spy(packed, state):
        states.append(state)
        return dequantize_nf4(packed, state)

    monkeypatch.setattr(triton_nf4, "dequantize_nf4", spy)
    return states


def test_a_weight_on_a_device_without_problems_goes_through_our_kernel(launches, monkeypatch):
    monkeypatch.setattr(nf4, "device_problem", lambda device: None)
    packed, state = quantized((64, 64))
    assert nf4.why_not_triton(packed, state) is None
    assert_same_bits(nf4.dequantize(packed, state), definition(packed, state))
    assert launches == [state]


def test_a_weight_on_a_cpu_goes_through_bitsandbytes(launches):
    packed, state = (x.cpu() if isinstance(x, torch.Tensor) else x for x in quantized((64, 64)))
    state.to("cpu")
    assert nf4.why_not_triton(packed, state) == "it runs on CUDA, not on cpu"
    assert torch.equal(nf4.dequantize(packed, state), dequantize_4bit(packed, state))
    assert launches == []


def with_attributes(**values):
    """Return a function that changes attributes of a state; "state2__code" is one of its state2."""

    def change(packed, state):
        for name, value in values.items():
            *owner, name = name.split("__")
            setattr(state.state2 if owner else state, name, value)
        return packed, state

    return change


# Changes of (packed, state) that bitsandbytes can read and our kernel cannot, and the reason.
CANNOT_READ = {
    "fp4": (with_attributes(quant_type="fp4"), "the weight is fp4, not nf4"),
    "float64": (with_attributes(dtype=torch.float64), "it does not write torch.float64"),
    "block size": (with_attributes(blocksize=16), "blocks have 16 numbers, not one of (32, 64"),
    "odd": (with_attributes(shape=torch.Size((3, 5))), "15 numbers are not a multiple of 8"),
    "row": (lambda packed, state: (packed.t(), state), "not one contiguous column"),
    "strided": (lambda packed, state: (packed[::2], state), "not one contiguous column"),
    "unaligned": (lambda packed, state: (packed[4:], state), "column that starts at a multiple of 16 bytes"),
    "float64 code": (with_attributes(code=torch.zeros(16).double()), "scales or codes are not float32"),
    "bfloat16 offset": (with_attributes(offset=torch.tensor(0.0).bfloat16()), "scales or codes are not float32"),
    "float16 scales": (with_attributes(state2__dtype=torch.float16), "not quantized once, to 8 bits"),
    "scales of scales of scales": (with_attributes(state2__nested=True), "not quantized once, to 8 bits"),
    "two devices": (with_attributes(offset=torch.zeros((), device="meta")), "its parts are on several devices"),
}


@pytest.mark.parametrize(("change", "reason"), CANNOT_READ.values(), ids=CANNOT_READ)
def test_a_weight_that_our_kernel_cannot_read_is_refused_with_the_reason(change, reason, monkeypatch):
    monkeypatch.setattr(nf4, "device_problem", lambda device: None)
    packed, state = quantized((64, 64))
    assert nf4.why_not_triton(packed, state) is None
    assert reason in nf4.why_not_triton(*change(packed, state))


def test_float32_scales_may_not_have_another_dtype():
    packed, state = quantized((64, 64), double=False)
    state.absmax = state.absmax.half()
    assert nf4.layout_problem(packed, state) == "scales or codes are not float32"


@pytest.fixture
def gpu(monkeypatch):
    """Make the choice see a CUDA device of compute capability 8.0, with Triton and without its interpreter."""
    monkeypatch.setattr(tile_ops, "_launcher_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    return monkeypatch


def find_device_problem():
    return nf4.device_problem.__wrapped__(torch.device("cuda", 0))  # what the cache keeps must not outlive a test


def test_our_kernel_runs_on_a_gpu_of_compute_capability_8(gpu):
    assert find_device_problem() is None


def test_our_kernel_does_not_run_on_an_old_gpu(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert find_device_problem() == "Some GPU is older than compute capability 8.0"


def test_our_kernel_does_not_run_without_triton(gpu):
    gpu.setattr(tile_ops, "_is_triton_installed", lambda: False)
    assert find_device_problem() == "triton is not installed"


def test_our_kernel_is_not_interpreted_on_a_gpu(gpu):
    gpu.setattr(triton.knobs.runtime, "interpret", True)
    assert find_device_problem() == "Triton's interpreter does not round to bfloat16, it cuts off"
