"""Measure the resident memory of this process, which on a CPU holds its tensors too."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import psutil

# Seconds between two samples: short, so that no peak falls between them.
_SAMPLE_SECONDS = 0.002


def give_freed_memory_back() -> None:
    """Return the memory of freed tensors to the system. ``Runtime.start`` makes glibc keep it, and it would be counted."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """Return the resident memory of this process, with the parts of files that it has mapped."""
    return psutil.Process().memory_info().rss


def own_bytes() -> int:
    """Return the resident memory of this process without mapped files, whose parts the system can take back."""
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)


def resident_peak(step: Callable[[], object], read: Callable[[], int] = resident_bytes) -> int:
    """Return the most that ``read`` reads while a function runs. Sampled, because the system's own peak never falls."""
    done, peak = threading.Event(), 0

    def sample() -> None:
        nonlocal peak
        ended = False
        while not ended:
            ended = done.wait(_SAMPLE_SECONDS)
            # Sample at the end too: a short step may be over before the first sample. Its freed memory is still resident.
            peak = max(peak, read())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        step()
    finally:
        done.set()
        sampler.join()
    return peak
