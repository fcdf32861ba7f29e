"""Keeps reference log-probs on disk, in immutable shards with an index that can be rebuilt from them.

    $SARO_CACHE/reference/KEY/key.json              what the log-probs were scored with
                             /shards/*.safetensors  keys (m, 16) uint8, offsets (m + 1,) int64, logps (r,)
                             /index.safetensors     the rows of each key; rebuilt if it does not match the shards

A shard appears complete and under a unique name, so several processes may add shards at the same time.
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
# Rows per shard, 16 MiB in fp32: reading holds one shard in memory beside the result.
SHARD_ROWS = 2**22


def sequence_key(sequence: ScoredSequence) -> bytes:
    """Return the key of a sequence: a hash of its token ids and of the position where scoring begins."""
    digest = hashlib.blake2b(sequence.scored_from.to_bytes(8, "little"), digest_size=_KEY_BYTES)
    digest.update(np.ascontiguousarray(sequence.tokens, np.int32))
    return digest.digest()


class _Place(NamedTuple):
    """The place of a key's log-probs: rows ``start`` to ``stop`` of a shard."""

    shard: str
    start: int
    stop: int


class ReferenceCache:
    """The log-probs of sequences under one reference, in a folder.

    Args:
        folder: folder of the cache; it need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards = folder / "shards"
        self._places: dict[bytes, _Place] = {}

    @classmethod
    def of(cls, key: Mapping[str, object]) -> ReferenceCache:
        """Return the cache of log-probs scored with ``key``, and write ``key`` to its key.json for people to read.

        Raises:
            SaroError: the folder cannot be written.
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
        """Write log-probs, one array per key, in shards of about ``SHARD_ROWS`` rows."""
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
        """Read the index from disk and return, for each key, True if it is in the cache."""
        self._places = self._read_index()
        return [key in self._places for key in keys]

    def load(self, keys: Sequence[bytes], rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the log-probs of n keys, one key after the other, and (n + 1,) int64 offsets.

        ``find`` must have returned True for all keys. ``rows`` is the number of log-probs of each key. Only one shard
        at a time is in memory beside the result.

        Raises:
            SaroError: a shard was damaged on disk.
        """
        offsets = np.concatenate([[0], np.cumsum(np.asarray(rows, np.int64))])  # (n + 1,)
        by_shard: dict[str, list[int]] = {}
        for i, key in enumerate(keys):
            by_shard.setdefault(self._places[key].shard, []).append(i)
        result: np.ndarray | None = None
        for shard, members in by_shard.items():
            logps = _read_logps(self._shards / shard)
            if result is None:
                result = np.empty(offsets[-1], logps.dtype)
            for i in members:
                place = self._places[keys[i]]
                if place.stop - place.start != rows[i]:
                    raise SaroError(f"{self.folder}: its index does not fit its shards; remove the folder")
                result[offsets[i] : offsets[i + 1]] = logps[place.start : place.stop]
        return np.empty(0, np.float32) if result is None else result, offsets

    def _write(self, entries: Sequence[tuple[bytes, np.ndarray]]) -> None:
        """Write (key, log-probs) entries as one shard."""
        logps = np.concatenate([values for _, values in entries])
        tensors = {
            "keys": np.frombuffer(b"".join(key for key, _ in entries), np.uint8).reshape(-1, _KEY_BYTES),
            "offsets": np.cumsum([0, *(len(values) for _, values in entries)]),
            "logps": logps,
        }
        # Name shards by time: if several hold a key, the oldest one counts.
        name = f"{time.time_ns():020d}-{secrets.token_hex(4)}.safetensors"
        with atomic_write(self._shards / name, "wb") as file:
            file.write(save(tensors, metadata={"crc32": str(_checksum(tensors))}))

    def _read_index(self) -> dict[bytes, _Place]:
        """Return the place of every key. Rebuild the index if it does not name exactly the shards on disk."""
        names = sorted(p.name for p in self._shards.glob("*.safetensors"))
        path = self.folder / "index.safetensors"
        with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError), safe_open(path, "numpy") as file:
            if json.loads(file.metadata()["shards"]) == names:
                tensors = {name: file.get_tensor(name) for name in ("keys", "shard", "bounds")}
                return _make_places(names, tensors)
        keys, shard, bounds, intact = [], [], [], []
        for name in names:
            content = _read_shard(self._shards / name)
            if content is None:
                continue
            shard_keys, offsets = content
            keys.append(shard_keys)  # (m, 16)
            shard.append(np.full(len(shard_keys), len(intact), np.int32))  # (m,)
            bounds.append(np.stack([offsets[:-1], offsets[1:]], axis=1))  # (m, 2)
            intact.append(name)
        if not intact:
            return {}
        tensors = {"keys": np.concatenate(keys), "shard": np.concatenate(shard), "bounds": np.concatenate(bounds)}
        with atomic_write(path, "wb") as file:
            file.write(save(tensors, metadata={"shards": json.dumps(intact)}))
        return _make_places(intact, tensors)


def _make_places(names: Sequence[str], tensors: Mapping[str, np.ndarray]) -> dict[bytes, _Place]:
    """Return the place of each key of an index. If several shards hold a key, the oldest one counts.

    The index has an entry for each key of each shard: ``shard`` is an index into ``names``, which are in order of time.
    """
    raw = tensors["keys"].tobytes()
    shard, bounds = tensors["shard"].tolist(), tensors["bounds"].tolist()
    places: dict[bytes, _Place] = {}
    for i, (shard_number, (start, stop)) in enumerate(zip(shard, bounds, strict=True)):
        key = raw[i * _KEY_BYTES : (i + 1) * _KEY_BYTES]
        places.setdefault(key, _Place(names[shard_number], start, stop))
    return places


def _checksum(tensors: Mapping[str, np.ndarray]) -> int:
    """Return the CRC-32 of a shard's tensors."""
    checksum = 0
    for name in ("keys", "offsets", "logps"):
        checksum = zlib.crc32(np.ascontiguousarray(tensors[name]), checksum)
    return checksum


def _read_logps(path: Path) -> np.ndarray:
    """Return all log-probs of a shard. If the file is damaged, delete it and raise SaroError."""
    with contextlib.suppress(SafetensorError, KeyError), safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in ("keys", "offsets", "logps")}
        if _checksum(tensors) == int(file.metadata()["crc32"]):
            return tensors["logps"]
    path.unlink(missing_ok=True)
    raise SaroError(f"{path}: was damaged on disk and has been removed; start again, and its rows will be scored again")


def _read_shard(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the keys and offsets of a shard. If the file is damaged, delete it and return None.

    Its rows are then scored again.
    """
    with contextlib.suppress(SafetensorError, KeyError), safe_open(path, "numpy") as file:
        return file.get_tensor("keys"), file.get_tensor("offsets")
    path.unlink(missing_ok=True)
    return None
