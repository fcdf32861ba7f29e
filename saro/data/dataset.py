"""JSONL files -> token ids in memory, in a few flat arrays for any number of records."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np

from saro.config import DataConfig
from saro.data.chat_format import ChatFormat
from saro.data.packs import CHOSEN, REJECTED
from saro.data.records import (
    KINDS,
    PAIR_KINDS,
    Example,
    Pair,
    Record,
    read_example_files,
    read_pair_files,
)
from saro.data.tree import RowKind, ScoredSequence, SequenceTree, build_tree, common_prefix
from saro.errors import SaroError
from saro.program import progress_bar


@dataclass(frozen=True, eq=False)
class ExampleSet:
    """n encoded examples.

    Attributes:
        kind_names: names of the kinds, ``KINDS`` unless a subclass has others.
        tokens: (T,) int32, all sequences one after the other.
        offsets: (n + 1,) int64, sequence i is ``tokens[offsets[i]:offsets[i + 1]]``.
        prompt_tokens: (n,) int32, number of tokens before the first scored one. These are the prompt; in a set made by
            ``PairSet.divergent``, they include the shared part of the responses.
        think_tokens: (n,) int32, number of scored tokens of the reasoning, including its tags.
        kinds: (n,) uint8, index into ``KINDS``.
        ids: the records' ids.
        where: "file.jsonl:17" of each record, as in ``Example``; empty for a set that was not read from files.
        dropped: ids of the records that were left out because they are too long.
        is_open: (n,) bool, True for sequences without a stop token, which are only the beginning of a response; None if
            no sequence is open. Only a side of pairs may hold some.
        conversations: (n,) int32, a number for each example's conversation: the turns of one have the same number. None if
            each example is a record of its own.
        ignored: names of the records' fields that were ignored.
    """

    kind_names: ClassVar[tuple[str, ...]] = KINDS

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_tokens: np.ndarray
    think_tokens: np.ndarray
    kinds: np.ndarray
    ids: tuple[str, ...]
    where: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    is_open: np.ndarray | None = None
    conversations: np.ndarray | None = None
    ignored: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64, number of tokens of each sequence."""
        return np.diff(self.offsets)

    @property
    def scored_tokens(self) -> np.ndarray:
        """(n,) int64, number of scored tokens of each sequence."""
        return self.lengths - self.prompt_tokens

    def sequence(self, record: int) -> ScoredSequence:
        """Return the sequence of one record."""
        prompt, think = int(self.prompt_tokens[record]), int(self.think_tokens[record])
        tokens = self.tokens[self.offsets[record] : self.offsets[record + 1]]
        kinds = np.full(len(tokens) - prompt, RowKind.ANSWER, np.uint8)
        kinds[:think] = RowKind.THINK
        if self.is_open is None or not self.is_open[record]:
            kinds[-1] = RowKind.STOP
        return ScoredSequence(tokens, prompt, kinds, record)

    def trees(self, records: Iterable[int], budget: int) -> list[SequenceTree]:
        """Return one tree for each of the records, in their order; turns of one conversation share trees.

        Such a tree has at most ``budget`` tokens, and a turn only once: other copies of it are in trees of their own.
        """
        if self.conversations is None:
            return [build_tree([self.sequence(record)]) for record in records]
        copies: dict[int, list[int]] = {}
        seen: Counter[int] = Counter()
        for record in records:
            copies.setdefault(seen[record], []).append(record)
            seen[record] += 1
        trees: list[SequenceTree] = []
        for turns in copies.values():
            trees += _grow_trees(turns, self.conversations, lambda turn: (self.sequence(turn),), budget)
        return trees


