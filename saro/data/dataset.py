"""JSONL files -> token ids in memory, compact: a few flat arrays, whatever the number of records."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from tqdm import tqdm

from saro.data.chat_format import ChatFormat
from saro.data.jsonl import shown
from saro.data.records import KINDS, PAIR_KINDS, Record, read_examples, read_pairs
from saro.data.tree import RowKind, ScoredSequence, SequenceTree, build_tree, common_prefix
from saro.errors import SaroError


@dataclass(frozen=True, eq=False)
class ExampleSet:
    """n encoded examples.

    Attributes:
        tokens: int32, all sequences one after the other.
        offsets: (n + 1,) int64, sequence i is ``tokens[offsets[i]:offsets[i + 1]]``.
        prompt_tokens: (n,) int32.
        think_tokens: (n,) int32, scored tokens of the reasoning, its tags included.
        kinds: (n,) uint8, index into ``KINDS``.
        ids: the records' ids.
        dropped: ids of the records that were left out because they are too long.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_tokens: np.ndarray
    think_tokens: np.ndarray
    kinds: np.ndarray
    ids: tuple[str, ...]
    dropped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64, tokens of each sequence."""
        return np.diff(self.offsets)

    @property
    def scored_tokens(self) -> np.ndarray:
        """(n,) int64, scored tokens of each sequence."""
        return self.lengths - self.prompt_tokens

    def sequence(self, record: int) -> ScoredSequence:
        """The sequence of one record."""
        prompt, think = int(self.prompt_tokens[record]), int(self.think_tokens[record])
        tokens = self.tokens[self.offsets[record] : self.offsets[record + 1]]
        kinds = np.full(len(tokens) - prompt, RowKind.ANSWER, np.uint8)
        kinds[:think] = RowKind.THINK
        kinds[-1] = RowKind.STOP
        return ScoredSequence(tokens, prompt, kinds, record)


@dataclass(frozen=True, eq=False)
class PairSet:
    """n encoded pairs: ``chosen`` and ``rejected`` hold one sequence of each, in the same order.

    ``kinds`` of both index into ``PAIR_KINDS``.

    Attributes:
        chosen, rejected: the two sides.
        prompts: (n,) int32, number of the pair's prompt: pairs on one prompt have the same.
    """

    chosen: ExampleSet
    rejected: ExampleSet
    prompts: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def ids(self) -> tuple[str, ...]:
        return self.chosen.ids

    @property
    def kinds(self) -> np.ndarray:
        """(n,) uint8."""
        return self.chosen.kinds

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64, tokens of each pair's tree: what its sides share counts once."""
        return self.chosen.lengths + self.rejected.lengths - self.shared_tokens

    @cached_property
    def shared_tokens(self) -> np.ndarray:
        """(n,) int32, tokens that both sides begin with, prompt included."""
        return np.array([common_prefix([s.tokens for s in self.sequences(i)]) for i in range(len(self))], np.int32)

    def sequences(self, record: int) -> tuple[ScoredSequence, ScoredSequence]:
        """The two sequences of one pair, chosen first."""
        return self.chosen.sequence(record), self.rejected.sequence(record)

    def trees(self, records: Iterable[int], budget: int) -> list[SequenceTree]:
        """Some of the pairs as trees of at most ``budget`` tokens: those on one prompt share one.

        Where they would not fit one tree, they are split between pairs, and the prompt is repeated.
        """
        by_prompt: dict[int, list[int]] = {}
        for record in records:
            by_prompt.setdefault(int(self.prompts[record]), []).append(record)
        trees: list[SequenceTree] = []
        for group in by_prompt.values():
            tree = None
            for record in group:
                pair = self.sequences(record)
                larger = build_tree([*(tree.sequences if tree else ()), *pair])
                if tree is not None and larger.tokens > budget:
                    trees.append(tree)
                    larger = build_tree(pair)
                tree = larger
            trees.append(tree)
        return trees

    def divergent(self) -> PairSet:
        """The same pairs, scored only from where the two sides part: what they share cancels in the margin."""
        return replace(
            self,
            chosen=_scored_from(self.chosen, self.shared_tokens),
            rejected=_scored_from(self.rejected, self.shared_tokens),
        )


