"""Continue texts token by token. Keys and values of past tokens stay in a cache that is written in place.

Each text has a row of the cache, whose tokens begin at position 0, so nothing is padded: prompts are read as a pack, by the
attention of training, and a row that ends is replaced without touching the others. A step continues all rows by one
token. It passes them through the decoder as one sequence of n tokens at their own positions; only attention tells them
apart. It is registered with transformers' attention interface as ``CACHED``; transformers' own caches are not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from saro.model.architectures import layer_head_sizes, text_config
from saro.model.attention import AttentionPlan, check_arguments, packed_attention, use_packed_attention
from saro.model.policy import Policy

CACHED = "saro_cached"
# A forward reads prompts of at most this many tokens, to bound its memory. A longer prompt has a forward of its own.
PACK_TOKENS = 4096
# The cache's length is a multiple of this. Smaller blocks are copied more often; larger ones attend to more masked keys.
BLOCK_TOKENS = 64


class KeyValueCache:
    """Keys and values of the tokens of several texts, one row a text, for all layers.

    Its tensors are as long as the texts need, in blocks: bfloat16 products on a CPU would copy a slice of longer ones in
    each step. They hold zeros where nothing was written, because what lies behind a mask must be a number.

    Args:
        rows: number of texts.
    """

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        self.rows = rows
        self.capacity = 0
        self.dtype = dtype
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys and values, each (rows, G, capacity, D)

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of a layer, by the number of its attention call in a forward.

        Args:
            key, value: (1, G, T, D) new keys and values: they tell the sizes of a layer that has no tensors yet.
        """
        if index == len(self.layers):
            sizes = [(self.rows, x.shape[1], self.capacity, x.shape[3]) for x in (key, value)]
            keys, values = (torch.zeros(size, dtype=self.dtype, device=key.device) for size in sizes)
            self.layers.append((keys, values))
        return self.layers[index]

    def make_room(self, length: int) -> None:
        """Grow to texts of ``length`` tokens."""
        if length > self.capacity:
            self._resize(length)

    def fit(self, length: int) -> None:
        """Grow or shrink to texts of ``length`` tokens; no text is longer. Shrink only if that frees a quarter."""
        if not 0.75 * self.capacity < _in_blocks(length) <= self.capacity:
            self._resize(length)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of a row over another row."""
        for keys, values in self.layers:
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]

    def _resize(self, length: int) -> None:
        kept = min(self.capacity, _in_blocks(length))
        self.capacity = _in_blocks(length)
        for i, layer in enumerate(self.layers):
            # Copy layer by layer, so that only one layer exists twice.
            resized = [x.new_zeros(*x.shape[:2], self.capacity, x.shape[3]) for x in layer]
            for new, old in zip(resized, layer, strict=True):
                new[:, :, :kept] = old[:, :, :kept]
            self.layers[i] = (resized[0], resized[1])


def _in_blocks(length: int) -> int:
    return -(-length // BLOCK_TOKENS) * BLOCK_TOKENS


def cache_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Return the bytes that one token takes in a ``KeyValueCache``, over all layers."""
    numbers = 0
    for layer in text_config(config).per_layer_config:
        heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
        numbers += heads * sum(layer_head_sizes(layer))
    return numbers * dtype.itemsize


@dataclass(eq=False)
class _Prefill:
    """A forward that reads prompts, with the attention of training, and writes their keys into the cache.

    Attributes:
        packed: the layout of the prompts: perhaps a segment that all share, then one of each prompt.
        rows: for each prompt, its row of the cache.
        cache: None if nothing will be continued.
        calls: number of attention calls so far.
    """

    packed: AttentionPlan
    rows: Sequence[int]
    cache: KeyValueCache | None
    calls: int = 0

    def attend(self, module, query, key, value, mask, **options):
        if self.cache is not None:
            for stored, new in zip(self.cache.layer(self.calls, key, value), (key, value), strict=True):
                self._write(stored, new[0])
        self.calls += 1
        return packed_attention(module, query, key, value, mask, plan=self.packed, **options)

    def _write(self, stored: torch.Tensor, new: torch.Tensor) -> None:
        """Write new keys or values (G, T, D) into the rows of a layer (rows, G, capacity, D)."""
        segments = new.split(self.packed.lengths, dim=1)
        for row, path in zip(self.rows, self.packed.paths[-len(self.rows) :], strict=True):
            start = 0
            for segment in path:
                stop = start + self.packed.lengths[segment]
                stored[row, :, start:stop] = segments[segment]
                start = stop


