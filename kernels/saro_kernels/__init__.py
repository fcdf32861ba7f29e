"""Memory-saving kernels for training on long reasoning chains. They need only torch, and work without the trainer.

- `token_logps`, `token_statistics`: log-probs, entropies and top-1 accuracy of an LM head, without the (N, V) logits.
- `lora_linear`, `lora_linears`, `lora_gated_mlp`: LoRA on frozen layers, with fewer tensors kept for the backward.
- `saro_kernels.softcap_attention`: attention with capped scores (Gemma 2). Import it from its module.
"""

from saro_kernels.lora import lora_linear, lora_linears
from saro_kernels.lora_group import FrozenLinear, LoraLinear
from saro_kernels.lora_mlp import lora_gated_mlp
from saro_kernels.token_logps import TokenStatistics, choose_impl, token_logps, token_statistics

__all__ = [
    "FrozenLinear",
    "LoraLinear",
    "TokenStatistics",
    "choose_impl",
    "lora_gated_mlp",
    "lora_linear",
    "lora_linears",
    "token_logps",
    "token_statistics",
]
