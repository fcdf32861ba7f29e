"""Make our functions follow autocast: they cast their input as a linear layer does, and nothing inside is cast again."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def cast_input(x: Tensor) -> Tensor:
    """Cast a float32 tensor to autocast's dtype if autocast is on. Any other tensor is returned unchanged."""
    device_type = x.device.type
    is_cast = x.dtype == torch.float32 and torch.is_autocast_enabled(device_type)
    return x.to(torch.get_autocast_dtype(device_type)) if is_cast else x


def outside_autocast(method: Callable) -> Callable:
    """Turn autocast off in the forward or backward of an autograd function.

    There it would cast the operators that make a new tensor, and not those that write into one that is given.
    """

    @functools.wraps(method)
    def run(ctx, x, *others):
        if not torch.is_autocast_enabled(x.device.type):
            return method(ctx, x, *others)
        with torch.autocast(x.device.type, enabled=False):
            return method(ctx, x, *others)

    return run
