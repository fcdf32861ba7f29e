"""Loads policies from the folders of tiny models, and makes random records and packs for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saro.config import ModelConfig
from saro.data.dataset import ExampleSet
from saro.data.packs import lay_out
from saro.data.tree import ScoredSequence, build_tree
from saro.errors import SaroError
from saro.model.load import load_policy
from saro.model.source import find_model

CPU = torch.device("cpu")


def load(name, method="lora", seed=0, **options):
    options = ModelConfig(name=str(name), method=method, **options)
    return load_policy(find_model(options), options, CPU, seed)


def refused(name, match, method="lora", **options):
    """Check that loading raises a SaroError of one line that matches ``match``, and return the line."""
    with pytest.raises(SaroError, match=match) as caught:
        load(name, method, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def a_pack(lengths=(20, 9)):
    rng = np.random.default_rng(0)
    trees = [
        build_tree([ScoredSequence(rng.integers(4, 260, n).astype(np.int32), 3, np.zeros(n - 3, np.uint8), 0)])
        for n in lengths
    ]
    return lay_out(trees)


def examples_of(*lengths, seed=0):
    """Make random records of these lengths, in tokens."""
    n = len(lengths)
    return ExampleSet(
        tokens=np.random.default_rng(seed).integers(4, 264, sum(lengths)).astype(np.int32),
        offsets=np.cumsum([0, *lengths]),
        prompt_tokens=np.full(n, 1, np.int32),
        think_tokens=np.zeros(n, np.int32),
        kinds=np.zeros(n, np.uint8),
        ids=tuple(f"r{i}" for i in range(n)),
    )


DATA = examples_of(21, 12, 34)  # 21 and 34 tokens exceed the window of 8
