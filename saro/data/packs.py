"""Lay out a step's trees as packs, one after the other under a token budget, without padding.

This file also holds the log-probs of pairs, chosen before rejected.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from saro.data.records import CHOSEN, REJECTED
from saro.data.tree import SequenceTree


@dataclass(frozen=True, eq=False)
class Pack:
    """The input of one forward pass. T tokens, R scored rows, E entries, S sequences, P = S / 2 pairs.

    Attributes:
        input_ids: (T,) int64.
        position_ids: (T,) int64; a child segment continues its parent's positions.
        segments: (start, stop, parent segment or -1) for each segment. A segment attends to all of its ancestors, and
            causally to itself. It may be empty: a leaf of one token is predicted but not read.
        margin_rows: number of rows that a margin of the pack's pairs depends on. They come first. In the others, the two
            sides of each pair have the same token after the same context, and cancel. R for packs of examples.
        row_hidden: (R,) int64, the position whose hidden state predicts this row. Two rows may read one position.
        row_target: (R,) int64, the token id that is scored.
        row_kind: (R,) int64, a ``RowKind``.
        entry_row: (E,) int64, the row of each entry.
        entry_sequence: (E,) int64, the sequence of each entry. A row in a shared prefix of two responses is computed
            once and has an entry for each of them.
        records: (S,) index of each sequence's record, on the host.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: tuple[tuple[int, int, int], ...]
    margin_rows: int
    row_hidden: torch.Tensor
    row_target: torch.Tensor
    row_kind: torch.Tensor
    entry_row: torch.Tensor
    entry_sequence: torch.Tensor
    records: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """T, the number of tokens that the model reads."""
        return len(self.input_ids)

    @property
    def rows(self) -> int:
        """R, the number of scored rows."""
        return len(self.row_target)

    @property
    def pairs(self) -> tuple[int, ...]:
        """(P,) index of each pair's record, for packs of pairs: a record's two sequences are neighbours."""
        return self.records[CHOSEN::2]

    def sum_sequences(self, entries: torch.Tensor) -> torch.Tensor:
        """Sum values (E,) of entries over each sequence: (S,)."""
        return entries.new_zeros(len(self.records)).index_add(0, self.entry_sequence, entries)

    def to(self, device: torch.device | str) -> Pack:
        """Return the pack with its tensors on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: send(tensor, device) for name, tensor in tensors.items()})


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a tensor of the host to a device, without waiting for the work that the device has queued.

    On CUDA it goes through pinned memory. From other memory the host would first wait until the queue is empty.
    """
    # A device without a driver is that of fake tensors.
    if torch.device(device).type == "cuda" and torch.cuda.is_available() and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def send_like(values: np.ndarray, tensor: torch.Tensor) -> torch.Tensor:
    """Return an array of the host on the device of a tensor, in its dtype."""
    return send(torch.from_numpy(values), tensor.device).to(tensor.dtype)


def sequence_number(pair: int, side: int) -> int:
    """Return the number of one side of a pair: chosen and rejected of pair 0, then of pair 1, and so on."""
    return 2 * pair + side


@dataclass(frozen=True, eq=False)
class PairLogps:
    """Log-probs of all scored tokens of n pairs under one model.

    Attributes:
        logps: (E,) nats; all sequences one after the other, by ``sequence_number``.
        offsets: (2n + 1,) int64; sequence i is ``logps[offsets[i]:offsets[i + 1]]``.
    """

    logps: np.ndarray
    offsets: np.ndarray

    @classmethod
    def zeros(cls, scored_tokens: np.ndarray) -> PairLogps:
        """Return log-probs of zero for 2n sequences of (2n,) scored tokens. They take no memory until they are read."""
        offsets = np.concatenate([[0], np.cumsum(scored_tokens, dtype=np.int64)])
        return cls(np.zeros(offsets[-1], np.float32), offsets)

    def side_logps(self, pair: int, side: int) -> np.ndarray:
        """Return the log-probs of one side (``CHOSEN`` or ``REJECTED``) of one pair, (scored tokens,)."""
        number = sequence_number(pair, side)
        return self.logps[self.offsets[number] : self.offsets[number + 1]]

    def side_sums(self, side: int) -> np.ndarray:
        """Return the log-probs of one side of each pair, (n,) float64, summed over its scored tokens."""
        num_pairs = len(self.offsets) // 2
        return np.array([self.side_logps(pair, side).sum(dtype=np.float64) for pair in range(num_pairs)])

    def pack_logps(self, pack: Pack) -> np.ndarray:
        """Return the log-probs of the pack's entries, (E,)."""
        parts = [np.empty(0, self.logps.dtype)]
        for pair in pack.pairs:
            parts += [self.side_logps(pair, CHOSEN), self.side_logps(pair, REJECTED)]
        return np.concatenate(parts)


