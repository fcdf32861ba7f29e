"""Make packs of random tokens: examples and pairs of equal lengths, for measurements and predictions without records."""

from __future__ import annotations

import numpy as np

from saro.data.packs import Pack, lay_out
from saro.data.tree import RowKind, ScoredSequence, build_tree


def random_pack(pack_tokens: int, vocabulary: int, sequence_tokens: int, scored_share: float) -> Pack:
    """Fill a pack with random sequences of equal length; the last ``scored_share`` of each is scored."""
    rng = np.random.default_rng(0)
    num_sequences = pack_tokens // sequence_tokens
    scored = round(sequence_tokens * scored_share)
    kinds = np.full(scored, RowKind.ANSWER, np.uint8)
    # One token more per sequence: the last token is only a target and not fed to the model.
    tokens = rng.integers(0, vocabulary, (num_sequences, sequence_tokens + 1)).astype(np.int32)
    sequences = [ScoredSequence(ids, sequence_tokens + 1 - scored, kinds, i) for i, ids in enumerate(tokens)]
    return lay_out([build_tree([sequence]) for sequence in sequences])


def random_pairs(pack_tokens: int, vocabulary: int, pair_tokens: int) -> Pack:
    """Fill a pack with random pairs that read ``pair_tokens`` each.

    An eighth is the prompt, three sixteenths are reasoning that both sides share, the rest is half of each side.
    """
    prompt, shared = pair_tokens // 8, 3 * pair_tokens // 16
    own = (pair_tokens - prompt - shared) // 2
    rng = np.random.default_rng(0)
    trees = []
    for record in range(pack_tokens // pair_tokens):
        start = rng.integers(0, vocabulary, prompt + shared)
        sides = []
        for side in range(2):
            # The sides differ in their first own token. The last one is only a target.
            own_ids = rng.integers(0, vocabulary, own + 1)
            own_ids[0] = side
            ids = np.concatenate([start, own_ids]).astype(np.int32)
            kinds = np.full(len(ids) - prompt, RowKind.ANSWER, np.uint8)
            sides.append(ScoredSequence(ids, prompt, kinds, record))
        trees.append(build_tree(sides))
    return lay_out(trees)