def _scored_from(data: ExampleSet, starts: np.ndarray) -> ExampleSet:
    """The set with everything before ``starts``, (n,) positions, unscored."""
    think = np.maximum(data.prompt_tokens + data.think_tokens - starts, 0).astype(np.int32)
    return replace(data, prompt_tokens=starts, think_tokens=think)


def encode_files(
    paths: Sequence[str], chat: ChatFormat, *, max_tokens: int, too_long: str = "error", progress: bool = False
) -> ExampleSet:
    """Read and encode JSONL files of examples.

    Args:
        max_tokens: longest sequence allowed; nothing is ever cut.
        too_long: "error", or "drop": leave the record out and remember its id.
        progress: show a progress bar.

    Raises:
        SaroError: for the first record that is wrong, with its file and line.
    """
    examples = (example for path in paths for example in read_examples(path))
    (columns,) = _encode(examples, lambda e: (chat.encode(e),), KINDS, max_tokens, too_long, progress)
    return columns


def encode_pair_files(
    paths: Sequence[str], chat: ChatFormat, *, max_tokens: int, too_long: str = "error", progress: bool = False
) -> PairSet:
    """Read and encode JSONL files of pairs. A pair goes whole or not at all; what its sides share counts once."""
    pairs = (pair for path in paths for pair in read_pairs(path))
    chosen, rejected = _encode(pairs, chat.encode_pair, PAIR_KINDS, max_tokens, too_long, progress)
    numbers: dict[bytes, int] = {}
    prompts = (chosen.sequence(i) for i in range(len(chosen)))
    keys = (s.tokens[: s.scored_from].tobytes() for s in prompts)
    return PairSet(chosen, rejected, np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int32))


def _encode(
    records: Iterable[Record],
    encode: Callable[[Record], tuple[ScoredSequence, ...]],
    kind_names: Sequence[str],
    max_tokens: int,
    too_long: str,
    progress: bool,
) -> list[ExampleSet]:
    """One set for each sequence that a record has."""
    sides: list[_Columns] = []
    kinds = array("B")
    ids: list[str] = []
    dropped: list[str] = []
    seen: dict[str, str] = {}
    # None shows the bar on a terminal alone.
    no_bar = None if progress else True
    for record in tqdm(records, desc="encoding", unit=" records", delay=2, leave=False, disable=no_bar):
        if record.id in seen:
            raise SaroError(f"{record.where}: id {shown(record.id)} stands at {seen[record.id]} too; ids must differ")
        seen[record.id] = record.where
        sequences = encode(record)
        tokens = sum(len(node.tokens) for node in build_tree(sequences).nodes)
        if tokens > max_tokens:
            if too_long == "error":
                raise SaroError(
                    f"{record.where}: {tokens} tokens, more than the {max_tokens} allowed; nothing is cut: "
                    "raise --data.pack_tokens, shorten the record, or leave it out with --data.too_long drop"
                )
            dropped.append(record.id)
            continue
        sides = sides or [_Columns() for _ in sequences]
        for side, sequence in zip(sides, sequences, strict=True):
            side.add(sequence)
        kinds.append(kind_names.index(record.kind))
        ids.append(record.id)
    if not ids:
        raise SaroError(f"all {len(dropped)} records are longer than {max_tokens} tokens; raise --data.pack_tokens")
    return [ExampleSet(*side.arrays(), np.frombuffer(kinds, np.uint8), tuple(ids), tuple(dropped)) for side in sides]


class _Columns:
    """Sequences, added one by one, as flat arrays."""

    def __init__(self) -> None:
        self._tokens, self._lengths, self._prompts, self._thinks = array("i"), array("q", [0]), array("i"), array("i")

    def add(self, sequence: ScoredSequence) -> None:
        self._tokens.frombytes(sequence.tokens.tobytes())
        self._lengths.append(len(sequence.tokens))
        self._prompts.append(sequence.scored_from)
        self._thinks.append(int((sequence.row_kinds == RowKind.THINK).sum()))

    def arrays(self) -> tuple[np.ndarray, ...]:
        """tokens, offsets, prompt_tokens, think_tokens."""
        offsets = np.cumsum(np.frombuffer(self._lengths, np.int64))
        columns = (np.frombuffer(column, np.int32) for column in (self._tokens, self._prompts, self._thinks))
        tokens, prompts, thinks = columns
        return tokens, offsets, prompts, thinks
