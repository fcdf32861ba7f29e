"""Read reference log-probs from the cache. Score the pairs that it lacks first, and verify a few."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from itertools import islice, pairwise

import numpy as np
import torch

from saro.checks.check_packs import check_packs
from saro.checks.noise import NOISE_FACTOR, layout_noise
from saro.config import ModelConfig
from saro.data.chat_format import ChatFormat
from saro.data.dataset import PairSet
from saro.data.packs import PairLogps, pack_trees
from saro.data.records import CHOSEN, REJECTED, SIDES
from saro.data.tree import build_tree
from saro.distributed.machines import share_array
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.model.fused_lora import uses_fused_lora
from saro.model.liger import uses_liger
from saro.model.load import load_policy
from saro.model.policy import Policy
from saro.model.score import score_packs, split_pairs
from saro.model.source import ModelSource
from saro.program import progress_bar
from saro.train.reference_cache import KEY_BYTES, ReferenceCache, sequence_key

# Increase when scoring changes its results: old caches are then ignored.
SCORER_VERSION = 2
# Write to the cache this often: a killed run loses at most this many seconds of scoring.
_FLUSH_SECONDS = 30.0
# Build the trees of this many pairs at a time, so that memory does not grow with the data.
_CHUNK_PAIRS = 4096
# Number of cached pairs that are scored again at every start.
_SPOT_PAIRS = 2


def load_references(
    runtime: Runtime, policy: Policy, source: ModelSource, sets: Mapping[str, PairSet], pack_tokens: int
) -> dict[str, PairLogps]:
    """Return the reference log-probs of each set of pairs, see ``load_reference``."""
    return {name: load_reference(runtime, policy, source, pairs, pack_tokens) for name, pairs in sets.items()}


def other_reference_options(model: ModelConfig, name: str) -> ModelConfig:
    """Return the options that load the reference model ``name`` in the same way as the policy."""
    own = dict.fromkeys(("revision", "lora_rank", "lora_alpha", "lora_rslora", "lora_targets"))
    return replace(model, name=name, **own)


def load_other_references(
    runtime: Runtime,
    source: ModelSource,
    options: ModelConfig,
    chat: ChatFormat,
    sets: Mapping[str, PairSet],
    pack_tokens: int,
) -> dict[str, PairLogps]:
    """Return the log-probs of several sets of pairs under a model that is loaded for this and then freed.

    Args:
        options: how the model is loaded, see ``other_reference_options``.
        chat: chat format of the policy; the model must read the same tokens.

    Raises:
        SaroError: the model has another vocabulary, or packed training does not support it.
    """
    if source.tokenizer.get_vocab() != chat.tokenizer.get_vocab():
        raise SaroError(
            f"preference.reference: {options.name} has another vocabulary than the policy; give a model of its family"
        )
    if source.adapter is not None and options.method == "full":
        options = replace(options, method="lora")
    policy = load_policy(source, options, runtime.device, seed=0, mesh=runtime.mesh)
    check_packs(policy, next(iter(sets.values())))
    references = load_references(runtime, policy, source, sets, pack_tokens)
    del policy
    # Modules and the forwards bound to them refer to each other: only the collector frees them.
    gc.collect()
    return references


def load_reference(
    runtime: Runtime, policy: Policy, source: ModelSource, pairs: PairSet, pack_tokens: int
) -> PairLogps:
    """Return the log-probs of ``pairs`` under ``policy`` from the cache. Missing pairs are scored and added first.

    Only rank 0 reads and writes the cache. All ranks share out the pairs that it misses, and send it their log-probs.
    No lock is held while scoring: two runs may score the same pairs, which costs time but does no harm.

    Args:
        policy: the reference, as it was loaded from ``source`` and not yet trained.
        pack_tokens: budget of a pack.

    Raises:
        SaroError: the policy does not give the log-probs that the cache holds.
    """
    key = cache_key(policy, source, runtime.device)
    cache = ReferenceCache(runtime.on_main(lambda: ReferenceCache.of(key).folder))
    keys = _sequence_keys(pairs) if runtime.is_main else None
    missing = runtime.on_main(lambda: _find_missing(cache, keys))
    cached = np.setdiff1d(np.arange(len(pairs)), missing)
    while len(missing):
        runtime.say(f"reference: scoring {len(missing):,} of {len(pairs):,} pairs, kept in {cache.folder}")
        _score_into_cache(runtime, cache, policy, pairs, missing, keys, pack_tokens)
        # Empty unless shards were removed in the meantime.
        missing = runtime.on_main(lambda: _find_missing(cache, keys))
    reference = _load_shared(runtime, cache, pairs, keys)
    if len(cached):
        # The same pairs on all ranks: those that share the weights must score together.
        spots = runtime.on_main(lambda: np.random.default_rng().choice(cached, min(_SPOT_PAIRS, len(cached)), False))
        _check_spots(policy, pairs, reference, sorted(spots.tolist()), cache, pack_tokens)
    return reference


def cache_key(policy: Policy, source: ModelSource, device: torch.device) -> dict[str, object]:
    """Return everything that reference log-probs depend on besides the tokens: not the loss, the steps or the data."""
    identity = source.identity()
    # The config is in the key as it was read, and tokens are in the key of each sequence.
    code = {name: value for name, value in identity.pop("definition").items() if name.endswith(".py")}
    if identity["files"]:
        del identity["name"], identity["commit"]
    config = {k: v for k, v in source.config.to_dict().items() if not k.startswith("_")}
    is_quantized = bool(getattr(policy.causal_lm, "quantization_method", None))
    packages = ["torch", "transformers", "bitsandbytes"]
    if policy.head == "tiled-triton":
        packages.append("triton")
    if uses_liger(policy.causal_lm):
        packages.append("liger-kernel")
    return {
        "scorer": SCORER_VERSION,
        "weights": identity,
        "code": code,
        "config": config,
        "quantization": "nf4, double" if is_quantized else None,
        "dtype": f"{policy.causal_lm.dtype}, products in {policy.compute_dtype}",
        "attention": policy.attention,
        "head": policy.head,
        "fused_lora": uses_fused_lora(policy.model),
        "device": device.type,
        "versions": {name: version(name) for name in packages},
    }


def _sequence_keys(pairs: PairSet) -> np.ndarray:
    """Return the cache's key of each sequence, (2n, 16) uint8, by ``sequence_number``."""
    keys = np.empty((len(pairs), len(SIDES), KEY_BYTES), np.uint8)
    for number, side in enumerate((pairs.chosen, pairs.rejected)):
        bounds = zip(pairwise(side.offsets.tolist()), side.prompt_tokens.tolist(), strict=True)
        found = b"".join(sequence_key(side.tokens[start:stop], prompt) for (start, stop), prompt in bounds)
        keys[:, number] = np.frombuffer(found, np.uint8).reshape(-1, KEY_BYTES)
    return keys.reshape(-1, KEY_BYTES)


