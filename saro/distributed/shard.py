"""Shards a model over ranks by torch's FSDP2: each rank keeps its part of every weight, and gathers one layer at a time.

Gradients are summed over ranks, not averaged. In a collective all ranks must take part: under sharding every rank makes
the same number of forwards, with or without gradient, and packs without trees fill up the shorter lists
(``saro.data.packs.Share``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from saro.errors import SaroError


def make_mesh(shard: str, processes: int, device: torch.device, environment: Mapping[str, str]) -> DeviceMesh | None:
    """Return the ranks that share a model's weights: (shards,), or (copies, shards) for hybrid; None for no sharding.

    The process group must be there.

    Args:
        shard: ``--train.shard``. With hybrid, each machine holds a whole copy of the weights.
        environment: the launcher's variables, which tell the number of ranks on this machine.

    Raises:
        SaroError: hybrid, and the machines have different numbers of ranks.
    """
    if shard == "none" or processes == 1:
        return None
    if shard == "full":
        return init_device_mesh(device.type, (processes,), mesh_dim_names=("shard",))
    local = int(environment.get("LOCAL_WORLD_SIZE", processes))
    if processes % local:
        raise SaroError(
            f"train.shard hybrid: {processes} ranks are not a multiple of the {local} ranks of this machine; "
            "start as many on each machine, or set --train.shard full"
        )
    return init_device_mesh(device.type, (processes // local, local), mesh_dim_names=("copy", "shard"))


def shard_module(
    module: nn.Module,
    layers: Iterable[nn.Module],
    mesh: DeviceMesh,
    methods: Sequence[str],
    fill: Callable[[nn.Module], None] | None = None,
) -> None:
    """Shard a module in place. Afterwards its parameters are DTensors, of which each rank holds a part.

    Each layer is gathered for its forward and again for its backward. All other weights, such as embedding and head, are one
    group, gathered with the module.

    Args:
        methods: names of the methods besides ``forward`` that use the weights of that group.
        fill: reads the weights of a layer, and at last those of the module, just before they are shared.
    """
    for part in (*layers, module):
        if fill is not None:
            fill(part)
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
        # The engine divides the loss by the counts of the whole step. gloo has no reduction that divides either.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    for method in methods:
        register_fsdp_forward_method(module, method)
    # The first group that runs becomes the root. It must be the module, although checks may run a layer alone first. Running a
    # method would do it too, but would gather embedding and head.
    module._get_fsdp_state()._lazy_init()


def is_sharded(module: nn.Module) -> bool:
    """Return True if the ranks share the weights of the module."""
    return isinstance(module, FSDPModule)


@contextmanager
def gathered(module: nn.Module, part: nn.Module) -> Iterator[None]:
    """Gather the weights that a part of a sharded module reads outside the module's forward; nothing without sharding.

    These are the weights of all groups that the part lies in. Groups inside the part gather themselves when they run. All
    ranks must enter and leave together.
    """
    groups = [m for m in module.modules() if isinstance(m, FSDPModule) and any(part is inner for inner in m.modules())]
    for group in groups:
        group.unshard()
    try:
        yield
    finally:
        for group in groups:
            group.reshard()


@contextmanager
def exchanging_gradients(module: nn.Module, is_last: bool) -> Iterator[None]:
    """Choose for a backward in this context how ranks exchange gradients.

    Under DDP, and under sharding with few trainable weights, each rank adds up its own gradients until the last pack of a
    step. If whole layers are trained, whole gradients would not fit: the ranks exchange those of every pack.
    """
    if isinstance(module, FSDPModule):
        groups = [part for part in module.modules() if isinstance(part, FSDPModule)]
        # Not in all groups: outside its layers, a multimodal model has parts that are not trained.
        is_full = any(all(parameter.requires_grad for parameter in group.parameters()) for group in groups)
        module.set_requires_gradient_sync(is_last or is_full)
        yield
    elif isinstance(module, DistributedDataParallel) and not is_last:
        with module.no_sync():
            yield
    else:
        yield


def is_part(tensor: torch.Tensor) -> bool:
    """Return True if this rank holds only a part of the tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a sharded tensor, which shares its memory; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a sharded tensor gathered from all ranks, which must all call this; another tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(sharded: torch.Tensor, tensor: object) -> object:
    """Return a whole tensor cut as a sharded one of the same shape is, without asking other ranks; all else as it is."""
    if not isinstance(sharded, DTensor) or not isinstance(tensor, torch.Tensor) or tensor.shape != sharded.shape:
        return tensor
    return distribute_tensor(tensor.to(sharded.device), sharded.device_mesh, sharded.placements, src_data_rank=None)
