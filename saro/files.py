"""Writes files and folders that are complete or absent: made beside the target, flushed to disk, renamed into place."""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING

from saro.errors import SaroError

if TYPE_CHECKING:
    from filelock import FileLock

# Files that are hashed at the same time: each thread reads about 1 GB/s, and disks that are as fast as all of them are rare.
_HASH_THREADS = 8
# Endings of what is being written, and of a folder that is being replaced.
_TEMP, _SET_ASIDE = "tmp", "old.tmp"


def cache_dir() -> Path:
    """Return the folder for files that can be made again: $SARO_CACHE, else $XDG_CACHE_HOME/saro, else ~/.cache/saro.

    Does not create it.
    """
    if own := os.environ.get("SARO_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "saro"
    return Path.home() / ".cache" / "saro"


def lock_output(folder: Path, lock: "FileLock", busy: str) -> None:
    """Make the folder of an output, and take its lock, which is held to the end of the process.

    Args:
        busy: the error if another process has the lock.

    Raises:
        SaroError: another process has it, or the folder cannot be written.
    """
    # Here, because filelock imports asyncio, and this file is imported by all.
    from filelock import Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SaroError(busy) from error
    except OSError as error:
        raise SaroError(f"{folder}: cannot be written ({error.strerror}); give another --output") from error


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Write a file that appears at ``path`` complete or not at all; an existing file is replaced in one step.

    ``mode`` is "w" (UTF-8 text with "\\n" line ends) or "wb". Yields the open file, which lies beside the target under
    a name that starts with "." and ends with ".tmp". If the block raises, it is deleted and ``path`` is untouched.

    Raises SaroError if the folder of ``path`` does not exist or ``path`` is a folder, ValueError for any other mode.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f'mode must be "w" or "wb", not {mode!r}')
    path = Path(path)
    check_file_target(path)
    temp = _temp_beside(path)
    text = {"encoding": "utf-8", "newline": "\n"} if mode == "w" else {}
    try:
        # Mode "x" rather than mkstemp: the file gets the permissions of the user's umask, not 0600.
        with open(temp, mode.replace("w", "x"), **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike, *, replace: bool = False) -> Iterator[Path]:
    """Make a folder that appears at ``path`` complete or not at all.

    Yields an empty folder beside the target, named like the files of ``atomic_write``. When the block ends, the folder
    is flushed to disk with everything in it and renamed to ``path``. If the block raises, it is deleted.
    ``replace=True`` replaces an existing folder. This takes two renames, and for an instant between them ``path`` does
    not exist: if the process is killed there, ``remove_temps`` puts the old folder back.

    Raises SaroError if ``path`` exists and ``replace`` is false, if it is a file, or if its parent does not exist.
    """
    path = Path(path)
    _check_parent(path)
    _check_free(path, replace)
    temp = _temp_beside(path)
    temp.mkdir()
    try:
        yield temp
        _fsync_tree(temp)
        # Check again: a rename onto an empty folder that appeared in the meantime would succeed silently.
        _check_free(path, replace)
        if path.exists():
            old = _temp_beside(path, _SET_ASIDE)
            path.rename(old)
            try:
                temp.rename(path)
            except BaseException:
                old.rename(path)
                raise
            shutil.rmtree(old)
        else:
            temp.rename(path)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    _fsync(path.parent)


def remove_temps(path: str | os.PathLike) -> None:
    """Delete the temporary files and folders that killed processes left beside ``path``.

    A folder that ``atomic_folder`` was about to replace is put back if ``path`` is missing.

    Call this only if nobody can be writing ``path`` now, because the caller holds a lock or owns the folder.
    """
    path = Path(path)
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.({_TEMP}|{re.escape(_SET_ASIDE)})")
    if not path.parent.is_dir():
        return
    for item in list(path.parent.iterdir()):
        if not name.fullmatch(item.name):
            continue
        if item.name.endswith(_SET_ASIDE) and not path.exists():
            item.rename(path)
        elif item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()


def follow_umask(folder: Path) -> None:
    """Give all files of a folder the permissions of a new file: safetensors files are readable only by their owner."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def read_hash(path: Path) -> str:
    """Return the sha256 of a file as it is on the disk now; ``file_hash`` would trust its times."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Hashes that this process has asked for, and those that another process has told it. Keys are those of hashes.json.
_asked_hashes: dict[str, str] = {}
_told_hashes: dict[str, str] = {}


def file_hash(path: Path) -> str:
    """Return the sha256 of a file, see ``file_hashes``."""
    return file_hashes([path])[0]


def file_hashes(paths: Sequence[Path]) -> list[str]:
    """Return the sha256 of each file, cached by path, inode, size and modification time: large weights are read once.

    Files that are not in the cache are read in threads.
    """
    stats = [path.stat() for path in paths]
    keys = [
        f"{path.resolve()}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"
        for path, stat in zip(paths, stats, strict=True)
    ]
    hashes = _read_hash_cache() | _told_hashes
    unknown = [i for i, key in enumerate(keys) if key not in hashes]
    if unknown:
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            read = pool.map(read_hash, [paths[i] for i in unknown])
            hashes |= zip([keys[i] for i in unknown], read, strict=True)
        # Cache only what takes time to read. If two processes overwrite each other's entry, or the cache is read-only,
        # the file is read once more.
        large = {keys[i]: hashes[keys[i]] for i in unknown if stats[i].st_size > 2**20}
        if large:
            with contextlib.suppress(OSError):
                cache_dir().mkdir(parents=True, exist_ok=True)
                with atomic_write(cache_dir() / "hashes.json") as out:
                    json.dump(_read_hash_cache() | large, out)
    result = [hashes[key] for key in keys]
    _asked_hashes.update(zip(keys, result, strict=True))
    return result


def asked_hashes() -> dict[str, str]:
    """Return all hashes that this process has asked for, to tell them to another one that sees the same files."""
    return dict(_asked_hashes)


def take_hashes(asked: Mapping[str, str]) -> None:
    """Take over hashes that another process has asked for. ``file_hashes`` does not read these files unless they change."""
    _told_hashes.update(asked)


def _read_hash_cache() -> dict[str, str]:
    try:
        return json.loads((cache_dir() / "hashes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _temp_beside(path: Path, ending: str = _TEMP) -> Path:
    # Beside the target, so that the rename never crosses file systems.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{ending}")


def check_file_target(path: Path) -> None:
    """Raise SaroError if ``atomic_write`` cannot write a file at ``path``; for a check before long work."""
    _check_parent(path)
    if path.is_dir():
        raise SaroError(f"{path}: is a folder; give the name of a file")
    if not os.access(path.parent, os.W_OK):
        raise SaroError(f"{path}: cannot be written, {path.parent} is not writable; give another name")


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise SaroError(f"{path}: there is no folder {path.parent}; make it first")


def _check_free(path: Path, replace: bool) -> None:
    if path.exists() and not path.is_dir():
        raise SaroError(f"{path}: is a file; give another name for the folder or remove it")
    if path.exists() and not replace:
        raise SaroError(f"{path}: exists already; give another name or remove it")


def _fsync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            if not os.path.islink(file := os.path.join(root, name)):
                _fsync(file)
        _fsync(root)


def _fsync(path: str | os.PathLike) -> None:
    # Windows cannot open a folder, nor flush a file that was opened for reading.
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