def _find_missing(cache: ReferenceCache, keys: np.ndarray) -> np.ndarray:
    """Return the indices of the pairs of which the cache lacks a side."""
    is_cached = np.array(cache.find(keys), bool).reshape(-1, len(SIDES))
    return np.flatnonzero(~is_cached.all(1))


def _load_shared(runtime: Runtime, cache: ReferenceCache, pairs: PairSet, keys: np.ndarray | None) -> PairLogps:
    """Return the log-probs of all pairs, which rank 0 reads and sends to the others."""
    scored_tokens = pairs.scored_tokens
    read: list[np.ndarray] = []
    # Return nothing through on_main, which would pickle the log-probs.
    runtime.on_main(lambda: read.append(cache.load(keys, scored_tokens.tolist())[0]))
    logps = share_array(runtime, read[0] if read else None)
    return PairLogps(logps, np.concatenate([[0], np.cumsum(scored_tokens, dtype=np.int64)]))


def _score_into_cache(
    runtime: Runtime,
    cache: ReferenceCache,
    policy: Policy,
    pairs: PairSet,
    missing: np.ndarray,
    keys: np.ndarray | None,
    pack_tokens: int,
) -> None:
    """Score the missing pairs on all ranks. Rank 0 adds them to the cache every ``_FLUSH_SECONDS``.

    Args:
        keys: key of each sequence, on rank 0.
    """
    # Pairs on one prompt share a tree, wherever they are in the files.
    by_prompt = missing[np.argsort(pairs.prompts[missing], kind="stable")]
    # All ranks make the same number of packs, so that they meet as often.
    share = replace(runtime.share, is_even=True)
    # Packs between two meetings. The first pack shows how long one takes.
    between = 1
    with progress_bar(None, "reference", "pairs", shown=runtime.is_main, total=len(missing)) as bar:
        for start in range(0, len(by_prompt), _CHUNK_PAIRS):
            chunk = by_prompt[start : start + _CHUNK_PAIRS].tolist()
            packs = pack_trees(pairs.trees(chunk, pack_tokens), pack_tokens, share)
            while batch := list(islice(packs, between)):
                began = time.monotonic()
                scored = [entry for pack, rows in score_packs(policy, batch) for entry in split_pairs(pack, rows)]
                numbers = [number for number, _ in scored]
                received = runtime.gather_on_main([(numbers, [logps for _, logps in scored])])
                if runtime.is_main:
                    cache.add({keys[i].tobytes(): logps for part in received for i, logps in zip(*part, strict=True)})
                    bar.update(sum(len(theirs) for theirs, _ in received) // len(SIDES))
                took = time.monotonic() - began
                between = runtime.broadcast(max(1, min(4 * between, int(between * _FLUSH_SECONDS / took))))
    runtime.on_main(cache.compact)


def _check_spots(
    policy: Policy, pairs: PairSet, reference: PairLogps, spots: list[int], cache: ReferenceCache, pack_tokens: int
) -> None:
    """Score a few pairs again. Raises SaroError if they differ from the cache by more than the noise of layouts."""
    noise = layout_noise(policy, [build_tree(pairs.sequences(pair)) for pair in spots], pack_tokens)
    cached = np.concatenate([reference.side_logps(pair, side) for pair in spots for side in (CHOSEN, REJECTED)])
    difference = float(np.abs(noise.logps - cached).mean())
    if not difference <= NOISE_FACTOR * noise.mean:
        raise SaroError(
            f"{cache.folder}: the cached reference of {', '.join(pairs.ids[i] for i in spots)} differs from what the "
            f"model gives by {difference:.3g} nats per token, and two layouts by {noise.mean:.3g}; "
            "remove the folder and start again"
        )
