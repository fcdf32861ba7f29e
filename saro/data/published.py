"""Read data sets as their authors publish them, and check where their conversions are written."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from saro.data.jsonl import decode, fault, open_data, parse_json, parse_text, read_objects, shown
from saro.data.read_rows import is_table, read_rows
from saro.errors import SaroError

_BOM = "\ufeff"
_NOT_THIS_FORMAT = "check that this is the format of the file"


def check_target(src: str | os.PathLike, dst: str | os.PathLike, overwrite: bool) -> None:
    """Raise SaroError if ``dst`` is the source itself, or exists and ``overwrite`` is false."""
    dst = Path(dst)
    if not dst.exists():
        return
    if os.path.exists(src) and dst.samefile(src):
        raise SaroError(f"{dst}: is the source itself; write to another file")
    if not overwrite:
        raise SaroError(f"{dst}: exists already; name another file, or ask to overwrite it")


def read_records(src: str | os.PathLike) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield (number from 1, place for error messages, object) for each object of a JSON array, or a file of ``read_rows``."""
    name = os.fsdecode(src)
    if is_table(src):
        yield from read_rows(src)
        return
    with open_data(src) as file:
        first = next((raw.strip() for raw in file if raw.strip()), b"").removeprefix(_BOM.encode())
    if not first.startswith(b"["):
        for number, (_, where, value) in enumerate(read_objects(src), start=1):
            yield number, where, value
        return
    records = read_json(src)
    if not records:
        fault(name, "the file has no records", "check how it was written")
    for number, value in enumerate(records, start=1):
        where = f"{name}: record {number}"
        if not isinstance(value, dict):
            fault(where, "is not an object", _NOT_THIS_FORMAT)
        yield number, where, value


def read_json(src: str | os.PathLike) -> Any:
    """Return the one JSON value of a file. Raises SaroError as ``read_objects`` does."""
    return parse_json(read_text(src), os.fsdecode(src))


def read_text(src: str | os.PathLike) -> str:
    """Return the text of a UTF-8 file, without a byte order mark. Raises SaroError for any other encoding."""
    with open_data(src) as file:
        return decode(file.read(), os.fsdecode(src)).removeprefix(_BOM)


def read_csv(src: str | os.PathLike, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield ("file:line", row by column) for each row of a CSV file whose header has ``columns``, and perhaps others.

    The line is the first of the row: a quoted field may hold line ends. Blank lines are skipped.

    Raises SaroError for a file that cannot be read or has no rows, for a missing column, and for a row that is broken
    or has more or fewer fields than the header.
    """
    name = os.fsdecode(src)
    rows = read_csv_rows(src)
    where, header = next(rows, (name, []))
    header = [column.strip() for column in header]
    for column in columns:
        if header.count(column) != 1:
            count = "no column" if column not in header else "more than one column"
            fault(where, f"{count} {shown(column)}", _NOT_THIS_FORMAT)
    has_rows = False
    for where, row in rows:
        if len(row) != len(header):
            fault(where, f"the row has {len(row)} fields, the header {len(header)}", "quote fields with commas")
        has_rows = True
        yield where, dict(zip(header, row, strict=True))
    if not has_rows:
        fault(name, "the file has no rows", "check how it was written")


def read_csv_rows(src: str | os.PathLike) -> Iterator[tuple[str, list[str]]]:
    """Yield ("file:line", fields) for each row of a CSV file without a header. Raises SaroError for a broken row."""
    name = os.fsdecode(src)
    # newline="" hands line ends within quotes to the csv module as they are.
    reader = csv.reader(io.StringIO(read_text(src), newline=""), strict=True)
    while True:
        where = f"{name}:{reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            fault(where, f"broken CSV in the row that begins here ({error})", "check its quotes")
        if row is None:
            return
        if row:
            yield where, row


def parse_field(source: dict[str, Any], name: str, where: str) -> str:
    """Return a field of a published record, which must be text."""
    if name not in source:
        fault(where, f"field {shown(name)} is missing", _NOT_THIS_FORMAT)
    return parse_text(source[name], f"field {shown(name)}", where, "fix or drop the record")
