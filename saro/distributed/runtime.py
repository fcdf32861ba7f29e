"""Processes, device and threads: the only file that imports accelerate or torch.distributed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object
from torch import nn

from saro.errors import SaroError, nearest
from saro.program import quiet_libraries

_LAUNCH = "on a CPU use accelerate launch --multi_gpu --num_processes N --num_machines 1, or torchrun"


@dataclass(frozen=True)
class Runtime:
    """One process of a run. One process is the normal case; then every collective here does nothing.

    Attributes:
        accelerator: where the process group and the trackers live.
        rank: of this process, 0 to processes - 1.
        processes: how many there are.
        threads: CPU threads of this process.
    """

    accelerator: Accelerator
    rank: int
    processes: int
    threads: int

    @classmethod
    def start(cls, trackers: list[str] | None = None, output: str | None = None) -> Runtime:
        """Join the process group that the launcher describes.

        Raises:
            SaroError: the launcher promised another number of processes than there are, or a tracker is missing.
        """
        quiet_libraries()
        keep_freed_memory()
        _end_with_launcher()
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
        # `accelerate launch` without a GPU leaves a process one thread.
        allowed = (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )  # not on macOS
        cores = min(allowed, psutil.cpu_count(logical=False) or 1)
        threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.set_num_threads(threads)
        return cls(accelerator, accelerator.process_index, accelerator.num_processes, threads)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module as it is trained: under DistributedDataParallel where there are several processes."""
        return self.accelerator.prepare_model(module) if self.processes > 1 else module

    @contextmanager
    def synchronize(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Around the forward and backward of one pack: only the last one of a step exchanges gradients."""
        if last or self.processes == 1:
            yield
        else:
            with self.accelerator.no_sync(module):
                yield

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, in place."""
        if self.processes > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, items: list[Any]) -> list[Any]:
        """The lists of all processes as one, in the order of ranks; every process gets it."""
        return gather_object(items) if self.processes > 1 else items

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.processes > 1:
            self.accelerator.wait_for_everyone()

    def say(self, text: str) -> None:
        """A line for the user, once for all processes."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def start_trackers(self, project: str, config: dict[str, Any]) -> None:
        """Open the trackers that were asked for."""
        if self.accelerator.log_with:
            self.accelerator.init_trackers(project, config={k: str(v) for k, v in _flat(config)})

    def log(self, values: dict[str, float], step: int) -> None:
        """Report to the trackers."""
        if self.accelerator.log_with:
            self.accelerator.log(values, step=step)

    def end(self) -> None:
        """Close the trackers and leave the process group."""
        self.accelerator.end_training()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    def memory(self) -> float:
        """Most memory that this process has held so far, GiB: of the GPU, or resident on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        import resource

        # In bytes on macOS, in KiB elsewhere.
        unit = 1 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _check_trackers(names: list[str]) -> None:
    # accelerate leaves out what is not installed, without a word.
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise SaroError(f"train.trackers: unknown tracker {name!r}{nearest(name, known)}")
        if name not in available:
            raise SaroError(f"train.trackers: {name} is not installed; install it with pip, or leave it out")


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def keep_freed_memory() -> None:
    """Let the C library keep the memory that tensors on a CPU leave, for those of the next step.

    glibc gives large blocks back to the system and faults them in again, page by page, at every step: a step of
    `benchmarks/train_step.py` took 1.4 times as long on a virtual machine. The price is that blocks between kept
    activations are not always used again: 3.7 GiB at the peak, not 2.9.
    """
    # M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD is -3; other C libraries have no mallopt or ignore it.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)
        mallopt(-3, 2**30)


def _end_with_launcher() -> None:
    # `accelerate launch` of one process passes no signal on: stopped by SIGTERM or SIGKILL, it would leave its child
    # training. The kernel sends the child a SIGTERM then (PR_SET_PDEATHSIG is 1). Several processes have torchrun's
    # agent, which sees to it; under a shell the parent's end means nothing.
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
