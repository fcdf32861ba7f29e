"""Trained models: loading, adapters, attention of packs, generation, merging."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def _compile_when_called(function: Callable | None = None, **options: object) -> Callable:
    """Stand for ``torch.compile``: compile the function when it is called first."""
    if function is None:
        return functools.partial(_compile_when_called, **options)
    compiled = functools.cache(lambda: torch.compile(function, **options))
    return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))


def _import_bitsandbytes() -> None:
    """Import bitsandbytes without torch's compiler, which takes a sixth of the time in which a program starts.

    bitsandbytes calls ``torch.compile`` on functions that few runs use, and that call imports the compiler.
    """
    compile_now = torch.compile
    torch.compile = _compile_when_called
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compile_now


# Call it before anything imports peft, which imports bitsandbytes.
_import_bitsandbytes()
