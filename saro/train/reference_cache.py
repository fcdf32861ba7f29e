"""The cache of reference log-probs on disk: immutable shards, and an index that can be made from them again.

    $SARO_CACHE/reference/KEY/key.json              what the log-probs were scored with
                             /shards/*.safetensors  keys (m, 16) uint8, offsets (m + 1,) int64, logps (r,)
                             /index.safetensors     where each key lies; made anew when it is not that of the shards

A shard appears complete under a name of its own, so any number of processes may add some at the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from saro.data.tree import ScoredSequence
from saro.errors import SaroError
from saro.files import atomic_write, cache_dir

_KEY_BYTES = 16
# Of one shard: so much is in memory beside the result while it is read.
SHARD_ROWS = 2**22


def sequence_key(sequence: ScoredSequence) -> bytes:
    """The key of a sequence: a hash of its token ids and of where scoring begins."""
    digest = hashlib.blake2b(sequence.scored_from.to_bytes(8, "little"), digest_size=_KEY_BYTES)
    digest.update(np.ascontiguousarray(sequence.tokens, np.int32))
    return digest.digest()


class _Place(NamedTuple):
    """Where the rows of a key lie: rows ``start`` to ``stop`` of a shard."""

    shard: str
    start: int
    stop: int


class ReferenceCache:
    """Log-probs of sequences under one reference.

    Args:
        folder: of the cache, which need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards = folder / "shards"
        self._places: dict[bytes, _Place] = {}

    @classmethod
    def of(cls, key: Mapping[str, object]) -> ReferenceCache:
        """The cache of what was scored with ``key``, which is written beside it for people to read.

        Raises:
            SaroError: its folder cannot be written.
        """
        text = json.dumps(key, sort_keys=True, indent=2, default=str)
        cache = cls(cache_dir() / "reference" / hashlib.sha256(text.encode()).hexdigest()[:32])
        try:
            cache._shards.mkdir(parents=True, exist_ok=True)
            if not (cache.folder / "key.json").is_file():
                with atomic_write(cache.folder / "key.json") as file:
                    file.write(text + "\n")
        except OSError as error:
            raise SaroError(
                f"{cache.folder}: cannot be written ({error.strerror}); set SARO_CACHE to another folder"
            ) from error
        return cache

    def add(self, logps: Mapping[bytes, np.ndarray]) -> None:
        """Add the log-probs of sequences by their keys, in shards of about ``SHARD_ROWS`` rows."""
        keys, rows = [], 0
        for key, values in logps.items():
            keys.append(key)
            rows += len(values)
            if rows >= SHARD_ROWS:
                self._write([(k, logps[k]) for k in keys])
                keys, rows = [], 0
        if keys:
            self._write([(k, logps[k]) for k in keys])

    def find(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of the keys are there, by the files as they are now."""
        self._places = self._read_index()
        return [key in self._places for key in keys]

    def load(self, keys: Sequence[bytes], rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Log-probs of the keys one after the other, and (n + 1,) int64 offsets; after ``find``, which saw them all.

        ``rows`` says how many each has. Beside the result, one shard at a time is in memory.

        Raises:
            SaroError: the disk has damaged a shard.
        """
        offsets = np.concatenate([[0], np.cumsum(np.asarray(rows, np.int64))])
        by_shard: dict[str, list[int]] = {}
        for i, key in enumerate(keys):
            by_shard.setdefault(self._places[key].shard, []).append(i)
        result: np.ndarray | None = None
        for shard, members in by_shard.items():
            logps = _read_logps(self._shards / shard)
            result = np.empty(offsets[-1], logps.dtype) if result is None else result
            for i in members:
                place = self._places[keys[i]]
                if place.stop - place.start != rows[i]:
                    raise SaroError(f"{self.folder}: its index does not fit its shards; remove the folder")
                result[offsets[i] : offsets[i + 1]] = logps[place.start : place.stop]
        return np.empty(0, np.float32) if result is None else result, offsets

    def _write(self, entries: Sequence[tuple[bytes, np.ndarray]]) -> None:
        logps = np.concatenate([values for _, values in entries])
        tensors = {
            "keys": np.frombuffer(b"".join(key for key, _ in entries), np.uint8).reshape(-1, _KEY_BYTES),
            "offsets": np.cumsum([0, *(len(values) for _, values in entries)]),
            "logps": logps,
        }
        # Named by time: where several hold a key, the first one counts, whatever comes later.
        name = f"{time.time_ns():020d}-{secrets.token_hex(4)}.safetensors"
        with atomic_write(self._shards / name, "wb") as file:
            file.write(save(tensors, metadata={"crc32": str(_checksum(tensors))}))

    def _read_index(self) -> dict[bytes, _Place]:
        """Where every key lies. An index that does not name exactly the shards that are there is made anew."""
        names = sorted(p.name for p in self._shards.glob("*.safetensors"))
        path = self.folder / "index.safetensors"
        with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError), safe_open(path, "numpy") as file:
            if json.loads(file.metadata()["shards"]) == names:
                return _places(names, *(file.get_tensor(name) for name in ("keys", "shard", "bounds")))
        keys, shard, bounds, read = [], [], [], []
        for name in names:
            if (found := _read_shard(self._shards / name)) is None:
                continue
            shard.append(np.full(len(found[0]), len(read), np.int32))
            keys.append(found[0])
            bounds.append(np.stack([found[1][:-1], found[1][1:]], axis=1))
            read.append(name)
        if not read:
            return {}
        columns = [np.concatenate(column) for column in (keys, shard, bounds)]
        tensors = dict(zip(("keys", "shard", "bounds"), columns, strict=True))
        with atomic_write(path, "wb") as file:
            file.write(save(tensors, metadata={"shards": json.dumps(read)}))
        return _places(read, *columns)


def _places(names: Sequence[str], keys: np.ndarray, shard: np.ndarray, bounds: np.ndarray) -> dict[bytes, _Place]:
    raw = keys.tobytes()
    places: dict[bytes, _Place] = {}
    for i, (at, (start, stop)) in enumerate(zip(shard.tolist(), bounds.tolist(), strict=True)):
        places.setdefault(raw[i * _KEY_BYTES : (i + 1) * _KEY_BYTES], _Place(names[at], start, stop))
    return places


def _checksum(tensors: Mapping[str, np.ndarray]) -> int:
    checksum = 0
    for name in ("keys", "offsets", "logps"):
        checksum = zlib.crc32(np.ascontiguousarray(tensors[name]), checksum)
    return checksum


def _read_logps(path: Path) -> np.ndarray:
    """All rows of a shard. Raises SaroError, and removes the file, where the disk has damaged it."""
    with contextlib.suppress(SafetensorError, KeyError), safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in ("keys", "offsets", "logps")}
        if _checksum(tensors) == int(file.metadata()["crc32"]):
            return tensors["logps"]
    path.unlink(missing_ok=True)
    raise SaroError(f"{path}: was damaged on disk, and is removed; start again, and its rows are scored anew")


def _read_shard(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Keys and offsets of a shard; None, and the file is removed, where it is none any more: it is scored again."""
    with contextlib.suppress(SafetensorError, KeyError), safe_open(path, "numpy") as file:
        return file.get_tensor("keys"), file.get_tensor("offsets")
    path.unlink(missing_ok=True)
    return None
