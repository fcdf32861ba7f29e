"""Writes and reads tensors that ranks share, each rank its own parts, by torch.distributed.checkpoint.

Files that some ranks wrote can be read by any number of ranks, and by one process that holds whole tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from saro.errors import SaroError


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors into a folder that all ranks see. All ranks must call this; each writes and syncs one file.

    Raises SaroError on all ranks if one of them cannot write.
    """
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    with _one_line(folder, "written"):
        dcp.save(dict(tensors), storage_writer=writer)


def read_shapes(folder: Path) -> dict[str, torch.Size]:
    """Return the whole shape of each tensor that ``write_tensors`` wrote, by name."""
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: tensor.size for name, tensor in stored.items()}


def read_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], *, is_alone: bool) -> None:
    """Overwrite tensors with those in a folder, by name.

    Args:
        is_alone: this process reads whole tensors. Otherwise all ranks must call this; each reads its own parts.

    Raises SaroError on all ranks if one of them cannot read.
    """
    with warnings.catch_warnings(), _one_line(folder, "read"):
        # It warns if there is no process group.
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(folder), no_dist=is_alone)


@contextmanager
def _one_line(folder: Path, done: str) -> Iterator[None]:
    """Turn the failure of a rank, for which torch raises a BaseException of many lines, into a SaroError."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        first = str(cause).strip().partition("\n")[0]
        raise SaroError(
            f"{folder}: the part of rank {rank} cannot be {done} ({type(cause).__name__}: {first}); "
            "look at the disk, and continue the run with --resume"
        ) from error
