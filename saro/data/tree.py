"""Merge sequences into tries of tokens, in which a shared prefix is stored and computed once.

Trees are built from token ids, after tokenization, never from text. In stage 1 (RW) a tree has the sequence of one example,
or those of the turns of one conversation. In stage 2 (SRPO) both responses of a pair, and other pairs with the same prompt, go
into one tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class RowKind(IntEnum):
    """The part of the response that a scored token belongs to, for metrics and ``data.row_weights``."""

    THINK = 0
    ANSWER = 1
    STOP = 2


@dataclass(frozen=True, eq=False)
class ScoredSequence:
    """One prompt and one response as token ids.

    Attributes:
        tokens: (L,) int32, prompt and response; the last token is the stop token unless the sequence is open.
        scored_from: index of the first scored token; all tokens after it are scored too. 1 <= scored_from < L.
        row_kinds: (L - scored_from,) uint8, the ``RowKind`` of each scored token.
        record: index of the record that the sequence came from.
    """

    tokens: np.ndarray
    scored_from: int
    row_kinds: np.ndarray
    record: int

    def __post_init__(self) -> None:
        if not 1 <= self.scored_from < len(self.tokens):
            raise ValueError(f"scored_from is {self.scored_from}, must lie in 1..{len(self.tokens) - 1}")
        if len(self.row_kinds) != len(self.tokens) - self.scored_from:
            raise ValueError("row_kinds must have one entry for each scored token")

    @property
    def is_open(self) -> bool:
        """True if the sequence has no stop token: it is only the beginning of a response."""
        return bool(self.row_kinds[-1] != RowKind.STOP)


@dataclass(frozen=True, eq=False)
class Node:
    """A run of tokens that belong to the same sequences.

    Attributes:
        parent: index of the parent node, which comes earlier in the tree; -1 for a root.
        start: position of the first token in its sequences.
        tokens: (n,) int32, n >= 1.
        fed_tokens: number of tokens that the model reads. This is n, or n - 1 if every sequence of the node ends here:
            the last token of a sequence predicts nothing.
    """

    parent: int
    start: int
    tokens: np.ndarray
    fed_tokens: int


@dataclass(frozen=True, eq=False)
class SequenceTree:
    """A trie of tokens. Parents come before children.

    Attributes:
        nodes: the runs of tokens.
        sequences: the sequences that the tree was built from, in the caller's order.
        paths: for each sequence, the indices of its nodes from the root down.
    """

    nodes: tuple[Node, ...]
    sequences: tuple[ScoredSequence, ...]
    paths: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Number of tokens that the model reads for this tree."""
        return sum(node.fed_tokens for node in self.nodes)


def build_tree(sequences: Sequence[ScoredSequence]) -> SequenceTree:
    """Build one trie from sequences. A node ends where its sequences diverge or one of them ends.

    Sequences that differ in their first token get different roots, which share nothing.
    """
    nodes: list[Node] = []
    paths: list[list[int]] = [[] for _ in sequences]
    pending = [(group, 0, -1) for group in reversed(_group_by_token(sequences, range(len(sequences)), 0))]
    while pending:
        members, start, parent = pending.pop()
        stop = common_prefix([sequences[m].tokens for m in members], start)
        index = len(nodes)
        for member in members:
            paths[member].append(index)
        continuing = [m for m in members if len(sequences[m].tokens) > stop]
        fed = stop - start - (0 if continuing else 1)
        nodes.append(Node(parent, start, sequences[members[0]].tokens[start:stop], fed))
        # Push in reverse: the first child is then popped next, and its tokens follow its parent's in a pack.
        pending.extend((group, stop, index) for group in reversed(_group_by_token(sequences, continuing, stop)))
    return SequenceTree(tuple(nodes), tuple(sequences), tuple(tuple(path) for path in paths))


def _group_by_token(sequences: Sequence[ScoredSequence], members: Sequence[int], position: int) -> list[list[int]]:
    """Group the members, indices of sequences, by their token at ``position``. First members keep their order."""
    groups: dict[int, list[int]] = {}
    for member in members:
        groups.setdefault(int(sequences[member].tokens[position]), []).append(member)
    return list(groups.values())


def common_prefix(tokens: Sequence[np.ndarray], start: int = 0) -> int:
    """Return the length of the longest prefix that all sequences share. They must agree up to ``start``."""
    first = tokens[0]
    stop = min(len(t) for t in tokens)
    for other in tokens[1:]:
        differs = np.flatnonzero(first[start:stop] != other[start:stop])
        if len(differs):
            stop = start + int(differs[0])
    return stop
