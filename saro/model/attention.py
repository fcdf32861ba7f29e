"""Packed tree attention: every segment of a pack attends to its ancestors and, causally, to itself, and to no other.

It is registered with transformers' attention interface as ``PACKED``. A pack's plan reaches it through the decoder's
keyword arguments. It has two backends (see ``attention_backend``): ``sdpa`` makes one call per segment, ``varlen`` one call
per pack. Models with a softcap use ``softcap_attention``, once per segment, and models with sinks ``sdpa``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention import varlen
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from saro.data.packs import Pack, send
from saro.model.architectures import attention_softcap
from saro.model.attention_backend import EITHER
from saro_kernels.autocast import cast_input
from saro_kernels.softcap_attention import softcap_attention

PACKED = "saro_packed"

# Rows of a mask start at multiples of this many elements: CUDA's memory-efficient attention copies other masks in each
# call.
MASK_ALIGNMENT = 8

# Heads with a sink grow by this many elements: kernels for half precision need sizes that are multiples of 8.
SINK_WIDTH = 8

# Arguments that decoders pass to their attention function and that do not change the result here: the rotary embedding
# has applied the positions already, and training has no cache. All others must be None (see `check_arguments`).
_WITHOUT_EFFECT = frozenset({"position_ids", "use_cache", "cache_position"})


class UnfitAttention(ValueError):
    """A model's layer calls attention in a way that packed attention does not compute."""


class KeyGather(NamedTuple):
    """The keys of all paths, one path after the other, as copies of the T tokens of a pack.

    Attributes:
        tokens: (K,) int64, the token that each of the K keys is a copy of.
        copies: (K,) int64, the keys in the order of their tokens.
        starts: (T,) int64, where the copies of each token start in ``copies``. Each token has at least one.
    """

    tokens: torch.Tensor
    copies: torch.Tensor
    starts: torch.Tensor


class VarlenLayout(NamedTuple):
    """The layout of a pack as ``varlen_attn`` needs it: N paths, each with the queries of its last segment.

    Attributes:
        bounds_q, bounds_k: (N + 1,) int32, where queries and keys of each path start and end.
        max_q, max_k: the most queries and the most keys of a path.
        gather: None if each path is a single segment, so that keys are where queries are.
    """

    bounds_q: torch.Tensor
    bounds_k: torch.Tensor
    max_q: int
    max_k: int
    gather: KeyGather | None


