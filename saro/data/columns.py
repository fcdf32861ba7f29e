"""Collect columns of many records in memory, or write them to files that every process of a machine maps."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from saro.errors import SaroError


class Texts(Sequence[str]):
    """n strings in two arrays, which may be mapped from files.

    Args:
        content: (B,) uint8, the strings in UTF-8, one after the other.
        offsets: (n + 1,) int64, string i is ``content[offsets[i]:offsets[i + 1]]``.
        renamed: beginnings of strings -> what to return instead, such as the name of a file that has moved.
    """

    def __init__(self, content: np.ndarray, offsets: np.ndarray, renamed: Mapping[str, str] | None = None) -> None:
        self._content = content
        self._offsets = offsets
        self._renamed = dict(renamed or {})

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        i = range(len(self))[index]
        text = self._content[self._offsets[i] : self._offsets[i + 1]].tobytes().decode()
        for old, new in self._renamed.items():
            if text.startswith(old):
                return new + text.removeprefix(old)
        return text


class Columns(ABC):
    """Collects columns, part by part."""

    def __init__(self) -> None:
        self._ends: dict[str, int] = {}

    @abstractmethod
    def append(self, name: str, values: np.ndarray) -> None:
        """Append values to a column."""

    @abstractmethod
    def append_texts(self, name: str, texts: Sequence[str]) -> None:
        """Append strings to a column."""

    def append_offsets(self, name: str, lengths: np.ndarray) -> None:
        """Append the ends of items of the given lengths to a column of offsets, which begins with 0."""
        if name not in self._ends:
            self._ends[name] = 0
            self.append(name, np.zeros(1, np.int64))
        ends = self._ends[name] + np.cumsum(lengths, dtype=np.int64)
        if len(ends):
            self._ends[name] = int(ends[-1])
            self.append(name, ends)


class MemoryColumns(Columns):
    """Keeps columns in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: dict[str, list[np.ndarray]] = {}
        self._texts: dict[str, list[str]] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        """Append values to a column."""
        self._parts.setdefault(name, []).append(values)

    def append_texts(self, name: str, texts: Sequence[str]) -> None:
        """Append strings to a column."""
        self._texts.setdefault(name, []).extend(texts)

    def finish(self) -> dict[str, Any]:
        """Return the columns by name: arrays, and tuples of strings."""
        arrays = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        return arrays | {name: tuple(texts) for name, texts in self._texts.items()}


class FileColumns(Columns):
    """Writes columns into files of a folder, part by part.

    Args:
        folder: an empty folder; each column becomes a file in it. Nothing else is kept in memory.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._hashes: dict[str, Any] = {}
        self._dtypes: dict[str, np.dtype] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        """Append values to a column's file."""
        if name not in self._files:
            # Buffered: small parts of narrow columns would be a call of the system each.
            file = self._folder / f"{name}.bin"
            self._files[name] = file.open("wb", buffering=2**20)
            self._hashes[name] = hashlib.sha256()
            self._dtypes[name] = values.dtype
        content = np.ascontiguousarray(values, self._dtypes[name]).view(np.uint8)
        self._files[name].write(content)
        self._hashes[name].update(content)

    def append_texts(self, name: str, texts: Sequence[str]) -> None:
        """Append strings to a column, which is two files: see ``Texts``."""
        encoded = [text.encode() for text in texts]
        self.append_offsets(f"{name}.offsets", np.array([len(text) for text in encoded], np.int64))
        self.append(f"{name}.content", np.frombuffer(b"".join(encoded), np.uint8))

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def finish(self) -> dict[str, dict[str, str]]:
        """Close the files, and return the dtype and the sha256 of each column, by name."""
        self.close()
        return {
            name: {"dtype": self._dtypes[name].str, "sha256": self._hashes[name].hexdigest()} for name in self._files
        }


def map_columns(folder: Path, described: Mapping[str, Mapping[str, str]]) -> dict[str, np.ndarray]:
    """Map the columns that ``FileColumns`` wrote into a folder; ``described`` is what its ``finish`` returned.

    Raises:
        SaroError: a file is missing, or is not whole items long.
    """
    columns = {}
    for name, column in described.items():
        file = folder / f"{name}.bin"
        try:
            is_empty = file.stat().st_size == 0
            # Return plain arrays: each slice of a memmap would be of that slower class. A file of 0 bytes cannot be mapped.
            mapped = np.empty(0, column["dtype"]) if is_empty else np.asarray(np.memmap(file, column["dtype"], "r"))
        except (OSError, ValueError) as error:
            raise SaroError(f"{file}: cannot be mapped ({error}); remove its folder and start again") from error
        columns[name] = mapped
    return columns
