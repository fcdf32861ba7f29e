"""Fixtures of the tests of run folders: a folder, a data file, a model and a cache of the hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from tiny import IM_END, tiny_config, tiny_tokenizer

from saro.model.source import ModelSource


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def data_file(tmp_path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "Why?", "answer": "So."}\n')
    return path


@pytest.fixture
def source(tmp_path) -> ModelSource:
    """Make a model whose weights are a file of arbitrary bytes."""
    weights = tmp_path / "model"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"weights")
    (weights / "config.json").write_text("{}")
    return ModelSource(str(weights), tiny_config(), tiny_tokenizer(), frozenset({IM_END}))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Give the test a cache of the hub of its own, and no network. Returns the folder of the model owner/name in it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub" / "models--owner--name"
