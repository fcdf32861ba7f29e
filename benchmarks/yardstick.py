"""Time work on a device, and measure the rates of a GEMM and of a copy, in which other benchmarks express their speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

# Rows and columns of the square GEMM. A smaller one does not fill a large GPU.
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
# Clock cycles for which the GPU sleeps before timed work: about a millisecond, in which Python launches the first kernels.
_SLEEP_CYCLES = 2_000_000


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that one call takes on the device.

    On CUDA, the queue is busy when the work is launched, so that the time of Python's launches counts only if it is longer
    than that of the kernels.
    """
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_SLEEP_CYCLES)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def gemm_per_second(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Return the floating-point operations per second of one square GEMM of random numbers.

    Its matrices are freed at the end, so that they do not count in the peak memory of other work.

    Args:
        size: rows and columns; default ``GEMM_SIZE`` of the device.
    """
    size = size or GEMM_SIZE[device.type]
    a, b, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    return 2 * size**3 / seconds(lambda: torch.mm(a, b, out=out), device)


def copy_bytes(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return two tensors larger than any cache, and the bytes moved by copying one into the other."""
    source = torch.ones(2**26 if device.type == "cpu" else 2**28, device=device)
    return source, torch.empty_like(source), 2 * source.numel() * source.element_size()


def copy_per_second(device: torch.device) -> float:
    """Return the bytes that a copy moves per second, median of six."""
    source, target, moved = copy_bytes(device)
    return moved / statistics.median(seconds(lambda: target.copy_(source), device) for _ in range(6))
