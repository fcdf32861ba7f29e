"""Check the fused head and LoRA layers with the weights of the user's own model: their errors against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saro.checks.noise import KERNEL_FACTOR
from saro.errors import SaroError
from saro.model.fused_lora import FUSED_FORWARDS, project
from saro.model.liger import replaced_forward
from saro.model.policy import Policy
from saro_kernels import FrozenLinear, LoraLinear, token_logps
from saro_kernels.definition import reference_token_logps

# Number of rows: enough for a tile and a part of one.
_ROWS = 40
# Most entries of a weight that is computed in float64: 1 GiB.
_NUMBERS = 2**27
# Scale of the entries of lora_B in the check. A layer's output then changes by a few per cent, far more than rounding.
_LORA_B_SCALE = 0.005


def check_kernels(policy: Policy) -> float:
    """Check the head's log-probs, and the first and the last fused LoRA layer of each name, such as q_proj.

    The policy is in eval mode, and its adapter is not zero.

    Each runs on random inputs in the policy's precision. Values and gradients, those of A, B and of a trainable head
    included, may err by twice as much as plain PyTorch does in the same precision, both against float64.

    Returns:
        The largest error, in units of the error of plain PyTorch.

    Raises:
        SaroError: an error is too large.
    """
    worst = 0.0
    for check, name, advice in _checks(policy):
        ratio = check()
        if math.isnan(ratio):
            raise SaroError(
                f"{name} gives values that are not numbers in {policy.compute_dtype}: the model's weights are damaged, "
                "or too large for this precision; fetch or save the model again, or set --model.dtype float32"
            )
        if ratio > KERNEL_FACTOR:
            raise SaroError(
                f"{name} errs by {ratio:.3g} times as much as plain PyTorch in {policy.compute_dtype}: training "
                f"would be wrong on this machine; {advice}, and report it"
            )
        worst = max(worst, ratio)
    return worst


def _checks(policy: Policy) -> Iterator[tuple[Callable[[], float], str, str]]:
    """Yield each check with the name of what it checks, and with the option that leaves it out."""
    if policy.head != "reference":
        trainable = policy.causal_lm.get_output_embeddings().weight.requires_grad
        kernel = partial(token_logps, impl=policy.head)
        yield partial(head_error, policy, kernel, trainable), f"the head {policy.head}", "set --model.head reference"
    by_name: dict[str, list[str]] = {}
    fused = {name: m for name, m in policy.model.named_modules() if replaced_forward(m) in FUSED_FORWARDS}
    # Attention modules come last, so that the error names a single faulty layer and not those that are computed with it.
    for name in sorted(fused, key=lambda name: hasattr(fused[name], "q_proj")):
        by_name.setdefault(name.rpartition(".")[2], []).append(name)
    for names in by_name.values():
        for name in dict.fromkeys([names[0], names[-1]]):
            yield partial(_lora_error, fused[name], policy), f"the fused {name}", "set --model.fused_lora false"


def head_error(policy: Policy, kernel: Callable[..., Tensor], trainable: bool) -> float:
    """Return the error of an implementation of ``token_logps`` on the policy's head, in units of the plain path's.

    ``trainable``: the gradient of the head is compared too.
    """
    head = policy.causal_lm.get_output_embeddings()
    with policy.gathered(head):
        return _head_error(policy, head, kernel, trainable)


def _head_error(policy: Policy, head: nn.Linear, kernel: Callable[..., Tensor], trainable: bool) -> float:
    device, dtype = policy.causal_lm.device, policy.compute_dtype
    # Take only as many columns of a very large head as fit into memory in float64.
    weight = head.weight.detach()[:, : max(1, _NUMBERS // len(head.weight))].contiguous()
    generator = torch.Generator().manual_seed(0)
    # Scale the logits to a few nats apart, as a model has them.
    spread = weight.double().norm(dim=1).mean().item() * policy.logits.scale
    hidden = (_normal(generator, _ROWS, weight.shape[1]) * (4 / spread)).to(device, dtype)
    targets = torch.randint(len(weight), (_ROWS,), generator=generator).to(device)
    upstream = _normal(generator, _ROWS).to(device)

    def run(kernel: Callable[..., Tensor], dtype: torch.dtype, weight: Tensor) -> list[Tensor]:
        """Return the log-probs, and the gradients of the hidden states and of a trainable head."""
        leaves = [hidden.to(dtype).detach().requires_grad_(), weight.detach().requires_grad_(trainable)]
        offset = None if head.bias is None else head.bias.detach().to(weight.dtype)
        logps = kernel(*leaves, targets, bias=offset, **policy.logits._asdict())
        inputs = [leaf for leaf in leaves if leaf.requires_grad]
        return [logps.detach(), *torch.autograd.grad((logps * upstream.to(logps.dtype)).sum(), inputs)]

    # The products are computed from the weight in the precision of the products.
    rounded = weight.to(dtype)
    return worst_ratio(
        ours=run(kernel, dtype, weight),
        plain=run(reference_token_logps, dtype, rounded),
        exact=run(reference_token_logps, torch.float64, rounded.double()),
        # Tensor cores truncate their float32 sum after every 16 products. The plain path rounds it to nearest.
        value_ulps=max(1, weight.shape[1] // 16) if dtype.itemsize == 2 else 1,
    )


def _lora_error(module: nn.Module, policy: Policy) -> float:
    """Return the error of a fused linear layer, gated MLP, or projection to queries, keys and values, in units of the plain path's."""
    with policy.gathered(module):
        return _gathered_lora_error(module, policy)


