"""Checks of the machine: versions, device, threads, disk."""

from __future__ import annotations

import platform
import shutil
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from saro.distributed.runtime import Runtime
from saro.files import cache_dir
from saro.tools.doctor.finding import Check, Finding

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton", "liger-kernel")
# Free disk that the cache needs at least; the demo model takes a quarter of it.
_FREE_GIB = 1.0


def machine_checks(runtime: Runtime) -> list[Check]:
    """Return the checks that need no model."""
    return [
        Check("versions", _versions),
        Check("device", partial(_device, runtime.device)),
        Check("threads", _threads),
        Check("free disk of the cache", _disk),
    ]


def has_bf16(device: torch.device) -> bool:
    """Return True if the hardware multiplies in bfloat16."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def device_memory(device: torch.device) -> float:
    """Return the memory that this process can have, GiB: its own and the free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return (free + torch.cuda.memory_reserved(device)) / 2**30
    return (psutil.Process().memory_info().rss + psutil.virtual_memory().available) / 2**30


def _versions() -> Finding:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    return Finding("versions", versions["torch"] != "none", ", ".join(f"{k} {v}" for k, v in versions.items()))


def _device(device: torch.device) -> Finding:
    memory = f"{device_memory(device):.1f} GiB for this process"
    if device.type != "cuda":
        return Finding("device", True, f"CPU, {memory}")
    properties = torch.cuda.get_device_properties(device)
    bf16 = "bfloat16" if has_bf16(device) else "no bfloat16"
    l2 = f"L2 {properties.L2_cache_size / 2**20:.0f} MiB"
    return Finding("device", True, f"{properties.name}, {memory}, {bf16}, {l2}")


def _threads() -> Finding:
    return Finding("threads", True, f"{torch.get_num_threads()} of this process")


def _disk() -> Finding:
    cache = cache_dir()
    # The cache's folder may not exist yet; then its nearest parent is on the same disk.
    folder = next(f for f in (cache, *cache.absolute().parents) if f.is_dir())
    free = shutil.disk_usage(folder).free / 2**30
    return Finding("free disk of the cache", free >= _FREE_GIB, f"{free:.1f} GiB", f"at least {_FREE_GIB:.0f} GiB")
