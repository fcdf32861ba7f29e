"""Packed tree attention: every segment of a pack attends to its ancestors and, causally, to itself, and to no other.

Registered with transformers' attention interface under ``PACKED``; the plan of a pack travels through the decoder's
keyword arguments. Two backends: ``sdpa`` makes one call per segment, on any device; ``varlen`` makes one call of
``torch.nn.attention.varlen.varlen_attn``, on CUDA. Capped scores are computed per segment too, by ``softcap_attention``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from saro.data.packs import Pack
from saro.model.architectures import attention_softcap, head_sizes
from saro_kernels.softcap_attention import softcap_attention

PACKED = "saro_packed"
BACKENDS = ("sdpa", "varlen")

# What decoders hand to their attention function besides the tensors. None of it changes the result here: positions are
# in the rotary embedding already, and there is no cache in training. Anything else must be None (see `packed_attention`).
_WITHOUT_EFFECT = frozenset({"position_ids", "use_cache", "cache_position"})


@dataclass(eq=False)
class AttentionPlan:
    """What attention needs to know of a pack, computed once and used in all layers.

    Attributes:
        backend: "sdpa" or "varlen".
        lengths: tokens of each segment that is read.
        paths: for each of them, its ancestors that are read, from the root down, and itself at the end.
        device: where masks and indices live.
    """

    backend: str
    lengths: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    device: torch.device
    _masks: dict[tuple[int, int | None], torch.Tensor | None] = field(default_factory=dict)
    _varlen: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, int, int] | None = None

    @classmethod
    def of(cls, pack: Pack, backend: str, isolated: bool = True) -> AttentionPlan:
        """The plan of a pack. Segments without tokens are passed over: no other segment descends from them.

        ``isolated=False`` makes one causal sequence of the whole pack: the control that a check must see fail.
        """
        index: dict[int, int] = {}
        lengths: list[int] = []
        paths: list[tuple[int, ...]] = []
        for i, (start, stop, parent) in enumerate(pack.segments):
            if stop > start:
                index[i] = len(lengths)
                paths.append((*(paths[index[parent]] if parent >= 0 else ()), len(lengths)))
                lengths.append(stop - start)
        if not isolated:
            lengths, paths = [sum(lengths)], [(0,)]
        return cls(backend, tuple(lengths), tuple(paths), pack.input_ids.device)

    def mask(self, segment: int, window: int | None) -> torch.Tensor | None:
        """(queries, keys) bool, True where attended; None where plain causal attention is the same."""
        key = (segment, window)
        if key not in self._masks:
            self._masks[key] = self._make_mask(segment, window)
        return self._masks[key]

    def _make_mask(self, segment: int, window: int | None) -> torch.Tensor | None:
        path = self.paths[segment]
        keys = sum(self.lengths[s] for s in path)
        if len(path) == 1 and (window is None or keys <= window):
            return None
        # Positions count along the path, so they order its tokens, whatever lies between them in the pack.
        k = torch.arange(keys, device=self.device)
        q = k[keys - self.lengths[segment] :, None]
        allowed = k <= q
        return allowed if window is None else allowed & (q - k < window)

    def varlen(self) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, int, int]:
        """Indices that gather the keys of all paths, None where each is one segment; (N+1,) int32 bounds of queries and
        keys; the longest of each.
        """
        if self._varlen is None:
            device = self.device
            starts = [0]
            for length in self.lengths:
                starts.append(starts[-1] + length)
            gather = None
            if any(len(path) > 1 for path in self.paths):
                gather = torch.cat([torch.arange(starts[s], starts[s + 1]) for path in self.paths for s in path])
                gather = gather.to(device, non_blocking=True)
            key_lengths = [sum(self.lengths[s] for s in path) for path in self.paths]
            bounds_q = torch.tensor(starts, dtype=torch.int32)
            bounds_k = torch.tensor([0, *key_lengths]).cumsum(0).to(torch.int32)
            self._varlen = (
                gather,
                bounds_q.to(device, non_blocking=True),
                bounds_k.to(device, non_blocking=True),
                max(self.lengths),
                max(key_lengths),
            )
        return self._varlen


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
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Attention over one pack, with the signature that transformers asks for.

    Args:
        query: (1, H, T, D); key, value: (1, G, T, D), H a multiple of G.
        plan: from ``AttentionPlan.of``.
        sliding_window: W tokens, the token itself included.
        softcap: bound of the scores.

    Returns:
        (1, T, H, D), and None for the attention weights.

    Raises:
        ValueError: for an argument that would change the result and that this function does not know; without a plan.
    """
    if plan is None:
        raise ValueError(f"{type(module).__name__} got no plan of a pack; call the model through Policy")
    unknown = sorted(k for k, v in others.items() if v is not None and k not in _WITHOUT_EFFECT)
    if unknown or attention_mask is not None:
        names = ", ".join(unknown) or "attention_mask"
        raise ValueError(f"packed attention does not know the argument {names} of {type(module).__name__}")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{type(module).__name__} is not causal; packed attention is")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = map(_as_autocast, (query, key, value))
    if softcap is None and plan.backend == "varlen":
        return _varlen(query, key, value, plan, scale, dropout, sliding_window), None
    return _sdpa(query, key, value, plan, scale, dropout, sliding_window, softcap), None


