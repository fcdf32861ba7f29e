"""Single responses with a label as token ids, each with another response that its prompt did not get."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from typing import ClassVar

import numpy as np

from saro.config import PAIR_KINDS, DataConfig
from saro.data.chat_format import ChatFormat, equal_sides
from saro.data.dataset import ExampleSet, PairSet, flatten, grow_trees
from saro.data.encode_files import Check, none_left, too_long
from saro.data.tree import ScoredSequence, SequenceTree
from saro.data.unpaired_records import Unpaired, read_unpaired_files
from saro.errors import SaroError
from saro.program import progress_bar


@dataclass(frozen=True, eq=False, kw_only=True)
class UnpairedSet(ExampleSet):
    """n encoded responses with labels. Their ``kinds`` index into ``PAIR_KINDS``.

    Attributes:
        labels: (n,) bool, True for desirable responses.
        prompts: (n,) int32, a number for each prompt; records on the same prompt have the same number.
        others: (n,) int64, the record whose response stands after this record's prompt in ``mismatched``. It is on
            another prompt.
        forms: (n,) form of each record, None for those without one; empty if no record has one.
    """

    kind_names: ClassVar[tuple[str, ...]] = PAIR_KINDS

    labels: np.ndarray
    prompts: np.ndarray
    others: np.ndarray
    forms: tuple[str | None, ...] = ()

    @cached_property
    def mismatched(self) -> ExampleSet:
        """Each record's prompt, followed by the response of its other record."""
        return flatten(
            [self._mismatch(record) for record in range(len(self))], kinds=self.kinds, ids=self.ids, where=self.where
        )

    @cached_property
    def as_pairs(self) -> PairSet:
        """Pairs of each record, as the chosen side, and its mismatched sequence, as the rejected one.

        In this form the log-probs of both under a reference are computed and kept.
        """
        return PairSet(self, self.mismatched, self.prompts, self.forms)

    def trees(self, records: Iterable[int], budget: int) -> list[SequenceTree]:
        """Return some of the records as trees of at most ``budget`` tokens. Records on one prompt share a tree."""
        return grow_trees(records, self.prompts, lambda record: (self.sequence(record),), budget)

    def mismatched_trees(self, records: Iterable[int], budget: int) -> list[SequenceTree]:
        """Return the mismatched sequences of some of the records as trees, as ``trees`` does the records."""
        return grow_trees(records, self.prompts, lambda record: (self.mismatched.sequence(record),), budget)

    def _mismatch(self, record: int) -> ScoredSequence:
        own, other = self.sequence(record), self.sequence(int(self.others[record]))
        tokens = np.concatenate([own.tokens[: own.scored_from], other.tokens[other.scored_from :]])
        return ScoredSequence(tokens, own.scored_from, other.row_kinds, record)


def encode_unpaired_files(
    paths: Sequence[str],
    chat: ChatFormat,
    options: DataConfig,
    *,
    progress: bool = False,
    check: Check | None = None,
) -> UnpairedSet:
    """Read and encode files of labelled responses, or of pairs, in memory.

    Nothing is ever cut. A record of more than ``options.pack_tokens`` tokens, or beside which no response to another prompt
    fits into a pack, is an error, or is dropped if ``options.too_long`` says so. So are both responses of a pair that are the
    same tokens, if ``options.equal_sides`` says so: no response is both desirable and undesirable.

    Args:
        progress: show a progress bar on a terminal.
        check: is called with the records that are kept.

    Raises:
        SaroError: names file and line of the first record that is wrong, or all records are on one prompt.
    """
    records: list[Unpaired] = []
    sequences: list[ScoredSequence] = []
    dropped: list[str] = []
    equal: list[str] = []

    def leave_out(record: Unpaired, tokens: str) -> None:
        if options.too_long == "error":
            raise too_long(record.where, tokens, options.pack_tokens)
        dropped.append(record.id)

    read = read_unpaired_files(paths, may_be_equal=options.equal_sides == "drop")
    for where, line_records in groupby(progress_bar(read, "encoding", "records", shown=progress), attrgetter("where")):
        both = [(record, chat.encode(record)) for record in line_records]
        if len(both) == 2 and np.array_equal(both[0][1].tokens, both[1][1].tokens):
            if options.equal_sides == "error":
                raise equal_sides(where)
            equal += [record.id for record, _ in both]
            continue
        for record, sequence in both:
            if len(sequence.tokens) > options.pack_tokens:
                leave_out(record, f"{len(sequence.tokens)}")
            else:
                records.append(record)
                sequences.append(sequence)
    while True:
        prompts = _number_prompts(sequences)
        others = _choose_others(sequences, prompts, options.pack_tokens)
        alone = [i for i, other in enumerate(others) if other is None]
        if not alone:
            break
        if len(set(prompts.tolist())) == 1:
            raise SaroError(
                f"{records[0].where}: all records are on one prompt, and kto compares responses with those to other prompts; "
                "give records on two prompts or more"
            )
        for i in alone:
            leave_out(records[i], f"beside any response to another prompt, over {options.pack_tokens}")
        records = [record for i, record in enumerate(records) if others[i] is not None]
        sequences = [sequence for i, sequence in enumerate(sequences) if others[i] is not None]
    if not records:
        raise none_left(len(dropped), len(equal), options.pack_tokens)
    forms = tuple(record.form for record in records)
    encoded = flatten(
        sequences,
        kinds=np.array([PAIR_KINDS.index(record.kind) for record in records], np.uint8),
        ids=tuple(record.id for record in records),
        where=tuple(record.where for record in records),
    )
    raw = sum(isinstance(record.prompt, str) for record in records) if chat.tokenizer.chat_template else 0
    data = UnpairedSet(
        **vars(encoded) | {"dropped": tuple(dropped), "equal": tuple(equal), "raw": raw},
        labels=np.array([record.label for record in records], bool),
        prompts=prompts,
        others=np.array(others, np.int64),
        forms=forms if any(forms) else (),
    )
    if check is not None:
        check(data, chat, records)
    return data


def _number_prompts(sequences: Sequence[ScoredSequence]) -> np.ndarray:
    """Return a number for each sequence's prompt, (n,) int32, in the order in which prompts first occur."""
    numbers: dict[bytes, int] = {}
    keys = (sequence.tokens[: sequence.scored_from].tobytes() for sequence in sequences)
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int32)


def _choose_others(sequences: Sequence[ScoredSequence], prompts: np.ndarray, budget: int) -> list[int | None]:
    """Return, for each of n records, a record on another prompt whose response fits beside it; None if there is none.

    Sorted by prompt, records are shifted by the size of the largest prompt's group: then each response is chosen once,
    unless one prompt has more than half of the records or a response does not fit.
    """
    n = len(sequences)
    if n == 0:
        return []
    order = np.argsort(prompts, kind="stable")
    shift = int(np.bincount(prompts).max())
    responses = [len(sequence.row_kinds) for sequence in sequences]
    shortest = min(responses)
    others: list[int | None] = [None] * n
    for place, record in enumerate(order.tolist()):
        room = budget - len(sequences[record].tokens)
        if room < shortest:
            continue
        for step in range(shift, shift + n):
            other = int(order[(place + step) % n])
            if prompts[other] != prompts[record] and responses[other] <= room:
                others[record] = other
                break
    return others
