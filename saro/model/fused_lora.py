"""Compute PEFT's LoRA layers with ``saro_kernels``. PEFT owns parameters, saving and loading; we replace the forward.

We replace it only where the result is exact: one active adapter of plain LoRA, without dropout, on a dense or 4-bit
linear layer. Every call checks this again, so that PEFT's own forward computes merged and disabled adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import MappingProxyType, MethodType

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.activations import GELUTanh, SiLUActivation

from saro.model.architectures import GATED_MLPS
from saro_kernels import FrozenLinear, LoraLinear, lora_gated_mlp, lora_linear

_ACTIVATIONS: dict[type, str] = {nn.SiLU: "silu", SiLUActivation: "silu", GELUTanh: "gelu_tanh"}
# A call without gradient on fewer tokens than this is a generation step. PEFT's forward computes it, because
# bitsandbytes has kernels for few tokens.
_FEW_ROWS = 8
# What ``cast_adapters`` has cast, by parameter. Each thread has its own, and autograd runs the backward in another thread.
_CASTS: ContextVar[Mapping[nn.Parameter, torch.Tensor]] = ContextVar("casts", default=MappingProxyType({}))


def fuse_lora(model: PeftModel) -> int:
    """Let ``saro_kernels`` compute a model's LoRA layers, and its gated MLPs in one piece if they have no dropout.

    Layers that are not plain LoRA keep PEFT's forward. Returns the number of layers that are fused.
    """
    layers = [layer for layer in lora_layers(model) if _can_fuse(layer)]
    for layer in layers:
        layer.forward = MethodType(_linear_forward, layer)
    fused = {id(layer) for layer in layers}
    for module in model.modules():
        if type(module).__name__ in GATED_MLPS and type(module.act_fn) in _ACTIVATIONS:
            parts = (module.gate_proj, module.up_proj, module.down_proj)
            # With dropout, no training step could use the fused MLP, and liger-kernel's may be in its place already.
            if all(id(part) in fused and not _has_dropout(part) for part in parts):
                module.forward = MethodType(_mlp_forward, module)
    return len(layers)


def lora_layers(model: nn.Module) -> tuple[LoraLayer, ...]:
    """Return the LoRA layers of a model, fused or not."""
    return tuple(module for module in model.modules() if isinstance(module, LoraLayer))


@contextmanager
def cast_adapters(layers: Iterable[LoraLayer], dtype: torch.dtype) -> Iterator[None]:
    """Cast the active adapters of those layers that are fused to ``dtype`` at once, for all forwards in this context.

    Outside it, each layer casts A and B itself, in its forward and again in its backward: a kernel for each matrix. The
    casts are made in each context, so they have the values of the parameters. Nothing writes to them afterwards. They live
    until the backward is done: 2 bytes for each parameter in bfloat16, and nothing if the adapters have ``dtype`` already.
    """
    matrices = [matrix for layer in layers for matrix in _fused_matrices(layer) if matrix.dtype != dtype]
    with torch.no_grad():
        casts = [torch.empty_like(matrix, dtype=dtype) for matrix in matrices]
        if casts:
            torch._foreach_copy_(casts, matrices)
    with _Casts(dict(zip(matrices, casts, strict=True))):
        yield


def _fused_matrices(layer: LoraLayer) -> tuple[nn.Parameter, ...]:
    """Return A and B of the adapter that our forward would compute; nothing if PEFT's forward computes the layer."""
    name = _exact_adapter(layer) if layer.forward.__func__ is _linear_forward else None
    return () if name is None else (layer.lora_A[name].weight, layer.lora_B[name].weight)


class _Casts:
    """A context in which fused layers find these casts, by parameter. It can be entered many times, but not within itself."""

    def __init__(self, casts: Mapping[nn.Parameter, torch.Tensor]) -> None:
        self._casts = casts

    def __enter__(self) -> None:
        self._token = _CASTS.set(self._casts)

    def __exit__(self, *_: object) -> None:
        _CASTS.reset(self._token)


def _keep_casts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts of a checkpointed forward and of its recomputation, which finds the casts of the forward."""
    return nullcontext(), _Casts(_CASTS.get())


# Arguments of ``torch.utils.checkpoint.checkpoint``. Without our contexts each layer would cast in its recomputation.
CHECKPOINTING = MappingProxyType({"use_reentrant": False, "context_fn": _keep_casts})


def _can_fuse(layer: LoraLayer) -> bool:
    """Return True for plain LoRA, without a bias of its own, on a dense or 4-bit linear layer."""
    base = layer.get_base_layer()
    plain = isinstance(layer, nn.Module) and not layer.lora_variant and not getattr(layer, "fan_in_fan_out", False)
    biased = any(getattr(matrix, "bias", None) is not None for matrix in layer.lora_B.values())
    return plain and not biased and type(base) in (nn.Linear, bnb.nn.Linear4bit)


def _has_dropout(layer: LoraLayer) -> bool:
    return any(not isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())


def _can_run_fused(layer: LoraLayer, x: torch.Tensor) -> bool:
    """Return True if our forward is exact for this call. False for a generation step."""
    if not torch.is_grad_enabled() and x.numel() < _FEW_ROWS * x.shape[-1]:
        return False
    return _exact_adapter(layer) is not None


def _exact_adapter(layer: LoraLayer) -> str | None:
    """Return the name of the active adapter if our forward is exact: it is the only one, plain and without dropout."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    if name not in layer.lora_A:
        return None
    dropout = layer.lora_dropout[name]
    has_dropout = not isinstance(dropout, nn.Identity) and layer.training and dropout.p > 0
    return None if has_dropout else name


def _parts(layer: LoraLayer) -> LoraLinear:
    """Return a layer's weights and its active adapter as ``saro_kernels`` takes them."""
    base = layer.get_base_layer()
    (name,) = layer.active_adapters
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    casts = _CASTS.get()
    return LoraLinear(
        # The layer has the state too. A weight that was gathered from ranks has lost it.
        base=FrozenLinear(base.weight, getattr(base, "quant_state", None), base.bias),
        a=a,
        b=b,
        scaling=layer.scaling[name],
        a_cast=casts.get(a),
        b_cast=casts.get(b),
    )


def _linear_forward(self: LoraLayer, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    if args or kwargs or not _can_run_fused(self, x):
        return type(self).forward(self, x, *args, **kwargs)
    return lora_linear(x, _parts(self))


def _mlp_forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    layers = (self.gate_proj, self.up_proj, self.down_proj)
    if not all(_can_run_fused(layer, x) for layer in layers):
        return type(self).forward(self, x)
    return lora_gated_mlp(x, *map(_parts, layers), _ACTIVATIONS[type(self.act_fn)])


# The forwards that ``fuse_lora`` binds to modules.
FUSED_FORWARDS = (_linear_forward, _mlp_forward)
