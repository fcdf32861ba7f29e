"""Keep reference log-probs on disk, in immutable shards with an index that can be rebuilt from them.

    $SARO_CACHE/reference/KEY/key.json              what the log-probs were scored with
                             /shards/*.safetensors  keys (m, 16) uint8, offsets (m + 1,) int64, logps (r,)
                             /index.safetensors     the rows of each key; rebuilt if it does not match the shards

A shard appears complete and under a unique name, so several processes may add shards at the same time. ``compact`` replaces
small shards by large ones with the same rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from saro.errors import SaroError
from saro.files import atomic_write, cache_dir

KEY_BYTES = 16
# Rows per shard, 16 MiB in fp32: reading holds one shard in memory beside the result.
SHARD_ROWS = 2**22
# Merge only if there are at least this many small shards: reading fewer costs nothing.
_MERGED_SHARDS = 8


def sequence_key(tokens: np.ndarray, scored_from: int) -> bytes:
    """Return the key of a sequence: a hash of its token ids, (L,), and of the position where scoring begins."""
    digest = hashlib.blake2b(scored_from.to_bytes(8, "little"), digest_size=KEY_BYTES)
    digest.update(np.ascontiguousarray(tokens, np.int32))
    return digest.digest()


@dataclass(frozen=True)
class _Index:
    """The places of n keys, in arrays: objects for a million pairs would take a gigabyte.

    Attributes:
        shards: names of the shards, in the order of time.
        keys: (n,) S16, sorted. If several shards hold a key, it is here several times, that of the oldest shard first.
        shard: (n,) int32, index into ``shards``.
        bounds: (n, 2) int64, the first row and the one after the last.
    """

    shards: tuple[str, ...]
    keys: np.ndarray
    shard: np.ndarray
    bounds: np.ndarray

    def places(self, keys: np.ndarray) -> np.ndarray:
        """Return the index (m,) of each of m keys; -1 if a key is missing."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, places, -1)


_EMPTY = _Index((), np.empty(0, "S16"), np.empty(0, np.int32), np.empty((0, 2), np.int64))


