"""The decode loop: continues many texts side by side, and gives the place of a text that ends to the next one."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from saro.draws.request import Request, Sampling
from saro.model.cached_attention import KeyValueCache, continue_rows, generating, read_prompts
from saro.model.policy import Policy

# Prompts are read when this share of the rows is free: a forward that reads several costs little more than for one.
_REFILL_SHARE = 1 / 8
# A stop text is searched in this many tokens more than it has bytes. The first of them may decode to parts of a character.
_STOP_MARGIN = 8


@dataclass(frozen=True)
class DecodedText:
    """The text that a policy wrote after a prompt.

    Attributes:
        ids: the new token ids, with the stop id or the stop text if one ended it.
        finish: "stop", or "length" if it was cut.
        logps: log-prob of each id, nats; empty if they were not asked for.
    """

    ids: tuple[int, ...]
    finish: Literal["stop", "length"]
    logps: tuple[float, ...] = ()


@dataclass(eq=False)
class _Text:
    """A text that is being written.

    Attributes:
        number: index of its request.
        prompt: its token ids.
        sampling: of its request.
        random: numbers in [0, 1), one for each token that may be drawn; empty for greedy texts.
        new: ids so far.
        logps: their log-probs, if asked for.
    """

    number: int
    prompt: tuple[int, ...]
    sampling: Sampling
    random: list[float]
    new: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, number: int, request: Request) -> _Text:
        return cls(number, request.ids, request.sampling, _random_numbers(request))

    @property
    def cached(self) -> int:
        """Number of tokens in the cache: all but the newest one."""
        return len(self.prompt) + len(self.new) - 1


@torch.inference_mode()
def continue_texts(
    policy: Policy,
    requests: Sequence[Request],
    stop_ids: Collection[int],
    rows: int,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    with_logps: bool = False,
    on_tokens: Callable[[int], object] = lambda tokens: None,
) -> list[DecodedText]:
    """Continue the prompts of requests, ``rows`` at a time.

    Greedy tokens are those that a text alone would get, but for rounding. So are drawn ones: the random numbers of a text
    depend on its request only.

    At the peak, memory holds the weights, the cache with ``rows`` times the longest prompt and answer, one of its layers
    twice, and either the activations of a pack of prompts (``PACK_TOKENS``) or a few tensors of rows x vocabulary.

    Args:
        requests: with ids; without choices.
        stop_ids: a text ends at the first of these.
        tokenizer: decodes texts of requests that have stop texts.
        with_logps: return the log-probs of the new tokens, at temperature 1.
        on_tokens: called after each forward with the number of new tokens.
    """
    waiting = deque(_Text.of(i, request) for i, request in enumerate(requests))
    cache = KeyValueCache(min(rows, len(waiting)), policy.compute_dtype)
    refill = max(1, int(cache.rows * _REFILL_SHARE))
    done: dict[int, DecodedText] = {}
    active: list[_Text] = []  # text i is in row i of the cache
    with generating(policy):
        while waiting or active:
            free = cache.rows - len(active)
            if waiting and free >= refill:
                fresh = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                at = range(len(active), len(active) + len(fresh))
                logits = read_prompts(policy, [text.prompt for text in fresh], cache, at)
                active += fresh
            else:
                fresh = active
                logits = continue_rows(policy, cache, [t.new[-1] for t in active], [t.cached for t in active])
            _append_tokens(fresh, logits, with_logps)
            on_tokens(len(fresh))
            _retire(active, cache, done, stop_ids, tokenizer)
    return [done[i] for i in range(len(requests))]


def _append_tokens(texts: Sequence[_Text], logits: torch.Tensor, with_logps: bool) -> None:
    """Choose the next token of each text from its logits (n, V)."""
    tokens = logits.argmax(-1)
    drawn = [i for i, text in enumerate(texts) if text.sampling.temperature > 0]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        randoms = [texts[i].random[len(texts[i].new)] for i in drawn]
        tokens[index] = draw_tokens(logits[index], [texts[i].sampling for i in drawn], randoms)
    for text, token in zip(texts, tokens.tolist(), strict=True):
        text.new.append(token)
    if with_logps:
        logps = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        for text, logp in zip(texts, logps.tolist(), strict=True):
            text.logps.append(logp)


def _retire(
    active: list[_Text],
    cache: KeyValueCache,
    done: dict[int, DecodedText],
    stop_ids: Collection[int],
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Move texts that have ended to ``done``. The last row takes the place of one that became free."""
    for row in reversed(range(len(active))):
        text = active[row]
        finish = _finish(text, stop_ids, tokenizer)
        if finish is None:
            continue
        done[text.number] = DecodedText(tuple(text.new), finish, tuple(text.logps))
        last = active.pop()
        if last is not text:
            cache.move(len(active), row, last.cached)
            active[row] = last


