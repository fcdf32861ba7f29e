"""Reference log-probs: scored once by the layout and kernel of training, kept for each token, and found again.

The objective reads a ``Reference``; ``load_reference`` makes one from the cache, after scoring what the cache lacks.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

import numpy as np
import torch
from tqdm import tqdm

from saro.checks.check_packs import check_packs
from saro.config import ModelConfig
from saro.data.chat_format import ChatFormat
from saro.data.dataset import PairSet
from saro.data.packs import Pack, lay_out
from saro.data.tree import SequenceTree, build_tree
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.model.liger import uses_liger
from saro.model.load import ModelSource, find_model, load_policy
from saro.model.policy import Policy
from saro.train.reference_cache import ReferenceCache, sequence_key
from saro.train.steps import packs_of

# Grows when scoring changes what it gives.
SCORER_VERSION = 1
# So many seconds of scoring a kill may cost.
_FLUSH_SECONDS = 30.0
# Trees of so many pairs are in memory at once.
_CHUNK_PAIRS = 4096
# Pairs scored again at every load.
_SPOT_PAIRS = 2
# Two scorings in different packs differ by rounding; a cached one may differ by so many times as much.
_ALLOWED = 3.0


@dataclass(frozen=True, eq=False)
class Reference:
    """Log-probs of all scored tokens of n pairs under the reference.

    Attributes:
        logps: (R,) nats; chosen and rejected of pair 0, then of pair 1, and so on.
        offsets: (2n + 1,) int64; side s (0 chosen, 1 rejected) of pair i is ``logps[offsets[2i + s]:offsets[2i + s + 1]]``.
    """

    logps: np.ndarray
    offsets: np.ndarray

    def of_pack(self, pack: Pack) -> torch.Tensor:
        """(E,) reference log-probs of the pack's entries, on the host. The pack's sequences come in twos, chosen first."""
        parts = [self.of_side(record, i % 2) for i, record in enumerate(pack.records)]
        return torch.from_numpy(np.concatenate([np.empty(0, self.logps.dtype), *parts]))

    def of_side(self, pair: int, side: int) -> np.ndarray:
        """(rows,) of one side of one pair."""
        at = 2 * pair + side
        return self.logps[self.offsets[at] : self.offsets[at + 1]]


def load_references(
    runtime: Runtime, policy: Policy, source: ModelSource, sets: Sequence[PairSet], pack_tokens: int
) -> list[Reference]:
    """``load_reference`` of several sets of pairs."""
    return [load_reference(runtime, policy, source, pairs, pack_tokens) for pairs in sets]


def other_references(
    runtime: Runtime, model: ModelConfig, name: str, chat: ChatFormat, sets: Sequence[PairSet], pack_tokens: int
) -> list[Reference]:
    """The references of several sets of pairs under the model ``name``, which is loaded for this and then freed.

    Args:
        model: how the policy is loaded; the other model is loaded in the same way.
        chat: of the policy, whose tokens the other model must read.

    Raises:
        SaroError: there is no such model, or it has another vocabulary.
    """
    options = replace(model, name=name, revision=None, lora_rank=None, lora_alpha=None, lora_targets=None)
    source = find_model(options)
    if source.tokenizer.get_vocab() != chat.tokenizer.get_vocab():
        raise SaroError(
            f"preference.reference: {name} has another vocabulary than the policy; give a model of its family"
        )
    if source.adapter is not None and options.method == "full":
        options = replace(options, method="lora")
    policy = load_policy(source, options, runtime.device, seed=0)
    check_packs(policy, sets[0])
    references = load_references(runtime, policy, source, sets, pack_tokens)
    del policy
    # Modules and the forwards that are bound to them hold each other.
    gc.collect()
    return references


def load_reference(
    runtime: Runtime, policy: Policy, source: ModelSource, pairs: PairSet, pack_tokens: int
) -> Reference:
    """The log-probs of ``pairs`` under ``policy``, from the cache; what it lacks is scored first and added to it.

    No lock is held while scoring: processes at work on the same rows may score them twice, and never wrongly.

    Args:
        policy: the reference, as it was loaded from ``source``: not yet trained.
        pack_tokens: budget of a pack.

    Raises:
        SaroError: what the cache holds is not what the policy gives.
    """
    cache = ReferenceCache.of(cache_key(policy, source, runtime.device))
    keys = [sequence_key(side) for i in range(len(pairs)) for side in pairs.sequences(i)]
    lacking = _lacking(cache, keys)
    cached = np.setdiff1d(np.arange(len(pairs)), lacking)
    if runtime.sum_(torch.tensor(len(lacking), device=runtime.device)).item():
        runtime.say(f"reference: scoring {len(lacking):,} of {len(pairs):,} pairs, kept in {cache.folder}")
    share = runtime.rank, runtime.processes
    while runtime.sum_(torch.tensor(len(lacking), device=runtime.device)).item():
        _score_into(cache, policy, pairs, lacking, keys, pack_tokens, runtime, share)
        # What is lacking after that is with processes that see other files: each scores it for itself.
        share = 0, 1
        runtime.barrier()
        lacking = _lacking(cache, keys)
    reference = Reference(*cache.load(keys, [rows for i in range(len(pairs)) for rows in _rows(pairs, i)]))
    if len(cached):
        chosen = np.random.default_rng().choice(cached, min(_SPOT_PAIRS, len(cached)), replace=False)
        _spot_check(policy, pairs, reference, sorted(chosen.tolist()), cache, pack_tokens)
    return reference


def cache_key(policy: Policy, source: ModelSource, device: torch.device) -> dict[str, object]:
    """What reference log-probs depend on besides the tokens. Nothing of the loss, the steps or the data is in it."""
    identity = source.identity()
    if identity["files"]:
        del identity["name"]
    config = {k: v for k, v in source.config.to_dict().items() if not k.startswith("_")}
    return {
        "scorer": SCORER_VERSION,
        "weights": identity,
        "config": config,
        "quantization": getattr(policy.causal_lm, "quantization_method", None) and "nf4, double",
        "dtype": f"{policy.causal_lm.dtype}, products in {policy.autocast or policy.causal_lm.dtype}",
        "attention": policy.attention,
        "head": policy.head,
        "device": device.type,
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes")}
        | ({"triton": version("triton")} if policy.head == "tiled-triton" else {})
        | ({"liger-kernel": version("liger-kernel")} if uses_liger(policy.causal_lm) else {}),
    }


@torch.no_grad()
def score(policy: Policy, packs: Iterable[Pack], device: torch.device) -> Iterator[tuple[Pack, np.ndarray]]:
    """Each pack with the log-probs (E,) of its entries, dropout off, in the policy's layout and kernel."""
    was_training = policy.training
    policy.eval()
    try:
        for pack in packs:
            logps = policy(pack.to(device)).cpu()
            yield pack, logps.index_select(0, pack.entry_row).numpy()
    finally:
        policy.train(was_training)


