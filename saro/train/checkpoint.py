"""Save and load checkpoints, which are complete or absent, bounded in number, and enough to resume bit for bit.

A checkpoint holds the trainable weights, the states of optimizer and schedule, and the step. It needs no random state,
because random numbers are seeded by (seed, step, rank).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from saro.errors import SaroError
from saro.files import atomic_folder, follow_umask

_WEIGHTS, _OPTIMIZER, _STATE = "trainable.safetensors", "optimizer.pt", "state.json"


def checkpoint_folder(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint after ``step`` finished steps."""
    return root / f"step_{step:06d}"


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Return the complete checkpoints as (step, folder), oldest first."""
    # Only digits may follow step_, so that a user's copy such as step_000100.good is neither loaded nor removed.
    numbered = [(int(p.name.removeprefix("step_")), p) for p in root.glob("step_*") if p.name[5:].isdecimal()]
    return sorted((step, p) for step, p in numbered if p.is_dir())


def find_intact_checkpoint(root: Path, say: Callable[[str], None]) -> Path | None:
    """Return the folder of the newest checkpoint that is not damaged; None if there are no checkpoints.

    A checkpoint is damaged if a file is missing or has other contents than were written, or if it is of another step than
    its name says. Of a checkpoint from before weights had a hash, only the size of the weights is known. ``say`` gets a
    line for each damaged checkpoint.

    Raises:
        SaroError: there are checkpoints, and all are damaged.
    """
    checkpoints = list_checkpoints(root)
    reasons = []
    for step, folder in reversed(checkpoints):
        damage = _find_damage(folder, step)
        if damage is None:
            for reason in reasons:
                say(f"{reason}; resuming from {folder.name} instead")
            return folder
        reasons.append(f"{folder}: the checkpoint is damaged ({damage})")
    if reasons:
        raise SaroError(
            f"{reasons[0]}, and there is no intact one; restore it from a copy, or start over with --overwrite"
        )
    return None


def check_not_past(root: Path, total_steps: int) -> None:
    """Raise SaroError if the newest checkpoint is of a later step than the last one of the run as it is now."""
    checkpoints = list_checkpoints(root)
    if checkpoints and checkpoints[-1][0] > total_steps:
        made = checkpoints[-1][0]
        raise SaroError(
            f"the run has made {made} steps, and --train.max_steps and --train.epochs now ask for {total_steps}; "
            f"ask for {made} or more"
        )


def set_aside_later_checkpoints(root: Path, step: int) -> None:
    """Rename the checkpoints after ``step`` to NAME.damaged: training makes those steps again, and saves them again."""
    for later, folder in list_checkpoints(root):
        if later > step:
            target = folder.with_name(f"{folder.name}.damaged")
            if target.exists():
                shutil.rmtree(target)
            folder.rename(target)


def _find_damage(folder: Path, step: int) -> str | None:
    """Return what is wrong with the files of the checkpoint after ``step`` steps, or None."""
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or state.get("step") != step:
            return f"{_STATE} is not that of step {step}"
    except (OSError, ValueError):
        return f"{_STATE} cannot be read"
    try:
        # Opening compares the file's size with its header.
        with safe_open(folder / _WEIGHTS, "pt"):
            pass
        if "weights" in state and _content_hash(folder / _WEIGHTS) != state["weights"]:
            return f"{_WEIGHTS} is not what was written"
    except (OSError, SafetensorError):
        return f"{_WEIGHTS} cannot be read"
    try:
        with zipfile.ZipFile(folder / _OPTIMIZER) as archive:
            is_whole = archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        is_whole = False
    return None if is_whole else f"{_OPTIMIZER} cannot be read"


def _content_hash(file: Path) -> str:
    """Return the sha256 of a file as it is on the disk now; ``saro.files.file_hash`` would trust its times."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def save_checkpoint(
    root: Path,
    step: int,
    trainable: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    keep: int,
) -> None:
    """Write a checkpoint after ``step`` finished steps, then remove all but the newest ``keep`` checkpoints."""
    root.mkdir(parents=True, exist_ok=True)
    folder = checkpoint_folder(root, step)
    # Remove the leftovers of killed runs for every step: the step of a half-removed checkpoint is never saved again.
    for leftover in root.glob(".step_*.tmp"):
        shutil.rmtree(leftover)
    if not folder.exists():
        with atomic_folder(folder) as temp:
            weights = {name: p.detach().cpu().contiguous() for name, p in trainable.items()}
            save_file(weights, temp / _WEIGHTS)
            torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, temp / _OPTIMIZER)
            # The optimizer's file has check sums of its own.
            state = {"step": step, "weights": _content_hash(temp / _WEIGHTS)}
            (temp / _STATE).write_text(json.dumps(state) + "\n")
            follow_umask(temp)
    for _, old in list_checkpoints(root)[:-keep]:
        # Rename first: a kill during rmtree must not leave a partial checkpoint under a valid name.
        doomed = old.with_name(f".{old.name}.00000000.tmp")
        old.rename(doomed)
        shutil.rmtree(doomed)


def load_checkpoint(
    folder: Path,
    trainable: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
) -> int:
    """Restore a checkpoint into the given parameters, optimizer and scheduler, and return its step.

    Raises:
        SaroError: its weights do not belong to this model.
    """
    weights = load_file(folder / _WEIGHTS)
    if {k: v.shape for k, v in weights.items()} != {k: p.shape for k, p in trainable.items()}:
        raise SaroError(f"{folder}: made with another model or other adapters; start over with --overwrite")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(weights[name])
    state: dict[str, Any] = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
    load_optimizer(optimizer, state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return int(json.loads((folder / _STATE).read_text())["step"])


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer, that of a paged one into pages."""
    if getattr(optimizer, "is_paged", False):
        _load_paged(optimizer, state)
    else:
        optimizer.load_state_dict(state)


def _load_paged(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of a paged optimizer into pages; bitsandbytes itself would load it into plain GPU tensors."""
    optimizer.load_state_dict(state, move_to_device=False)
    for parameter, parameter_state in optimizer.state.items():
        for name in {"state1", "state2"} & parameter_state.keys():
            pages = optimizer.get_state_buffer(parameter, parameter_state[name].dtype)
            parameter_state[name] = pages.copy_(parameter_state[name])
    # Move the tensors that are not paged: scales and code books.
    optimizer.to_gpu()
