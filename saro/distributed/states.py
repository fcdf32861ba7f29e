"""Writes and reads tensors that ranks share, each rank its own parts, by torch.distributed.checkpoint.

Files that some ranks wrote can be read by any number of ranks, and by one process that holds whole tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors into a folder that all ranks see. All ranks must call this; each writes and syncs one file."""
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    dcp.save(dict(tensors), storage_writer=writer)


def read_shapes(folder: Path) -> dict[str, torch.Size]:
    """Return the whole shape of each tensor that ``write_tensors`` wrote, by name."""
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: tensor.size for name, tensor in stored.items()}


def read_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], *, is_alone: bool) -> None:
    """Overwrite tensors with those in a folder, by name.

    Args:
        is_alone: this process reads whole tensors. Otherwise all ranks must call this; each reads its own parts.
    """
    with warnings.catch_warnings():
        # It warns if there is no process group.
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(folder), no_dist=is_alone)
