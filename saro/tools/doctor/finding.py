"""A check, its finding, and the one place where the error of a check becomes a finding."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from saro.errors import SaroError

# Errors that a check or a broken backend raises. torch's and CUDA's own errors are RuntimeErrors. KeyboardInterrupt is
# left out: the user's Ctrl-C ends the program.
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
        name: of the check.
        ok: None if the check was skipped.
        figure: the measurement with its unit; the reason if the check was skipped, the error's first line if it raised.
        limit: the limit of the figure; empty if the figure only informs.
    """

    name: str
    ok: bool | None
    figure: str
    limit: str = ""


@dataclass(frozen=True)
class Check:
    """A check and its name. It has not run yet."""

    name: str
    run: Callable[[], Finding]


def within(name: str, value: float, limit: float, unit: str) -> Finding:
    """Return a finding that passes if value <= limit. NaN fails."""
    return Finding(name, value <= limit, f"{value:.3g} {unit}", f"at most {limit:.3g}")


def guarded(check: Check, user_errors: tuple[type[Exception], ...] = ()) -> Finding:
    """Run a check. If it raises, return a failed finding with the first line of the error.

    Raises:
        user_errors: errors that are about the user's options, not about a broken machine.
    """
    try:
        return check.run()
    except user_errors:
        raise
    except _broken_errors() as error:
        lines = str(error).strip().splitlines()
        return Finding(check.name, False, lines[0] if lines else type(error).__name__, "no error")


def _broken_errors() -> tuple[type[Exception], ...]:
    """Return the errors that become findings. Triton's have their own base class."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return _BROKEN
    return (*_BROKEN, TritonError)
