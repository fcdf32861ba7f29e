"""Sets up ranks, device and threads. This is the only file that imports accelerate."""

from __future__ import annotations

import ctypes
import os
import platform
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator, init_empty_weights
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from saro.data.packs import Share
from saro.distributed.check_launcher import asks_for_fsdp, check_launcher
from saro.distributed.shard import is_sharded, make_mesh
from saro.errors import SaroError, nearest
from saro.program import quiet_libraries

Value = TypeVar("Value")

_LAUNCH = "on a CPU use accelerate launch --multi_gpu --num_processes N --num_machines 1, or torchrun"


@dataclass(frozen=True)
class Runtime:
    """One rank of a run. Most runs have only one; every collective here then does nothing.

    Attributes:
        accelerator: holds the process group and the trackers.
        rank: number of this rank, from 0 to processes - 1.
        processes: number of ranks: each is a process of its own.
        threads: number of CPU threads of this rank.
        mesh: the ranks that share a model's weights; None if each holds all of them.
    """

    accelerator: Accelerator
    rank: int
    processes: int
    threads: int
    mesh: DeviceMesh | None = None

    @classmethod
    def start(cls, trackers: list[str] | None = None, output: str | None = None, shard: str = "none") -> Runtime:
        """Join the process group that the launcher describes.

        Args:
            shard: ``--train.shard``. A launcher that is configured for FSDP2 turns none into full.

        Raises:
            SaroError: the number of processes is not the one that the launcher promised, it asks for what a run would
                not do (see ``check_launcher``), or a tracker is missing.
        """
        check_launcher(os.environ)
        # accelerate would wrap the model in its own way, which does not know packs.
        if asks_for_fsdp(os.environ):
            del os.environ["ACCELERATE_USE_FSDP"]
            shard = "full" if shard == "none" else shard
        quiet_libraries()
        keep_freed_memory()
        _stop_with_launcher()
        _check_trackers(trackers or [])
        try:
            accelerator = Accelerator(
                cpu=not torch.cuda.is_available(),
                mixed_precision="no",
                log_with=trackers or None,
                project_dir=output,
                kwargs_handlers=[
                    DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                    InitProcessGroupKwargs(timeout=timedelta(hours=2)),
                ],
            )
        except (ValueError, RuntimeError) as error:
            first = str(error).strip().partition("\n")[0]
            raise SaroError(f"cannot join the launcher's processes ({first}); {_LAUNCH}") from error
        promised = int(os.environ.get("WORLD_SIZE", "1"))
        if promised != accelerator.num_processes:
            raise SaroError(
                f"the launcher promised {promised} processes, and there are {accelerator.num_processes}; {_LAUNCH}"
            )
        # Set the number of threads ourselves: without a GPU, `accelerate launch` gives each process only one.
        cpus = _allowed_cpus()
        cores = min(len(cpus), psutil.cpu_count(logical=False) or 1)
        places = gather_object([(platform.node(), cpus)]) if accelerator.num_processes > 1 else []
        if not has_own_cpus(places, accelerator.process_index):
            cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        threads = max(1, cores)
        torch.set_num_threads(threads)
        mesh = make_mesh(shard, accelerator.num_processes, accelerator.device, os.environ)
        return cls(accelerator, accelerator.process_index, accelerator.num_processes, threads, mesh)

    @property
    def device(self) -> torch.device:
        """The device that this rank computes on."""
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes the run's files and prints."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """This rank's share of the work."""
        return Share(self.rank, self.processes, is_even=self.mesh is not None)

    @property
    def averaging(self) -> int:
        """Number of ranks over which an exchange of gradients averages: 1 if it sums them, as under sharding."""
        return self.processes if self.mesh is None else 1

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module to train: wrapped in DistributedDataParallel if there are several ranks and it is not sharded.

        Raises:
            SaroError: the launcher asks for another kind of parallelism.
        """
        if self.processes == 1 or is_sharded(module):
            return module
        wrapped = self.accelerator.prepare_model(module)
        if not isinstance(wrapped, DistributedDataParallel):
            raise SaroError(
                f"the launcher asks for {type(wrapped).__name__}, and only data parallelism is supported; "
                "leave options such as --use_fsdp or --use_deepspeed out of accelerate's config and command"
            )
        return wrapped

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks in place, and return it."""
        if self.processes > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_parts(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the ranks that share the weights, without those that hold other copies of them."""
        summed = tensor.clone()
        if self.mesh is not None:
            dist.all_reduce(summed, group=self.mesh.get_group("shard"))
        return summed

    def gather(self, items: list[Any]) -> list[Any]:
        """Return the lists of all ranks as one list, in the order of ranks, on every rank."""
        return gather_object(items) if self.processes > 1 else items

    def gather_on_main(self, items: list[Any]) -> list[Any]:
        """Return the lists of all ranks as one list, in the order of ranks, on rank 0, and an empty one on the others."""
        if self.processes == 1:
            return items
        lists: list[list[Any]] | None = [[]] * self.processes if self.is_main else None
        dist.gather_object(items, lists, dst=0)
        return [item for part in lists or [] for item in part]

    def broadcast(self, value: Value) -> Value:
        """Return rank 0's value, which can be pickled, on every rank."""
        if self.processes == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def on_main(self, decide: Callable[[], Value]) -> Value:
        """Call ``decide`` on rank 0 only, and return its result on every rank.

        Use it for all that is read from a disk or a clock, which other ranks may see differently.

        Raises:
            SaroError: ``decide`` raised it on rank 0. Every rank raises it.
        """
        result, error = None, None
        if self.is_main:
            try:
                result = decide()
            except SaroError as raised:
                error = raised
        result, message = self.broadcast((result, None if error is None else str(error)))
        if message is not None:
            raise SaroError(message) from error
        return result

    def broadcast_tensors(self, tree: Any) -> Any:
        """Return rank 0's tree of dicts, lists, tensors and other values on every rank.

        One tensor at a time is in transit, so the other ranks need memory for the tree and for its largest tensor. They
        get tensors on the CPU; rank 0 gets its own tree back.
        """
        if self.processes == 1:
            return tree
        outline = self.broadcast(_map_tensors(tree, lambda tensor: _Outline(tensor.shape, tensor.dtype)))
        if self.is_main:
            _map_tensors(tree, self.broadcast_tensor_)
            return tree
        return _map_tensors(outline, lambda item: self.broadcast_tensor_(torch.empty(item.shape, dtype=item.dtype)))

    @torch.no_grad()
    def broadcast_tensor_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite a tensor with that of rank 0, and return it. A CPU tensor goes through this rank's GPU if it has one."""
        if self.processes > 1:
            sent = tensor.detach().to(self.device).contiguous()
            dist.broadcast(sent, src=0)
            if not self.is_main and sent.data_ptr() != tensor.data_ptr():
                tensor.copy_(sent)
        return tensor

    def compare(self, values: Mapping[str, str], fix: str) -> None:
        """Check that all ranks have the same values.

        Args:
            values: what each value is -> the value or its hash; for example "the token ids of train" -> a sha256.
            fix: end of the error: what to do.

        Raises:
            SaroError: on every rank; it names the first value that differs, and the ranks that have another than rank 0.
        """
        if self.processes == 1:
            return
        by_rank = self.gather([dict(values)])
        for name in dict.fromkeys(name for theirs in by_rank for name in theirs):
            others = [rank for rank, theirs in enumerate(by_rank) if theirs.get(name) != by_rank[0].get(name)]
            if others:
                ranks = (
                    f"rank {others[0]} differs" if len(others) == 1 else f"ranks {', '.join(map(str, others))} differ"
                )
                raise SaroError(f"{ranks} from rank 0 in {name}; {fix}")

    def check_common_folder(self, folder: Path) -> None:
        """Check that all ranks see a folder of rank 0, into which each of them will write.

        Raises:
            SaroError: on every rank, if one of them does not see it.
        """

        def leave_mark() -> Path:
            mark = folder / f".{secrets.token_hex(8)}.tmp"
            mark.touch()
            return mark

        mark = self.on_main(leave_mark)
        blind = [rank for rank, sees in enumerate(self.gather([mark.exists()])) if not sees]
        self.on_main(mark.unlink)
        if blind:
            raise SaroError(
                f"{folder}: rank {blind[0]} does not see this folder of rank 0; ranks that share the weights write "
                "checkpoints together: give a folder on a file system that all machines share, with --train.output"
            )

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.processes > 1:
            self.accelerator.wait_for_everyone()

    def say(self, text: str) -> None:
        """Print a line for the user, on rank 0 only."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def start_trackers(self, project: str, config: dict[str, Any], name: str, run_id: str) -> None:
        """Open the trackers that were asked for.

        Args:
            name: name of the run there.
            run_id: id of the run in W&B: under the id of a run that has stopped, it is continued.
        """
        if self.accelerator.log_with:
            options = {"wandb": {"name": name, "id": run_id, "resume": "allow"}}
            self.accelerator.init_trackers(project, {k: str(v) for k, v in _flat(config)}, init_kwargs=options)

    def log(self, values: dict[str, float], step: int) -> None:
        """Send metrics to the trackers."""
        if self.accelerator.log_with:
            self.accelerator.log(values, step=step)

    def log_samples(self, samples: Sequence[tuple[str, str, str]], step: int) -> None:
        """Send (id, prompt, answer) of some prompts to the trackers: as a table to those that have tables, else as texts."""
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_table"):
                tracker.log_table(
                    "samples", columns=["id", "prompt", "answer"], data=list(map(list, samples)), step=step
                )
            else:
                tracker.log({f"samples/{id}": f"{prompt}\n\n{answer}" for id, prompt, answer in samples}, step=step)

    def end(self) -> None:
        """Close the trackers and leave the process group."""
        self.accelerator.end_training()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    def memory(self) -> float:
        """Return the peak memory of this rank so far in GiB: GPU memory, or resident memory on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        import resource

        # ru_maxrss is in bytes on macOS and in KiB elsewhere.
        unit = 1 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@dataclass(frozen=True)
