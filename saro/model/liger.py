"""Use the Triton layers of liger-kernel (Hsu et al. 2024, arXiv 2410.10989): RMSNorm, rotary embedding, gated MLP.

They are optional: the user installs liger-kernel and turns them on with --model.liger. They run on CUDA only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import GELUTanh, SiLUActivation

from saro.errors import SaroError
from saro.model.unmodified import own_forwards, replacement

# Name of the rotary function in transformers' modeling_*.py. Replacing it affects every model of that type in the
# process. _own_rotary maps the name of a modeling file to transformers' own function.
_ROTARY = "apply_rotary_pos_emb"
_own_rotary: dict[str, Callable] = {}


def check_liger(model_type: str, device: torch.device) -> None:
    """Raise SaroError if liger-kernel cannot compute the layers of this model type on this device."""
    if device.type != "cuda":
        raise SaroError("liger-kernel runs on CUDA only; leave --model.liger out")
    try:
        version("liger-kernel")
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KINDS
    except PackageNotFoundError as error:
        raise SaroError("--model.liger needs liger-kernel; pip install liger-kernel") from error
    except ImportError as error:  # this version is incompatible with the installed transformers
        raise SaroError(f"--model.liger: {error}") from error
    if model_type not in KINDS:
        raise SaroError(f"liger-kernel has no layers for model type {model_type!r}; leave --model.liger out")


def use_liger(model: PreTrainedModel) -> None:
    """Let liger-kernel compute a model's norms, rotary embedding and gated MLPs. The loss stays ours.

    Call this before adding adapters. `fuse_lora` then takes over the MLPs that it can compute, because it keeps fewer
    activations. Other models of this type in the process get liger-kernel's rotary embedding too.

    Raises:
        SaroError: the model brings its own code, which may compute something else than liger-kernel's layers.
    """
    if not type(model).__module__.startswith("transformers.models."):
        raise SaroError(f"{type(model).__name__} brings its own code; leave --model.liger out")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    file = sys.modules[type(model).__module__]
    before = dict(vars(file))
    try:
        _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    finally:
        # liger-kernel also replaces the classes in the file. Restore them, or other models of this type would use them.
        for name in before.keys() - {_ROTARY}:
            setattr(file, name, before[name])
    for module in model.modules():
        if _is_ligers(module) and not _has_ligers_activation(module):
            del module.forward, module._get_name
    if vars(file).get(_ROTARY) is not before.get(_ROTARY):
        _own_rotary[file.__name__] = before[_ROTARY]


def uses_liger(model: nn.Module) -> bool:
    """Return True if liger-kernel computes any layer of the model."""
    return any(_is_ligers(module) for module in model.modules())


@contextmanager
def transformers_own_layers(model: PreTrainedModel) -> Iterator[None]:
    """Inside, transformers' own code computes every layer again: for comparison."""
    file = sys.modules[type(model).__module__]
    ligers_rotary = getattr(file, _ROTARY, None)
    swap = uses_liger(model) and file.__name__ in _own_rotary
    if swap:
        setattr(file, _ROTARY, _own_rotary[file.__name__])
    try:
        with own_forwards(model, _is_ligers):
            yield
    finally:
        if swap:
            setattr(file, _ROTARY, ligers_rotary)


def _has_ligers_activation(module: nn.Module) -> bool:
    """Return True if the layer has no activation, or one that liger-kernel implements.

    liger-kernel does not check this itself.
    """
    activation = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    geglu = replacement(module).__qualname__.startswith("LigerGEGLU")
    return activation is None or isinstance(activation, GELUTanh if geglu else (nn.SiLU, SiLUActivation))


def _is_ligers(module: nn.Module) -> bool:
    return getattr(replacement(module), "__module__", "").startswith("liger_kernel.")
