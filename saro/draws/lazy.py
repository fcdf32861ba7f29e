"""Delays the loading of a model until something has to be drawn from it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from saro.config import ModelConfig
from saro.draws.local import LocalGenerator, identify, order_requests
from saro.draws.request import Draw, Generator, Request
from saro.model.source import ModelSource


class LazyGenerator(Generator):
    """A local model whose weights are read when its first text is drawn: a store that has all texts costs no loading.

    Arguments and errors are those of ``LocalGenerator.load``. The files are identified at once.
    """

    def __init__(
        self,
        source: ModelSource,
        options: ModelConfig,
        stop_ids: Collection[int],
        device: torch.device,
        *,
        merge: bool = True,
        batch: int | None = None,
        progress: bool = True,
    ) -> None:
        model = (source, options, stop_ids, device)
        self._identity = identify(*model, merge=merge)
        self._load = partial(LocalGenerator.load, *model, merge=merge, batch=batch, progress=progress)
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