@dataclass(frozen=True)
class Share:
    """The part of the work that rank ``rank`` of ``processes`` ranks does.

    Attributes:
        is_even: all ranks run as many packs as the rank with most. Ranks that share a model's weights must: each forward
            gathers weights from all of them.
    """

    rank: int = 0
    processes: int = 1
    is_even: bool = False


ALL_WORK = Share()


def pack_trees(trees: Sequence[SequenceTree], pack_tokens: int, share: Share = ALL_WORK) -> Iterator[Pack]:
    """Yield the packs of one rank's share of some trees. Each pack is laid out when it is asked for."""
    plan = plan_step([tree.tokens for tree in trees], pack_tokens, share.processes, share.is_even)
    for items in plan[share.rank]:
        yield lay_out([trees[i] for i in items])
    if share.is_even:
        for _ in range(max(map(len, plan)) - len(plan[share.rank])):
            yield lay_out([])


def lay_out(trees: Sequence[SequenceTree]) -> Pack:
    """Lay trees out one after the other.

    Without trees, return a pack of one token and no scored row, whose gradient is exactly zero. A rank that has no
    work in a step runs it, so that the ranks stay together.
    """
    input_ids, position_ids, segments = [], [], []
    row_hidden, row_target, row_kind, entry_row, entry_sequence, records = [], [], [], [], [], []
    num_tokens = num_rows = 0
    for tree in trees:
        first_segment = len(segments)
        node_scored_from: list[int] = []  # position of each node's first scored token
        node_row: list[int] = []  # row of that token in the pack
        for index, node in enumerate(tree.nodes):
            stop = node.start + len(node.tokens)
            parent = node.parent + first_segment if node.parent >= 0 else -1
            segments.append((num_tokens, num_tokens + node.fed_tokens, parent))
            input_ids.append(node.tokens[: node.fed_tokens])
            position_ids.append(np.arange(node.start, node.start + node.fed_tokens))

            members = [s for s, path in zip(tree.sequences, tree.paths, strict=True) if index in path]
            earliest = min(members, key=lambda s: s.scored_from)
            scored_from = min(max(earliest.scored_from, node.start), stop)
            # The token before predicts a token: its neighbour in the node, or the last token of the parent.
            hidden = np.arange(scored_from, stop) - 1 - node.start + num_tokens
            if scored_from == node.start and len(hidden):
                hidden[0] = segments[parent][1] - 1
            node_row.append(num_rows)
            node_scored_from.append(scored_from)
            row_hidden.append(hidden)
            row_target.append(node.tokens[scored_from - node.start :])
            # At least 0: in a node without scored tokens the slice must be empty, not count from the end.
            kinds_from = max(scored_from - earliest.scored_from, 0)
            kinds_to = max(stop - earliest.scored_from, 0)
            row_kind.append(earliest.row_kinds[kinds_from:kinds_to])
            num_rows += stop - scored_from
            num_tokens += node.fed_tokens
        for sequence, path in zip(tree.sequences, tree.paths, strict=True):
            for index in path:
                node = tree.nodes[index]
                start = max(sequence.scored_from, node_scored_from[index])
                stop = node.start + len(node.tokens)
                rows = np.arange(start, max(start, stop)) - node_scored_from[index] + node_row[index]
                entry_row.append(rows)
                entry_sequence.append(np.full(len(rows), len(records)))
            records.append(sequence.record)
    if not trees:
        input_ids, position_ids, segments = [np.zeros(1)], [np.zeros(1)], [(0, 1, -1)]
    rows, sequences = _concatenate(entry_row), _concatenate(entry_sequence)
    cancels = _cancelling_rows(rows, sequences, num_rows, records)  # (R,)
    order = cancels.argsort(kind="stable")
    return Pack(
        input_ids=torch.from_numpy(_concatenate(input_ids)),
        position_ids=torch.from_numpy(_concatenate(position_ids)),
        segments=tuple(segments),
        margin_rows=num_rows - int(cancels.sum()),
        row_hidden=torch.from_numpy(_concatenate(row_hidden)[order]),
        row_target=torch.from_numpy(_concatenate(row_target)[order]),
        row_kind=torch.from_numpy(_concatenate(row_kind)[order]),
        entry_row=torch.from_numpy(order.argsort()[rows]),
        entry_sequence=torch.from_numpy(sequences),
        records=tuple(records),
    )


