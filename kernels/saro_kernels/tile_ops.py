"""Chooses a tile op, which turns a tile of the head's products into log-probs and, in place, into their gradient.

A tile op is a class that owns the buffers of one (rows, V) tile. Each pass over a batch makes one tile and reuses it for
all rows: on a CPU, the page faults of a new tile cost more than all arithmetic on it.
"""

import difflib
import functools
from typing import TYPE_CHECKING

import torch

from saro_kernels.torch_tile import TorchTile

if TYPE_CHECKING:
    from saro_kernels.triton_tile import TritonTile

TILE_OPS = ("torch", "triton")
# Devices that Triton compiles for. torch calls ROCm devices "cuda" too.
TRITON_DEVICES = ("cuda", "xpu")


def choose_tile_op(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the tile op to use for products of `dtype` on `device`: "torch" or "triton".

    "auto" becomes "triton" if that can run on this device, else "torch". Any other name is returned as it is.

    Raises:
        ValueError: `name` is unknown, or that tile op cannot run here. The message says which one to use.
    """
    if name == "auto":
        can_run_triton = device.type in TRITON_DEVICES and triton_problem(device, dtype) is None
        return "triton" if can_run_triton else "torch"
    if name not in TILE_OPS:
        closest = difflib.get_close_matches(name, TILE_OPS, n=1, cutoff=0)[0]
        raise ValueError(f"tile op {name!r} is unknown; did you mean {closest!r}?")
    problem = triton_problem(device, dtype) if name == "triton" else None
    if problem is not None:
        raise ValueError(f"tile op 'triton' cannot run here: {problem}; use 'torch'")
    return name


def find_tile_op(name: str) -> "type[TorchTile] | type[TritonTile]":
    """Return the class for a name that `choose_tile_op` returned."""
    if name == "torch":
        return TorchTile
    # Import it only here: Triton is optional, and its import takes a second.
    from saro_kernels.triton_tile import TritonTile

    return TritonTile


def triton_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why Triton's tile op cannot run on `device`; None if it can."""
    if not _is_triton_installed():
        return "triton is not installed"
    if dtype == torch.float64:
        return "it does not support float64"
    if device.type not in TRITON_DEVICES and not _is_interpreted():
        return f"triton does not compile for {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None if _is_interpreted() else _launcher_problem()


@functools.cache
def _is_triton_installed() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def _launcher_problem() -> str | None:
    """Return why Triton cannot launch kernels here; None if it can. Triton compiles its C launcher at the first use."""
    from triton.runtime import driver

    try:
        _ = driver.active.utils
    # Catch everything: no compiler, a failing compiler, no Python headers and no libcuda raise different types.
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        return f"its launcher cannot be built: {first_line.rstrip('.')}"
    return None


def _is_interpreted() -> bool:
    """Return True if Triton runs its kernels in the interpreter, which works on any device."""
    from triton import knobs

    return knobs.runtime.interpret