def score_pairs(policy: Policy, pairs: PairSet, trees: Sequence[SequenceTree], pack_tokens: int) -> Reference:
    """The reference of ``pairs`` without a cache; ``trees`` hold each pair once."""
    rows = np.array([rows for i in range(len(pairs)) for rows in _rows(pairs, i)], np.int64)
    offsets = np.concatenate([[0], np.cumsum(rows)])
    logps: np.ndarray | None = None
    for pack, entries in score(policy, packs_of(trees, pack_tokens), policy.causal_lm.device):
        logps = np.empty(offsets[-1], entries.dtype) if logps is None else logps
        for at, part in _sides(pack, entries):
            logps[offsets[at] : offsets[at + 1]] = part
    return Reference(logps, offsets)


def _rows(pairs: PairSet, pair: int) -> tuple[int, int]:
    return tuple(int(side.lengths[pair] - side.prompt_tokens[pair]) for side in (pairs.chosen, pairs.rejected))


def _sides(pack: Pack, entries: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Number 2 * pair + side of each sequence of a pack, and its rows."""
    ends = np.cumsum(np.bincount(pack.entry_sequence.numpy(), minlength=len(pack.records))).tolist()
    for i, (record, start, stop) in enumerate(zip(pack.records, [0, *ends], ends, strict=False)):
        yield 2 * record + i % 2, entries[start:stop]


def _lacking(cache: ReferenceCache, keys: Sequence[bytes]) -> np.ndarray:
    """Pairs of which the cache lacks a side."""
    found = np.array(cache.find(keys), bool).reshape(-1, 2)
    return np.flatnonzero(~found.all(1))


def _score_into(
    cache: ReferenceCache,
    policy: Policy,
    pairs: PairSet,
    lacking: np.ndarray,
    keys: Sequence[bytes],
    pack_tokens: int,
    runtime: Runtime,
    share: tuple[int, int],
) -> None:
    """Score a share, (rank, processes), and add it to the cache from time to time, so that a kill costs little."""
    waiting: dict[bytes, np.ndarray] = {}
    since = time.monotonic()
    # Those on one prompt share a tree, wherever they stand in the files.
    by_prompt = lacking[np.argsort(pairs.prompts[lacking], kind="stable")]
    # None shows the bar on a terminal alone.
    no_bar = None if runtime.is_main else True
    with tqdm(total=len(lacking), desc="reference", unit=" pairs", delay=2, leave=False, disable=no_bar) as bar:
        for start in range(0, len(by_prompt), _CHUNK_PAIRS):
            chunk = by_prompt[start : start + _CHUNK_PAIRS].tolist()
            packs = packs_of(pairs.trees(chunk, pack_tokens), pack_tokens, *share)
            for pack, entries in score(policy, packs, runtime.device):
                waiting |= {keys[at]: part for at, part in _sides(pack, entries)}
                bar.update(len(pack.records) // 2 * share[1])
                if time.monotonic() - since >= _FLUSH_SECONDS:
                    cache.add(waiting)
                    waiting, since = {}, time.monotonic()
    cache.add(waiting)


def _spot_check(
    policy: Policy, pairs: PairSet, reference: Reference, chosen: list[int], cache: ReferenceCache, pack_tokens: int
) -> None:
    """A few pairs scored again: what the cache says of them must be what the policy says, within the layout's noise."""
    trees = _within([build_tree(pairs.sequences(i)) for i in chosen], pack_tokens)
    chosen = chosen[: len(trees)]
    expected = np.concatenate([reference.of_side(i, side) for i in chosen for side in (0, 1)])
    again, noise = layout_noise(policy, trees, pack_tokens)
    difference = float(np.abs(again.astype(np.float64) - expected).mean())
    if not difference <= _ALLOWED * noise.mean:
        raise SaroError(
            f"{cache.folder}: the cached reference of {', '.join(pairs.ids[i] for i in chosen)} differs from what the model "
            f"gives by {difference:.3g} nats per token, and two layouts by {noise.mean:.3g}; remove the folder and start again"
        )


@dataclass(frozen=True)
class Noise:
    """By how much log-probs change with the layout alone, nats per token: on average, and at most."""

    mean: float
    most: float


def layout_noise(policy: Policy, trees: Sequence[SequenceTree], pack_tokens: int) -> tuple[np.ndarray, Noise]:
    """Log-probs (E,) of the entries of trees in one pack, and by how much those differ from one sequence at a time.

    Of the trees only the first ones are taken that fit a pack, one at least. A rounding of the log-probs to the dtype of
    the products is noise at the least.
    """
    device, trees = policy.causal_lm.device, _within(trees, pack_tokens)
    ((_, together),) = score(policy, [lay_out(trees)], device)
    sequences = [lay_out([build_tree([sequence])]) for tree in trees for sequence in tree.sequences]
    alone = np.concatenate([entries for _, entries in score(policy, sequences, device)])
    rounding = torch.finfo(policy.autocast or policy.causal_lm.dtype).eps * np.abs(together)
    change = np.abs(together - alone)
    return together, Noise(max(change.mean(), rounding.mean()).item(), max(change.max(), rounding.max()).item())


def _within(trees: Sequence[SequenceTree], pack_tokens: int) -> Sequence[SequenceTree]:
    """The first trees that fit a pack together, one at least."""
    fitting = np.cumsum([tree.tokens for tree in trees]) <= pack_tokens
    return trees[: max(1, int(fitting.sum()))]
