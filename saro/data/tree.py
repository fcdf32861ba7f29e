"""Sequences that are scored together -> one trie of tokens, in which a shared prefix is stored, and computed, once.

Trees are built on token ids, after tokenization, never on text. Stage 1 (RW) makes trees of one sequence, which have
one node; stage 2 (SRPO) puts both responses of a pair, and further pairs on the same prompt, into one tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class RowKind(IntEnum):
    """What a scored token is part of; for telemetry only."""

    THINK = 0
    ANSWER = 1
    STOP = 2


@dataclass(frozen=True, eq=False)
class ScoredSequence:
    """One prompt and one response as token ids.

    Attributes:
        tokens: (L,) int32, prompt and response; the last one is the stop token.
        scored_from: index of the first scored token; all from there to the end are scored. 1 <= scored_from < L.
        row_kinds: (L - scored_from,) uint8, the ``RowKind`` of each scored token.
        record: index of the record that it came from.
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


@dataclass(frozen=True, eq=False)
class Node:
    """A run of tokens that the same sequences pass through.

    Attributes:
        parent: index of the parent node, which comes earlier in the tree; -1 for a root.
        start: position of the first token in its sequences.
        tokens: (n,) int32, n >= 1.
        fed_tokens: how many of them the model reads: all, or all but the last where every sequence ends, because the
            last token of a sequence predicts nothing.
    """

    parent: int
    start: int
    tokens: np.ndarray
    fed_tokens: int


@dataclass(frozen=True, eq=False)
class SequenceTree:
    """A token trie, parents before children.

    Attributes:
        nodes: the runs of tokens.
        sequences: what the tree was built from, in the caller's order.
        paths: for each sequence, its nodes from the root down.
    """

    nodes: tuple[Node, ...]
    sequences: tuple[ScoredSequence, ...]
    paths: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Tokens that the model reads for this tree."""
        return sum(node.fed_tokens for node in self.nodes)


def build_tree(sequences: Sequence[ScoredSequence]) -> SequenceTree:
    """Put sequences into one trie: the longest common prefix of those that pass through a node is that node.

    Sequences without a common first token make a forest, whose roots share nothing.
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
        going_on = [m for m in members if len(sequences[m].tokens) > stop]
        fed = stop - start - (0 if going_on else 1)
        nodes.append(Node(parent, start, sequences[members[0]].tokens[start:stop], fed))
        # A stack: pushed in reverse, so that the first child follows its parent directly in memory.
        pending.extend((group, stop, index) for group in reversed(_group_by_token(sequences, going_on, stop)))
    return SequenceTree(tuple(nodes), tuple(sequences), tuple(tuple(path) for path in paths))


def _group_by_token(sequences: Sequence[ScoredSequence], members: Sequence[int], position: int) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for member in members:
        groups.setdefault(int(sequences[member].tokens[position]), []).append(member)
    return list(groups.values())


def common_prefix(tokens: Sequence[np.ndarray], start: int = 0) -> int:
    """The position after the longest prefix that all share, given that they agree up to ``start``."""
    first = tokens[0]
    stop = min(len(t) for t in tokens)
    for other in tokens[1:]:
        differs = np.flatnonzero(first[start:stop] != other[start:stop])
        if len(differs):
            stop = start + int(differs[0])
    return stop
