"""Each kernel against its reference on this device: at most twice the plain path's error against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from saro.model.policy import Policy
from saro.tools.doctor.finding import Check, Finding
from saro_kernels import FrozenLinear, LoraLinear, lora_gated_mlp, lora_linear
from saro_kernels.definition import reference_token_logps
from saro_kernels.tile_ops import TILE_OPS, choose_tile_op
from saro_kernels.tiled import tiled_token_logps

_ALLOWED = 2.0
_ROWS, _TILE_ROWS = 40, 16  # the last tile is not full
_RANK = 8
# Truth is held in float64: so many numbers of one weight at most (1 GiB).
_NUMBERS = 2**27
# Widest sides of the layers that carry adapters.
_WIDTH, _INNER = 2048, 4096

_Run = Callable[..., Tensor]


def kernel_checks(policy: Policy) -> list[Check]:
    """The tiled log-softmax with every tile op, and the LoRA functions on dense and NF4 weights."""
    device, dtype = policy.causal_lm.device, policy.autocast or policy.causal_lm.dtype
    checks = []
    for op in TILE_OPS:
        for head in ("frozen", "trainable"):
            name = f"token_logps, {op} tiles, {head} head"
            checks.append(Check(name, lambda n=name, o=op, h=head: _token_logps(n, o, h == "trainable", policy)))
    config = policy.causal_lm.config.get_text_config()
    d, inner = min(config.hidden_size, _WIDTH), min(getattr(config, "intermediate_size", _INNER), _INNER)
    for weights in ("dense", "NF4"):
        for what, shapes in (("lora_linear", [(inner, d)]), ("lora_gated_mlp", [(inner, d), (inner, d), (d, inner)])):
            name = f"{what}, {weights} base"
            checks.append(
                Check(name, lambda n=name, s=shapes, w=weights: _lora(n, s, w == "NF4", device, dtype)),
            )
    return checks


def _token_logps(name: str, op: str, trainable: bool, policy: Policy) -> Finding:
    """On as many columns of the model's own head as the truth has place for; all of its vocabulary, its scale and its softcap."""
    device, dtype = policy.causal_lm.device, policy.autocast or policy.causal_lm.dtype
    try:
        choose_tile_op(op, device, dtype)
    except ValueError as error:
        return Finding(name, None, str(error))
    head = policy.causal_lm.get_output_embeddings().weight.detach()
    weight = head[:, : max(1, _NUMBERS // len(head))].to(dtype).contiguous()
    generator = torch.Generator().manual_seed(0)
    # Logits as a model has them: a few nats apart.
    spread = weight.double().norm(dim=1).mean().item() * policy.logits.scale
    hidden = _normal(generator, _ROWS, weight.shape[1]) * (4 / spread)
    hidden = hidden.to(device, dtype)
    targets = torch.randint(len(weight), (_ROWS,), generator=generator).to(device)
    upstream = _normal(generator, _ROWS).to(device)

    def run(kernel: _Run, dtype: torch.dtype) -> list[Tensor]:
        leaves = [hidden.to(dtype).detach().requires_grad_(), weight.to(dtype).detach().requires_grad_(trainable)]
        logps = kernel(*leaves, targets, bias=None, **policy.logits._asdict())
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return [logps.detach(), *torch.autograd.grad((logps * upstream.to(logps.dtype)).sum(), wanted)]

    def tiled(*args: Tensor, **options: object) -> Tensor:
        return tiled_token_logps(*args, **options, rows=_TILE_ROWS, tile_op=op)

    truth = run(reference_token_logps, torch.float64)
    return _budget(name, run(tiled, dtype), run(reference_token_logps, dtype), truth)


def _lora(name: str, shapes: Sequence[tuple[int, int]], nf4: bool, device: torch.device, dtype: torch.dtype) -> Finding:
    """A linear layer, or the three of a gated MLP, of these (out, in)."""
    generator = torch.Generator().manual_seed(0)
    layers = [_layer(generator, shape, nf4, device, dtype) for shape in shapes]
    x = _normal(generator, _ROWS, shapes[0][1]).to(device, dtype)
    upstream = _normal(generator, _ROWS, shapes[-1][0]).to(device, dtype)

    def run(kernel: _Run, dtype: torch.dtype, layers: Sequence[LoraLinear]) -> list[Tensor]:
        rows = x.to(dtype).detach().requires_grad_()
        out = kernel(rows, *layers)
        wanted = [rows, *(matrix for layer in layers for matrix in (layer.a, layer.b))]
        return [out.detach(), *torch.autograd.grad((out * upstream.to(dtype)).sum(), wanted)]

    wide = [
        LoraLinear(
            # What the layer computes with, in its own dtype.
            FrozenLinear(layer.base.dense(dtype).double()),
            *(matrix.detach().double().requires_grad_() for matrix in (layer.a, layer.b)),
            layer.scaling,
        )
        for layer in layers
    ]
    one = len(layers) == 1
    ours = lora_linear if one else lambda rows, *three: lora_gated_mlp(rows, *three, "silu")
    plain = _plain if one else _plain_mlp
    return _budget(name, run(ours, dtype, layers), run(plain, dtype, layers), run(plain, torch.float64, wide))


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
    a, b = (_normal(generator, *s).float() / s[1] ** 0.5 for s in ((_RANK, n_in), (n_out, _RANK)))
    return LoraLinear(base, *(matrix.to(device).requires_grad_() for matrix in (a, b)), 1.5)


def _plain(x: Tensor, layer: LoraLinear) -> Tensor:
    low = F.linear(F.linear(x, layer.a.to(x.dtype)), layer.b.to(x.dtype))
    return F.linear(x, layer.base.dense(x.dtype)) + low * layer.scaling


def _plain_mlp(x: Tensor, gate: LoraLinear, up: LoraLinear, down: LoraLinear) -> Tensor:
    return _plain(F.silu(_plain(x, gate)) * _plain(x, up), down)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _budget(name: str, ours: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> Finding:
    """The worst of value and gradients, each as a multiple of the plain path's error."""
    ratios = []
    for mine, other, exact in zip(ours, plain, truth, strict=True):
        # A last bit of the numbers is error of the plain path at the least.
        floor = torch.finfo(mine.dtype).eps / _ALLOWED * exact.norm()
        ratios.append(((mine.double() - exact).norm() / torch.maximum((other.double() - exact).norm(), floor)).item())
    # Not max(): it would pass over what is not a number.
    worst = torch.tensor(ratios).max().item()
    return Finding(name, worst <= _ALLOWED, f"{worst:.2f} times the plain path's error", f"at most {_ALLOWED:.0f}")
