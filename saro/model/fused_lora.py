"""Compute PEFT's LoRA layers with ``saro_kernels``. PEFT owns parameters, saving and loading; we replace the forward.

We replace it only where the result is the same up to rounding in the compute dtype: one active adapter of plain LoRA, without
dropout, on a dense or 4-bit linear layer. (PEFT computes an adapter of float32 in float32 also where the base is bfloat16.)
Every call checks this again, so that PEFT's own forward computes merged and disabled adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import MappingProxyType, MethodType
from typing import NamedTuple

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.activations import GELUTanh, SiLUActivation

from saro.model.architectures import GATED_MLPS, QKV_ATTENTIONS, WITH_LAST_NORM
from saro_kernels import FrozenLinear, LoraLinear, lora_gated_mlp, lora_linear, lora_linears

_ACTIVATIONS: dict[type, str] = {nn.SiLU: "silu", SiLUActivation: "silu", GELUTanh: "gelu_tanh"}
# A call without gradient on fewer tokens than this is a generation step. PEFT's forward computes it, because
# bitsandbytes has kernels for few tokens.
_FEW_ROWS = 8
# A recomputed MLP runs in chunks of rows whose intermediate tensors take at most this many bytes. 256 MiB are enough rows
# to keep a GPU busy: 1,792 of Llama-3-8B's.
_CHUNK_BYTES = 2**28
# Intermediate tensors that an MLP's backward holds: the outputs of gate and up, their product, and two gradients.
_NUM_INTERMEDIATES = 5


class _Adapter(NamedTuple):
    """The adapter of a layer that our forward computes, and the casts of its parameters if ``cast_adapters`` has made them."""

    name: str
    a: nn.Parameter
    b: nn.Parameter
    a_cast: torch.Tensor | None = None
    b_cast: torch.Tensor | None = None


class _Group(NamedTuple):
    """Layers with one input, whose A are cast into one stack. Each of them has it as its attribute ``saro_group``."""

    name: str
    size: int


@dataclass(frozen=True)
class _Casts:
    """The layers that ``cast_adapters`` has looked at, and their casts.

    Attributes:
        adapters: the adapter of each layer that our forward computes.
        stacks: the casts of a group's A, one below another, in the order of its layers, by the first of them. The casts of
            these A are views of it.
        recomputed: True in a layer that gradient checkpointing recomputes.
    """

    adapters: Mapping[LoraLayer, _Adapter] = field(default_factory=dict)
    stacks: Mapping[LoraLayer, torch.Tensor] = field(default_factory=dict)
    recomputed: bool = False


_NO_CASTS = _Casts()
# Each thread has its own, and autograd runs the backward in another thread.
_CASTS: ContextVar[_Casts] = ContextVar("casts", default=_NO_CASTS)


def fuse_lora(model: PeftModel) -> int:
    """Let ``saro_kernels`` compute a model's LoRA layers.

    Gated MLPs, and the layers that make queries, keys and values, are computed in one piece if they have no dropout.
    Layers that are not plain LoRA keep PEFT's forward. Returns the number of layers that are fused.
    """
    layers = [layer for layer in lora_layers(model) if _can_fuse(layer)]
    for layer in layers:
        layer.forward = MethodType(_linear_forward, layer)
    fused = {id(layer) for layer in layers}

    def are_fused(*parts: nn.Module) -> bool:
        # With dropout no training step could compute the layers together, and liger-kernel's MLP may be in place already.
        return all(id(part) in fused and not _has_dropout(part) for part in parts)

    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in GATED_MLPS and type(module.act_fn) in _ACTIVATIONS:
            if are_fused(module.gate_proj, module.up_proj, module.down_proj):
                module.forward = MethodType(_mlp_forward, module)
                _group(name, module.gate_proj, module.up_proj)
        elif kind in QKV_ATTENTIONS and are_fused(*_projections(module)):
            module.forward = MethodType(_attention_forward, module)
            _group(name, *_projections(module))
    return len(layers)


def _group(name: str, *layers: LoraLayer) -> None:
    """Make these layers a group, whose A ``cast_adapters`` stacks in this order."""
    for place, layer in enumerate(layers):
        layer.saro_group = (_Group(name, len(layers)), place)


def _projections(attention: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return the layers that read the input of attention."""
    return attention.q_proj, attention.k_proj, attention.v_proj