class _Outline:
    """Stands for a tensor that is sent on its own."""

    shape: torch.Size
    dtype: torch.dtype


def _map_tensors(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Return a copy of a tree of dicts and lists in which each tensor, or outline of one, is changed."""
    if isinstance(tree, torch.Tensor | _Outline):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_map_tensors(value, change) for value in tree]
    return tree


def _allowed_cpus() -> set[int]:
    """Return the logical CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))  # macOS has no affinity


def has_own_cpus(places: Sequence[tuple[str, set[int]]], rank: int) -> bool:
    """Return True if the launcher bound a rank to CPUs that no other rank of its machine may use, as srun does.

    ``places``: the machine of each rank, and the CPUs that it may use there.
    """
    if not places:
        return False
    machine, cpus = places[rank]
    others = [theirs for i, (name, theirs) in enumerate(places) if name == machine and i != rank]
    return bool(others) and all(cpus.isdisjoint(theirs) for theirs in others)


def _check_trackers(names: list[str]) -> None:
    """Raise SaroError for a tracker that is unknown, or not installed, which accelerate would silently ignore."""
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise SaroError(f"train.trackers: unknown tracker {name!r}{nearest(name, known)}")
        if name not in available:
            raise SaroError(f"train.trackers: {name} is not installed; install it with pip, or leave it out")


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (group.option, value) for each option of nested dicts."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed CPU tensors, so that the next step can use it again.

    By default, glibc returns large blocks to the system, and each step faults them in again page by page: a step of
    `benchmarks/train_step.py` then took 1.4 times as long on a virtual machine. The cost is that blocks between
    kept activations are not always reused: the peak was 3.7 GiB instead of 2.9.
    """
    # M_TRIM_THRESHOLD is -1 and M_MMAP_THRESHOLD is -3. Other C libraries have no mallopt, or ignore it.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)
        mallopt(-3, 2**30)


def empty_weights() -> AbstractContextManager[None]:
    """Return a context in which modules are made with parameters on the meta device. Their buffers have their values."""
    return init_empty_weights(include_buffers=False)


def _stop_with_launcher() -> None:
    """Ask Linux to send this process SIGTERM when `accelerate launch` ends."""
    # `accelerate launch` of one process forwards no signals: after a SIGTERM or SIGKILL, its child would keep training.
    # PR_SET_PDEATHSIG is 1. With several ranks, torchrun's agent stops them. Do not ask without a launcher: the end of
    # a shell does not mean that training should end.
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
