"""Run a recipe as one of the launcher's ranks: when one rank fails, all of them end, each with one line."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from saro.distributed.watch import Watch
from saro.errors import SaroError
from saro.program import run_program


def run_ranks(main: Callable[[], int]) -> NoReturn:
    """Run a program as ``run_program`` does. If there are several ranks, the failure of one ends the others too.

    Ranks that end because of another one say so in one line, with exit code 2. A single process is not watched.
    """
    watch = Watch.of(os.environ)
    if watch is None:
        run_program(main)
    try:
        run_program(partial(_run_watched, main, watch))
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if code in (None, 0):
        _finish()
    sys.stdout.flush()
    sys.stderr.flush()
    watch.outlive_others()
    # Not a normal exit. After a failure it would wait for the process group's threads, which may wait for ranks that are
    # gone. After success such a thread may still be freeing the tensors of the last collective, or the watch its store: a
    # thread that comes back from C++ while the interpreter ends aborts the process ("terminate called without ...").
    os._exit(code or 0)


def _finish() -> None:
    """Do what a normal exit does before the interpreter ends: wait for threads, then call the functions of ``atexit``."""
    threading._shutdown()
    atexit._run_exitfuncs()


def _run_watched(main: Callable[[], int], watch: Watch) -> int:
    """Run ``main``, and tell the other ranks how it ended."""
    watch.join()
    try:
        code = main()
    except SaroError as error:
        watch.report(str(error))
        raise
    except KeyboardInterrupt:
        watch.report("it was interrupted")
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        cause = watch.find_cause(f"{type(error).__name__}: {first}")
        if cause is not None:
            raise SaroError(str(cause)) from error
        raise
    except SystemExit:  # --help
        watch.leave()
        raise
    watch.leave()
    return code
