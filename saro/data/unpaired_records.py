"""Reads files as single responses with a label: unpaired records, or pairs, of which each side is one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saro.config import PAIR_KINDS, DataConfig, PreferenceConfig
from saro.data.jsonl import fault, parse_kind, shown, type_name
from saro.data.read_rows import read_rows
from saro.data.record_fields import READ_COLUMNS
from saro.data.records import (
    Example,
    Pair,
    each_once,
    holds_pairs,
    parse_example,
    parse_pair,
    read_examples,
    read_pair_files,
    read_pairs,
    with_own_ids,
)


@dataclass(frozen=True)
class Unpaired(Example):
    """One response to a prompt, and whether it is desirable.

    Attributes:
        kind: one of ``PAIR_KINDS``.
        label: True if the response is desirable.
        form: as in ``Pair``.
    """

    label: bool = True
    form: str | None = None


def read_unpaired(path: str | os.PathLike, *, may_be_equal: bool = False) -> Iterator[Unpaired]:
    """Yield the responses of a file of ``read_rows`` in order.

    A record is TRL's unpaired preference, an example in any of its formats with ``label``, true or false; or it is a pair
    in any of its formats, which gives a desirable response, ID/chosen, and an undesirable one, ID/rejected.

    Raises SaroError during iteration: for a file that cannot be read or is empty, and for the first faulty record.
    """
    stem = Path(os.fsdecode(path)).stem
    first_line: dict[str, int] = {}
    for line, where, fields in read_rows(path, READ_COLUMNS):
        for record in parse_unpaired(fields, where, f"{stem}:{line}", may_be_equal=may_be_equal):
            if record.id in first_line:
                wrong = f"id {shown(record.id)} is already used on line {first_line[record.id]}"
                fault(where, wrong, "give each record its own id, or none")
            first_line[record.id] = line
            yield record


def read_unpaired_files(paths: Iterable[str | os.PathLike], *, may_be_equal: bool = False) -> Iterator[Unpaired]:
    """Yield the responses of several files, as ``read_example_files`` does examples; ``may_be_equal`` as in ``read_pairs``.

    Raises SaroError as ``read_unpaired`` does, and for a file that is given twice.
    """
    return with_own_ids(
        record for path in each_once(paths) for record in read_unpaired(path, may_be_equal=may_be_equal)
    )


def read_preference_files(
    paths: Iterable[str | os.PathLike], options: DataConfig, preference: PreferenceConfig
) -> Iterator[Pair | Unpaired]:
    """Yield the records that a loss of stage 2 takes: labelled responses for kto, else pairs."""
    read = read_unpaired_files if preference.is_unpaired else read_pair_files
    return read(paths, may_be_equal=options.equal_sides == "drop")


def parse_unpaired(
    record: dict[str, Any], where: str, default_id: str, *, may_be_equal: bool = False
) -> list[Unpaired]:
    """Parse a JSON object as one response, or as the two of a pair. Raises SaroError at ``where`` if it is faulty."""
    if record.get("chosen") is not None or record.get("rejected") is not None:
        if record.get("label") is not None:
            fault(where, "a pair has a label", "the label of its sides is known; remove it")
        return _split(parse_pair(record, where, default_id, may_be_equal=may_be_equal))
    if record.get("label") is None:
        fault(where, "neither a label nor a pair", "give each response its label, true or false")
    label = record["label"]
    if not isinstance(label, bool):
        fault(where, f"label is {type_name(label)}", "give true or false")
    kind = parse_kind(record, PAIR_KINDS, where)
    rest = {name: value for name, value in record.items() if name not in ("label", "kind")}
    example = parse_example(rest, where, default_id)
    return [Unpaired(example.id, kind, example.prompt, example.response, where, ignored=example.ignored, label=label)]


def _split(pair: Pair) -> list[Unpaired]:
    sides = []
    for name, response, label in (("chosen", pair.chosen, True), ("rejected", pair.rejected, False)):
        if response.open:
            fault(pair.where, f"{name} is open, and kto takes whole responses", "finish it, or drop the pair")
        id = f"{pair.id}/{name}"
        sides.append(
            Unpaired(
                id,
                pair.kind,
                pair.prompt,
                response,
                pair.where,
                ignored=pair.ignored,
                label=label,
                form=pair.form,
            )
        )
    return sides


def holds_labels(path: str | os.PathLike) -> bool:
    """Return True if a file's first record is a labelled response. Raises SaroError like ``read_unpaired``."""
    _, _, first = next(read_rows(path, READ_COLUMNS))
    return first.get("label") is not None and first.get("chosen") is None


def read_records(path: str | os.PathLike, *, may_be_equal: bool = False) -> Iterator[Example | Pair]:
    """Yield the records of a file in whichever form its first one has: pairs, labelled responses, or examples.

    ``may_be_equal`` as in ``read_pairs``.
    """
    if holds_labels(path):
        return read_unpaired(path, may_be_equal=may_be_equal)
    return read_pairs(path, may_be_equal=may_be_equal) if holds_pairs(path) else read_examples(path)