@dataclass(eq=False)
class AttentionPlan:
    """The layout of a pack as attention needs it, computed once and used in all layers.

    Attributes:
        backend: "sdpa", "varlen" or ``EITHER``.
        lengths: number of tokens of each segment; segments without tokens are left out.
        paths: for each segment, the indices of its ancestors from the root down, then its own index.
        device: device of masks and indices.
    """

    backend: str
    lengths: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    device: torch.device
    _masks: dict[tuple[int, int | None, torch.dtype], torch.Tensor | None] = field(default_factory=dict)
    _varlen: VarlenLayout | None = None

    @classmethod
    def of(cls, pack: Pack, backend: str, isolated: bool = True) -> AttentionPlan:
        """Make the plan of a pack. Segments without tokens are skipped; no other segment descends from them.

        ``isolated=False`` makes one causal sequence of the whole pack. ``check_packs`` uses it as the control that must
        fail.
        """
        index: dict[int, int] = {}  # segment of the pack -> segment of the plan
        lengths: list[int] = []
        paths: list[tuple[int, ...]] = []
        for i, (start, stop, parent) in enumerate(pack.segments):
            if stop > start:
                index[i] = len(lengths)
                ancestors = paths[index[parent]] if parent >= 0 else ()
                paths.append((*ancestors, len(lengths)))
                lengths.append(stop - start)
        if not isolated:
            lengths, paths = [sum(lengths)], [(0,)]
        return cls(backend, tuple(lengths), tuple(paths), pack.input_ids.device)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest sequence."""
        return max(sum(self.lengths[s] for s in path) for path in self.paths)

    def backend_of(self, window: int | None) -> str:
        """Return the backend that computes layers of this window, "sdpa" or "varlen".

        ``EITHER`` is SDPA for a single sequence, if that needs no mask.
        """
        if self.backend != EITHER:
            return self.backend
        is_causal = len(self.lengths) == 1 and (window is None or self.lengths[0] <= window)
        return "sdpa" if is_causal else "varlen"

    def mask(self, segment: int, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """Return a (queries, keys) mask, or None if plain causal attention does the same.

        Args:
            dtype: torch.bool for a mask that is True where a query attends to a key. A float dtype for one to add to
                the scores, 0 there and -inf elsewhere: torch's attention makes one of a bool mask in each call.
        """
        key = (segment, window, dtype)
        if key not in self._masks:
            self._masks[key] = self._make_mask(segment, window, dtype)
        return self._masks[key]

    def _make_mask(self, segment: int, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        path = self.paths[segment]
        keys = sum(self.lengths[s] for s in path)
        if len(path) == 1 and (window is None or keys <= window):
            return None
        # Count positions along the path: in the pack, other segments may lie between its tokens.
        k = torch.arange(keys, device=self.device)  # (keys,)
        q = k[keys - self.lengths[segment] :, None]  # (queries, 1)
        allowed = k <= q  # (queries, keys)
        if window is not None:
            allowed &= q - k < window
        if dtype == torch.bool:
            return allowed
        width = -(-keys // MASK_ALIGNMENT) * MASK_ALIGNMENT
        mask = torch.zeros(len(q), width, dtype=dtype, device=self.device)[:, :keys]
        return mask.masked_fill_(~allowed, -torch.inf)

    def varlen(self) -> VarlenLayout:
        """Return the layout for ``varlen_attn``."""
        if self._varlen is None:
            starts = np.cumsum([0, *self.lengths])
            key_lengths = [sum(self.lengths[s] for s in path) for path in self.paths]
            gather = None
            if any(len(path) > 1 for path in self.paths):
                # On the host, in numpy, so that fake tensors can measure the memory of a step.
                tokens = np.concatenate([np.arange(starts[s], starts[s + 1]) for path in self.paths for s in path])
                copies_of = np.bincount(tokens)  # (T,)
                gather = KeyGather(
                    tokens=self._on_device(tokens, torch.int64),
                    copies=self._on_device(tokens.argsort(kind="stable"), torch.int64),
                    starts=self._on_device(copies_of.cumsum() - copies_of, torch.int64),
                )
            self._varlen = VarlenLayout(
                bounds_q=self._on_device(starts, torch.int32),
                bounds_k=self._on_device(np.cumsum([0, *key_lengths]), torch.int32),
                max_q=max(self.lengths),
                max_k=max(key_lengths),
                gather=gather,
            )
        return self._varlen

    def _on_device(self, numbers: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return send(torch.tensor(numbers, dtype=dtype), self.device)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    plan: AttentionPlan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Compute attention over one pack, with the signature that transformers expects.

    Args:
        query: (1, H, T, D), H query heads of size D over T tokens.
        key, value: (1, G, T, D), G key heads; H is a multiple of G.
        plan: from ``AttentionPlan.of``.
        sliding_window: number of tokens that a token sees, itself included.
        softcap: bound of the scores.
        s_aux: (H,) sinks (Agarwal et al. 2025, arXiv 2508.10925, section 2.2): a score of each head beside those of its
            keys, which takes its share of the softmax and adds no value.

    Returns:
        (1, T, H, D), and None for the attention weights.

    Raises:
        UnfitAttention: there is no plan, or an unknown argument could change the result.
    """
    if plan is None:
        raise UnfitAttention(f"{type(module).__name__} got no plan of a pack; call the model through Policy")
    check_arguments(module, attention_mask, others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # autocast does this for SDPA only, and the rotary embedding of float32 hidden states leaves queries and keys float32.
    query, key, value = map(cast_input, (query, key, value))
    if softcap is None and s_aux is None and plan.backend_of(sliding_window) == "varlen":
        return _varlen(query, key, value, plan, scale, dropout, sliding_window), None
    return _sdpa(query, key, value, plan, scale, dropout, sliding_window, softcap, s_aux), None


def check_arguments(module: torch.nn.Module, mask: torch.Tensor | None, others: Mapping[str, object]) -> None:
    """Raise UnfitAttention if a module passes an argument that our attention functions do not support.

    Args:
        others: the arguments that our attention function does not name.
    """
    unknown = sorted(k for k, v in others.items() if v is not None and k not in _WITHOUT_EFFECT)
    if unknown or mask is not None:
        names = ", ".join(unknown) or "attention_mask"
        raise UnfitAttention(f"packed attention does not know the argument {names} of {type(module).__name__}")
    if not getattr(module, "is_causal", True):
        raise UnfitAttention(f"{type(module).__name__} is not causal; packed attention is")


def _sdpa(query, key, value, plan, scale, dropout, window, softcap=None, sinks=None):
    """Compute attention with one call per segment; arguments and result as in ``packed_attention``."""
    if sinks is not None:
        attend, mask_dtype = partial(_attend_with_sinks, sinks=sinks, dropout_p=dropout, scale=scale), query.dtype
    elif softcap is None:
        attend, mask_dtype = partial(_attend, dropout_p=dropout, scale=scale), query.dtype
    elif dropout:
        raise ValueError("softcapped attention has no dropout; set --model.dropout false")
    else:
        attend, mask_dtype = partial(softcap_attention, scale=scale, softcap=softcap), torch.bool
    # Split, do not slice: the backward of a split is one concatenation, but that of n slices is n sums over the pack.
    queries, keys, values = (x.split(plan.lengths, dim=2) for x in (query, key, value))
    outputs = []
    for segment, path in enumerate(plan.paths):
        k = keys[segment] if len(path) == 1 else torch.cat([keys[s] for s in path], dim=2)
        v = values[segment] if len(path) == 1 else torch.cat([values[s] for s in path], dim=2)
        mask = plan.mask(segment, window, mask_dtype)
        outputs.append(attend(queries[segment], k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2))
    return torch.cat(outputs, dim=1)  # (1, T, H, D)


def _attend(query, key, value, *, attn_mask, **options):
    """Call torch's attention on one segment. Key heads are repeated if the kernel cannot share them."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not _shares_keys(query, attn_mask):
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, enable_gqa=gqa, **options)


def _attend_with_sinks(query, key, value, *, sinks, attn_mask, is_causal, scale, **options):
    """Call torch's attention with sinks (H,): a first key, of zeros, whose score is the sink.

    Heads grow by ``SINK_WIDTH``. There, queries hold their head's sink, the first key holds ones, and the others zeros. The
    sink is split into a part that the dtype holds and the rest, so that its score is exact to twice the dtype's precision.
    """
    size = value.shape[-1]
    score = sinks.to(torch.promote_types(sinks.dtype, torch.float32)) / scale  # (H,)
    high = score.to(query.dtype)
    low = (score - high).to(query.dtype)
    parts = F.pad(torch.stack([high, low], dim=-1), (0, SINK_WIDTH - 2))  # (H, SINK_WIDTH)
    query = torch.cat([query, parts[None, :, None].expand(-1, -1, query.shape[2], -1)], dim=-1)
    key, value = (F.pad(x, (0, SINK_WIDTH, 1, 0)) for x in (key, value))
    key[:, :, 0, -SINK_WIDTH:] = 1
    if is_causal:
        # A query before the first one sees only the sink. Each of the others then sees as many keys as is_causal allows.
        query = F.pad(query, (0, 0, 1, 0))
    else:
        attn_mask = F.pad(attn_mask, (1, 0))  # 0 is added to the sink's score
    output = _attend(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, **options)
    return output[:, :, int(is_causal) :, :size]


def _shares_keys(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Return True if a kernel that never materialises queries x keys supports fewer key heads than query heads here.

    On CUDA only flash attention does, and it supports neither float32 nor masks. In all other cases the keys are
    repeated, so that memory-efficient attention can run.
    """
    return query.device.type != "cuda" or (query.dtype != torch.float32 and mask is None)


def _varlen(query, key, value, plan, scale, dropout, window):
    """Compute attention with one call for the pack; arguments and result as in ``packed_attention``."""
    if dropout:
        raise ValueError("varlen attention has no dropout; set --model.attention sdpa or --model.dropout false")
    layout = plan.varlen()
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    if layout.gather is not None:
        k, v = _GatherKeys.apply(k, v, layout.gather)
    # The kernel takes fewer key heads than query heads. Versions of torch that have this option refuse them without it.
    shares_keys = {"enable_gqa": q.shape[1] != k.shape[1]} if _has_enable_gqa(varlen.varlen_attn) else {}
    # varlen_attn aligns a causal mask at the last query and the last key, and the keys of a path end with its queries.
    # Its window does not count the token itself, ours does.
    output = varlen.varlen_attn(
        q,
        k,
        v,
        layout.bounds_q,
        layout.bounds_k,
        layout.max_q,
        layout.max_k,
        scale=scale,
        window_size=(-1, 0) if window is None else (window - 1, 0),
        **shares_keys,
    )
    return output.unsqueeze(0)  # (1, T, H, D)


@functools.cache
def _has_enable_gqa(varlen_attn: Callable) -> bool:
    """Return True if torch's function has the argument ``enable_gqa``, which is newer than torch 2.11."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


class _GatherKeys(torch.autograd.Function):
    """Copies keys and values (T, G, D) of a pack to those of its paths, (K, G, D).

    The backward sums the gradients of a token's copies in float32, always in the same order. That of ``index_select``
    adds them one by one in the dtype of the keys, on a GPU in any order.
    """

    @staticmethod
    def forward(ctx, key, value, gather):
        ctx.gather = gather
        return key.index_select(0, gather.tokens), value.index_select(0, gather.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_keys, d_values):
        return _sum_copies(d_keys, ctx.gather), _sum_copies(d_values, ctx.gather), None


def _sum_copies(gradient: torch.Tensor, gather: KeyGather) -> torch.Tensor:
    """Return the sums (T, G, D) over each token's copies, from values (K, G, D)."""
    # An embedding bag is a sum of rows that are chosen by index: one kernel gathers and sums.
    sums = F.embedding_bag(gather.copies, gradient.flatten(1), gather.starts, mode="sum")
    return sums.unflatten(1, gradient.shape[1:])


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switch a model to packed attention. Every call then needs a plan.

    transformers does not know this name, so it makes no mask of T x T and does not search for packed sequences, which would
    wait for the device.
    """
    ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
    model.set_attn_implementation(PACKED)


@contextmanager
def native_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use transformers' own attention in this context, for generation and comparison. Packed attention returns at its end.

    Never run the backward of an earlier forward in this context: gradient checkpointing would recompute that forward
    with the wrong attention.
    """
    has_sdpa = model._supports_sdpa and attention_softcap(model.config) is None
    model.set_attn_implementation("sdpa" if has_sdpa else "eager")
    try:
        yield
    finally:
        use_packed_attention(model)
