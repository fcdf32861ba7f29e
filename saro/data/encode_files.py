"""Encode data files as token ids, part by part, in this process or in several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np

from saro.config import DataConfig
from saro.data.chat_format import ChatFormat, EqualSides
from saro.data.columns import Columns, MemoryColumns
from saro.data.dataset import ExampleSet, PairSet, flatten, make_set
from saro.data.records import KINDS, PAIR_KINDS, SIDES, Example, Pair, read_example_files, read_pair_files
from saro.data.tree import ScoredSequence, build_tree
from saro.data.workers import map_in_order
from saro.errors import SaroError
from saro.program import progress_bar

# A worker encodes this many records at a time: sending them then costs little beside tokenizing them.
_PART_RECORDS = 256
# Checks encoded records against what they were read from, and raises SaroError.
Check = Callable[[ExampleSet | PairSet, ChatFormat, Sequence[Example | Pair]], None]


def too_long(where: str, tokens: int | str, allowed: int) -> SaroError:
    """Return the error of a record that is longer than a pack."""
    return SaroError(
        f"{where}: {tokens} tokens, more than the {allowed} allowed; nothing is cut: "
        "raise --data.pack_tokens, shorten the record, or leave it out with --data.too_long drop"
    )


def none_left(too_long: int, equal: int, allowed: int) -> SaroError:
    """Return the error of a set of which every record is longer than a pack, or has two sides that are the same."""
    if equal:
        return SaroError(
            f"no record is left: {equal} pairs have the same two sides, and {too_long} records are longer than {allowed} "
            "tokens; give other pairs, or raise --data.pack_tokens"
        )
    return SaroError(f"all {too_long} records are longer than {allowed} tokens; raise --data.pack_tokens")


def encode_files(
    paths: Sequence[str],
    chat: ChatFormat,
    options: DataConfig,
    *,
    progress: bool = False,
    check: Check | None = None,
) -> ExampleSet:
    """Read and encode files of examples, in memory: with ``options.train_on`` "all", each assistant turn is one.

    Nothing is ever cut. A sequence of more than ``options.pack_tokens`` tokens is an error, or is dropped if
    ``options.too_long`` says so.

    Args:
        progress: show a progress bar on a terminal.
        check: is called with some records at a time.

    Raises:
        SaroError: names file and line of the first record that is wrong.
    """
    return _encode_in_memory("examples", paths, chat, options, progress, check)


def encode_pair_files(
    paths: Sequence[str],
    chat: ChatFormat,
    options: DataConfig,
    *,
    progress: bool = False,
    check: Check | None = None,
) -> PairSet:
    """Read and encode files of pairs, as ``encode_files`` does examples.

    A pair is as long as its tree. If that is longer than a pack, both sides are dropped, never only one. Sides of the same
    tokens are an error, or are dropped if ``options.equal_sides`` says so.
    """
    return _encode_in_memory("pairs", paths, chat, options, progress, check)


def _encode_in_memory(
    kind: str, paths: Sequence[str], chat: ChatFormat, options: DataConfig, progress: bool, check: Check | None
) -> ExampleSet | PairSet:
    columns = MemoryColumns()
    about = encode_into(columns, kind, paths, chat, options, progress=progress, check=check)
    return make_set(columns.finish(), about)


def encode_into(
    columns: Columns,
    kind: str,
    paths: Sequence[str],
    chat: ChatFormat,
    options: DataConfig,
    *,
    progress: bool = False,
    check: Check | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Encode files into columns; see ``encode_files``. Returns what ``make_set`` needs besides, as plain data.

    Args:
        kind: "examples" or "pairs".
        workers: number of processes that encode. The result, and the first error, do not depend on it.
    """
    if kind == "pairs":
        records = read_pair_files(paths, may_be_equal=options.equal_sides == "drop")
    else:
        records = read_example_files(paths, options.train_on)
    parts = _divide(progress_bar(records, "encoding", "records", shown=progress))
    encode = partial(_encode_part, chat=chat, options=options, check=check)
    number_of_prompt: dict[bytes, int] = {}
    forms: dict[str | None, int] = {}
    number_of_conversation: dict[str, int] | None = {} if options.train_on == "all" else None
    dropped: list[str] = []
    equal: list[str] = []
    ignored: set[str] = set()
    count = raw = 0
    for part in map_in_order(encode, parts, workers):
        ignored.update(part.ignored)
        raw += part.raw
        if part.data is not None:
            count += len(part.data)
            _append(columns, part.data, number_of_prompt, forms)
            if number_of_conversation is not None:
                numbers = [
                    number_of_conversation.setdefault(name, len(number_of_conversation)) for name in part.conversations
                ]
                columns.append("conversations", np.array(numbers, np.int32))
        dropped += part.dropped
        equal += part.equal
        if part.error is not None:
            raise SaroError(part.error)
    if not count:
        raise none_left(len(dropped), len(equal), options.pack_tokens)
    return {
        "kind": kind,
        "dropped": dropped,
        "equal": equal,
        "forms": list(forms),
        "ignored": sorted(ignored),
        "raw": raw,
    }


