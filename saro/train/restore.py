"""Give every rank the checkpoint that rank 0 has, and check that the ranks train the same model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from saro.data.steps import Schedule
from saro.distributed.runtime import Runtime
from saro.distributed.shard import is_part, local
from saro.model.policy import Policy
from saro.train.checkpoint import (
    TrainingState,
    apply_checkpoint,
    find_intact_checkpoint,
    load_checkpoint,
    load_optimizer,
    load_parts,
    read_checkpoint,
)
from saro.train.part_files import has_parts

# Integers of as many bytes as an element, to add up the bits of any dtype.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Add up this many elements at a time: torch first copies them to 64-bit integers.
_CHUNK = 2**24


def restore_newest(runtime: Runtime, root: Path, training: TrainingState) -> int:
    """Restore the newest intact checkpoint that rank 0 sees, on every rank. Returns its step, or 0 if there is none.

    Only rank 0 reads the folder. The others receive what it read, so they need no common folder and cannot read an older
    checkpoint than rank 0.

    Raises:
        SaroError: all checkpoints are damaged, or the weights do not belong to this model.
    """
    if runtime.mesh is not None:
        return _restore_shared(runtime, root, training)

    def load() -> int:
        folder = find_intact_checkpoint(root, runtime.say)
        return 0 if folder is None else load_checkpoint(folder, training)

    step = runtime.on_main(load)
    if step == 0 or runtime.processes == 1:
        return step
    for parameter in training.trainable.values():
        runtime.broadcast_tensor_(parameter.detach())
    states = {"optimizer": training.optimizer.state_dict(), "scheduler": training.scheduler.state_dict()}
    state = runtime.broadcast_tensors(states)
    if not runtime.is_main:
        load_optimizer(training.optimizer, state["optimizer"])
        training.scheduler.load_state_dict(state["scheduler"])
    return step


def _restore_shared(runtime: Runtime, root: Path, training: TrainingState) -> int:
    """Restore the newest checkpoint on ranks that share the weights. All of them read a common folder."""
    folder = runtime.on_main(lambda: find_intact_checkpoint(root, runtime.say))
    if folder is None:
        return 0
    if runtime.on_main(lambda: has_parts(folder)):
        return load_parts(folder, training, is_alone=False)
    # The run began with whole weights on every rank.
    stored = runtime.broadcast_tensors(read_checkpoint(folder) if runtime.is_main else None)
    return apply_checkpoint(folder, stored, training)


def check_same_start(runtime: Runtime, policy: Policy, schedule: Schedule, total_steps: int, start: int) -> None:
    """Check before the first step that all ranks train the same model on the same records.

    Args:
        start: number of finished steps.

    Raises:
        SaroError: on every rank, if one of them differs from rank 0.
    """
    if runtime.processes == 1:
        return
    trainable = policy.trainable()
    frozen = {name: p for name, p in policy.named_parameters() if not p.requires_grad} | dict(policy.named_buffers())
    for name, module in policy.named_modules():
        # A 4-bit weight has scales and code books.
        state = getattr(module, "quant_state", None)
        frozen |= {} if state is None else {f"{name}.{key}": x for key, x in state.as_dict(packed=True).items()}
    values = {
        "the schedule of records": _hash_schedule(schedule, total_steps),
        "the step it starts at": str(start),
        "the weights of the base model": _hash_bits(runtime, frozen),
        "the trainable weights": _hash_bits(runtime, trainable),
    }
    runtime.compare(values, "give every rank the same model and options")


def check_same_weights(runtime: Runtime, step: int, trainable: Mapping[str, torch.Tensor]) -> None:
    """Compare the trainable weights of all ranks after ``step`` steps, before they become a checkpoint.

    Raises:
        SaroError: on every rank, if one of them differs from rank 0.
    """
    if runtime.processes == 1:
        return
    runtime.compare(
        {f"the trainable weights after step {step}": _hash_bits(runtime, trainable)},
        "no checkpoint was written; give all ranks the same kind of device, check their memory for faults, "
        "and continue with --resume",
    )


def _hash_schedule(schedule: Schedule, total_steps: int) -> str:
    digest = hashlib.sha256(schedule.kinds.tobytes())
    if schedule.groups is not None:
        digest.update(schedule.groups.tobytes())
    options = (schedule.records_per_step, schedule.seed, sorted(schedule.weights.items()), total_steps)
    digest.update(repr(options).encode())
    return digest.hexdigest()


@torch.no_grad()
def _hash_bits(runtime: Runtime, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a hash of named tensors: for each, the sum of its bit patterns, computed on its device.

    For a tensor that ranks share, the parts are summed over ranks, so the hash is equal unless machines hold different copies.
    """
    totals: list[int] = []
    if tensors:
        # A 4-bit weight keeps some of its state on the CPU, even if the model is on a GPU.
        own = torch.stack([_sum_bits(local(tensor)).to(runtime.device) for tensor in tensors.values()])
        are_parts = torch.tensor([is_part(tensor) for tensor in tensors.values()], device=own.device)
        # Read the device once.
        totals = runtime.sum_parts(own).where(are_parts, own).tolist()
    return hashlib.sha256(repr((list(tensors), totals)).encode()).hexdigest()


def _sum_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor's elements, read as integers: a scalar, modulo 2**64."""
    flat = tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in flat.split(_CHUNK):
        total += chunk.sum(dtype=torch.int64)
    return total
