"""Run models entirely in float64: transformers casts to float32 in norms, rotary embeddings and its eager softmax.

With those casts, two orders of a sum that differ by 1e-16 can round to different float32 neighbours. Then the outputs of
a float64 model differ by 6e-8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Float64ForFloat32(TorchDispatchMode):
    """A dispatch mode, because it is the only kind that stays on in layers recomputed by gradient checkpointing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **{n: torch.float64 if x is torch.float32 else x for n, x in (kwargs or {}).items()})


@contextmanager
def in_float64() -> Iterator[None]:
    """Make torch use float64 wherever code asks for float32. For models with float64 parameters; also a decorator."""
    with _Float64ForFloat32():
        yield
