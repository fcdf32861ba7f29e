"""SaRO: Safety-oriented Reasoning Optimization for causal language models."""

import logging
import sys
from importlib.util import find_spec

__version__ = "0.1.0"


def _keep_bitsandbytes_offline() -> None:
    """Keep bitsandbytes from fetching a binary from a hub, and from logging a line if it cannot.

    On a CPU it does the first if the PyPI package ``kernels`` is installed, and the second if not. If it is installed,
    bitsandbytes is imported here with None in sys.modules, so that `import kernels` fails at once and bitsandbytes does
    without it. If not, the import waits until somebody needs it: it takes seconds.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if "bitsandbytes" in sys.modules or not _is_kernels_installed():
        return
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


def _is_kernels_installed() -> bool:
    if "kernels" in sys.modules:
        return True
    spec = find_spec("kernels")
    # A folder named kernels on the path, as in this repository, is found too; it has no origin.
    return spec is not None and spec.origin is not None


# Call it before anything imports transformers, which imports bitsandbytes.
_keep_bitsandbytes_offline()
