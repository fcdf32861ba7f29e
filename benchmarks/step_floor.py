"""The least that a training step must do: operations and bytes by part, from shapes alone.

A part's floor is the longer of its operations at the GEMM rate and its bytes at the rate of a copy. Bytes are those that
must cross the bus where every part is one kernel: inputs, weights and outputs once in the forward, and once more each time
the backward needs them. What a fused kernel keeps to itself (attention scores, logits) is no byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from saro.data.packs import Pack
from saro.model.policy import Policy

# AdamW reads parameter, gradient and two moments, and writes all but the gradient; all are float32.
_ADAMW_BYTES = 7 * 4
_ADAMW_OPERATIONS = 14


@dataclass(frozen=True)
class Work:
    """Floating-point operations (a multiplication and an addition are two), and bytes."""

    operations: float
    bytes: float

    def seconds(self, operations_per_second: float, bytes_per_second: float) -> float:
        return max(self.operations / operations_per_second, self.bytes / bytes_per_second)


def floor_of_step(policy: Policy, pack: Pack) -> dict[str, Work]:
    """What one step on a pack needs, by part; norms, activations and residuals can be part of other kernels."""
    lm = policy.causal_lm
    width = (policy.autocast or lm.dtype).itemsize
    layers = [m for m in lm.get_decoder().modules() if isinstance(m, nn.Linear)]
    trainable = sum(p.numel() for p in policy.trainable().values())
    return {
        "linear layers": _sum([_product(layer, pack.tokens, width) for layer in layers]),
        "attention": _attention(lm.config, pack, width),
        "head": _product(lm.get_output_embeddings(), pack.rows, width, logits=False),
        "optimizer": Work(_ADAMW_OPERATIONS * trainable, _ADAMW_BYTES * trainable),
    }


def _sum(parts: Sequence[Work]) -> Work:
    return Work(sum(p.operations for p in parts), sum(p.bytes for p in parts))


def _product(layer: nn.Linear, rows: int, width: int, logits: bool = True) -> Work:
    """Forward and backward of a linear layer: 2 operations for each weight and row in the forward, as many for the
    gradient of the input, and of the weight where it is trained. ``logits=False`` leaves out the bytes of its output.
    """
    weight = layer.weight
    n_in, n_out = layer.in_features, layer.out_features
    products = 3 if weight.requires_grad else 2
    x, y = rows * n_in * width, rows * n_out * width if logits else 0
    stored = weight.numel() * weight.element_size()  # of a 4-bit weight, its packed bytes
    return Work(products * 2 * rows * n_in * n_out, products * (x + stored + y))


def _attention(config: PretrainedConfig, pack: Pack, width: int) -> Work:
    """Causal attention over L tokens and its ancestors' P: 4 (L^2 / 2 + L P) H D operations forward, twice that backward."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    # A token attends to as many as stand before it on its path, and to itself, of which half is counted.
    scores = pack.position_ids.sum().item() + pack.tokens / 2
    # Forward: q, k, v in, the output out. Backward: those and the output's gradient in, three gradients out.
    moved = pack.tokens * width * ((2 * queries + 2 * keys) + (3 * queries + 2 * keys) + (queries + 2 * keys))
    return Work(3 * 4 * scores * queries * config.num_hidden_layers, moved * config.num_hidden_layers)
