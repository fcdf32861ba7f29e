"""Compute log-probs of packs without gradient: by the policy as in training, or by a model's own forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from saro.data.dataset import PairSet
from saro.data.packs import Pack, PairLogps, pack_trees, sequence_number
from saro.data.records import CHOSEN, REJECTED
from saro.data.tree import SequenceTree
from saro.model.policy import Policy
from saro.program import progress_bar

# ``score_natively`` computes fp32 log-probs over the vocabulary for this many rows at a time, to bound their memory.
_ROWS = 256


@torch.no_grad()
def score_packs(policy: Policy, packs: Iterable[Pack]) -> Iterator[tuple[Pack, np.ndarray]]:
    """Yield each pack with the log-probs (E,) of its entries, in eval mode, by the layout and kernels of training."""
    with policy.evaluating():
        for pack in packs:
            logps = policy(pack.to(policy.causal_lm.device)).cpu()
            yield pack, logps.index_select(0, pack.entry_row).numpy()


def split_sequences(pack: Pack, entries: np.ndarray) -> list[np.ndarray]:
    """Split values (E,) of a pack's entries by sequence: S arrays."""
    sizes = np.bincount(pack.entry_sequence.numpy(), minlength=len(pack.records))
    return np.split(entries, np.cumsum(sizes)[:-1])


def split_pairs(pack: Pack, entries: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (``sequence_number``, log-probs) for each sequence of a pack of pairs."""
    parts = split_sequences(pack, entries)
    for i, pair in enumerate(pack.pairs):
        for side in (CHOSEN, REJECTED):
            yield sequence_number(pair, side), parts[sequence_number(i, side)]


def score_pairs(policy: Policy, pairs: PairSet, trees: Sequence[SequenceTree], pack_tokens: int) -> PairLogps:
    """Return the log-probs of all pairs, without a cache. ``trees`` hold each pair once."""
    offsets = np.concatenate([[0], np.cumsum(pairs.scored_tokens)])
    logps: np.ndarray | None = None
    for pack, entries in score_packs(policy, pack_trees(trees, pack_tokens)):
        if logps is None:
            logps = np.empty(offsets[-1], entries.dtype)
        for number, part in split_pairs(pack, entries):
            logps[offsets[number] : offsets[number + 1]] = part
    return PairLogps(logps, offsets)


def score_trees(policy: Policy, trees: Sequence[SequenceTree], pack_tokens: int) -> torch.Tensor:
    """Score trees as in training. The ``record`` of a sequence must be its number among all sequences.

    Returns:
        Log-probs of the scored tokens, (E,) float64, nats, sequence after sequence.
    """
    by_sequence: dict[int, np.ndarray] = {}
    packs = progress_bar(list(pack_trees(trees, pack_tokens)), "scoring", "packs")
    for pack, entries in score_packs(policy, packs):
        by_sequence.update(zip(pack.records, split_sequences(pack, entries), strict=True))
    return torch.from_numpy(np.concatenate([by_sequence[number] for number in sorted(by_sequence)])).double()


@torch.inference_mode()
def score_natively(lm: PreTrainedModel, trees: Sequence[SequenceTree]) -> torch.Tensor:
    """Score trees by a model's own forward, one sequence at a time. Returns what ``score_trees`` returns."""
    scored = []
    sequences = [sequence for tree in trees for sequence in tree.sequences]
    for sequence in progress_bar(sequences, "scoring", "sequences"):
        tokens = torch.from_numpy(sequence.tokens.astype(np.int64)).to(lm.device)
        logits = lm(input_ids=tokens[None, :-1], use_cache=False).logits[0, sequence.scored_from - 1 :]
        targets = tokens[sequence.scored_from :, None]
        for rows, row_targets in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
            scored.append(rows.float().log_softmax(-1).gather(1, row_targets)[:, 0].double().cpu())
    return torch.cat(scored)
