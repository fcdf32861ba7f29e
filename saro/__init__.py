"""SaRO: Safety-oriented Reasoning Optimization for causal language models."""

import logging
import sys

__version__ = "0.1.0"


def _import_bitsandbytes() -> None:
    """Import bitsandbytes without its download and without its log line about the package ``kernels``.

    If the PyPI package ``kernels`` is installed, importing bitsandbytes on a CPU fetches a binary from a hub; if not,
    bitsandbytes logs a line. With None in sys.modules, `import kernels` fails at once, and bitsandbytes does without it.
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


# Call it before anything imports transformers, which imports bitsandbytes.
_import_bitsandbytes()
