"""Compare `lora_linear` and `lora_gated_mlp` with their definitions, in float64 and by error budget."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from saro_kernels import FrozenLinear, LoraLinear, lora_gated_mlp, lora_linear, lora_linears
from saro_kernels.gated_activation import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("one_thread")


def make_layer(
    n_in: int, n_out: int, r: int = 3, dtype=torch.float64, adapter_dtype=None, bias=False, seed=0
) -> LoraLinear:
    """Return a random layer; the adapter has `dtype` too by default."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    frozen = FrozenLinear(draw(n_out, n_in).to(dtype), bias=draw(n_out).to(dtype) if bias else None)
    a = draw(r, n_in).to(adapter_dtype or dtype).requires_grad_()
    b = draw(n_out, r).to(adapter_dtype or dtype).requires_grad_()
    return LoraLinear(frozen, a, b, 1.5)


def random_rows(*shape: int, dtype=torch.float64, seed=1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain(x: torch.Tensor, layer: LoraLinear) -> torch.Tensor:
    """The definition of `lora_linear`."""
    low = F.linear(F.linear(x, layer.a.to(x.dtype)), layer.b.to(x.dtype))
    return F.linear(x, layer.base.dense(x.dtype), layer.base.bias) + low * layer.scaling


def plain_mlp(x, gate, up, down, activation):
    """The definition of `lora_gated_mlp`."""
    act = {"silu": F.silu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}[activation]
    return plain(act(plain(x, gate)) * plain(x, up), down)


def output_and_gradients(function, x, *layers, weight=None) -> list[torch.Tensor]:
    """Return the output and the gradients of sum(weight * output) by x and by A and B of each layer."""
    x = x.detach().requires_grad_()
    out = function(x, *layers)
    weight = random_rows(*out.shape, seed=9).to(out.dtype) if weight is None else weight
    leaves = [x, *(m for layer in layers if isinstance(layer, LoraLinear) for m in (layer.a, layer.b))]
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("r", [1, 3, 15, 16, 20])  # on a CPU, the products with A and B change layout at r = 16
@pytest.mark.parametrize("shape", [(7, 12), (1, 12), (0, 12), (2, 3, 12), (1, 5, 12)])
def test_linear_equals_its_definition(shape, r, bias):
    layer = make_layer(12, 10, r, bias=bias)
    for ours, expected in zip(
        output_and_gradients(lora_linear, random_rows(*shape), layer),
        output_and_gradients(plain, random_rows(*shape), layer),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def side_by_side(function, **options):
    """Return the function with its outputs, one for each layer, side by side."""
    return lambda x, *layers: torch.cat(function(x, layers, **options), -1)


def each_plain(x, layers):
    """The definition of `lora_linears`."""
    return [plain(x, layer) for layer in layers]


def three_layers(ranks=(3, 3, 3), bias=False, **options) -> list[LoraLinear]:
    """Return layers of unequal widths that read one input."""
    widths = (10, 4, 6)
    return [
        make_layer(12, n, r, bias=bias, seed=i, **options) for i, (n, r) in enumerate(zip(widths, ranks, strict=True))
    ]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [(1, 1, 1), (3, 5, 2), (16, 16, 16), (20, 3, 16)])
@pytest.mark.parametrize("shape", [(7, 12), (0, 12), (2, 3, 12)])
def test_layers_with_one_input_equal_their_definitions(shape, ranks, bias):
    layers, x = three_layers(ranks, bias), random_rows(*shape)
    results = output_and_gradients(side_by_side(lora_linears), x, *layers)
    for ours, expected in zip(results, output_and_gradients(side_by_side(each_plain), x, *layers), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_each_layer_with_one_input_has_a_scaling_of_its_own():
    layers = [replace(layer, scaling=s) for layer, s in zip(three_layers((3, 1, 5)), (0.5, 2.0, -1.0), strict=True)]
    x = random_rows(7, 12)
    results = output_and_gradients(side_by_side(lora_linears), x, *layers)
    for ours, expected in zip(results, output_and_gradients(side_by_side(each_plain), x, *layers), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_an_output_that_is_not_used_gives_its_layer_a_zero_gradient():
    layers, x = three_layers(), random_rows(7, 12).requires_grad_()
    outputs = lora_linears(x, layers)
    d_x, d_b, d_unused = torch.autograd.grad(outputs[0].sum(), (x, layers[0].b, layers[1].b))
    expected = torch.autograd.grad(plain(x, layers[0]).sum(), (x, layers[0].b))
    torch.testing.assert_close((d_x, d_b), expected, rtol=1e-12, atol=1e-12)
    assert not d_unused.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r", [8, 16])
def test_layers_with_one_input_err_at_most_twice_as_much_as_plain_layers(dtype, r):
    layers = [make_layer(96, n, r, seed=n) for n in (80, 40, 24)]
    layers = [replace(layer, base=FrozenLinear(layer.base.weight.to(dtype).double())) for layer in layers]
    for layer in layers:
        layer.a.data, layer.b.data = layer.a.data.float().double(), layer.b.data.float().double()
    x, weight = (random_rows(64, n, seed=n).to(dtype).double() for n in (96, 144))
    truth = output_and_gradients(side_by_side(each_plain), x, *layers, weight=weight)
    ours = _errors(side_by_side(lora_linears), x, layers, dtype, truth)
    theirs = _errors(side_by_side(each_plain), x, layers, dtype, truth)
    for error, budget in zip(ours, theirs, strict=True):
        assert error <= 2 * budget


def count_calls(operator, run) -> int:
    """Return how often `run` calls an operator."""

    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += function is operator
            return function(*args, **kwargs or {})

    with Counter() as counter:
        run()
    return counter.calls


@pytest.mark.parametrize("r", [3, 16])
def test_a_stack_of_the_caller_gives_the_same_bits_and_is_not_copied(r):
    layers = three_layers((r, r, r), dtype=torch.bfloat16, adapter_dtype=torch.float32)
    x = random_rows(7, 12).bfloat16()
    stack = torch.cat([layer.a.detach() for layer in layers]).bfloat16()
    runs = {}

    def run(name, **options):
        function = side_by_side(lora_linears, **options)
        runs[name] = output_and_gradients(function, x, *layers)

    with_stack = count_calls(torch.ops.aten.cat.default, lambda: run("stack", a_stack=stack))
    without = count_calls(torch.ops.aten.cat.default, lambda: run("without"))
    assert without == with_stack + 2  # in the forward and in the backward
    assert all(torch.equal(ours, expected) for ours, expected in zip(runs["stack"], runs["without"], strict=True))
    run("zero", a_stack=torch.zeros_like(stack))
    base = output_and_gradients(side_by_side(lora_linears), x, *(replace(layer, scaling=0.0) for layer in layers))
    assert all(torch.equal(ours, expected) for ours, expected in zip(runs["zero"][:2], base[:2], strict=True))
    run("other dtype", a_stack=torch.full_like(stack, torch.nan, dtype=torch.float16))
    assert all(torch.equal(o, expected) for o, expected in zip(runs["other dtype"], runs["without"], strict=True))


@pytest.mark.parametrize("chunk_rows", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(7, 12), (0, 12), (2, 3, 12)])
def test_mlp_equals_its_definition(shape, activation, chunk_rows):
    layers = make_layer(12, 20, seed=1, bias=True), make_layer(12, 20, seed=2), make_layer(20, 12, seed=3, bias=True)

    def ours(x, *layers):
        return lora_gated_mlp(x, *layers, activation, chunk_rows=chunk_rows)

    def expected(x, *layers):
        return plain_mlp(x, *layers, activation)

    x = random_rows(*shape)
    results, definitions = output_and_gradients(ours, x, *layers), output_and_gradients(expected, x, *layers)
    for result, definition in zip(results, definitions, strict=True):
        torch.testing.assert_close(result, definition, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    layer = make_layer(5, 4, r=2)
    assert gradcheck(
        lambda x, a, b: lora_linear(x, LoraLinear(layer.base, a, b, 0.7)),
        (random_rows(3, 5).requires_grad_(), layer.a, layer.b),
    )


@pytest.mark.parametrize("chunk_rows", [None, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_mlp(activation, chunk_rows):
    layers = make_layer(4, 6, r=2, seed=1), make_layer(4, 6, r=2, seed=2), make_layer(6, 4, r=2, seed=3)
    matrices = [m for layer in layers for m in (layer.a, layer.b)]

    def mlp(x, *matrices):
        pairs = zip(layers, matrices[0::2], matrices[1::2], strict=True)
        parts = (LoraLinear(layer.base, a, b, layer.scaling) for layer, a, b in pairs)
        return lora_gated_mlp(x, *parts, activation, chunk_rows=chunk_rows)

    assert gradcheck(mlp, (random_rows(3, 4).requires_grad_(), *matrices))


def _errors(function, x, layers, dtype, truth) -> list[float]:
    """Return the relative errors of the output and the gradients, with float32 adapters and all else in ``dtype``."""
    cast = [
        LoraLinear(
            base=FrozenLinear(layer.base.weight.to(dtype)),
            a=layer.a.detach().float().requires_grad_(),
            b=layer.b.detach().float().requires_grad_(),
            scaling=layer.scaling,
        )
        for layer in layers
    ]
    results = output_and_gradients(function, x.to(dtype), *cast)
    return [((ours.double() - t).norm() / t.norm()).item() for ours, t in zip(results, truth, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r", [8, 16])
@pytest.mark.parametrize("shape", [(64, 96, 80), (33, 17, 51)])
def test_linear_errs_at_most_twice_as_much_as_the_plain_layer(dtype, r, shape):
    n, n_in, n_out = shape
    layer = make_layer(n_in, n_out, r)
    # Round weights and inputs to the dtype first, so that both sides start from the same numbers as the truth.
    layer = LoraLinear(FrozenLinear(layer.base.weight.to(dtype).double()), layer.a, layer.b, layer.scaling)
    layer.a.data, layer.b.data = layer.a.data.float().double(), layer.b.data.float().double()
    x = random_rows(n, n_in).to(dtype).double()
    weight = random_rows(n, n_out, seed=9).to(dtype).double()
    truth = output_and_gradients(plain, x, layer, weight=weight)
    ours, theirs = _errors(lora_linear, x, [layer], dtype, truth), _errors(plain, x, [layer], dtype, truth)
    for error, budget in zip(ours, theirs, strict=True):
        assert error <= 2 * budget


@pytest.mark.parametrize("chunk_rows", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlp_errs_at_most_twice_as_much_as_plain_layers(dtype, chunk_rows):
    layers = [make_layer(48, 96, 8, seed=1), make_layer(48, 96, 8, seed=2), make_layer(96, 48, 8, seed=3)]
    layers = [
        LoraLinear(FrozenLinear(layer.base.weight.to(dtype).double()), layer.a, layer.b, layer.scaling)
        for layer in layers
    ]
    for layer in layers:
        layer.a.data, layer.b.data = layer.a.data.float().double(), layer.b.data.float().double()
    x, weight = random_rows(64, 48).to(dtype).double(), random_rows(64, 48, seed=9).to(dtype).double()
    truth = output_and_gradients(lambda x, *ls: plain_mlp(x, *ls, "silu"), x, *layers, weight=weight)
    ours = _errors(lambda x, *ls: lora_gated_mlp(x, *ls, "silu", chunk_rows=chunk_rows), x, layers, dtype, truth)
    theirs = _errors(lambda x, *ls: plain_mlp(x, *ls, "silu"), x, layers, dtype, truth)
    for error, budget in zip(ours, theirs, strict=True):
        assert error <= 2 * budget


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_4_bit_weight_equals_the_one_that_bitsandbytes_dequantizes(dtype, double):
    dense = random_rows(64, 128).to(dtype)
    packed = bnb.nn.Params4bit(dense, requires_grad=False, quant_type="nf4", compress_statistics=double).to("cpu")
    state = packed.quant_state
    a, b = random_rows(4, 128, seed=2).float().requires_grad_(), random_rows(64, 4, seed=3).float().requires_grad_()
    dequantized = FrozenLinear(bnb.functional.dequantize_4bit(packed, state).to(dtype))
    x = random_rows(9, 128, seed=4).to(dtype)
    ours = output_and_gradients(lora_linear, x, LoraLinear(FrozenLinear(packed, state), a, b, 2.0))
    expected = output_and_gradients(lora_linear, x, LoraLinear(dequantized, a, b, 2.0))
    assert all(torch.equal(p, q) for p, q in zip(ours, expected, strict=True))


def test_gradients_of_fp32_adapters_under_half_precision_are_fp32():
    layer = make_layer(12, 10, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    _, d_x, d_a, d_b = output_and_gradients(lora_linear, random_rows(7, 12).bfloat16(), layer)
    assert (d_x.dtype, d_a.dtype, d_b.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("function", ["linear", "mlp", "mlp by chunks"])
def test_autocast_casts_a_float32_input_as_for_a_linear_layer_and_nothing_else(function):
    layers = make_layer(12, 10, dtype=torch.float32), make_layer(12, 10, dtype=torch.float32), make_layer(10, 12)
    x = random_rows(7, 12, dtype=torch.float32)

    def run(x, *layers):
        if function == "linear":
            return lora_linear(x, layers[0]) + lora_linear(x, layers[1])
        return lora_gated_mlp(x, *layers, "silu", chunk_rows=3 if "chunks" in function else None)

    used = layers[:2] if function == "linear" else layers
    expected = output_and_gradients(lambda x, *layers: run(x.bfloat16(), *layers), x, *used)
    with torch.autocast("cpu", torch.bfloat16):
        results = output_and_gradients(run, x, *used)
    assert [result.dtype for result in results] == [value.dtype for value in expected]
    assert all(torch.equal(result, value) for result, value in zip(results, expected, strict=True))


def half_precision_layer() -> LoraLinear:
    return make_layer(12, 10, dtype=torch.bfloat16, adapter_dtype=torch.float32)


def test_casts_of_the_caller_give_the_same_bits():
    layer, x = half_precision_layer(), random_rows(7, 12).bfloat16()
    with_casts = replace(layer, a_cast=layer.a.detach().bfloat16(), b_cast=layer.b.detach().bfloat16())
    results = zip(
        output_and_gradients(lora_linear, x, with_casts), output_and_gradients(lora_linear, x, layer), strict=True
    )
    assert all(torch.equal(ours, expected) for ours, expected in results)


@pytest.mark.parametrize("name", ["a_cast", "b_cast"])
def test_casts_of_the_caller_are_read_in_forward_and_backward(name):
    layer, x = half_precision_layer(), random_rows(7, 12).bfloat16()
    zero = replace(
        layer, **{name: torch.zeros_like(getattr(layer, name[0]), dtype=torch.bfloat16, requires_grad=False)}
    )
    out, d_x, *_ = output_and_gradients(lora_linear, x, zero)
    base_out, base_d_x, *_ = output_and_gradients(lora_linear, x, replace(layer, scaling=0.0))
    assert torch.equal(out, base_out)
    assert torch.equal(d_x, base_d_x)


def test_casts_in_another_dtype_are_not_read():
    layer, x = half_precision_layer(), random_rows(7, 12).bfloat16()
    wrong = torch.full((3, 12), torch.nan, dtype=torch.float16), torch.full((10, 3), torch.nan, dtype=torch.float16)
    with_casts = replace(layer, a_cast=wrong[0], b_cast=wrong[1])
    results = zip(
        output_and_gradients(lora_linear, x, with_casts), output_and_gradients(lora_linear, x, layer), strict=True
    )
    assert all(torch.equal(ours, expected) for ours, expected in results)


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """Let torch fill memory with NaN when it allocates it."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r", [3, 16])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_uninitialized_memory_is_not_read(rows, r, dtype):
    assert torch.empty(1, dtype=dtype).isnan()
    layer = make_layer(48, 32, r, dtype)
    assert all(
        result.isfinite().all()
        for result in output_and_gradients(lora_linear, random_rows(rows, 48, dtype=dtype), layer)
    )


def test_an_input_may_need_no_gradient():
    layer = make_layer(12, 10)
    out = lora_linear(random_rows(7, 12), layer)
    assert out.requires_grad
    d_a, d_b = torch.autograd.grad(out.sum(), (layer.a, layer.b))
    expected = torch.autograd.grad(plain(random_rows(7, 12), layer).sum(), (layer.a, layer.b))
    torch.testing.assert_close((d_a, d_b), expected)


def test_a_second_derivative_is_an_error():
    layer = make_layer(5, 4)
    x = random_rows(3, 5).requires_grad_()
    (first,) = torch.autograd.grad(lora_linear(x, layer).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def saved_numbers(function, *arguments) -> int:
    """Return how many numbers the backward keeps, not counting arguments and parameters."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function(*arguments)
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    for layer in (a for a in arguments if isinstance(a, LoraLinear)):
        tensors += [layer.base.weight, layer.a, layer.b]
    known = {t.untyped_storage().data_ptr() for t in tensors}
    del out
    gc.collect()
    return sum(t.untyped_storage().nbytes() // t.element_size() for p, t in kept.items() if p not in known)


def test_linear_keeps_only_its_input_and_the_low_rank_product():
    x = random_rows(50, 64, dtype=torch.float32).requires_grad_()
    assert saved_numbers(lora_linear, x, make_layer(64, 80, 4, torch.float32)) == 50 * 4


def test_mlp_keeps_two_intermediate_tensors_and_separate_layers_keep_four():
    x = random_rows(50, 64, dtype=torch.float32).requires_grad_()
    layers = [make_layer(*shape, 4, torch.float32, seed=s) for s, shape in enumerate(((64, 160), (64, 160), (160, 64)))]
    assert saved_numbers(lora_gated_mlp, x, *layers, "silu") == 2 * 50 * 160 + 3 * 50 * 4

    def separate(x, gate, up, down):
        return lora_linear(F.silu(lora_linear(x, gate)) * lora_linear(x, up), down)

    assert saved_numbers(separate, x, *layers) >= 4 * 50 * 160


def mlp_layers(dtype=torch.float32) -> list[LoraLinear]:
    return [make_layer(*shape, 4, dtype, seed=s) for s, shape in enumerate(((64, 160), (64, 160), (160, 64)))]


def test_an_mlp_by_chunks_keeps_only_its_input():
    x = random_rows(50, 64, dtype=torch.float32).requires_grad_()
    assert saved_numbers(lambda x, *ls: lora_gated_mlp(x, *ls, "silu", chunk_rows=16), x, *mlp_layers()) == 0


class LargestWidth(TorchDispatchMode):
    """Sees how many rows the largest tensor of a width has that any operator makes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[1] == self.width:
                self.rows = max(self.rows, tensor.shape[0])
        return out


@pytest.mark.parametrize(("chunk_rows", "rows"), [(None, 500), (150, 150)])
def test_an_mlp_by_chunks_makes_no_tensor_of_more_rows(chunk_rows, rows):
    layers, x = mlp_layers(), random_rows(500, 64, dtype=torch.float32)
    with LargestWidth(160) as largest:
        output_and_gradients(lambda x, *ls: lora_gated_mlp(x, *ls, "silu", chunk_rows=chunk_rows), x, *layers)
    assert largest.rows == rows


@pytest.mark.parametrize("chunk_rows", [10, 50])
def test_an_mlp_by_chunks_dequantizes_each_weight_once_in_the_forward_and_once_in_the_backward(chunk_rows, monkeypatch):
    from saro_kernels import nf4

    calls, original = [], nf4.dequantize
    monkeypatch.setattr(nf4, "dequantize", lambda *args: calls.append(args) or original(*args))
    layers = []
    for layer in mlp_layers():
        packed = bnb.nn.Params4bit(layer.base.weight, requires_grad=False, quant_type="nf4").to("cpu")
        layers.append(replace(layer, base=FrozenLinear(packed, packed.quant_state)))
    x = random_rows(50, 64, dtype=torch.float32)
    output_and_gradients(lambda x, *ls: lora_gated_mlp(x, *ls, "silu", chunk_rows=chunk_rows), x, *layers)
    assert len(calls) == 3 + 3


def test_an_mlp_by_chunks_may_have_an_input_that_needs_no_gradient():
    layers, x = mlp_layers(torch.float64), random_rows(50, 64)
    matrices = [m for layer in layers for m in (layer.a, layer.b)]
    ours = torch.autograd.grad(lora_gated_mlp(x, *layers, "silu", chunk_rows=16).sum(), matrices)
    expected = torch.autograd.grad(plain_mlp(x, *layers, "silu").sum(), matrices)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_an_mlp_by_chunks_gives_the_same_without_gradients():
    layers, x = mlp_layers(), random_rows(50, 64, dtype=torch.float32)
    with torch.no_grad():
        out = lora_gated_mlp(x, *layers, "silu", chunk_rows=16)
    assert torch.equal(out, lora_gated_mlp(x, *layers, "silu", chunk_rows=16))
    assert not out.requires_grad


def test_gradient_checkpointing_does_not_recompute_an_mlp_by_chunks():
    """Its backward does, chunk by chunk. The product with down's weight is computed once, in the forward."""
    layers, x = mlp_layers(), random_rows(50, 64, dtype=torch.float32).requires_grad_()
    gradients = {}

    def step(name, chunk_rows):
        def block(x):
            return x + lora_gated_mlp(x.sin(), *layers, "silu", chunk_rows=chunk_rows)

        out = checkpoint(block, x, use_reentrant=False)
        gradients[name] = torch.autograd.grad(out.sum(), [x, layers[0].a, layers[2].b])

    def count_down_products(chunk_rows) -> int:
        """Count the products of (50, 160) and (160, 64), which only down's forward has."""
        found = []

        class Products(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function._schema.name == "aten::mm" and [t.shape for t in args[:2]] == [(50, 160), (160, 64)]:
                    found.append(function)
                return function(*args, **kwargs or {})

        with Products():
            step("whole" if chunk_rows is None else "chunked", chunk_rows)
        return len(found)

    assert count_down_products(None) == 2
    assert count_down_products(50) == 1
    for ours, expected in zip(gradients["chunked"], gradients["whole"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["a", "b"])
def test_an_mlp_by_chunks_refuses_a_matrix_that_changed_before_the_backward(change):
    layers = mlp_layers()
    out = lora_gated_mlp(random_rows(50, 64, dtype=torch.float32), *layers, "silu", chunk_rows=16)
    with torch.no_grad():
        getattr(layers[1], change).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("function", ["linear", "mlp"])
def test_an_output_may_be_changed_in_place(function):
    """OLMo clamps its queries in place. autograd refuses that for a view that a Function returns."""
    gate, up, down = make_layer(5, 7, seed=1), make_layer(5, 7, seed=2), make_layer(7, 5, seed=3)
    x = random_rows(2, 3, 5)
    if function == "linear":
        ours = output_and_gradients(lambda x, layer: lora_linear(x, layer).clamp_(-0.5, 0.5), x, gate)
        theirs = output_and_gradients(lambda x, layer: plain(x, layer).clamp(-0.5, 0.5), x, gate)
    else:
        layers = (gate, up, down)
        ours = output_and_gradients(lambda x, *ls: lora_gated_mlp(x, *ls, "silu").clamp_(-0.5, 0.5), x, *layers)
        theirs = output_and_gradients(lambda x, *ls: plain_mlp(x, *ls, "silu").clamp(-0.5, 0.5), x, *layers)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(ours, theirs, strict=True))