@dataclass(frozen=True)
class _Part:
    """Some encoded records, in the order of the files.

    Attributes:
        ignored: names of the records' fields that were ignored.
        conversations: for each record of ``data``, the place of its conversation, or its id if it is of none.
        data: the records that are not too long; None if there are none. ``prompts`` of pairs has no meaning.
        dropped: ids of those that are.
        equal: ids of pairs whose sides are the same, which are left out too.
        error: the first record that is wrong comes after all of these.
        raw: number of records of ``data`` that are raw text although the model has a chat template.
    """

    ignored: tuple[str, ...]
    conversations: tuple[str, ...]
    data: ExampleSet | PairSet | None
    dropped: tuple[str, ...]
    equal: tuple[str, ...]
    error: str | None
    raw: int


def _divide(records: Iterable[Example | Pair]) -> Iterator[tuple[list[Example | Pair], str | None]]:
    """Yield some records at a time, and the error that comes after them, which ends the records."""
    remaining = iter(records)
    while True:
        part: list[Example | Pair] = []
        error = None
        try:
            for record in islice(remaining, _PART_RECORDS):
                # Not list.extend, which need not keep the records before an error.
                part += [record]
        except SaroError as raised:
            error = str(raised)
        if part or error:
            yield part, error
        if error or len(part) < _PART_RECORDS:
            return


def _encode_part(
    records: Sequence[Example | Pair], error: str | None, chat: ChatFormat, options: DataConfig, check: Check | None
) -> _Part:
    """Encode some records, up to the first one that is wrong. ``error`` comes after the last of them."""
    ignored: set[str] = set()
    kept: list[Example | Pair] = []
    encoded: list[tuple[ScoredSequence, ...]] = []
    dropped: list[str] = []
    equal: list[str] = []
    try:
        for record in records:
            ignored.update(record.ignored)
            try:
                sequences = chat.encode_pair(record) if isinstance(record, Pair) else (chat.encode(record),)
            except EqualSides:
                if options.equal_sides == "error":
                    raise
                equal.append(record.id)
                continue
            # The limit counts the last token of each sequence too, which the model does not read.
            tokens = sum(len(node.tokens) for node in build_tree(sequences).nodes)
            if tokens <= options.pack_tokens:
                kept.append(record)
                encoded.append(sequences)
            elif options.too_long == "drop":
                dropped.append(record.id)
            else:
                raise too_long(record.where, tokens, options.pack_tokens)
        data = _as_set(kept, encoded) if kept else None
        if check is not None and data is not None:
            check(data, chat, kept)
    except SaroError as raised:
        data = _as_set(kept, encoded) if kept else None
        error = str(raised)
    conversations = tuple(getattr(record, "conversation", None) or record.id for record in kept)
    raw = sum(isinstance(record.prompt, str) for record in kept) if chat.tokenizer.chat_template else 0
    return _Part(tuple(ignored), conversations, data, tuple(dropped), tuple(equal), error, raw)


def _as_set(records: Sequence[Example | Pair], encoded: Sequence[tuple[ScoredSequence, ...]]) -> ExampleSet | PairSet:
    """Return encoded records as a set. An example has one sequence, a pair has two. The prompts of pairs all have number 0."""
    sides = [_as_side(records, sequences) for sequences in zip(*encoded, strict=True)]
    if len(sides) == 1:
        return sides[0]
    chosen, rejected = sides
    return PairSet(chosen, rejected, np.zeros(len(records), np.int32), tuple(record.form for record in records))


def _as_side(records: Sequence[Example | Pair], sequences: Sequence[ScoredSequence]) -> ExampleSet:
    names = PAIR_KINDS if isinstance(records[0], Pair) else KINDS
    side = flatten(
        sequences,
        kinds=np.array([names.index(record.kind) for record in records], np.uint8),
        ids=tuple(record.id for record in records),
        where=tuple(record.where for record in records),
    )
    return replace(side, is_open=np.array([sequence.is_open for sequence in sequences], bool))


def _append(
    columns: Columns,
    data: ExampleSet | PairSet,
    number_of_prompt: dict[bytes, int],
    forms: dict[str | None, int],
) -> None:
    """Append a part of a set to columns. Prompts and forms that are new get the next numbers."""
    is_pairs = isinstance(data, PairSet)
    sides = dict(zip(SIDES, (data.chosen, data.rejected), strict=True)) if is_pairs else {"example": data}
    for name, side in sides.items():
        columns.append(f"{name}.tokens", side.tokens)
        columns.append_offsets(f"{name}.offsets", side.lengths)
        columns.append(f"{name}.prompt_tokens", side.prompt_tokens)
        columns.append(f"{name}.think_tokens", side.think_tokens)
        columns.append(f"{name}.is_open", side.is_open)
    first = next(iter(sides.values()))
    columns.append("kinds", first.kinds)
    columns.append_texts("ids", first.ids)
    columns.append_texts("where", first.where)
    if is_pairs:
        prompts = []
        for i in range(len(data)):
            sequence = first.sequence(i)
            # With 128 bits, two of a billion prompts collide with a probability of 1e-21.
            prompt = blake2b(sequence.tokens[: sequence.scored_from], digest_size=16).digest()
            prompts.append(number_of_prompt.setdefault(prompt, len(number_of_prompt)))
        columns.append("prompts", np.array(prompts, np.int32))
        columns.append("forms", np.array([forms.setdefault(form, len(forms)) for form in data.forms], np.uint16))
        columns.append("shared_tokens", data.shared_tokens)
