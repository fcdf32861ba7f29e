"""Pretends to be one of many ranks, in one process: what sharding holds can then be counted without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from saro.distributed.shard import DeviceMesh, make_mesh


@contextmanager
def pretended_ranks(shard: str, processes: int, per_machine: int) -> Iterator[DeviceMesh | None]:
    """Be rank 0 of a process group whose collectives exchange nothing; yield its mesh, as ``make_mesh`` makes it.

    Results of collectives have the right shapes and no meaning. The process must not be in a process group.
    """
    # Importing it registers the backend. torch's own tests and memory tools use it; there is no public name.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield make_mesh(shard, processes, torch.device("cpu"), {"LOCAL_WORLD_SIZE": str(per_machine)})
    finally:
        dist.destroy_process_group()
