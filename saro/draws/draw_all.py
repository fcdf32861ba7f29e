"""Draws what a store lacks, group by group, so that a run that is killed loses at most one group."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence

from saro.distributed.runtime import Runtime
from saro.draws.request import FINAL_FAILURES, Draw, Generator, Request
from saro.draws.store import DrawStore
from saro.errors import SaroError
from saro.program import progress_bar

# The run ends if more than half of this many draws fail one after the other: then it is the server, not a prompt.
_WINDOW = 40
# Draws that are read from the store at a time. One of 1,000 tokens takes 36 KB of memory.
_SLICE = 500


def draw_missing(
    store: DrawStore,
    generator: Generator,
    requests: Sequence[Request],
    *,
    share: tuple[int, int] = (0, 1),
    progress: bool = True,
    offline: bool = False,
) -> list[Draw | None]:
    """Return the draw of each request, in order, after drawing those that the store lacks.

    A request that occurs several times is drawn once. Failures are draws too; those that may not last
    (not in ``FINAL_FAILURES``) are drawn again.

    Args:
        share: (rank, number of processes): draw only this process's part. Draws of other parts are those in the store,
            or None.
        progress: show a progress bar, on a terminal.
        offline: draw nothing.

    Raises:
        SaroError: more than half of the last 40 draws failed (refusals and prompts that are too long do not count:
            another server or a new try would not change them), draws are missing with ``offline``, or the store or the
            generator cannot go on. What was drawn is stored.
    """
    keys = _fill(store, generator, requests, share, progress, offline)
    stored = store.get([*dict.fromkeys(keys)])
    return [stored.get(key) for key in keys]


def _fill(
    store: DrawStore,
    generator: Generator,
    requests: Sequence[Request],
    share: tuple[int, int],
    progress: bool,
    offline: bool,
) -> list[str]:
    """Draw what the store lacks, and return the keys of all requests. No draw that is stored is read."""
    identity = generator.identity
    keys = [request.key(identity) for request in requests]
    by_key = dict(zip(keys, requests, strict=True))
    if offline:
        if num_missing := len(by_key) - len(store.find_failures([*by_key])):
            raise SaroError(
                f"{store.path}: {num_missing:,} of {len(by_key):,} draws are not in the store; draw them without --offline"
            )
        return keys

    rank, processes = share
    unique = [*by_key]
    # Order and part first: a batch must not depend on what is missing, nor a process's part on what others have drawn.
    mine = [unique[index] for index in generator.order([by_key[key] for key in unique])][rank::processes]
    failures = store.find_failures(mine)
    missing = [key for key in mine if key not in failures or _may_change(failures[key])]
    if missing:
        _draw(store, generator, {key: by_key[key] for key in missing}, progress)
    return keys


def check_one_machine(runtime: Runtime, work: str) -> None:
    """Raise SaroError if ranks run on several machines: the store of draws is a file of one.

    Args:
        work: what the ranks do, for the error message.
    """
    if runtime.processes > int(os.environ.get("LOCAL_WORLD_SIZE", runtime.processes)):
        raise SaroError(f"{work} runs on one machine; start it there, with one process for each GPU")


def draw_on_all_ranks(
    runtime: Runtime, store: DrawStore, generator: Generator, requests: Sequence[Request], *, offline: bool = False
) -> list[Draw]:
    """Return the draws of all requests, on every rank; each rank draws a part of what the store lacks.

    Raises SaroError like ``draw_missing``.
    """
    return [*iterate_on_all_ranks(runtime, store, generator, requests, offline=offline)]


def iterate_on_all_ranks(
    runtime: Runtime, store: DrawStore, generator: Generator, requests: Sequence[Request], *, offline: bool = False
) -> Iterator[Draw]:
    """Yield the draws of all requests, in order, on every rank, after all are drawn; few are in memory at a time.

    Callers read to the end: ranks wait for each other there.

    Raises SaroError like ``draw_missing``.
    """
    share = (runtime.rank, runtime.processes)
    keys = _fill(store, generator, requests, share, runtime.is_main, offline)
    if runtime.processes > 1:
        runtime.barrier()
    for start in range(0, len(keys), _SLICE):
        part = keys[start : start + _SLICE]
        stored = store.get(part)
        yield from (stored[key] for key in part)
    # No rank may go on and free its process group before the others have read.
    if runtime.processes > 1:
        runtime.barrier()


def _draw(store: DrawStore, generator: Generator, requests: dict[str, Request], progress: bool) -> None:
    """Draw all requests (key -> request) and store each group when it comes."""
    keys = [*requests]
    drawn: set[int] = set()
    recent: deque[tuple[str, Draw]] = deque(maxlen=_WINDOW)
    tokens = failures = 0
    with progress_bar(None, "drawing", "texts", shown=progress, total=len(keys)) as bar:
        for group in generator.draw([*requests.values()]):
            store.put(generator.identity, {keys[index]: (requests[keys[index]], draw) for index, draw in group})
            drawn.update(index for index, _ in group)
            recent.extend((keys[index], draw) for index, draw in group)
            tokens += sum(draw.num_tokens for _, draw in group)
            failures += sum(draw.failure is not None for _, draw in group)
            bar.set_postfix_str(f"{tokens:,} tokens" + (f", {failures:,} failed" if failures else ""), refresh=False)
            bar.update(len(group))
            _check_failures(recent)
    if len(drawn) < len(keys):
        raise RuntimeError(f"the generator gave {len(drawn)} of {len(keys)} draws")


def _may_change(failure: str | None) -> bool:
    """Return True for a failure that another try may not repeat."""
    return failure is not None and failure not in FINAL_FAILURES


def _check_failures(recent: Sequence[tuple[str, Draw]]) -> None:
    """Raise SaroError if more than half of the last draws failed. It names kinds and keys, never texts."""
    failed = [(key, draw) for key, draw in recent if _may_change(draw.failure)]
    if len(recent) < _WINDOW or 2 * len(failed) <= _WINDOW:
        return
    kinds = ", ".join(f"{number} {kind}" for kind, number in Counter(draw.failure for _, draw in failed).most_common())
    detail = Counter(draw.detail for _, draw in failed).most_common(1)[0][0]
    examples = ", ".join(key[:12] for key, _ in failed[:3])
    raise SaroError(
        f"{len(failed)} of the last {_WINDOW} draws failed ({kinds}; mostly: {detail}; draws {examples}, ...); "
        "find out why and start again, what was drawn is stored"
    )