def _cancelling_rows(
    entry_row: np.ndarray, entry_sequence: np.ndarray, num_rows: int, records: Sequence[int]
) -> np.ndarray:
    """Return (R,) bool, True for rows that both sides of every one of their pairs have. All False for packs of examples."""
    if records[CHOSEN::2] != records[REJECTED::2]:
        return np.zeros(num_rows, bool)
    num_pairs = len(records) // 2
    pair, side = entry_sequence // 2, entry_sequence % 2
    row_pairs, entry_row_pair = np.unique(entry_row * num_pairs + pair, return_inverse=True)
    chosen_minus_rejected = np.bincount(entry_row_pair, weights=1 - 2 * side)
    cancels = np.ones(num_rows, bool)
    cancels[row_pairs[chosen_minus_rejected != 0] // max(num_pairs, 1)] = False
    return cancels


def _concatenate(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate arrays into one of int64, which is empty if there are none."""
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)


# At this length, 12 times the width, attention costs as much as all products with weights in a model of width 4,096. A rough
# value is enough, because the plan mainly spreads the longest records.
_ATTENTION_TOKENS = 12 * 4096


def record_cost(tokens: int) -> float:
    """Return the work of a record, in units of one token of a short record. Attention makes each later token cost more."""
    return tokens * (1 + tokens / _ATTENTION_TOKENS)


def balance(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Deal items of the given costs to ``ranks`` ranks, largest first, each to the rank with the least so far.

    Returns the item indices of each rank. (Graham 1969, longest processing time first.)
    """
    loads: list[tuple[float, int]] = [(0, rank) for rank in range(ranks)]
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        dealt[rank].append(item)
        heapq.heappush(loads, (load + costs[item], rank))
    return dealt


def best_fit_decreasing(tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Fill bins of at most ``budget`` tokens: each item, largest first, goes where it leaves the least room.

    Returns the item indices of each bin. Raises ValueError for an item over the budget. (Johnson 1973.)
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for item in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        size = tokens[item]
        if size > budget:
            raise ValueError(f"an item of {size} tokens does not fit the budget of {budget}")
        at = bisect_left(room, (size, -1))
        if at == len(room):
            left, index = budget, len(bins)
            bins.append([])
        else:
            left, index = room.pop(at)
        bins[index].append(item)
        insort(room, (left - size, index))
    return bins


def plan_step(tokens: Sequence[int], budget: int, ranks: int = 1, is_even: bool = False) -> list[list[list[int]]]:
    """Return each rank's packs as lists of indices into ``tokens``. A rank without work gets one empty pack.

    Ranks wait for each other at the end of the step, so that their work is balanced. If ``is_even``, they wait in every pack:
    then their tokens are, which gives them equally many packs of about equal sizes. The packs with most work come first, so that
    the ranks run like packs at the same time.
    """
    costs = [record_cost(size) for size in tokens]
    plan = []
    for items in balance(tokens if is_even else costs, ranks):
        packs = [[items[i] for i in pack] for pack in best_fit_decreasing([tokens[i] for i in items], budget)]
        packs.sort(key=lambda pack: -sum(costs[i] for i in pack))
        plan.append(packs or [[]])
    return plan
