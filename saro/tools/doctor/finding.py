"""What one check found, and the one place where the failure of a check becomes a finding."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from saro.errors import SaroError

# What a check, or a backend that is broken here, raises. torch's and CUDA's own errors are RuntimeErrors. None of these
# is the user's Ctrl-C.
_BROKEN: tuple[type[Exception], ...] = (
    SaroError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    ImportError,
    OSError,
    MemoryError,
    AssertionError,
    subprocess.CalledProcessError,  # Triton's compilers
)


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: what was checked.
        ok: None where the check was skipped.
        figure: what was measured, with its unit; of a skipped check the reason, of a broken one the error's first line.
        limit: what the figure is held against; empty where it only informs.
    """

    name: str
    ok: bool | None
    figure: str
    limit: str = ""


@dataclass(frozen=True)
class Check:
    """A check by its name, not yet run."""

    name: str
    run: Callable[[], Finding]


def within(name: str, value: float, limit: float, unit: str) -> Finding:
    """A figure that must be at most its limit; one that is not a number is not."""
    return Finding(name, value <= limit, f"{value:.3g} {unit}", f"at most {limit:.3g}")


def guarded(check: Check, users: tuple[type[Exception], ...] = ()) -> Finding:
    """The check's finding; FAILED with the first line of the error where it raises.

    Raises:
        users: errors that tell of the user's options and not of what is broken.
    """
    try:
        return check.run()
    except users:
        raise
    except _broken() as error:
        lines = str(error).strip().splitlines()
        return Finding(check.name, False, lines[0] if lines else type(error).__name__, "no error")


def _broken() -> tuple[type[Exception], ...]:
    """Triton's errors have a base of their own."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return _BROKEN
    return (*_BROKEN, TritonError)
