"""Delays the loading of a model until something has to be drawn from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from saro.draws.local import order_requests
from saro.draws.request import Draw, Generator, Request


class LazyGenerator(Generator):
    """A local model whose weights are read when its first text is drawn: a store that has all texts costs no loading.

    Args:
        identity: the identity that the loaded generator has.
        load: loads it.
    """

    def __init__(self, identity: Mapping[str, Any], load: Callable[[], Generator]) -> None:
        self._identity = identity
        self._load = load
        self._loaded: Generator | None = None

    @property
    def identity(self) -> Mapping[str, Any]:
        """The identity of the loaded generator."""
        return self._identity

    def order(self, requests: Sequence[Request]) -> list[int]:
        """Return the order of local models; see ``order_requests``."""
        return order_requests(requests)

    def draw(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Draw]]]:
        """Load the model if it is not loaded, and draw."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded.draw(requests)