def _as_autocast(tensor: torch.Tensor) -> torch.Tensor:
    """As autocast casts for SDPA, and not for other attention: rotary embeddings of float32 hidden states are float32."""
    device = tensor.device.type
    cast = torch.is_autocast_enabled(device) and tensor.dtype == torch.float32
    return tensor.to(torch.get_autocast_dtype(device)) if cast else tensor


def _sdpa(query, key, value, plan, scale, dropout, window, softcap=None):
    if softcap is None:
        attend = partial(_attend, dropout_p=dropout, scale=scale)
    elif dropout:
        raise ValueError("softcapped attention has no dropout; set --model.dropout false")
    else:
        attend = partial(softcap_attention, scale=scale, softcap=softcap)
    # split, not slices: the backward of a split is one concatenation, that of n slices n sums over the whole pack.
    queries, keys, values = (x.split(plan.lengths, dim=2) for x in (query, key, value))
    outputs = []
    for segment, path in enumerate(plan.paths):
        k = keys[segment] if len(path) == 1 else torch.cat([keys[s] for s in path], dim=2)
        v = values[segment] if len(path) == 1 else torch.cat([values[s] for s in path], dim=2)
        mask = plan.mask(segment, window)
        outputs.append(attend(queries[segment], k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _attend(query, key, value, *, attn_mask, **options):
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not _shares_keys(query, attn_mask):
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, enable_gqa=gqa, **options)


def _shares_keys(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether a kernel that holds no queries x keys takes fewer heads of keys than of queries: on CUDA flash attention
    alone does, which has neither float32 nor masks; copied keys are what memory-efficient attention takes.
    """
    return query.device.type != "cuda" or (query.dtype != torch.float32 and mask is None)


def _varlen(query, key, value, plan, scale, dropout, window):
    if dropout:
        raise ValueError("varlen attention has no dropout; set --model.attention sdpa or --model.dropout false")
    gather, bounds_q, bounds_k, max_q, max_k = plan.varlen()
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if gather is not None:
        k, v = k.index_select(0, gather), v.index_select(0, gather)
    # Keys end where their queries end, which is how varlen_attn aligns a causal mask. Its window leaves out the token.
    output = varlen.varlen_attn(
        q,
        k,
        v,
        bounds_q,
        bounds_k,
        max_q,
        max_k,
        scale=scale,
        window_size=(-1, 0) if window is None else (window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output.unsqueeze(0)


def _no_mask(*args: object, **kwargs: object) -> None:
    """The plan takes the mask's place: nothing of T x T is made for a pack."""


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switch a model to packed attention, which then needs a plan at every call."""
    ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED, _no_mask)
    model.set_attn_implementation(PACKED)


@contextmanager
def native_attention(model: PreTrainedModel) -> Iterator[None]:
    """transformers' own attention inside, packed attention again after: for generation and comparison.

    No backward of a forward outside may run inside: recomputed checkpoints would meet the wrong attention.
    """
    model.set_attn_implementation("sdpa" if attention_softcap(model.config) is None else "eager")
    try:
        yield
    finally:
        use_packed_attention(model)


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, config: PretrainedConfig) -> str:
    """Resolve "auto" for a model: varlen where it can run, else sdpa.

    Raises:
        ValueError: when a backend is asked for that cannot run here.
    """
    reason = _why_not_varlen(device, dtype, config)
    if name == "auto":
        return "varlen" if reason is None else "sdpa"
    if name == "varlen" and reason is not None:
        raise ValueError(f"varlen attention {reason}; set --model.attention sdpa")
    return name


def _why_not_varlen(device: torch.device, dtype: torch.dtype, config: PretrainedConfig) -> str | None:
    """What varlen attention lacks there, None where it can run. Its heads are those of FlashAttention 2."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "needs CUDA and bfloat16"
    if attention_softcap(config) is not None:
        return "has no softcap, which the model needs"
    sizes = head_sizes(config)
    if len(sizes) > 1 or max(sizes) > 256 or max(sizes) % 8:
        return f"has no heads of {' and '.join(map(str, sorted(sizes)))} numbers, which the model needs"
    return None
