"""Count the least work of a training step: operations and bytes of each part, computed only from shapes.

The floor of a part is the longer of two times: its operations at the GEMM rate, and its bytes at the rate of a copy.
The bytes are those that must cross the bus if every part is one kernel: inputs, weights and outputs once in the forward,
and once more each time the backward needs them. Numbers that stay inside a fused kernel (attention scores, logits) are
not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from saro.data.packs import Pack
from saro.model.architectures import text_config
from saro.model.policy import Policy

# AdamW reads the parameter, the gradient and two moments, and writes all but the gradient: 7 float32 numbers.
_ADAMW_BYTES = 7 * 4
_ADAMW_OPERATIONS = 14


@dataclass(frozen=True)
class Work:
    """The work of one part of a step.

    Attributes:
        operations: floating-point operations; a multiplication and an addition count as two.
        bytes: bytes that cross the bus.
    """

    operations: float
    bytes: float

    def seconds(self, operations_per_second: float, bytes_per_second: float) -> float:
        return max(self.operations / operations_per_second, self.bytes / bytes_per_second)


def floor_of_step(policy: Policy, pack: Pack) -> dict[str, Work]:
    """Return {part: Work} of one step on a pack. Norms, activations and residuals count as fused into other kernels."""
    lm = policy.causal_lm
    width = (policy.autocast or lm.dtype).itemsize
    config = text_config(lm.config)
    layers = [m for m in lm.get_decoder().modules() if isinstance(m, nn.Linear)]
    experts = [p for p in lm.get_decoder().parameters() if p.ndim == 3]
    trainable = sum(p.numel() for p in policy.trainable().values())
    return {
        "linear layers": _sum(
            [_product(layer, pack.tokens, width) for layer in layers]
            + [_experts(weight, pack.tokens, config.num_experts_per_tok, width) for weight in experts]
        ),
        "attention": _attention(config, pack, width),
        "head": _product(lm.get_output_embeddings(), pack.rows, width, logits=False),
        "optimizer": Work(_ADAMW_OPERATIONS * trainable, _ADAMW_BYTES * trainable),
    }


def _sum(parts: Sequence[Work]) -> Work:
    return Work(sum(p.operations for p in parts), sum(p.bytes for p in parts))


def _product(layer: nn.Linear, rows: int, width: int, logits: bool = True) -> Work:
    """Count forward and backward of a linear layer.

    The forward takes 2 operations per weight and row. The gradient of the input takes as many, and so does that of the
    weight if it is trained. ``logits=False`` leaves out the bytes of the output.
    """
    weight = layer.weight
    n_in, n_out = layer.in_features, layer.out_features
    products = 3 if weight.requires_grad else 2
    input_bytes = rows * n_in * width
    output_bytes = rows * n_out * width if logits else 0
    weight_bytes = weight.numel() * weight.element_size()  # for a 4-bit weight, the packed bytes
    return Work(products * 2 * rows * n_in * n_out, products * (input_bytes + weight_bytes + output_bytes))


def _experts(weight: nn.Parameter, tokens: int, chosen: int, width: int) -> Work:
    """Count forward and backward of the frozen layers of all experts, (experts, n, m); each token chooses some of them."""
    experts, n, m = weight.shape
    rows = tokens * chosen
    weight_bytes = min(rows, experts) * n * m * weight.element_size()
    return Work(2 * 2 * rows * n * m, 2 * (rows * (n + m) * width + weight_bytes))


def _attention(config: PretrainedConfig, pack: Pack, width: int) -> Work:
    """Count the attention of all layers over the trees of a pack.

    A node of L tokens, whose ancestors have P tokens, takes 4 (L^2 / 2 + L P) H D operations in the forward and twice as
    many in the backward.
    """
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    # Use the segments, which are on the host. Positions may be on a device, or fake tensors.
    scores = 0.0
    path: list[int] = []  # tokens of each segment and its ancestors
    for start, stop, parent in pack.segments:
        length, before = stop - start, path[parent] if parent >= 0 else 0
        path.append(before + length)
        scores += length**2 / 2 + length * before
    # The forward reads q, k, v and writes the output. The backward reads these and the output's gradient, and writes
    # three gradients.
    moved = pack.tokens * width * ((2 * queries + 2 * keys) + (3 * queries + 2 * keys) + (queries + 2 * keys))
    return Work(3 * 4 * scores * queries * config.num_hidden_layers, moved * config.num_hidden_layers)
