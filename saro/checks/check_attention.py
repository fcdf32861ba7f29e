"""Check packed attention in the run's precision and with the model's head shapes: its error against float64, per row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from saro.checks.noise import KERNEL_FACTOR
from saro.data.packs import lay_out
from saro.data.tree import SequenceTree, build_tree
from saro.errors import SaroError
from saro.model.architectures import attention_softcap, has_sinks, layer_head_sizes, sliding_window, text_config
from saro.model.attention import AttentionPlan, packed_attention
from saro.model.attention_backend import EITHER
from saro.model.policy import Policy

# Compare about this many rows of each pack: float64 scores of all rows would take memory quadratic in its tokens.
_ROWS = 64
# The plain path's error counts as at least one rounding to the precision, and this many to float32.
_FLOAT32_ROUNDINGS = 64
_OTHER = {"sdpa": "varlen", "varlen": "sdpa"}


@dataclass(frozen=True)
class HeadShape:
    """The shape of one kind of attention layer.

    Attributes:
        heads, key_heads: number of heads of queries, and of keys and values.
        size, value_size: size of a head of queries and keys, and of values.
        window: number of tokens that a token sees, itself included; None for all.
        softcap: bound of the scores, or None.
        sinks: each head has a sink.
    """

    heads: int
    key_heads: int
    size: int
    value_size: int
    window: int | None
    softcap: float | None
    sinks: bool = False


def check_attention(policy: Policy, trees: Sequence[SequenceTree]) -> float:
    """Run random queries, keys and values of a pack of trees through the policy's attention backend, or both backends.

    About 64 rows are compared with float64, those at the ends of segments among them. The error of each row's output may
    be twice the error that plain attention makes there in the same precision: attention over one row's keys, gathered by
    hand. So may the largest error of the gradients.

    Returns:
        The largest error, in units of the error of plain attention.

    Raises:
        SaroError: an error is too large.
    """
    packs = [trees]
    if policy.attention == EITHER:
        longest = max((sequence for tree in trees for sequence in tree.sequences), key=lambda s: len(s.tokens))
        alone = build_tree([longest])
        packs = [[alone], [*trees, alone]]  # one for each backend
    device = policy.causal_lm.device
    plans = [AttentionPlan.of(lay_out(pack).to(device), policy.attention) for pack in packs]
    worst = 0.0
    for plan, shape in itertools.product(plans, head_shapes(policy.causal_lm.config)):
        backend = plan.backend_of(shape.window)
        if (shape.softcap is not None or shape.sinks) and backend == "varlen":
            continue
        for name, ratio in _errors(plan, shape, policy.compute_dtype).items():
            # Do not write "ratio > ...": NaN must fail too.
            if not ratio <= KERNEL_FACTOR:
                way_out = "" if policy.attention == "sdpa" else f"set --model.attention {_OTHER[backend]}, and "
                raise SaroError(
                    f"the {backend} attention of packs is wrong on this machine: its {name} over {shape.heads} "
                    f"heads of size {shape.size} in {policy.compute_dtype} err by {ratio:.3g} times as much as plain "
                    f"attention; {way_out}report it"
                )
            worst = max(worst, ratio)
    return worst


def head_shapes(config: PretrainedConfig) -> list[HeadShape]:
    """Return the kinds of attention layers that a model has, each once."""
    shapes = []
    config = text_config(config)
    window = sliding_window(config)
    types = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    for layer, kind in zip(config.per_layer_config, types, strict=False):
        size, value_size = layer_head_sizes(layer)
        shapes.append(
            HeadShape(
                heads=layer.num_attention_heads,
                key_heads=getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads,
                size=size,
                value_size=value_size,
                window=None if kind == "full_attention" else window,
                softcap=attention_softcap(config),
                sinks=has_sinks(config),
            )
        )
    return list(dict.fromkeys(shapes))


def _errors(plan: AttentionPlan, shape: HeadShape, dtype: torch.dtype) -> dict[str, float]:
    """Return the largest errors of outputs and gradients, in units of those of plain attention."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(plan.lengths)

    def draw(heads: int, size: int) -> Tensor:
        return torch.randn(1, heads, tokens, size, generator=generator).to(plan.device, dtype)

    query, key = draw(shape.heads, shape.size), draw(shape.key_heads, shape.size)
    value, upstream = draw(shape.key_heads, shape.value_size), draw(shape.heads, shape.value_size)
    sinks = torch.randn(shape.heads, generator=generator).to(plan.device, dtype) if shape.sinks else None
    keys_of = _choose_rows(plan, shape.window)
    rows = torch.tensor(list(keys_of), device=plan.device)

    def packed() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        layer = SimpleNamespace(is_causal=True)
        out, _ = packed_attention(
            layer, *leaves, None, plan=plan, sliding_window=shape.window, softcap=shape.softcap, s_aux=sinks
        )
        chosen = out[0].index_select(0, rows)  # (rows, H, D)
        gradients = torch.autograd.grad((chosen * upstream[0].transpose(0, 1)[rows]).sum(), leaves)
        return [chosen.detach(), *(gradient[0].transpose(0, 1) for gradient in gradients)]

    def plain(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).clone().requires_grad_() for x in (query, key, value)]
        outputs = []
        for row, keys in keys_of.items():
            out = _attend(*leaves, sinks, row, keys.to(plan.device), shape)
            # Go row by row, so that the graph of only one row is alive.
            (out * upstream[0, :, row].to(dtype)).sum().backward()
            outputs.append(out.detach())
        return [torch.stack(outputs), *(leaf.grad[0].transpose(0, 1) for leaf in leaves)]

    exact, rounded, ours = plain(torch.float64), plain(dtype), packed()
    # Either error may be small by chance: a few roundings always count.
    eps = max(torch.finfo(dtype).eps, _FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps)
    # Gradients of queries and keys are zero if all tokens attend only to themselves. The products that cancel then have at
    # most this size, and their rounding may be left.
    product = upstream.norm(dim=-1).max() * value.norm(dim=-1).max() * shape.size**-0.5
    cancelled = {
        "gradients of queries": product * key.norm(dim=-1).max(),
        "gradients of keys": product * query.norm(dim=-1).max(),
    }
    names = ("outputs", "gradients of queries", "gradients of keys", "gradients of values")
    # An output is a mean of values: each row has an error of its own, which falls with the number of its keys. Gradients
    # are sums, in which parts may cancel: the largest errors are compared.
    ratios = {}
    for name, *results in zip(names, ours, rounded, exact, strict=True):
        error, plain_error, size = _token_norms(*results)
        if name != "outputs":
            error, plain_error, size = error.max(), plain_error.max(), size.max()
            if size == 0:
                size = cancelled[name].double()
        allowed = torch.maximum(plain_error, eps * size)
        ratios[name] = (error / allowed).max().item()
    return ratios