def _gathered_lora_error(module: nn.Module, policy: Policy) -> float:
    dtype = policy.compute_dtype
    ours, width = module, None
    if hasattr(module, "gate_proj"):
        layers = [module.gate_proj, module.up_proj, module.down_proj]
        plain = partial(plain_mlp, module.act_fn)
    elif hasattr(module, "q_proj"):
        layers, plain = [module.q_proj, module.k_proj, module.v_proj], _plain_projections
        ours, width = _projections_of(module), sum(layer.out_features for layer in layers)
    else:
        layers, plain = [module], plain_linear
    parts = [_parts(layer) for layer in layers]
    generator = torch.Generator().manual_seed(0)
    rows = _normal(generator, _ROWS, layers[0].in_features).to(policy.causal_lm.device, dtype)
    upstream = _normal(generator, _ROWS, width or layers[-1].out_features).to(rows)

    def run(kernel: Callable[..., Tensor], dtype: torch.dtype, parts: Sequence[LoraLinear]) -> list[Tensor]:
        """Return the output, and the gradients of the input and of each layer's A and B."""
        x = rows.to(dtype).detach().requires_grad_()
        out = kernel(x)
        inputs = [x] + [matrix for part in parts for matrix in (part.a, part.b)]
        return [out.detach(), *torch.autograd.grad((out * upstream.to(dtype)).sum(), inputs)]

    in_float64 = [in_float64_of(part, dtype) for part in parts]
    return worst_ratio(
        ours=run(ours, dtype, parts),
        plain=run(lambda x: plain(x, *parts), dtype, parts),
        exact=run(lambda x: plain(x, *in_float64), torch.float64, in_float64),
    )


def _parts(layer: nn.Module) -> LoraLinear:
    """Return the weights of PEFT's layer, read from its attributes. How ``fuse_lora`` reads them is under test."""
    base = layer.get_base_layer()
    (name,) = layer.active_adapters
    frozen = FrozenLinear(base.weight, getattr(base, "quant_state", None), base.bias)
    return LoraLinear(frozen, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


def in_float64_of(layer: LoraLinear, dtype: torch.dtype) -> LoraLinear:
    """Return the layer in float64, with the weight that it has in ``dtype``."""
    bias = None if layer.base.bias is None else layer.base.bias.detach().to(dtype).double()
    base = FrozenLinear(layer.base.dense(dtype).double(), bias=bias)
    a, b = layer.a.detach().double(), layer.b.detach().double()
    return LoraLinear(base, a.requires_grad_(), b.requires_grad_(), layer.scaling)


def plain_linear(x: Tensor, layer: LoraLinear) -> Tensor:
    """Compute a linear layer with LoRA by its definition."""
    low = F.linear(F.linear(x, layer.a.to(x.dtype)), layer.b.to(x.dtype))
    bias = None if layer.base.bias is None else layer.base.bias.to(x.dtype)
    return F.linear(x, layer.base.dense(x.dtype), bias) + low * layer.scaling


def plain_mlp(
    activation: Callable[[Tensor], Tensor], x: Tensor, gate: LoraLinear, up: LoraLinear, down: LoraLinear
) -> Tensor:
    """Compute a gated MLP with LoRA by its definition."""
    return plain_linear(activation(plain_linear(x, gate)) * plain_linear(x, up), down)


def _projections_of(attention: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the function that computes queries, keys and values as training does, one after the other."""
    return lambda x: torch.cat(project(attention, x), dim=-1)


def _plain_projections(x: Tensor, *layers: LoraLinear) -> Tensor:
    """Compute several layers with LoRA by their definition, one after the other."""
    return torch.cat([plain_linear(x, layer) for layer in layers], dim=-1)


def worst_ratio(
    *, ours: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], value_ulps: int = 1
) -> float:
    """Return the worst error of a value and its gradients, as a multiple of the plain path's error.

    An error of ``value_ulps`` ulps of the value, and of one ulp of each gradient, counts as allowed.
    """
    ratios = []
    allowed_ulps = [value_ulps] + [1] * (len(exact) - 1)
    for our_tensor, plain_tensor, exact_tensor, ulps in zip(ours, plain, exact, allowed_ulps, strict=True):
        our_error = (our_tensor.double() - exact_tensor).norm()
        plain_error = (plain_tensor.double() - exact_tensor).norm()
        rounding = ulps * torch.finfo(our_tensor.dtype).eps * exact_tensor.norm()
        # If there is no error, for example for a zero weight, the ratio is 0.
        allowed = torch.maximum(plain_error, rounding / KERNEL_FACTOR).clamp_min(torch.finfo(torch.float64).tiny)
        ratios.append((our_error / allowed).item())
    # Do not use max(ratios), which can pass over a NaN.
    return torch.tensor(ratios).max().item()


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@contextmanager
def nonzero_adapter(policy: Policy) -> Iterator[None]:
    """Give a new adapter small non-zero weights: at zero, its errors would not show. Restores the zeros at the end."""
    zero_parameters = [p for name, p in policy.trainable_parts().items() if "lora_B" in name and not p.any()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in zero_parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * _LORA_B_SCALE)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zero_parameters:
                parameter.zero_()
