"""Checks of the kernels on this device: their error against float64 is at most twice that of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from saro.checks.noise import KERNEL_FACTOR
from saro.model.policy import Policy
from saro.tools.doctor.finding import Check, Finding
from saro_kernels import FrozenLinear, LoraLinear, lora_gated_mlp, lora_linear
from saro_kernels.definition import reference_token_logps
from saro_kernels.tile_ops import TILE_OPS, choose_tile_op
from saro_kernels.tiled import tiled_token_logps

_ROWS, _TILE_ROWS = 40, 16  # the last tile is not full
_RANK = 8
# Most entries of a weight that is computed in float64: 1 GiB.
_NUMBERS = 2**27
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
    device, dtype = policy.causal_lm.device, policy.compute_dtype
    try:
        choose_tile_op(op, device, dtype)
    except ValueError as error:
        return Finding(name, None, str(error))
    head = policy.causal_lm.get_output_embeddings().weight.detach()
    weight = head[:, : max(1, _NUMBERS // len(head))].to(dtype).contiguous()
    generator = torch.Generator().manual_seed(0)
    # Scale the logits to a few nats apart, as a model has them.
    spread = weight.double().norm(dim=1).mean().item() * policy.logits.scale
    hidden = _normal(generator, _ROWS, weight.shape[1]) * (4 / spread)
    hidden = hidden.to(device, dtype)
    targets = torch.randint(len(weight), (_ROWS,), generator=generator).to(device)
    upstream = _normal(generator, _ROWS).to(device)

    def run(kernel: _Run, dtype: torch.dtype) -> list[Tensor]:
        """Return the log-probs, and the gradients of the hidden states and of a trainable head."""
        leaves = [hidden.to(dtype).detach().requires_grad_(), weight.to(dtype).detach().requires_grad_(trainable)]
        logps = kernel(*leaves, targets, bias=None, **policy.logits._asdict())
        inputs = [leaf for leaf in leaves if leaf.requires_grad]
        return [logps.detach(), *torch.autograd.grad((logps * upstream.to(logps.dtype)).sum(), inputs)]

    def tiled(*args: Tensor, **options: object) -> Tensor:
        return tiled_token_logps(*args, **options, rows=_TILE_ROWS, tile_op=op)

    return _compare_errors(
        name,
        ours=run(tiled, dtype),
        plain=run(reference_token_logps, dtype),
        exact=run(reference_token_logps, torch.float64),
        # Tensor cores truncate their float32 sum after every 16 products. The plain path rounds it to nearest.
        value_ulps=max(1, weight.shape[1] // 16) if dtype.itemsize == 2 else 1,
    )


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

    ours, plain = (lora_linear, _plain_linear) if len(layers) == 1 else (_gated_mlp, _plain_mlp)
    return _compare_errors(
        name,
        ours=run(ours, dtype, layers),
        plain=run(plain, dtype, layers),
        exact=run(plain, torch.float64, [_in_float64(layer, dtype) for layer in layers]),
    )


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


def _in_float64(layer: LoraLinear, dtype: torch.dtype) -> LoraLinear:
    """Return the layer in float64, with the weight that it has in ``dtype``."""
    base = FrozenLinear(layer.base.dense(dtype).double())
    a, b = layer.a.detach().double(), layer.b.detach().double()
    return LoraLinear(base, a.requires_grad_(), b.requires_grad_(), layer.scaling)


def _gated_mlp(x: Tensor, gate: LoraLinear, up: LoraLinear, down: LoraLinear) -> Tensor:
    return lora_gated_mlp(x, gate, up, down, "silu")


def _plain_linear(x: Tensor, layer: LoraLinear) -> Tensor:
    low = F.linear(F.linear(x, layer.a.to(x.dtype)), layer.b.to(x.dtype))
    return F.linear(x, layer.base.dense(x.dtype)) + low * layer.scaling


def _plain_mlp(x: Tensor, gate: LoraLinear, up: LoraLinear, down: LoraLinear) -> Tensor:
    return _plain_linear(F.silu(_plain_linear(x, gate)) * _plain_linear(x, up), down)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _compare_errors(
    name: str, *, ours: list[Tensor], plain: list[Tensor], exact: list[Tensor], value_ulps: int = 1
) -> Finding:
    """Return the worst error of value and gradients, as a multiple of the plain path's error.

    An error of ``value_ulps`` ulps of the value and one of each gradient is always allowed.
    """
    ratios = []
    allowed_ulps = [value_ulps] + [1] * (len(exact) - 1)
    for our_tensor, plain_tensor, exact_tensor, ulps in zip(ours, plain, exact, allowed_ulps, strict=True):
        our_error = (our_tensor.double() - exact_tensor).norm()
        plain_error = (plain_tensor.double() - exact_tensor).norm()
        allowed = ulps * torch.finfo(our_tensor.dtype).eps * exact_tensor.norm()
        ratios.append((our_error / torch.maximum(plain_error, allowed / KERNEL_FACTOR)).item())
    # Not max(ratios), which can pass over a NaN.
    worst = torch.tensor(ratios).max().item()
    return Finding(
        name, worst <= KERNEL_FACTOR, f"{worst:.2f} times the plain path's error", f"at most {KERNEL_FACTOR:.0f}"
    )