def _choose_rows(plan: AttentionPlan, window: int | None) -> dict[int, Tensor]:
    """Return the tokens that a token attends to, by token: for the first and last of each segment, and some others."""
    starts = np.cumsum([0, *plan.lengths[:-1]])
    spread = max(1, sum(plan.lengths) // _ROWS)
    chosen = {}
    for start, length, path in zip(starts, plan.lengths, plan.paths, strict=True):
        ancestors = [np.arange(starts[s], starts[s] + plan.lengths[s]) for s in path[:-1]]
        for row in sorted({0, length - 1, *range(0, length, spread)}):
            keys = np.concatenate([*ancestors, np.arange(start, start + row + 1)])
            chosen[int(start + row)] = torch.from_numpy(keys if window is None else keys[-window:])
    return chosen


def _attend(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, row: int, keys: Tensor, shape: HeadShape
) -> Tensor:
    """Return the attention output (H, D) of one row over its keys, by the definition, with the softmax in float32 or wider."""
    q = query[0, :, row].view(shape.key_heads, -1, shape.size)  # (G, H / G, D)
    k, v = key[0, :, keys], value[0, :, keys]  # (G, K, D)
    scores = q @ k.transpose(1, 2) * shape.size**-0.5  # (G, H / G, K)
    if shape.softcap is not None:
        scores = (scores / shape.softcap).tanh() * shape.softcap
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(shape.key_heads, -1, 1)], dim=-1)  # (G, H / G, K + 1)
    wide = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = wide[..., : len(keys)].to(scores.dtype)
    return (weights @ v).view(shape.heads, shape.value_size)


def _token_norms(ours: Tensor, rounded: Tensor, exact: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norms of our error, of the plain path's and of the exact values: (tokens,) each, of (tokens, H, D)."""
    ours, rounded = ours.double() - exact, rounded.double() - exact
    return tuple(x.flatten(1).norm(dim=1) for x in (ours, rounded, exact))
