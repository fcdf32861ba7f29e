"""Write and read checkpoints of ranks that share the weights: each rank has files of its own parts.

Any number of ranks can read them, and one process that holds whole tensors. With the same number of ranks a resumed run
is that of the unbroken one, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from saro.distributed.runtime import Runtime
from saro.distributed.states import read_shapes, read_tensors, write_tensors
from saro.errors import SaroError
from saro.files import read_hash

_FOLDER = "parts"
# Names of tensors are weight/NAME, and KEY/NAME for each tensor of the optimizer, such as exp_avg.
_WEIGHT = "weight"


def has_parts(folder: Path) -> bool:
    """Return True if ranks that shared the weights wrote the checkpoint."""
    return (folder / _FOLDER).is_dir()


def write_parts(
    runtime: Runtime, folder: Path, trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, str]:
    """Write this rank's parts into a folder that all ranks see. All must call it. Returns the sha256 of each file."""
    tensors = {f"{_WEIGHT}/{name}": p.detach() for name, p in trainable.items()}
    for name, parameter in trainable.items():
        tensors |= {f"{key}/{name}": value for key, value in optimizer.state[parameter].items()}
    write_tensors(folder / _FOLDER, tensors)
    runtime.barrier()
    files = sorted(file for file in (folder / _FOLDER).iterdir())
    own = files[runtime.rank :: runtime.processes]
    return dict(runtime.gather([(file.name, read_hash(file)) for file in own]))


def find_damaged_part(folder: Path, hashes: Mapping[str, str]) -> str | None:
    """Return the name of a file that is missing or not what was written, or None."""
    for name, expected in hashes.items():
        file = folder / _FOLDER / name
        try:
            if read_hash(file) != expected:
                return f"{_FOLDER}/{name}"
        except OSError:
            return f"{_FOLDER}/{name}"
    return None


def check_shapes(folder: Path, stored: Mapping[str, torch.Size], trainable: Mapping[str, nn.Parameter]) -> None:
    """Raise SaroError if a checkpoint stores weights of other names or shapes than those that are trained."""
    if stored != {name: p.shape for name, p in trainable.items()}:
        raise SaroError(f"{folder}: made with another model or other adapters; start over with --overwrite")


def read_parts(
    folder: Path, trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, *, is_alone: bool
) -> None:
    """Restore weights and the optimizer's state, each rank its parts.

    Args:
        is_alone: this process holds whole tensors, and reads alone. Otherwise all ranks must call this.

    Raises:
        SaroError: the weights do not belong to this model.
    """
    shapes: dict[str, dict[str, torch.Size]] = {}  # by key, then by name
    for stored, shape in read_shapes(folder / _FOLDER).items():
        key, _, name = stored.partition("/")
        shapes.setdefault(key, {})[name] = shape
    check_shapes(folder, shapes.pop(_WEIGHT, {}), trainable)
    states: dict[str, dict[str, torch.Tensor]] = {name: {} for name in trainable}
    for key, by_name in shapes.items():
        for name, shape in by_name.items():
            parameter = trainable[name].detach()
            # Moments are shared among ranks as their parameters are. Every rank has the others, such as a count of steps.
            same = shape == parameter.shape
            states[name][key] = torch.zeros_like(parameter) if same else torch.zeros(shape)
    tensors = {f"{_WEIGHT}/{name}": p.detach() for name, p in trainable.items()}
    tensors |= {f"{key}/{name}": value for name, state in states.items() for key, value in state.items()}
    read_tensors(folder / _FOLDER, tensors, is_alone=is_alone)
    names = {id(parameter): name for name, parameter in trainable.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    by_index = {index: states[name] for index, name in enumerate(order)}
    optimizer.load_state_dict({"state": by_index, "param_groups": optimizer.state_dict()["param_groups"]})
