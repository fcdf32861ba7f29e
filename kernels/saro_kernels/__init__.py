"""Memory-lean kernels for training on long reasoning chains; usable without the trainer."""

from saro_kernels.lora import FrozenLinear, LoraLinear, lora_gated_mlp, lora_linear
from saro_kernels.token_logps import TokenStatistics, choose_impl, token_logps, token_statistics

__all__ = [
    "FrozenLinear",
    "LoraLinear",
    "TokenStatistics",
    "choose_impl",
    "lora_gated_mlp",
    "lora_linear",
    "token_logps",
    "token_statistics",
]
