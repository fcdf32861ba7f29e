"""Memory-lean kernels for training on long reasoning chains; usable without the trainer."""

from saro_kernels.lora import FrozenLinear, LoraLinear, lora_gated_mlp, lora_linear
from saro_kernels.token_logps import token_logps

__all__ = ["FrozenLinear", "LoraLinear", "lora_gated_mlp", "lora_linear", "token_logps"]
