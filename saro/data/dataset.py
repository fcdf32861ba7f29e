"""Hold the token ids of any number of records in a few flat arrays, in memory or mapped from files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from saro.config import KINDS, PAIR_KINDS
from saro.data.records import CHOSEN, REJECTED, SIDES
from saro.data.tree import RowKind, ScoredSequence, SequenceTree, build_tree, common_prefix


@dataclass(frozen=True)
class Repeats:
    """Counts that take reading all tokens of a set. A mapped set has them from its encoding.

    Attributes:
        duplicates: number of records that repeat an earlier one.
        by_prompt: number of tokens of all pairs if those on one prompt share a tree; None for examples.
    """

    duplicates: int
    by_prompt: int | None


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
        kinds: (n,) uint8, index into ``kind_names``.
        ids: the records' ids.
        where: "file.jsonl:17" of each record, as in ``Example``; empty for a set that was not read from files.
        dropped: ids of the records that were left out because they are too long.
        equal: ids of the pairs that were left out because their two sides are the same.
        is_open: (n,) bool, True for sequences without a stop token, which are only the beginning of a response; None if
            no sequence is open. Only a side of pairs may hold some.
        conversations: (n,) int32, a number for each example's conversation: the turns of one have the same number. None if
            each example is a record of its own.
        ignored: names of the records' fields that were ignored.
        raw: number of records that are raw text although the model has a chat template.
        digest: sha256 that stands for all of this; None if the set is not mapped from files.
        repeats: counted when the set was encoded; None if it is not mapped from files.
    """

    kind_names: ClassVar[tuple[str, ...]] = KINDS

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_tokens: np.ndarray
    think_tokens: np.ndarray
    kinds: np.ndarray
    ids: Sequence[str]
    where: Sequence[str] = ()
    dropped: tuple[str, ...] = ()
    equal: tuple[str, ...] = ()
    is_open: np.ndarray | None = None
    conversations: np.ndarray | None = None
    ignored: tuple[str, ...] = ()
    raw: int = 0
    digest: str | None = None
    repeats: Repeats | None = None

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
            trees += grow_trees(turns, self.conversations, lambda turn: (self.sequence(turn),), budget)
        return trees


@dataclass(frozen=True, eq=False)
class PairSet:
    """n encoded pairs.

    Attributes:
        chosen, rejected: the two sides: sequence i of each belongs to pair i. Their ``kinds`` index into ``PAIR_KINDS``.
        prompts: (n,) int32, a number for each pair's prompt; pairs on the same prompt have the same number.
        forms: (n,) form of each pair, as in ``Pair``, None for pairs without one; empty if no pair has one.
        shared_tokens: (n,) int32, number of tokens with which both sides of a pair begin, including the prompt; counted if
            not given.
        digest, repeats: as in ``ExampleSet``.
    """

    kind_names: ClassVar[tuple[str, ...]] = PAIR_KINDS

    chosen: ExampleSet
    rejected: ExampleSet
    prompts: np.ndarray
    forms: tuple[str | None, ...] = ()
    shared_tokens: np.ndarray | None = None
    digest: str | None = None
    repeats: Repeats | None = None

    def __post_init__(self) -> None:
        if self.shared_tokens is None:
            shared = [common_prefix([s.tokens for s in self.sequences(i)]) for i in range(len(self))]
            object.__setattr__(self, "shared_tokens", np.array(shared, np.int32))

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def as_pairs(self) -> PairSet:
        """The set itself, see ``UnpairedSet.as_pairs``."""
        return self

    @property
    def ids(self) -> Sequence[str]:
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

    def sequences(self, record: int) -> tuple[ScoredSequence, ScoredSequence]:
        """Return the chosen and the rejected sequence of one pair."""
        return self.chosen.sequence(record), self.rejected.sequence(record)

    def trees(self, records: Iterable[int], budget: int) -> list[SequenceTree]:
        """Return some of the pairs as trees of at most ``budget`` tokens. Pairs on one prompt share a tree.

        Pairs that do not fit into one tree are divided between two or more, each of which begins with the prompt.
        """
        return grow_trees(records, self.prompts, self.sequences, budget)

    def divergent(self) -> PairSet:
        """Return the same pairs, scored only from where the two sides diverge: the shared part cancels in the margin."""
        return replace(
            self,
            chosen=_score_from(self.chosen, self.shared_tokens),
            rejected=_score_from(self.rejected, self.shared_tokens),
            digest=None if self.digest is None else f"{self.digest}-divergent",
        )


def grow_trees(
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


def flatten(
    sequences: Sequence[ScoredSequence], kinds: np.ndarray, ids: Sequence[str], where: Sequence[str]
) -> ExampleSet:
    """Return sequences as a set. Its other columns are as in ``ExampleSet``."""
    think = [int((sequence.row_kinds == RowKind.THINK).sum()) for sequence in sequences]
    return ExampleSet(
        tokens=np.concatenate([np.empty(0, np.int32), *(sequence.tokens for sequence in sequences)]),
        offsets=np.cumsum([0, *(len(sequence.tokens) for sequence in sequences)]),
        prompt_tokens=np.array([sequence.scored_from for sequence in sequences], np.int32),
        think_tokens=np.array(think, np.int32),
        kinds=kinds,
        ids=ids,
        where=where,
    )


def make_set(columns: Mapping[str, Any], about: Mapping[str, Any]) -> ExampleSet | PairSet:
    """Return the set that columns hold. ``about`` is what ``saro.data.encode_files.encode_into`` returned."""

    def side(name: str) -> ExampleSet:
        is_open = columns[f"{name}.is_open"]
        return ExampleSet(
            tokens=columns[f"{name}.tokens"],
            offsets=columns[f"{name}.offsets"],
            prompt_tokens=columns[f"{name}.prompt_tokens"],
            think_tokens=columns[f"{name}.think_tokens"],
            kinds=columns["kinds"],
            ids=columns["ids"],
            where=columns["where"],
            dropped=tuple(about["dropped"]),
            equal=tuple(about["equal"]),
            is_open=is_open if is_open.any() else None,
            conversations=columns.get("conversations"),
            ignored=tuple(about["ignored"]),
            raw=about.get("raw", 0),
        )

    if about["kind"] == "examples":
        return side("example")
    names = about["forms"]
    return PairSet(
        chosen=side(SIDES[CHOSEN]),
        rejected=side(SIDES[REJECTED]),
        prompts=columns["prompts"],
        forms=tuple(names[i] for i in columns["forms"].tolist()) if any(names) else (),
        shared_tokens=columns["shared_tokens"],
    )