class ReferenceCache:
    """The log-probs of sequences under one reference, in a folder.

    Args:
        folder: folder of the cache; it need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards = folder / "shards"
        self._index = _EMPTY

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

    def find(self, keys: Sequence[bytes] | np.ndarray) -> list[bool]:
        """Read the index from disk and return, for each key, True if it is in the cache.

        Args:
            keys: n keys, or an array of them, (n, 16) uint8.
        """
        self._index = self._read_index()
        return (self._index.places(_as_texts(keys)) >= 0).tolist()

    def load(self, keys: Sequence[bytes] | np.ndarray, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the log-probs of n keys, one key after the other, and (n + 1,) int64 offsets.

        ``find`` must have returned True for all keys. ``rows`` is the number of log-probs of each key. Only one shard
        at a time is in memory beside the result.

        Raises:
            SaroError: a shard was damaged on disk.
        """
        offsets = np.concatenate([[0], np.cumsum(np.asarray(rows, np.int64))])  # (n + 1,)
        texts = _as_texts(keys)
        result: np.ndarray | None = None
        left = np.arange(len(texts))
        while len(left):
            index = self._index
            places = index.places(texts[left])  # (m,)
            name = index.shards[index.shard[places[0]]]
            try:
                logps = _read_logps(self._shards / name)
            except FileNotFoundError:
                # Another process has just merged this shard into a larger one.
                self._index = self._read_index()
                if (self._index.places(texts[left]) < 0).any():
                    raise SaroError(f"{self.folder}: rows have been removed meanwhile; start again") from None
                continue
            if result is None:
                result = np.empty(offsets[-1], logps.dtype)
            is_here = index.shard[places] == index.shard[places[0]]
            for i, (start, stop) in zip(left[is_here], index.bounds[places[is_here]].tolist(), strict=True):
                if stop - start != rows[i]:
                    raise SaroError(f"{self.folder}: its index does not fit its shards; remove the folder")
                result[offsets[i] : offsets[i + 1]] = logps[start:stop]
            left = left[~is_here]
        return np.empty(0, np.float32) if result is None else result, offsets

    def compact(self) -> None:
        """Replace small shards that follow each other in time by shards of about ``SHARD_ROWS`` rows.

        Of a key with several values, the oldest one still counts. A process that reads at the same time finds the rows in
        their new place, and one that is killed leaves rows twice, which does no harm.
        """
        index = self._read_index()
        rows = np.zeros(len(index.shards), np.int64)
        np.maximum.at(rows, index.shard, index.bounds[:, 1])
        group: list[str] = []
        held = 0
        for name, size in [*zip(index.shards, rows.tolist(), strict=True), ("", SHARD_ROWS)]:
            if held + size > SHARD_ROWS:
                self._merge(group)
                group, held = [], 0
            # A nearly full shard stays as it is, and ends the group.
            if size < SHARD_ROWS / 2:
                group.append(name)
                held += size
            else:
                self._merge(group)
                group, held = [], 0

    def _merge(self, names: Sequence[str]) -> None:
        """Write the rows of some shards as one shard in the place of the oldest, and delete them."""
        if len(names) < _MERGED_SHARDS:
            return
        entries: dict[bytes, np.ndarray] = {}
        for name in names:
            try:
                tensors = _read_tensors(self._shards / name)
            except FileNotFoundError:
                return
            if tensors is None:
                continue
            raw, offsets = tensors["keys"].tobytes(), tensors["offsets"].tolist()
            for i in range(len(offsets) - 1):
                key = raw[i * KEY_BYTES : (i + 1) * KEY_BYTES]
                entries.setdefault(key, tensors["logps"][offsets[i] : offsets[i + 1]])
        time_of_oldest = names[0].partition("-")[0]
        self._write(list(entries.items()), time_of_oldest)
        for name in names:
            (self._shards / name).unlink(missing_ok=True)

    def _write(self, entries: Sequence[tuple[bytes, np.ndarray]], written_at: str | None = None) -> None:
        """Write (key, log-probs) entries as one shard, with the time ``written_at``; default now."""
        logps = np.concatenate([values for _, values in entries])
        tensors = {
            "keys": np.frombuffer(b"".join(key for key, _ in entries), np.uint8).reshape(-1, KEY_BYTES),
            "offsets": np.cumsum([0, *(len(values) for _, values in entries)]),
            "logps": logps,
        }
        # Name shards by time: if several hold a key, the oldest one counts.
        name = f"{written_at or f'{time.time_ns():020d}'}-{secrets.token_hex(4)}.safetensors"
        with atomic_write(self._shards / name, "wb") as file:
            file.write(save(tensors, metadata={"crc32": str(_checksum(tensors))}))

    def _read_index(self) -> _Index:
        """Return the place of every key. Rebuild the index if it does not name exactly the shards on disk."""
        names = sorted(p.name for p in self._shards.glob("*.safetensors"))
        path = self.folder / "index.safetensors"
        with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError), safe_open(path, "numpy") as file:
            # Older versions did not sort the keys.
            if json.loads(file.metadata()["sorted"]) == names:
                keys = file.get_tensor("keys").view("S16").reshape(-1)
                return _Index(tuple(names), keys, file.get_tensor("shard"), file.get_tensor("bounds"))
        keys, shard, bounds, intact = [], [], [], []
        for name in names:
            try:
                content = _read_shard(self._shards / name)
            except FileNotFoundError:
                # Another process has just merged this shard into a larger one, which is not among these names.
                return self._read_index()
            if content is None:
                continue
            shard_keys, offsets = content
            keys.append(shard_keys)  # (m, 16)
            shard.append(np.full(len(shard_keys), len(intact), np.int32))  # (m,)
            bounds.append(np.stack([offsets[:-1], offsets[1:]], axis=1))  # (m, 2)
            intact.append(name)
        if not intact:
            return _EMPTY
        all_keys = np.concatenate(keys).view("S16").reshape(-1)  # (n,)
        # Stable: the oldest of equal keys stays the first.
        order = np.argsort(all_keys, kind="stable")
        index = _Index(tuple(intact), all_keys[order], np.concatenate(shard)[order], np.concatenate(bounds)[order])
        tensors = {
            "keys": index.keys.view(np.uint8).reshape(-1, KEY_BYTES),
            "shard": index.shard,
            "bounds": index.bounds,
        }
        with atomic_write(path, "wb") as file:
            file.write(save(tensors, metadata={"sorted": json.dumps(intact)}))
        return index


def _as_texts(keys: Sequence[bytes] | np.ndarray) -> np.ndarray:
    """Return keys as (n,) S16, which can be sorted. As bytes they would lose the zeros at their ends."""
    return keys.view("S16").reshape(-1) if isinstance(keys, np.ndarray) else np.array(keys, "S16")


def _checksum(tensors: Mapping[str, np.ndarray]) -> int:
    """Return the CRC-32 of a shard's tensors."""
    checksum = 0
    for name in ("keys", "offsets", "logps"):
        checksum = zlib.crc32(np.ascontiguousarray(tensors[name]), checksum)
    return checksum


def _read_logps(path: Path) -> np.ndarray:
    """Return all log-probs of a shard. If the file is damaged, delete it and raise SaroError."""
    tensors = _read_tensors(path)
    if tensors is not None:
        return tensors["logps"]
    raise SaroError(f"{path}: was damaged on disk and has been removed; start again, and its rows will be scored again")


def _read_tensors(path: Path) -> dict[str, np.ndarray] | None:
    """Return the tensors of a shard. If the file is damaged, delete it and return None.

    Raises FileNotFoundError if there is no such file.
    """
    with contextlib.suppress(SafetensorError, KeyError), safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in ("keys", "offsets", "logps")}
        if _checksum(tensors) == int(file.metadata()["crc32"]):
            return tensors
    path.unlink(missing_ok=True)
    return None


def _read_shard(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the keys and offsets of a shard. If the file is damaged, delete it and return None.

    Its rows are then scored again. Raises FileNotFoundError if there is no such file.
    """
    with contextlib.suppress(SafetensorError, KeyError), safe_open(path, "numpy") as file:
        return file.get_tensor("keys"), file.get_tensor("offsets")
    path.unlink(missing_ok=True)
    return None