@dataclass(eq=False)
class _Step:
    """A forward that continues the first n rows of the cache by one token each.

    Attributes:
        positions: (n,) number of tokens that each row has already.
        calls: number of attention calls so far.
    """

    cache: KeyValueCache
    positions: torch.Tensor
    calls: int = 0
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def attend(
        self,
        module,
        query,
        key,
        value,
        mask,
        *,
        scaling=None,
        dropout=0.0,
        sliding_window=None,
        softcap=None,
        s_aux=None,
        **others,
    ):
        check_arguments(module, mask, others)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        keys, values = self._append(key, value)
        rows, groups = keys.shape[:2]
        # Treat heads that share keys as queries of one head, so that keys are read once and never repeated.
        queries = query[0].to(keys.dtype).transpose(0, 1).unflatten(1, (groups, -1))  # (n, G, H/G, D)
        # Multiply in this order: a product with long, contiguous rows is twice as fast on a CPU as its transpose.
        scores = torch.matmul(keys, queries.transpose(2, 3)).transpose(2, 3).float() * scale  # (n, G, H/G, S)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + self._mask(sliding_window)
        if s_aux is not None:
            sinks = s_aux.float().view(groups, -1, 1).expand(rows, -1, -1, -1)  # (n, G, H/G, 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = scores.softmax(-1)[..., : keys.shape[2]].to(values.dtype)
        output = torch.matmul(weights, values)  # (n, G, H/G, D)
        return output.reshape(1, rows, -1, output.shape[-1]), None  # (1, n, H, D)

    def _append(self, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
        """Write the new token of each row; return keys and values of the rows, (n, G, S, D), S the cache's capacity."""
        rows = torch.arange(len(self.positions), device=key.device)
        views = []
        for stored, new in zip(self.cache.layer(self.calls, key, value), (key, value), strict=True):
            stored[rows, :, self.positions] = new[0].transpose(0, 1).to(stored.dtype)  # (n, G, D)
            views.append(stored[: len(rows)])
        self.calls += 1
        return views

    def _mask(self, window: int | None) -> torch.Tensor:
        """Return (n, 1, 1, S): 0 where a row's token attends, -inf elsewhere."""
        if window not in self._masks:
            k = torch.arange(self.cache.capacity, device=self.positions.device)
            q = self.positions[:, None]  # (n, 1)
            allowed = k <= q  # (n, S)
            if window is not None:
                allowed &= q - k < window
            mask = torch.zeros(allowed.shape, device=k.device).masked_fill_(~allowed, float("-inf"))
            self._masks[window] = mask[:, None, None]
        return self._masks[window]


def cached_attention(module, query, key, value, attention_mask, *, plan=None, **options):
    """Compute attention of a forward of ``read_prompts`` or ``continue_rows``, with the signature of transformers.

    Shapes are those of ``packed_attention``.

    Raises:
        ValueError: there is no plan, or an unknown argument could change the result.
    """
    if plan is None:
        raise ValueError(f"{type(module).__name__} got no plan; call the model through read_prompts or continue_rows")
    return plan.attend(module, query, key, value, attention_mask, **options)


@contextmanager
def generating(policy: Policy) -> Iterator[None]:
    """Use eval mode and cached attention in this context. The policy's mode and packed attention return at its end."""
    ALL_ATTENTION_FUNCTIONS.register(CACHED, cached_attention)
    lm: PreTrainedModel = policy.causal_lm
    lm.set_attn_implementation(CACHED)
    try:
        with policy.evaluating(), torch.inference_mode():
            yield
    finally:
        use_packed_attention(lm)


def read_prompts(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    cache: KeyValueCache | None = None,
    rows: Sequence[int] = (),
) -> torch.Tensor:
    """Read prompts, and write their keys and values into rows of the cache. Only in ``generating``.

    Prompts are packed, so nothing is padded. What all prompts of a pack begin with is read once.

    Args:
        prompts: token ids; none is empty.
        cache: None if nothing will be continued.
        rows: for each prompt, its row of the cache.

    Returns:
        Logits of the token after each prompt, (P, V) float32.
    """
    rows = rows or range(len(prompts))
    if cache is not None:
        cache.make_room(max(map(len, prompts)))
    logits = [_read_pack(policy, prompts[start:stop], cache, rows[start:stop]) for start, stop in _cut_packs(prompts)]
    return torch.cat(logits)


def continue_rows(
    policy: Policy, cache: KeyValueCache, tokens: Sequence[int], positions: Sequence[int]
) -> torch.Tensor:
    """Append a token to each of the first n rows of the cache. Only in ``generating``.

    Args:
        tokens: n token ids.
        positions: number of tokens that each row has already.

    Returns:
        Logits of the token after each row, (n, V) float32.
    """
    at = torch.tensor(positions, device=policy.causal_lm.device)
    cache.fit(max(positions) + 1)
    return policy.next_logits(_decode(policy, tokens, at, _Step(cache, at)))


def _read_pack(
    policy: Policy, prompts: Sequence[Sequence[int]], cache: KeyValueCache | None, rows: Sequence[int]
) -> torch.Tensor:
    device = policy.causal_lm.device
    shared = _shared_tokens(prompts)
    segments = [prompts[0][:shared]] if shared else []
    first = len(segments)
    segments += [prompt[shared:] for prompt in prompts]
    lengths = tuple(map(len, segments))
    plan = AttentionPlan(
        backend=policy.attention,
        lengths=lengths,
        paths=tuple((0, i) if i and first else (i,) for i in range(len(segments))),
        device=device,
    )
    tokens = [token for segment in segments for token in segment]
    positions = [*range(shared), *(p for prompt in prompts for p in range(shared, len(prompt)))]
    hidden = _decode(policy, tokens, torch.tensor(positions, device=device), _Prefill(plan, rows, cache))
    ends = torch.tensor(lengths, device=device).cumsum(0)[first:] - 1
    return policy.next_logits(hidden.index_select(0, ends))


def _decode(policy: Policy, tokens: Sequence[int], positions: torch.Tensor, plan: _Prefill | _Step) -> torch.Tensor:
    """Return the hidden states (T, D) of tokens at their positions."""
    ids = torch.tensor(tokens, device=positions.device)
    with policy.precision():
        output = policy.causal_lm.get_decoder()(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, plan=plan
        )
    if not plan.calls:
        raise ValueError(f"{type(policy.causal_lm).__name__} does not compute its attention by transformers' interface")
    return output.last_hidden_state[0]


def _shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Return the length of the prompts' common prefix, which leaves each at least one token of its own."""
    if len(prompts) == 1:
        return 0
    # The sorted prompts all share the prefix that the first and the last share.
    low, high = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if low[i] != high[i]), most)


def _cut_packs(prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of packs of prompts, each of at most ``PACK_TOKENS`` tokens or of one prompt."""
    start = 0
    for stop in range(1, len(prompts) + 1):
        if stop == len(prompts) or _pack_tokens(prompts[start : stop + 1]) > PACK_TOKENS:
            yield start, stop
            start = stop


def _pack_tokens(prompts: Sequence[Sequence[int]]) -> int:
    shared = _shared_tokens(prompts)
    return shared + sum(len(prompt) - shared for prompt in prompts)
