"""Compute a function of many items in worker processes, in the order of the items."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from typing import Any, TypeVar

from saro.errors import SaroError

Result = TypeVar("Result")

# A worker that imports torch takes about 0.3 GiB.
_MOST_WORKERS = 16
# Items in flight for each worker: while one is read, the others are worked on.
_WAITING = 2


def count_workers() -> int:
    """Return how many workers the CPUs that this process may use can run."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, _MOST_WORKERS)


def map_in_order(function: Callable[..., Result], items: Iterable[tuple[Any, ...]], workers: int) -> Iterator[Result]:
    """Yield ``function(*item)`` for each item, in the order of the items. Only a few items are in memory at a time.

    Args:
        function: can be pickled; so can its arguments and its result. It is sent to each worker once.
        workers: number of processes; with 1, this process does the work.

    Raises whatever ``function`` raised, and SaroError if a worker was killed.
    """
    if workers == 1:
        yield from (function(*item) for item in items)
        return
    pending: deque[Future[Result]] = deque()
    # Do not fork: the copy of a process with threads or a GPU may wait for a lock forever.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(function,))
    try:
        for item in items:
            pending.append(pool.submit(_call, item))
            if len(pending) > _WAITING * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenExecutor as error:
        raise SaroError(
            f"one of {workers} processes that encode records was killed, perhaps for want of memory; free some and start again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_function: Callable[..., Any]


def _begin(function: Callable[..., Any]) -> None:
    global _function
    _function = function
    # Ctrl-C reaches the whole group of processes. The one that started this worker decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the process that started it ends: after a kill, nobody else would."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(item: tuple[Any, ...]) -> Any:
    return _function(*item)
