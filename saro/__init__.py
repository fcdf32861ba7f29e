"""SaRO: Safety-oriented Reasoning Optimization for causal language models."""

import logging
import sys

__version__ = "0.1.0"


def _import_bitsandbytes() -> None:
    """Import bitsandbytes without its download and without its log line about the package ``kernels``.

    If the PyPI package ``kernels`` is installed, importing bitsandbytes on a CPU fetches a binary from a hub; if not,
    bitsandbytes logs a line. None in sys.modules makes `import kernels` fail at once, which bitsandbytes takes as absence.
    """
    if "bitsandbytes" in sys.modules:
        return
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    absent = object()
    kernels = sys.modules.get("kernels", absent)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        if kernels is absent:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = kernels  # type: ignore[assignment]


# Now, before anything imports transformers: transformers imports bitsandbytes.
_import_bitsandbytes()