def lora_layers(model: nn.Module) -> tuple[LoraLayer, ...]:
    """Return the LoRA layers of a model, fused or not."""
    return tuple(module for module in model.modules() if isinstance(module, LoraLayer))


def uses_fused_lora(model: nn.Module) -> bool:
    """Return True if ``saro_kernels`` computes LoRA layers of a model."""
    return any(getattr(layer.forward, "__func__", None) is _linear_forward for layer in lora_layers(model))


@contextmanager
def cast_adapters(layers: Iterable[LoraLayer], dtype: torch.dtype) -> Iterator[None]:
    """Cast the active adapters of all fused layers to ``dtype`` at once, for all forwards in this context.

    Outside it, each layer casts A and B itself, in its forward and again in its backward: a kernel for each matrix. The
    casts are made in each context, so they have the values of the parameters. Nothing writes to them afterwards. They live
    until the backward is done: 2 bytes for each parameter in bfloat16, and nothing if the adapters have ``dtype`` already.
    """
    adapters = {layer: adapter for layer in layers if (adapter := _active_adapter(layer)) is not None}
    sources: list[nn.Parameter] = []
    casts: list[torch.Tensor] = []

    def make_cast(matrix: nn.Parameter, out: torch.Tensor | None = None) -> torch.Tensor:
        sources.append(matrix)
        casts.append(torch.empty_like(matrix, dtype=dtype, requires_grad=False) if out is None else out)
        return casts[-1]

    stacks = {}
    a_casts: dict[LoraLayer, torch.Tensor] = {}
    for members in _whole_groups(adapters):
        matrices = [adapters[layer].a for layer in members]
        if all(a.dtype != dtype for a in matrices):
            stack = matrices[0].new_empty(sum(map(len, matrices)), matrices[0].shape[1], dtype=dtype)  # (R, in)
            parts = stack.split([len(a) for a in matrices])
            a_casts |= {layer: make_cast(*pair) for layer, *pair in zip(members, matrices, parts, strict=True)}
            stacks[members[0]] = stack
    for layer, adapter in adapters.items():
        a_cast = a_casts.get(layer)
        if a_cast is None and adapter.a.dtype != dtype:
            a_cast = make_cast(adapter.a)
        b_cast = None if adapter.b.dtype == dtype else make_cast(adapter.b)
        adapters[layer] = adapter._replace(a_cast=a_cast, b_cast=b_cast)
    if casts:
        with torch.no_grad():
            torch._foreach_copy_(casts, sources)
    with _CastsSet(_Casts(adapters, stacks)):
        yield


def _whole_groups(layers: Iterable[LoraLayer]) -> list[list[LoraLayer]]:
    """Return the layers of each group, in order, if the whole group is among these layers."""
    groups: dict[_Group, dict[int, LoraLayer]] = {}
    for layer in layers:
        group, place = getattr(layer, "saro_group", (None, 0))
        if group is not None:
            groups.setdefault(group, {})[place] = layer
    return [[found[i] for i in range(group.size)] for group, found in groups.items() if len(found) == group.size]


def _active_adapter(layer: LoraLayer) -> _Adapter | None:
    """Return the adapter that our forward would compute; None if PEFT's forward computes the layer."""
    if layer.forward.__func__ is not _linear_forward:
        return None
    name = _plain_adapter(layer)
    return None if name is None else _Adapter(name, layer.lora_A[name].weight, layer.lora_B[name].weight)


class _CastsSet:
    """Makes fused layers use these casts in its context, which can be entered many times, but not within itself."""

    def __init__(self, casts: _Casts) -> None:
        self._casts = casts

    def __enter__(self) -> None:
        self._token = _CASTS.set(self._casts)

    def __exit__(self, *_: object) -> None:
        _CASTS.reset(self._token)