@dataclass(frozen=True, eq=False)
class PairSet:
    """n encoded pairs.

    Attributes:
        chosen, rejected: the two sides: sequence i of each belongs to pair i. Their ``kinds`` index into ``PAIR_KINDS``.
        prompts: (n,) int32, a number for each pair's prompt; pairs on the same prompt have the same number.
        forms: (n,) form of each pair, as in ``Pair``, None for pairs without one; empty if no pair has one.
    """

    kind_names: ClassVar[tuple[str, ...]] = PAIR_KINDS

    chosen: ExampleSet
    rejected: ExampleSet
    prompts: np.ndarray
    forms: tuple[str | None, ...] = ()

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def ids(self) -> tuple[str, ...]:
        """The pairs' ids."""
        return self.chosen.ids

    @property
    def kinds(self) -> np.ndarray:
        """(n,) uint8, index into ``PAIR_KINDS``."""
        return self.chosen.kinds

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64, number of tokens of each pair's tree, which holds the shared part once."""
        return self.chosen.lengths + self.rejected.lengths - self.shared_tokens

    @property
    def scored_tokens(self) -> np.ndarray:
        """(2n,) int64, number of scored tokens of each sequence, by ``sequence_number``."""
        scored = np.empty(2 * len(self), np.int64)
        scored[CHOSEN::2] = self.chosen.scored_tokens
        scored[REJECTED::2] = self.rejected.scored_tokens
        return scored

    @cached_property
    def shared_tokens(self) -> np.ndarray:
        """(n,) int32, number of tokens with which both sides of a pair begin, including the prompt."""
        return np.array([common_prefix([s.tokens for s in self.sequences(i)]) for i in range(len(self))], np.int32)

    def sequences(self, record: int) -> tuple[ScoredSequence, ScoredSequence]:
        """Return the chosen and the rejected sequence of one pair."""
        return self.chosen.sequence(record), self.rejected.sequence(record)

    def trees(self, records: Iterable[int], budget: int) -> list[SequenceTree]:
        """Return some of the pairs as trees of at most ``budget`` tokens. Pairs on one prompt share a tree.

        Pairs that do not fit into one tree are divided between two or more, each of which begins with the prompt.
        """
        return _grow_trees(records, self.prompts, self.sequences, budget)

    def divergent(self) -> PairSet:
        """Return the same pairs, scored only from where the two sides diverge: the shared part cancels in the margin."""
        return replace(
            self,
            chosen=_score_from(self.chosen, self.shared_tokens),
            rejected=_score_from(self.rejected, self.shared_tokens),
        )


def _grow_trees(
    records: Iterable[int],
    groups: np.ndarray,
    sequences: Callable[[int], tuple[ScoredSequence, ...]],
    budget: int,
) -> list[SequenceTree]:
    """Return the sequences of records as trees of at most ``budget`` tokens. Records of one group share a tree if they fit."""
    members: dict[int, list[int]] = {}
    for record in records:
        members.setdefault(int(groups[record]), []).append(record)
    trees: list[SequenceTree] = []
    for group in members.values():
        tree = build_tree(sequences(group[0]))
        for record in group[1:]:
            larger = build_tree([*tree.sequences, *sequences(record)])
            if larger.tokens <= budget:
                tree = larger
            else:
                trees.append(tree)
                tree = build_tree(sequences(record))
        trees.append(tree)
    return trees


def _score_from(data: ExampleSet, starts: np.ndarray) -> ExampleSet:
    """Return the set with all tokens before ``starts``, (n,) positions, unscored."""
    think = np.maximum(data.prompt_tokens + data.think_tokens - starts, 0).astype(np.int32)
    return replace(data, prompt_tokens=starts, think_tokens=think)


def encode_files(paths: Sequence[str], chat: ChatFormat, options: DataConfig, *, progress: bool = False) -> ExampleSet:
    """Read and encode files of examples: with ``options.train_on`` "all", each assistant turn of a conversation is one.

    Nothing is ever cut. A sequence of more than ``options.pack_tokens`` tokens is an error, or is dropped if
    ``options.too_long`` says so.

    Args:
        progress: show a progress bar on a terminal.

    Raises:
        SaroError: names file and line of the first record that is wrong.
    """
    conversation_of_id: dict[str, str | None] = {}

    def encode(example: Example) -> tuple[ScoredSequence]:
        conversation_of_id[example.id] = example.conversation
        return (chat.encode(example),)

    # An example is a record with one sequence, a pair one with two.
    (encoded,) = _encode(read_example_files(paths, options.train_on), encode, KINDS, options, progress)
    conversations = [conversation_of_id[id] for id in encoded.ids]
    if not any(conversations):
        return encoded
    number_of: dict[str, int] = {}
    names = [conversation or id for conversation, id in zip(conversations, encoded.ids, strict=True)]
    return replace(encoded, conversations=np.array([number_of.setdefault(n, len(number_of)) for n in names], np.int32))


