"""Models in float64 throughout: transformers rounds to float32 in norms, rotary embeddings and its eager softmax.

Where two orders of a sum, 1e-16 apart, round to different neighbours there, a float64 model's outputs part by 6e-8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Float64ForFloat32(TorchDispatchMode):
    """Of the dispatcher's modes, since layers that are computed again in the backward have no others."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **{n: torch.float64 if x is torch.float32 else x for n, x in (kwargs or {}).items()})


@contextmanager
def in_float64() -> Iterator[None]:
    """Inside, whoever names float32 to torch gets float64. For models whose parameters are float64; a decorator too."""
    with _Float64ForFloat32():
        yield
