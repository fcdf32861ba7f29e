"""Save and load checkpoints, which are complete or absent, bounded in number, and enough to resume bit for bit.

A checkpoint holds the trainable weights, the states of optimizer and schedule, and the step. It needs no random state,
because random numbers are seeded by (seed, step, rank).
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from saro.distributed.runtime import Runtime
from saro.distributed.shard import part_like
from saro.errors import SaroError
from saro.files import atomic_folder, follow_umask, read_hash
from saro.train.part_files import check_shapes, find_damaged_part, has_parts, read_parts, write_parts

_WEIGHTS, _OPTIMIZER, _STATE = "trainable.safetensors", "optimizer.pt", "state.json"


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Everything that training changes and a checkpoint holds.

    Attributes:
        trainable: the trainable parameters by name.
        optimizer: their optimizer.
        scheduler: its learning-rate schedule.
    """

    trainable: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler


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
    its name says. A file whose hash an older version did not write is intact if it can be read. ``say`` gets a line for each
    damaged checkpoint.

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
    if has_parts(folder):
        part = find_damaged_part(folder, state["parts"])
        return None if part is None else f"{part} is not what was written"
    for name, read, expected in (
        (_WEIGHTS, load_file, state.get("weights")),
        (_OPTIMIZER, _load_states, state.get("optimizer")),
    ):
        try:
            if expected is None:
                # An older version wrote it without a hash.
                read(folder / name)
                if name == _OPTIMIZER and not _has_check_sums(folder / name):
                    return f"{name} is not what was written"
            elif read_hash(folder / name) != expected:
                return f"{name} is not what was written"
        # A damaged file raises many types: a changed byte may be anywhere in its structure.
        except Exception:
            return f"{name} cannot be read"
    return None


def _has_check_sums(file: Path) -> bool:
    """Return True if each member of a zip archive, such as torch writes, has its check sum; torch does not look."""
    with zipfile.ZipFile(file) as archive:
        return archive.testzip() is None


def _load_states(file: Path) -> dict[str, Any]:
    return torch.load(file, map_location="cpu", weights_only=True)


def save_checkpoint(root: Path, step: int, training: TrainingState, keep: int) -> None:
    """Write a checkpoint after ``step`` finished steps, then remove all but the newest ``keep`` checkpoints."""
    _remove_leftovers(root)
    folder = checkpoint_folder(root, step)
    if not folder.exists():
        with atomic_folder(folder) as temp:
            weights = {name: p.detach().cpu().contiguous() for name, p in training.trainable.items()}
            states = {"optimizer": training.optimizer.state_dict(), "scheduler": training.scheduler.state_dict()}
            save_file(weights, temp / _WEIGHTS)
            torch.save(states, temp / _OPTIMIZER)
            # The check sums in the optimizer's file do not protect its structure: torch may read a tensor from elsewhere.
            hashes = {"weights": read_hash(temp / _WEIGHTS), "optimizer": read_hash(temp / _OPTIMIZER)}
            state = {"step": step, **hashes}
            (temp / _STATE).write_text(json.dumps(state) + "\n")
            follow_umask(temp)
    _remove_old(root, keep)


def save_parts(runtime: Runtime, root: Path, step: int, training: TrainingState, keep: int) -> None:
    """Write a checkpoint as ``save_checkpoint`` does, of ranks that share the weights. All ranks must call this.

    Each rank writes its parts into a folder that rank 0 makes, and that appears under its name when all have done so.
    """
    folder = checkpoint_folder(root, step)

    def is_new() -> bool:
        _remove_leftovers(root)
        return not folder.exists()

    if runtime.on_main(is_new):
        with atomic_folder(folder) if runtime.is_main else nullcontext() as made:
            temp = runtime.broadcast(made)
            parts = write_parts(runtime, temp, training.trainable, training.optimizer)
            if runtime.is_main:
                state = {"step": step, "scheduler": training.scheduler.state_dict(), "parts": parts}
                (temp / _STATE).write_text(json.dumps(state) + "\n")
                follow_umask(temp)
    if runtime.is_main:
        _remove_old(root, keep)


def _remove_leftovers(root: Path) -> None:
    """Make the folder of checkpoints, and remove what killed runs have left in it."""
    root.mkdir(parents=True, exist_ok=True)
    # For every step: the step of a half-removed checkpoint is never saved again.
    for leftover in root.glob(".step_*.tmp"):
        shutil.rmtree(leftover)


def _remove_old(root: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints."""
    for _, old in list_checkpoints(root)[:-keep]:
        # Rename first: a kill during rmtree must not leave a partial checkpoint under a valid name.
        doomed = old.with_name(f".{old.name}.00000000.tmp")
        old.rename(doomed)
        shutil.rmtree(doomed)


def load_checkpoint(folder: Path, training: TrainingState) -> int:
    """Restore a checkpoint, and return its step.

    Raises:
        SaroError: its weights do not belong to this model.
    """
    if has_parts(folder):
        return load_parts(folder, training, is_alone=True)
    return apply_checkpoint(folder, read_checkpoint(folder), training)


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the step, weights and states of a checkpoint of whole tensors, on the CPU."""
    step = int(json.loads((folder / _STATE).read_text())["step"])
    return {"step": step, "weights": load_file(folder / _WEIGHTS), **_load_states(folder / _OPTIMIZER)}


def apply_checkpoint(folder: Path, stored: Mapping[str, Any], training: TrainingState) -> int:
    """Restore what ``read_checkpoint`` returned, of which each rank takes its part, and return its step.

    Raises:
        SaroError: its weights do not belong to this model.
    """
    weights = stored["weights"]
    check_shapes(folder, {name: tensor.shape for name, tensor in weights.items()}, training.trainable)
    with torch.no_grad():
        for name, parameter in training.trainable.items():
            parameter.copy_(part_like(parameter, weights[name]))
    parameters = [parameter for group in training.optimizer.param_groups for parameter in group["params"]]
    states = {
        index: {key: part_like(parameters[index], value) for key, value in state.items()}
        for index, state in stored["optimizer"]["state"].items()
    }
    load_optimizer(training.optimizer, stored["optimizer"] | {"state": states})
    training.scheduler.load_state_dict(stored["scheduler"])
    return stored["step"]


def load_parts(folder: Path, training: TrainingState, *, is_alone: bool) -> int:
    """Restore a checkpoint of ranks that shared the weights, see ``read_parts``, and return its step."""
    state = json.loads((folder / _STATE).read_text())
    read_parts(folder, training.trainable, training.optimizer, is_alone=is_alone)
    training.scheduler.load_state_dict(state["scheduler"])
    return int(state["step"])


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
