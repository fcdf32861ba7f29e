"""Lets one rank of each machine work before the others, so that each machine reads, hashes and encodes its files once."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.files import asked_hashes, cache_dir, take_hashes

Value = TypeVar("Value")

# Arrays of fewer bytes are kept by each rank: eight of them together take less than half a gigabyte.
_MAPPED_BYTES = 2**26
# Bytes that are sent at a time, which ranks with a GPU hold there.
_PIECE_BYTES = 2**24


def first_on_machine(runtime: Runtime, make: Callable[..., Value], *arguments: Any) -> Value:
    """Call ``make`` on one rank of each machine and then, with the hashes of all files that it read, on the others.

    Each rank returns its own result. So ``make`` may leave its work in files, which the others find, and ranks of machines
    without a common file system each depend on their own files.

    Raises:
        SaroError: ``make`` raised it on the first rank of a machine. Every rank raises it.
    """
    if runtime.processes == 1:
        return make(*arguments)
    first = _first_rank(runtime)
    made: list[Value] = []
    error = None
    if runtime.rank == first:
        try:
            made.append(make(*arguments))
        except SaroError as raised:
            error = raised
    outcomes = runtime.gather([(None if error is None else str(error), asked_hashes())])
    if error is not None:
        raise error
    for rank, (message, _) in enumerate(outcomes):
        if message is not None:
            raise SaroError(f"rank {rank} failed: {message}")
    if runtime.rank == first:
        return made[0]
    take_hashes(outcomes[first][1])
    return make(*arguments)


def share_array(runtime: Runtime, array: np.ndarray | None) -> np.ndarray:
    """Return rank 0's array (n,) on every rank. The ranks of a machine map one copy of it if it is large.

    The copy is a file in the cache folder without a name: it takes its space until the last of these ranks ends.

    Args:
        array: on rank 0; None on the others.

    Raises:
        SaroError: the copy cannot be written.
    """
    if runtime.processes == 1:
        return array
    length, name = runtime.broadcast((len(array), array.dtype.str) if runtime.is_main else None)
    dtype = np.dtype(name)
    is_mapped = length * dtype.itemsize >= _MAPPED_BYTES
    is_first = runtime.rank == _first_rank(runtime)
    received = array if runtime.is_main else np.empty(0 if is_mapped else length, dtype)
    path = cache_dir() / f".{secrets.token_hex(8)}.tmp"
    try:
        if is_mapped and is_first:
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(path if is_mapped and is_first else os.devnull, "wb") as copy:
            step = _PIECE_BYTES // dtype.itemsize
            for start in range(0, length, step):
                stop = min(start + step, length)
                piece = received[start:stop] if len(received) else np.empty(stop - start, dtype)
                # A copy: torch takes no array that cannot be written, such as a mapped one.
                sent = runtime.broadcast_tensor_(torch.from_numpy(piece.copy())).numpy()
                if is_mapped:
                    copy.write(sent)
                elif not runtime.is_main:
                    received[start:stop] = sent
        if not is_mapped:
            return received
        paths = runtime.gather([path])
        received = np.asarray(np.memmap(paths[_first_rank(runtime)], dtype, "r"))
        runtime.barrier()
        return received
    except OSError as error:
        raise SaroError(
            f"{path.parent}: no copy of {length * dtype.itemsize / 2**30:.1f} GiB can be written or read there "
            f"({error.strerror}); set SARO_CACHE to a folder with room, the same for all ranks of a machine"
        ) from error
    finally:
        path.unlink(missing_ok=True)


def _first_rank(runtime: Runtime) -> int:
    """Return the first rank of this machine."""
    # Launchers number the ranks of a machine one after the other. Without LOCAL_RANK, each rank is the first of its own.
    return runtime.rank - int(os.environ.get("LOCAL_RANK", "0"))