def _keep_casts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts of a checkpointed forward and of its recomputation, which finds the casts of the forward."""
    casts = replace(_CASTS.get(), recomputed=True)
    return _CastsSet(casts), _CastsSet(casts)


# Arguments of ``torch.utils.checkpoint.checkpoint``. Without our contexts each layer would cast again as it recomputes.
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
    """Return True if our forward can stand for PEFT's in this call: not in a generation step, nor for a layer that was replaced."""
    if not torch.is_grad_enabled() and x.numel() < _FEW_ROWS * x.shape[-1]:
        return False
    # Within a forward of the policy, ``cast_adapters`` has looked at the layer.
    return layer in _CASTS.get().adapters or (isinstance(layer, LoraLayer) and _plain_adapter(layer) is not None)


def _plain_adapter(layer: LoraLayer) -> str | None:
    """Return the name of the active adapter if our forward can stand for PEFT's: it is the only one, plain and without dropout."""
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
    weight = base.weight
    adapter = _CASTS.get().adapters.get(layer)
    name = layer.active_adapters[0] if adapter is None else adapter.name
    # Read the parameters now: a layer may have got others since they were cast, such as those of all ranks.
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return LoraLinear(
        # Take the state from the layer: a weight that was gathered from ranks has lost it.
        base=FrozenLinear(weight, getattr(base, "quant_state", None), base.bias),
        a=a,
        b=b,
        scaling=layer.scaling[name],
        a_cast=adapter.a_cast if adapter is not None and adapter.a is a else None,
        b_cast=adapter.b_cast if adapter is not None and adapter.b is b else None,
    )


def _find_stack(layers: Sequence[LoraLayer], parts: Sequence[LoraLinear]) -> torch.Tensor | None:
    """Return a group's stack of A if ``cast_adapters`` has made it from these parameters, else None."""
    stack = _CASTS.get().stacks.get(layers[0])
    return stack if stack is not None and all(part.a_cast is not None for part in parts) else None


def _linear_forward(self: LoraLayer, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    projected = self.__dict__.pop("saro_projected", None)
    if projected is not None and projected[0] is x:
        return projected[1]
    if args or kwargs or not _can_run_fused(self, x):
        return type(self).forward(self, x, *args, **kwargs)
    return lora_linear(x, _parts(self))


def _attention_forward(self: nn.Module, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
    """Compute queries, keys and values together, and hand them to the layers that the module will ask for them."""
    projections = _projections(self)
    if not all(_can_run_fused(layer, hidden_states) for layer in projections):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    outputs = project(self, hidden_states)
    try:
        for layer, output in zip(projections, outputs, strict=True):
            layer.__dict__["saro_projected"] = (hidden_states, output)  # setattr would run Module's code
        del outputs, output
        return type(self).forward(self, hidden_states, *args, **kwargs)
    finally:
        for layer in projections:
            layer.__dict__.pop("saro_projected", None)


def project(attention: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return queries, keys and values of an attention module whose projections are fused: (..., out) each."""
    layers = _projections(attention)
    parts = [_parts(layer) for layer in layers]
    return lora_linears(x, parts, _find_stack(layers, parts))


def _mlp_forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    layers = (self.gate_proj, self.up_proj, self.down_proj)
    if not all(_can_run_fused(layer, x) for layer in layers):
        return type(self).forward(self, x)
    gate, up, down = map(_parts, layers)
    chunk_rows = None
    if _CASTS.get().recomputed and type(self).__name__ not in WITH_LAST_NORM:
        chunk_rows = _chunk_rows(x, self.gate_proj.out_features)
    return lora_gated_mlp(
        x,
        gate,
        up,
        down,
        _ACTIVATIONS[type(self.act_fn)],
        a_stack=_find_stack(layers[:2], (gate, up)),
        chunk_rows=chunk_rows,
    )


def _chunk_rows(x: torch.Tensor, width: int) -> int:
    """Return how many rows of x (..., D) an MLP of this intermediate width may compute at a time; its chunks have equal size."""
    rows = max(1, x.numel() // x.shape[-1])
    num_chunks = -(-rows * width * x.element_size() * _NUM_INTERMEDIATES // _CHUNK_BYTES)
    return -(-rows // num_chunks)


# The forwards that ``fuse_lora`` binds to modules.
FUSED_FORWARDS = (_linear_forward, _mlp_forward, _attention_forward)
