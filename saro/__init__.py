"""SaRO: Safety-oriented Reasoning Optimization for causal language models."""

import logging
import os
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


def _use_expandable_segments() -> None:
    """Let torch's CUDA allocator grow its segments, unless the user has configured it.

    Packs differ in size from step to step. Segments of fixed sizes then fragment: memory is reserved that no tensor fits
    into. Only Linux has the driver calls for it, and where a GPU lacks them torch goes on without.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        os.environ[names[0]] = "expandable_segments:True"


# Call it before anything imports torch: some builds read the variable when they are loaded.
_use_expandable_segments()
# Call it before anything imports transformers, which imports bitsandbytes.
_keep_bitsandbytes_offline()
