"""Recompute decoder layers in the backward instead of keeping their activations (Chen et al. 2016, arXiv 1604.06174)."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from saro.errors import SaroError
from saro.model.fused_lora import CHECKPOINTING

# Layers whose inputs are still on the device while they are copied to the host. The stream that computes waits for a copy only
# when the next but one layer begins, and a layer takes several times as long as the copy of its inputs.
_LEAVING = 2


def recomputable_layers(lm: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Return the layers of a model's decoder that can be recomputed, in the order in which they run."""
    return [module for module in lm.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]


def count_recomputed(lm: PreTrainedModel) -> int:
    """Return how many layers of a model are recomputed in training."""
    return sum(layer.gradient_checkpointing for layer in recomputable_layers(lm))


def offloads_inputs(lm: PreTrainedModel) -> bool:
    """Return True if the inputs of recomputed layers are kept in host memory."""
    functions = [getattr(layer, "_gradient_checkpointing_func", None) for layer in recomputable_layers(lm)]
    return any(getattr(function, "func", None) is _checkpoint_on_host for function in functions)


def enable_recomputation(lm: PreTrainedModel, offload: bool = False) -> None:
    """Recompute all layers of a model in the backward. Between forward and backward only their inputs are kept.

    Args:
        offload: keep these inputs in host memory.

    Raises:
        SaroError: transformers cannot recompute the layers of this model.
    """
    if not lm.supports_gradient_checkpointing or not recomputable_layers(lm):
        raise SaroError(
            f"model.gradient_checkpointing: transformers cannot recompute the layers of {type(lm).__name__}; "
            "leave it out, and lower --data.pack_tokens instead"
        )
    lm.activation_checkpointing_enable(activation_checkpointing_kwargs=CHECKPOINTING)
    # It also lets the embeddings' output require a gradient, which only reentrant checkpointing needs. That gradient would be
    # computed and kept, and with it the output.
    lm.disable_input_require_grads()
    if offload:
        run = partial(_checkpoint_on_host, InputsOnHost())
        for layer in recomputable_layers(lm):
            layer._gradient_checkpointing_func = run


def recompute_layers(lm: PreTrainedModel, number: int) -> None:
    """Recompute only the first ``number`` layers; call ``enable_recomputation`` before.

    The backward begins with the last layers. Those that are kept are then freed before the first one is recomputed, and its
    activations take their place.

    Raises:
        SaroError: the model has fewer layers.
    """
    layers = recomputable_layers(lm)
    if number > len(layers):
        raise SaroError(
            f"model.gradient_checkpointing is {number}; the model has {len(layers)} layers; give at most {len(layers)}"
        )
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < number


def _checkpoint_on_host(hooks: InputsOnHost, function, *args):
    # ``checkpoint`` sets hooks of its own inside, so ours see only its arguments.
    with hooks:
        return checkpoint(function, *args, **CHECKPOINTING)


def empty_on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Make a tensor like this one in host memory. It is pinned if this one is on a device, so that copies are asynchronous."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type != "cpu")


class _Parked:
    """A saved tensor in host memory. While it is copied, it is on the device too.

    Attributes:
        host: its values, in pinned memory if they come from a device.
        on_device: the tensor on the device, or None.
        moved: event after the last copy in either direction.
        before: the first tensor of a layer has references to all of the layer before, which the backward reads next.
    """

    def __init__(self, host, on_device, moved, before) -> None:
        self.host = host
        self.on_device = on_device
        self.moved = moved
        self.before = before


class InputsOnHost(saved_tensors_hooks):
    """Makes autograd save tensors in host memory in its context. Each is back on the device before the backward reads it.

    Enter it once for each layer, in the order in which they run.

    Copies have a stream of their own. The stream that computes waits for a copy only where it needs the result: for that to
    the host before the device's memory is used again, and for that back, which begins a layer before. The host waits for
    neither. ``torch.autograd.graph.save_on_cpu`` copies on the stream that computes.

    All memory on the device is allocated for the stream that computes, and freed only when no copy can touch it any more. So
    the allocator can use it again at once, although the host has queued many layers ahead.

    A tensor on a CPU is copied in the same way.
    """

    def __init__(self) -> None:
        super().__init__(self._park, self._bring_back)
        self._stream = None
        # The tensors of the layers whose copies to the host may be under way, the newest layer last.
        self._leaving: deque[list[weakref.ref[_Parked]]] = deque()

    def __enter__(self) -> None:
        """Begin a layer, and free the device's memory of an earlier one."""
        self._leaving.append([])
        while len(self._leaving) > _LEAVING:
            # Autograd has freed a tensor already if its backward is done, or will never run.
            for parked in _alive(self._leaving.popleft()):
                if parked.on_device is not None:
                    self._wait_for(parked)
                    parked.on_device = None
        super().__enter__()

    @torch.no_grad()
    def _park(self, tensor: torch.Tensor) -> _Parked | torch.Tensor:
        """Begin to copy a tensor to the host; autograd keeps the result in its place."""
        # ``checkpoint`` of torch before 2.13 also saves a tensor without elements.
        if tensor.numel() == 0:
            return tensor
        host, tensor = empty_on_host(tensor), tensor.detach()
        *earlier, layer = self._leaving
        before = earlier[-1] if earlier and not layer else []
        parked = _Parked(host, tensor, self._copy(tensor, host), before)
        layer.append(weakref.ref(parked))
        return parked

    @torch.no_grad()
    def _bring_back(self, parked: _Parked | torch.Tensor) -> torch.Tensor:
        """Return a tensor on the device, and begin to fetch those of the layer that the backward reads next."""
        if isinstance(parked, torch.Tensor):
            return parked
        self._fetch(parked)
        self._wait_for(parked)
        # Autograd keeps the result while it needs it. If it asks again (retain_graph), the tensor is fetched again.
        tensor, parked.on_device = parked.on_device, None
        for earlier in _alive(parked.before):
            self._fetch(earlier)
        return tensor

    def _fetch(self, parked: _Parked) -> None:
        """Begin to copy a tensor back, unless it is on the device."""
        if parked.on_device is None:
            parked.on_device = torch.empty_like(parked.host, device=self._device)
            parked.moved = self._copy(parked.host, parked.on_device)

    def _copy(self, source: torch.Tensor, target: torch.Tensor):
        """Copy on our own stream, after all work queued on the computing stream. Returns the event of its end."""
        if self._stream is None:
            self._device = source.device
            self._streams = torch.get_device_module(self._device)
            self._stream = self._streams.Stream()
        self._stream.wait_stream(self._streams.current_stream())
        with self._streams.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def _wait_for(self, parked: _Parked) -> None:
        """Let the stream that computes wait for the last copy of a tensor."""
        self._streams.current_stream().wait_event(parked.moved)


def _alive(references: list[weakref.ref[_Parked]]) -> Iterator[_Parked]:
    """Yield the tensors that autograd still keeps."""
    return filter(None, (reference() for reference in references))