def _finish(
    text: _Text, stop_ids: Collection[int], tokenizer: PreTrainedTokenizerBase | None
) -> Literal["stop", "length"] | None:
    """Return why a text has ended with its newest token, or None if it goes on."""
    if text.new[-1] in stop_ids or (text.sampling.stop and _has_stop_text(text, tokenizer)):
        return "stop"
    return "length" if len(text.new) == text.sampling.max_tokens else None


def _has_stop_text(text: _Text, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the newest tokens hold a stop text. Each token is at least one byte of it."""
    longest = max(len(stop.encode()) for stop in text.sampling.stop)
    tail = tokenizer.decode(text.new[-longest - _STOP_MARGIN :], clean_up_tokenization_spaces=False)
    return any(stop in tail for stop in text.sampling.stop)


def _random_numbers(request: Request) -> list[float]:
    """Return a number in [0, 1) for each token that a request may draw, the same ones each time."""
    if request.sampling.temperature == 0:
        return []
    content = json.dumps(asdict(request), sort_keys=True).encode()
    seed = int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(request.sampling.max_tokens, generator=generator, dtype=torch.float64).tolist()


def draw_tokens(logits: torch.Tensor, samplings: Sequence[Sampling], randoms: Sequence[float]) -> torch.Tensor:
    """Draw one token for each row of logits (R, V), by its temperature, then its top_k, then its top_p: (R,).

    A row's number in [0, 1) points at a share of the probability, with the tokens in a fixed order. So the token depends
    on the row only, not on the others.
    """
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    is_open = [s.top_p == 1 and s.top_k == 0 for s in samplings]
    for draw, chosen in ((_draw_from_all, True), (_draw_from_top, False)):
        rows = [i for i, value in enumerate(is_open) if value is chosen]
        if rows:
            group = [samplings[i] for i in rows]
            index = torch.tensor(rows, device=logits.device)
            scaled = logits[index] / _column([s.temperature for s in group], logits).to(logits.dtype)
            tokens[index] = draw(scaled, group, _column([randoms[i] for i in rows], logits))
    return tokens


def _draw_from_all(logits: torch.Tensor, samplings: Sequence[Sampling], randoms: torch.Tensor) -> torch.Tensor:
    """Draw from the whole distribution, with the tokens in the order of their ids: no row is sorted."""
    total = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    chosen = torch.searchsorted(total, randoms * total[:, -1:], right=True)
    return chosen.clamp_(max=logits.shape[1] - 1)[:, 0]


def _draw_from_top(logits: torch.Tensor, samplings: Sequence[Sampling], randoms: torch.Tensor) -> torch.Tensor:
    """Draw from the likeliest tokens, with the likeliest one first."""
    vocabulary = logits.shape[1]
    top_k = _column([min(s.top_k, vocabulary) or vocabulary for s in samplings], logits)
    top_p = _column([s.top_p for s in samplings], logits)
    # Tokens less likely than (1 - top_p) / V have less than 1 - top_p together, so the likelier ones have top_p: the
    # others need not be sorted.
    likely = (logits.softmax(-1) >= (1 - top_p) / vocabulary).sum(-1, keepdim=True)
    candidates = torch.where(top_k < vocabulary, top_k, likely)
    ordered, tokens = logits.double().topk(int(candidates.max()), dim=-1)  # (R, most candidates)
    ordered = ordered.masked_fill(torch.arange(ordered.shape[1], device=logits.device) >= top_k, float("-inf"))
    # top_p is a share of what top_k left.
    whole = torch.where(top_k < vocabulary, ordered.logsumexp(-1, keepdim=True), logits.logsumexp(-1, keepdim=True))
    probs = (ordered - whole).exp()
    total = probs.cumsum(-1)
    last = (total - probs < top_p).sum(-1, keepdim=True) - 1
    chosen = torch.searchsorted(total, randoms * total.gather(1, last), right=True)
    return tokens.gather(1, torch.minimum(chosen, last))[:, 0]


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
