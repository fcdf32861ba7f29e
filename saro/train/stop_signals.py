"""Note the signals that end a run, so that the step can be finished and saved."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGINTs within this time are one Ctrl-C: torchrun sends its children a SIGINT right after the terminal's.
_SAME_CTRL_C_SECONDS = 2.0


@contextmanager
def noting_stop_signals() -> Iterator[list[int]]:
    """Append SIGTERM and the first Ctrl-C to the yielded list instead of obeying at once. A later Ctrl-C interrupts."""
    received: list[int] = []
    first = 0.0

    def on_signal(number: int, _: FrameType | None) -> None:
        nonlocal first
        if not received:
            first = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - first > _SAME_CTRL_C_SECONDS:
            raise KeyboardInterrupt
        received.append(number)

    old = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
