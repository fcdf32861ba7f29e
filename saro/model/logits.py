"""What a model makes of the LM head's products before its softmax: a scale and a softcap, read from its config."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PretrainedConfig

# Options by which a model scales its logits. The same name means a factor in one model and a divisor in another, so
# each model type is listed, with the power of the option that is its factor.
SCALE_OPTIONS = ("logit_scale", "logits_scaling")
_SCALES = {
    "cohere": ("logit_scale", 1),
    "cohere2": ("logit_scale", 1),
    "granite": ("logits_scaling", -1),
    "hyperclovax": ("logits_scaling", 1),
    "minicpm3": ("logits_scaling", -1),
}


class LogitOptions(NamedTuple):
    """Of `token_logps`: logits are ``softcap * tanh(scale * products / softcap)``, or without a softcap
    ``scale * products``.
    """

    scale: float = 1.0
    softcap: float | None = None


def logit_options(config: PretrainedConfig) -> LogitOptions:
    """The scale and the softcap of a causal LM. What other options change is refused by ``check_supported``."""
    scale = 1.0
    if config.model_type in _SCALES:
        name, power = _SCALES[config.model_type]
        scale = float(getattr(config, name)) ** power
    return LogitOptions(scale, getattr(config, "final_logit_softcapping", None) or None)


def scales_its_logits(config: PretrainedConfig, option: str) -> bool:
    """Whether ``logit_options`` takes ``option`` into account for models of this type."""
    return _SCALES.get(config.model_type, ("", 0))[0] == option
