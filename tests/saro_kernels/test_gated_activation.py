"""Compare the gated activation and its gradients with float64, by torch's operators and by Triton's kernels.

The kernels run in Triton's interpreter on any machine (see conftest.py). With TRITON_INTERPRET=0 on a GPU they are compiled.
"""

import pytest
import torch
import torch.nn.functional as F
from head_cases import why_no_interpreter

from saro_kernels.gated_activation import ACTIVATIONS, gated_product, gated_product_backward

DEFINITIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
HAS_GPU = torch.cuda.is_available() and why_no_interpreter() == "TRITON_INTERPRET=0"
DEVICE = "cuda" if HAS_GPU else "cpu"
# Relative error allowed: a few roundings. In bfloat16 it is one, to the nearest on a GPU; Triton's interpreter truncates.
BUDGET = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 2**-8 if HAS_GPU else 2**-7}

needs_triton = pytest.mark.skipif(not HAS_GPU and why_no_interpreter() is not None, reason=str(why_no_interpreter()))
pytestmark = pytest.mark.usefixtures("one_thread")


def draw(shape, dtype):
    """Return random (gated, lifted, gradient of the output); some of gated are far from zero."""
    rng = torch.Generator().manual_seed(0)
    numbers = [torch.randn(shape, generator=rng, dtype=torch.float64) * scale for scale in (4, 1, 1)]
    return [x.to(dtype).to(DEVICE) for x in numbers]


def exact(activation, gated, lifted, upstream):
    """Return (output, d gated, d lifted) in float64."""
    gated, lifted = (x.double().requires_grad_() for x in (gated, lifted))
    output = DEFINITIONS[activation](gated) * lifted
    return [output.detach(), *torch.autograd.grad(output, (gated, lifted), upstream.double())]


def assert_close(values, exacts, dtype):
    for value, truth in zip(values, exacts, strict=True):
        assert value.dtype == dtype
        assert (value.double() - truth).norm() <= BUDGET[dtype] * truth.norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_its_definition(activation, dtype):
    gated, lifted, upstream = draw((7, 33), dtype)
    truth = exact(activation, gated, lifted, upstream)
    assert_close([gated_product(activation, gated, lifted)], truth[:1], dtype)
    assert_close(gated_product_backward(activation, upstream.clone(), gated, lifted), truth, dtype)


@needs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 341), (2, 1024), (0, 8)], ids=str)
def test_the_kernels_equal_the_definition(activation, dtype, shape):
    from saro_kernels.triton_gate import triton_gated_product, triton_gated_product_backward

    gated, lifted, upstream = draw(shape, dtype)
    truth = exact(activation, gated, lifted, upstream)
    assert_close([triton_gated_product(activation, gated, lifted)], truth[:1], dtype)
    assert_close(triton_gated_product_backward(activation, upstream.clone(), gated, lifted), truth, dtype)


@needs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_kernels_are_finite_where_the_activation_saturates(activation):
    from saro_kernels.triton_gate import triton_gated_product_backward

    gated = torch.tensor([[-300.0, -90.0, -20.0, 0.0, 20.0, 90.0, 300.0]], device=DEVICE)
    lifted, upstream = torch.full_like(gated, 2.0), torch.ones_like(gated)
    values = triton_gated_product_backward(activation, upstream.clone(), gated, lifted)
    for value, truth in zip(values, exact(activation, gated, lifted, upstream), strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-6)


def test_the_gradient_of_the_output_is_overwritten_on_purpose():
    gated, lifted, upstream = draw((4, 8), torch.float32)
    hidden, d_gated, d_lifted = gated_product_backward("silu", upstream, gated, lifted)
    assert len({x.data_ptr() for x in (hidden, d_gated, d_lifted)}) == 3
