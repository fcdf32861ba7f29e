"""Each machine works once: its first rank reads and hashes, and the others map and know."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest

from saro import files
from saro.distributed import machines
from saro.distributed.machines import first_on_machine, share_array
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.files import file_hash


@pytest.fixture
def start_machines(recipes, tmp_path):
    """Return a function that calls a function of this file on two machines of two ranks, each machine with its own cache."""

    def run(call: str) -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        started = []
        for rank in range(4):
            group = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SARO_CACHE": str(tmp_path / str(rank // 2))}
            started.append(
                recipes.start(str(tmp_path), call=f"{__file__}:{call}", environment=group | place, folder=str(tmp_path))
            )
        ended = [process.wait() for process in started]
        assert [p.code for p in ended] == [0] * 4, "".join(p.err for p in ended)
        return [process.out.strip() for process in ended]

    return run


def hash_once(folder: str) -> None:
    """Hash a file. Print the hash, and how many files this rank has read for it."""
    runtime = Runtime.start()
    read: list[Path] = []
    whole = files.read_hash
    files.read_hash = lambda path: read.append(path) or whole(path)
    path = Path(folder) / f"weights {runtime.rank // 2}"
    print(first_on_machine(runtime, lambda: file_hash(path))[:8], len(read))
    runtime.end()


def test_one_rank_of_each_machine_reads_a_file_and_tells_its_hash(start_machines, tmp_path):
    for machine in range(2):
        (tmp_path / f"weights {machine}").write_text(f"of machine {machine}")
    hashes = [files.read_hash(tmp_path / f"weights {machine}")[:8] for machine in range(2)]
    assert start_machines("hash_once") == [f"{hashes[0]} 1", f"{hashes[0]} 0", f"{hashes[1]} 1", f"{hashes[1]} 0"]


def refuse_on_second_machine(_: str) -> None:
    runtime = Runtime.start()

    def make() -> str:
        if runtime.rank == 2:
            raise SaroError("wrong; fix it")
        return "made"

    try:
        print(first_on_machine(runtime, make))
    except SaroError as error:
        print(error)
    runtime.end()


def test_an_error_of_one_machine_is_raised_on_every_rank(start_machines):
    told = "rank 2 failed: wrong; fix it"
    assert start_machines("refuse_on_second_machine") == [told, told, "wrong; fix it", told]


def share(folder: str) -> None:
    """Share a small and a large array; print their sums, and if the large one is mapped."""
    machines._MAPPED_BYTES, machines._PIECE_BYTES = 400, 64
    runtime = Runtime.start()
    # As the log-probs of a cache that was mapped: it cannot be written.
    arrays = [np.arange(length, dtype=np.float32) for length in (99, 101)]
    arrays[1].flags.writeable = False
    small, large = (share_array(runtime, array if runtime.is_main else None) for array in arrays)
    print(small.dtype, small.sum(), large.dtype, large.sum(), isinstance(large.base, np.memmap))
    runtime.barrier()
    left = list(Path(os.environ["SARO_CACHE"]).glob("*"))
    assert not left, left
    runtime.end()


def test_arrays_of_rank_0_are_mapped_on_all_ranks_if_they_are_large(start_machines):
    assert start_machines("share") == ["float32 4851.0 float32 5050.0 True"] * 4


def test_one_process_does_not_copy(runtime):
    array = np.zeros(3)
    assert share_array(runtime, array) is array
    assert first_on_machine(runtime, lambda: 3) == 3
