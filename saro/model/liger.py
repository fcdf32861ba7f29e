"""Use the Triton layers of liger-kernel (Hsu et al. 2024, arXiv 2410.10989): RMSNorm, rotary embedding, gated MLP.

They are optional: where liger-kernel is installed, they are used on CUDA, unless --model.liger says otherwise.
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
from saro.model.architectures import MIXTURES, WRAPPERS

# Name of the rotary function in transformers' modeling_*.py. Replacing it affects every model of that type in the
# process. _own_rotary maps the name of a modeling file to transformers' own function.
_ROTARY = "apply_rotary_pos_emb"
_own_rotary: dict[str, Callable] = {}


def why_not_liger(model_type: str, device: torch.device) -> str | None:
    """Return why liger-kernel cannot compute the layers of this model type on this device; None if it can."""
    if model_type in WRAPPERS | MIXTURES:
        return f"liger-kernel's layers are not used for model type {model_type!r}; leave --model.liger out"
    if device.type != "cuda":
        return "liger-kernel runs on CUDA only; leave --model.liger out"
    try:
        version("liger-kernel")
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KINDS
    except PackageNotFoundError:
        return "--model.liger needs liger-kernel; pip install liger-kernel"
    except ImportError as error:  # this version is incompatible with the installed transformers
        return f"--model.liger: {error}"
    if model_type not in KINDS:
        return f"liger-kernel has no layers for model type {model_type!r}; leave --model.liger out"
    return None


def choose_liger(asked: bool | None, model_type: str, device: torch.device) -> bool:
    """Return ``asked``; if it is None, True if liger-kernel can compute the model's layers.

    Raises:
        SaroError: they were asked for and cannot be used.
    """
    if asked is False:
        return False
    reason = why_not_liger(model_type, device)
    if asked and reason is not None:
        raise SaroError(reason)
    return reason is None


def brings_own_code(model: PreTrainedModel) -> bool:
    """Return True if the model's code is not that of transformers: it may compute something else than liger-kernel."""
    return not type(model).__module__.startswith("transformers.models.")


def use_liger(model: PreTrainedModel) -> None:
    """Let liger-kernel compute a model's norms, rotary embedding and gated MLPs. The loss stays ours.

    Call this before adding adapters. `fuse_lora` then takes over the MLPs that it can compute, because it keeps fewer
    activations. Other models of this type in the process get liger-kernel's rotary embedding too.

    Raises:
        SaroError: the model brings its own code, which may compute something else than liger-kernel's layers, or this
            version of liger-kernel lacks what it needs for the model's type. The model is unchanged.
    """
    if brings_own_code(model):
        raise SaroError(f"{type(model).__name__} brings its own code; leave --model.liger out")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    file = sys.modules[type(model).__module__]
    before = dict(vars(file))
    try:
        _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    except ImportError as error:  # a type's layers are imported only now, before anything is replaced
        raise SaroError(f"--model.liger: {error}; leave it out") from error
    finally:
        # liger-kernel also replaces the classes in the file. Restore them, or other models of this type would use them.
        for name in before.keys() - {_ROTARY}:
            setattr(file, name, before[name])
    for module in model.modules():
        if is_ligers(module) and not _has_ligers_activation(module):
            del module.forward, module._get_name
    if vars(file).get(_ROTARY) is not before.get(_ROTARY):
        _own_rotary[file.__name__] = before[_ROTARY]


def uses_liger(model: nn.Module) -> bool:
    """Return True if liger-kernel computes any layer of the model."""
    return any(is_ligers(module) for module in model.modules())


@contextmanager
def own_rotary(model: PreTrainedModel) -> Iterator[None]:
    """Restore transformers' own rotary embedding for all models of this type."""
    file = sys.modules[type(model).__module__]
    if file.__name__ not in _own_rotary or not uses_liger(model):
        yield
        return
    ligers = getattr(file, _ROTARY)
    setattr(file, _ROTARY, _own_rotary[file.__name__])
    try:
        yield
    finally:
        setattr(file, _ROTARY, ligers)


def is_ligers(module: nn.Module) -> bool:
    """Return True if liger-kernel has replaced the module's forward."""
    return getattr(replaced_forward(module), "__module__", "").startswith("liger_kernel.")


def replaced_forward(module: nn.Module) -> Callable | None:
    """Return the function that was bound to a module in place of its class's forward; None if there is none."""
    return getattr(module.__dict__.get("forward"), "__func__", None)


def _has_ligers_activation(module: nn.Module) -> bool:
    """Return True if the layer has no activation, or one that liger-kernel implements.

    liger-kernel does not check this itself.
    """
    activation = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    geglu = replaced_forward(module).__qualname__.startswith("LigerGEGLU")
    return activation is None or isinstance(activation, GELUTanh if geglu else (nn.SiLU, SiLUActivation))
