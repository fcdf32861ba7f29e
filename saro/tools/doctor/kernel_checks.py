"""Checks of the kernels on this device: their error against float64 is at most twice that of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from saro.checks.check_kernels import head_error, in_float64_of, plain_linear, plain_mlp, worst_ratio
from saro.checks.noise import KERNEL_FACTOR
from saro.model.policy import Policy
from saro.tools.doctor.finding import Check, Finding
from saro_kernels import FrozenLinear, LoraLinear, lora_gated_mlp, lora_linear
from saro_kernels.tile_ops import TILE_OPS, choose_tile_op
from saro_kernels.tiled import tiled_token_logps

_ROWS, _TILE_ROWS = 40, 16  # the last tile is not full
_RANK = 8
# Largest hidden and intermediate size of the layers with adapters: bounds the time and memory of the check.
_WIDTH, _INNER = 2048, 4096

_Run = Callable[..., Tensor]


def kernel_checks(policy: Policy) -> list[Check]:
    """Return checks of the tiled log-softmax with every tile op, and of the LoRA functions on dense and NF4 weights."""
    checks = []
    for op in TILE_OPS:
        for head in ("frozen", "trainable"):
            name = f"token_logps, {op} tiles, {head} head"
            checks.append(Check(name, partial(_token_logps, name, op, head == "trainable", policy)))
    config = policy.causal_lm.config.get_text_config()
    d, inner = min(config.hidden_size, _WIDTH), min(getattr(config, "intermediate_size", _INNER), _INNER)
    layer_shapes = {"lora_linear": [(inner, d)], "lora_gated_mlp": [(inner, d), (inner, d), (d, inner)]}
    for weights in ("dense", "NF4"):
        for function, shapes in layer_shapes.items():
            name = f"{function}, {weights} base"
            checks.append(Check(name, partial(_lora, name, shapes, weights == "NF4", policy)))
    return checks


def _token_logps(name: str, op: str, trainable: bool, policy: Policy) -> Finding:
    """Check a tile op on the model's head: all rows, as many columns as float64 has memory for, its scale and softcap."""
    try:
        choose_tile_op(op, policy.causal_lm.device, policy.compute_dtype)
    except ValueError as error:
        return Finding(name, None, str(error))
    kernel = partial(tiled_token_logps, rows=_TILE_ROWS, tile_op=op)
    return _judge(name, head_error(policy, kernel, trainable))


def _lora(name: str, shapes: Sequence[tuple[int, int]], nf4: bool, policy: Policy) -> Finding:
    """Check a linear layer, or the three of a gated MLP. ``shapes``: (out, in) of each layer."""
    device, dtype = policy.causal_lm.device, policy.compute_dtype
    generator = torch.Generator().manual_seed(0)
    layers = [_layer(generator, shape, nf4, device, dtype) for shape in shapes]
    x = _normal(generator, _ROWS, shapes[0][1]).to(device, dtype)
    upstream = _normal(generator, _ROWS, shapes[-1][0]).to(device, dtype)

    def run(kernel: _Run, dtype: torch.dtype, layers: Sequence[LoraLinear]) -> list[Tensor]:
        """Return the output, and the gradients of the input and of each layer's A and B."""
        rows = x.to(dtype).detach().requires_grad_()
        out = kernel(rows, *layers)
        inputs = [rows]
        for layer in layers:
            inputs += [layer.a, layer.b]
        return [out.detach(), *torch.autograd.grad((out * upstream.to(dtype)).sum(), inputs)]

    ours, plain = (lora_linear, plain_linear) if len(layers) == 1 else (_gated_mlp, partial(plain_mlp, F.silu))
    ratio = worst_ratio(
        ours=run(ours, dtype, layers),
        plain=run(plain, dtype, layers),
        exact=run(plain, torch.float64, [in_float64_of(layer, dtype) for layer in layers]),
    )
    return _judge(name, ratio)


def _layer(
    generator: torch.Generator, shape: tuple[int, int], nf4: bool, device: torch.device, dtype: torch.dtype
) -> LoraLinear:
    n_out, n_in = shape
    weight = (_normal(generator, n_out, n_in) / n_in**0.5).to(device, dtype)
    base = FrozenLinear(weight)
    if nf4:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        base = replace(base, weight=packed, quant_state=state)
    a = _normal(generator, _RANK, n_in).float() / n_in**0.5
    b = _normal(generator, n_out, _RANK).float() / _RANK**0.5
    return LoraLinear(base, a.to(device).requires_grad_(), b.to(device).requires_grad_(), 1.5)


def _gated_mlp(x: Tensor, gate: LoraLinear, up: LoraLinear, down: LoraLinear) -> Tensor:
    return lora_gated_mlp(x, gate, up, down, "silu")


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _judge(name: str, ratio: float) -> Finding:
    figure = f"{ratio:.2f} times the plain path's error"
    return Finding(name, ratio <= KERNEL_FACTOR, figure, f"at most {KERNEL_FACTOR:.0f}")
