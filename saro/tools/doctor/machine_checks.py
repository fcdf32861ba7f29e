"""What the machine is: versions, device, threads, disk."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from saro.distributed.runtime import Runtime
from saro.files import cache_dir
from saro.tools.doctor.finding import Check, Finding

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton", "liger-kernel")
_FREE_GIB = 1.0


def machine_checks(runtime: Runtime) -> list[Check]:
    """Of the machine alone; no model is needed."""
    return [
        Check("versions", _versions),
        Check("device", lambda: _device(runtime.device)),
        Check("threads", lambda: Finding("threads", True, f"{torch.get_num_threads()} of this process")),
        Check("free disk of the cache", lambda: _disk(cache_dir())),
    ]


def has_bf16(device: torch.device) -> bool:
    """Whether products in bfloat16 are the hardware's own."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def device_memory(device: torch.device) -> float:
    """Memory that this process can have, GiB: what it holds and what is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return (free + torch.cuda.memory_reserved(device)) / 2**30
    return (psutil.Process().memory_info().rss + psutil.virtual_memory().available) / 2**30


def _versions() -> Finding:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return Finding("versions", found["torch"] != "none", ", ".join(f"{k} {v}" for k, v in found.items()))


def _device(device: torch.device) -> Finding:
    memory = f"{device_memory(device):.1f} GiB for this process"
    if device.type != "cuda":
        return Finding("device", True, f"CPU, {memory}")
    properties = torch.cuda.get_device_properties(device)
    bf16 = "bfloat16" if has_bf16(device) else "no bfloat16"
    l2 = f"L2 {properties.L2_cache_size / 2**20:.0f} MiB"
    return Finding("device", True, f"{properties.name}, {memory}, {bf16}, {l2}")


def _disk(folder: Path) -> Finding:
    # The folder may not be there yet.
    there = next(f for f in (folder, *folder.absolute().parents) if f.is_dir())
    free = shutil.disk_usage(there).free / 2**30
    return Finding("free disk of the cache", free >= _FREE_GIB, f"{free:.1f} GiB", f"at least {_FREE_GIB:.0f} GiB")
