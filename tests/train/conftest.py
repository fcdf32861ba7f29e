"""What several tests of training share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tiny import Training


@pytest.fixture
def training(tiny_model, records_file, examples, tmp_path) -> Callable[..., Training]:
    """Return a function that makes a run on 24 short records, in a folder of its own."""
    file = records_file(examples)

    def make(output: str = "run", **options: object) -> Training:
        return Training.on(tiny_model(), file, tmp_path / output, **options)

    return make
