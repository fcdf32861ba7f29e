"""Read the records of JSONL files, Parquet files and data sets of the Hugging Face hub as plain dicts."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saro.data.jsonl import fault, open_data, read_objects
from saro.data.record_fields import READ_COLUMNS
from saro.errors import install_extra
from saro.files import file_hash

if TYPE_CHECKING:
    from datasets import Dataset

_HUB = "hf://"
# Like the hub's own addresses, hf://datasets/ORG/NAME@REVISION/PATH, but with a configuration and a split for a path.
_HUB_NAME = re.compile(
    r"hf://(?:datasets/)?(?P<path>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/\w+/[\w.-]+|[\w.-]+))?(?:/(?P<name>[\w.+-]+))?"
    r":(?P<split>\w[\w.-]*(?:\[[\d:%-]+\])?)"
)
_HUB_FORM = "hf://ORG/NAME[@REVISION][/CONFIG]:SPLIT"
_BATCH = 1024


def read_rows(
    path: str | os.PathLike, columns: Collection[str] | None = None
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield (number from 1, "file:number", record) for each record of a file.

    A file is one of these, by its name: a data set of the hub, "hf://ORG/NAME@REVISION/CONFIG:SPLIT", of which revision and
    configuration may be left out; a Parquet file, "*.parquet"; else a JSONL file, whose records are numbered by line.

    Args:
        columns: the columns of a table that are read; the others are None in each record. Default all. JSONL is read whole.

    Raises SaroError for a file that cannot be read or has no records, and if it needs a library that is not installed.
    """
    name = os.fsdecode(path)
    if is_hub(name):
        return _read_hub(name, columns)
    if name.endswith(".parquet"):
        return _read_parquet(name, columns)
    return read_objects(path)


def is_hub(path: str | os.PathLike) -> bool:
    """Return True for the name of a hub data set."""
    return os.fsdecode(path).startswith(_HUB)


def is_table(path: str | os.PathLike) -> bool:
    """Return True for the name of a Parquet file or of a hub data set."""
    return is_hub(path) or os.fsdecode(path).endswith(".parquet")


def hash_rows(path: str) -> str:
    """Return the sha256 of a file; for a hub data set, of the columns that records are made from."""
    if not is_hub(path):
        return file_hash(Path(path))
    digest = hashlib.sha256()
    for _, _, record in _read_hub(path, READ_COLUMNS):
        digest.update(json.dumps(record, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _read_parquet(name: str, columns: Collection[str] | None) -> Iterator[tuple[int, str, dict[str, Any]]]:
    with open_data(name) as file:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            _fault_missing(name, "pyarrow")
        try:
            table = pq.ParquetFile(file)
            wanted, others = _choose_columns(table.schema_arrow.names, columns, name)
            number = 0
            for batch in table.iter_batches(_BATCH, columns=wanted):
                # A batch without columns does not know how many rows it has.
                rows = batch.to_pylist() if wanted else [{}] * batch.num_rows
                for row in rows:
                    number += 1
                    yield number, f"{name}:{number}", _without_nulls(row | others)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            fault(name, f"broken Parquet ({type(error).__name__})", "write the file again")
    if not number:
        fault(name, "the file has no records", "check how it was written")


def _read_hub(name: str, columns: Collection[str] | None) -> Iterator[tuple[int, str, dict[str, Any]]]:
    data = _load_hub(name)
    wanted, others = _choose_columns(data.column_names, columns, name)
    if not len(data):
        fault(name, "the split has no records", "name another one")
    rows = data.select_columns(wanted) if wanted else ({} for _ in range(len(data)))
    for number, row in enumerate(rows, start=1):
        yield number, f"{name}:{number}", _without_nulls(row | others)


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Leave out an id or a kind that is null: a table has no other way to leave it out in some rows."""
    return {field: value for field, value in row.items() if value is not None or field not in ("id", "kind")}


def _load_hub(name: str) -> Dataset:
    """Load a split of a hub data set, from the cache of ``datasets`` if it is there."""
    parts = _HUB_NAME.fullmatch(name)
    if not parts:
        fault(name, "is not the name of a split", f"write {_HUB_FORM}")
    try:
        import datasets
    except ImportError:
        _fault_missing(name, "datasets")
    try:
        return datasets.load_dataset(**parts.groupdict())
    except datasets.exceptions.DatasetNotFoundError:
        fault(name, "the hub has no such data set, or it is private", "check the name, or log in: hf auth login")
    except ValueError as error:
        # An unknown configuration or split: the message lists those that there are.
        message = " ".join(str(error).split())
        fault(name, f"cannot be loaded: {message[:300]}", f"write {_HUB_FORM}")
    except Exception as error:
        # The network and the readers of files may raise anything, with messages that hold the text of records.
        wrong = f"cannot be loaded ({type(error).__name__})"
        fault(name, wrong, "check the connection and the data set, or give a file on this machine")


def _choose_columns(
    names: Sequence[str], columns: Collection[str] | None, where: str
) -> tuple[list[str], dict[str, None]]:
    """Return the columns to read, and the values of the others in each record."""
    if len(set(names)) < len(names):
        fault(where, "two columns have one name", "rename one")
    wanted = [name for name in names if columns is None or name in columns]
    return wanted, dict.fromkeys(name for name in names if name not in wanted)


def _fault_missing(name: str, library: str) -> None:
    fault(name, f"reading it needs {library}, which is not installed", install_extra("data"))