def encode_pair_files(
    paths: Sequence[str], chat: ChatFormat, options: DataConfig, *, progress: bool = False
) -> PairSet:
    """Read and encode files of pairs, as ``encode_files`` does examples.

    A pair is as long as its tree. If that is longer than a pack, both sides are dropped, never only one.
    """
    form_of_id: dict[str, str | None] = {}

    def encode(pair: Pair) -> tuple[ScoredSequence, ScoredSequence]:
        form_of_id[pair.id] = pair.form
        return chat.encode_pair(pair)

    chosen, rejected = _encode(read_pair_files(paths), encode, PAIR_KINDS, options, progress)
    forms = tuple(form_of_id[id] for id in chosen.ids)
    number_of_prompt: dict[bytes, int] = {}
    prompts = np.empty(len(chosen), np.int32)
    for i in range(len(chosen)):
        sequence = chosen.sequence(i)
        prompt = sequence.tokens[: sequence.scored_from].tobytes()
        prompts[i] = number_of_prompt.setdefault(prompt, len(number_of_prompt))
    return PairSet(chosen, rejected, prompts, forms if any(forms) else ())


def _encode(
    records: Iterable[Record],
    encode: Callable[[Record], tuple[ScoredSequence, ...]],
    kind_names: Sequence[str],
    options: DataConfig,
    progress: bool,
) -> list[ExampleSet]:
    """Encode the records. Returns a set of their first sequences, then one of their second sequences if they have two."""
    sides: list[_Columns] = []
    kinds = array("B")
    ids: list[str] = []
    where: list[str] = []
    dropped: list[str] = []
    ignored: set[str] = set()
    for record in progress_bar(records, "encoding", "records", shown=progress):
        ignored.update(record.ignored)
        sequences = encode(record)
        # With the last token of each sequence, which the model does not read.
        tokens = sum(len(node.tokens) for node in build_tree(sequences).nodes)
        if tokens > options.pack_tokens:
            if options.too_long == "error":
                raise SaroError(
                    f"{record.where}: {tokens} tokens, more than the {options.pack_tokens} allowed; nothing is cut: "
                    "raise --data.pack_tokens, shorten the record, or leave it out with --data.too_long drop"
                )
            dropped.append(record.id)
            continue
        sides = sides or [_Columns() for _ in sequences]
        for side, sequence in zip(sides, sequences, strict=True):
            side.add(sequence)
        kinds.append(kind_names.index(record.kind))
        ids.append(record.id)
        where.append(record.where)
    if not ids:
        raise SaroError(
            f"all {len(dropped)} records are longer than {options.pack_tokens} tokens; raise --data.pack_tokens"
        )
    sets = (side.as_set(np.frombuffer(kinds, np.uint8), tuple(ids), tuple(where), tuple(dropped)) for side in sides)
    return [replace(encoded, ignored=tuple(sorted(ignored))) for encoded in sets]


class _Columns:
    """Collects sequences in flat arrays."""

    def __init__(self) -> None:
        self._tokens = array("i")
        self._offsets = array("q", [0])
        self._prompt_tokens = array("i")
        self._think_tokens = array("i")
        self._is_open = array("b")

    def add(self, sequence: ScoredSequence) -> None:
        self._tokens.frombytes(sequence.tokens.tobytes())
        self._offsets.append(len(self._tokens))
        self._prompt_tokens.append(sequence.scored_from)
        self._think_tokens.append(int((sequence.row_kinds == RowKind.THINK).sum()))
        self._is_open.append(sequence.is_open)

    def as_set(
        self, kinds: np.ndarray, ids: tuple[str, ...], where: tuple[str, ...], dropped: tuple[str, ...]
    ) -> ExampleSet:
        """Return the sequences as a set, which shares the memory of these arrays."""
        return ExampleSet(
            tokens=np.frombuffer(self._tokens, np.int32),
            offsets=np.frombuffer(self._offsets, np.int64),
            prompt_tokens=np.frombuffer(self._prompt_tokens, np.int32),
            think_tokens=np.frombuffer(self._think_tokens, np.int32),
            kinds=kinds,
            ids=ids,
            where=where,
            dropped=dropped,
            is_open=np.frombuffer(self._is_open, bool) if any(self._is_open) else None,
        )
