"""Measures a model on held-out records, without a reference: its loss on examples, its preference on pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from saro.config import DataConfig
from saro.data.chat_format import ChatFormat
from saro.data.encode_files import encode_files, encode_pair_files
from saro.data.packs import pack_trees
from saro.data.records import CHOSEN, REJECTED
from saro.model.policy import Policy
from saro.model.score import score_packs, score_pairs


def heldout_loss(policy: Policy, chat: ChatFormat, files: Sequence[str], options: DataConfig) -> float:
    """Return the mean negative log-likelihood of the scored tokens of examples, nats per token."""
    data = encode_files(files, chat, options)
    packs = pack_trees(data.trees(range(len(data)), options.pack_tokens), options.pack_tokens)
    logps = np.concatenate([entries for _, entries in score_packs(policy, packs)])
    return float(-logps.mean(dtype=np.float64))


def heldout_preference(
    policy: Policy, chat: ChatFormat, files: Sequence[str], options: DataConfig
) -> tuple[float, float]:
    """Return the share of pairs whose chosen response is likelier, and the mean of log p(chosen) - log p(rejected), nats."""
    pairs = encode_pair_files(files, chat, options)
    logps = score_pairs(policy, pairs, pairs.trees(range(len(pairs)), options.pack_tokens), options.pack_tokens)
    margins = logps.side_sums(CHOSEN) - logps.side_sums(REJECTED)
    return float((margins > 0).mean()), float(margins.mean())
