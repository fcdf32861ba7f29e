"""Modules whose forward others have replaced, on the module itself, and how to have their own again for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


def replacement(module: nn.Module) -> Callable | None:
    """The function that was bound to a module in place of its class's forward; None where there is none."""
    return getattr(module.__dict__.get("forward"), "__func__", None)


@contextmanager
def own_forwards(model: nn.Module, replaced: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Inside, those modules of a model that ``replaced`` tells compute by their class's forward again."""
    forwards = {module: module.__dict__.pop("forward") for module in model.modules() if replaced(module)}
    try:
        yield
    finally:
        for module, forward in forwards.items():
            module.forward = forward
