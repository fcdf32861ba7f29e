"""Run folders for tests: opened and begun by one process, without a launcher, and sources of models."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_config

from saro.config import DataConfig, ModelConfig, RWConfig, TrainConfig
from saro.errors import SaroError
from saro.model.source import ModelSource
from saro.program import RunFlags
from saro.runs.folder import RunFolder

# Two commits of a hub model.
OLD, NEW = "a" * 40, "b" * 40


class OneProcess(SimpleNamespace):
    """Stands in for the parts of Runtime that a run's folder uses."""

    def __init__(self, is_main: bool = True) -> None:
        super().__init__(is_main=is_main, processes=1, threads=2, device=torch.device("cpu"), barriers=0, said=[])

    def barrier(self) -> None:
        self.barriers += 1

    def compare(self, values: dict[str, str], fix: str) -> None:
        """Nobody else has other values."""

    def on_main(self, decide):
        return decide()

    def say(self, text: str) -> None:
        self.said.append(text)


def open_run(folder: Path, config: RWConfig | None = None, *, resume=False, overwrite=False) -> RunFolder:
    return RunFolder.open(config or RWConfig(), str(folder), RunFlags(resume, overwrite), OneProcess())


def manifest_of(run: RunFolder, source: ModelSource, files: list[object], reports=None) -> dict[str, object]:
    chat = run.chat_format(source, DataConfig(**run.config["data"]))
    dtype = run.decide_dtype(OneProcess(), source, ModelConfig(**run.config["model"])).dtype
    return run.manifest(OneProcess(), source, chat, dtype, None, [str(file) for file in files], reports or {})


def begin(folder: Path, source: ModelSource, data_file: Path, config: RWConfig | None = None, **options) -> RunFolder:
    """Open and begin a run on one data file."""
    run = open_run(folder, config, **options)
    runtime = OneProcess()
    run.begin(runtime, manifest_of(run, source, [data_file]))
    return run


def refusal(folder: Path, config: RWConfig | None = None, **options) -> str:
    with pytest.raises(SaroError) as caught:
        open_run(folder, config, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_train(**changes) -> RWConfig:
    return RWConfig(train=TrainConfig(**changes))


def with_data(**changes) -> RWConfig:
    return RWConfig(data=DataConfig(**changes))


def contents(folder: Path) -> dict[str, bytes]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_hub_source(hub: Path, source: ModelSource, commit: str, **contents: str) -> ModelSource:
    """Put a commit of owner/name into the hub's cache, with files of these contents, and return it as a source.

    ``model_safetensors="W"`` is a large file, which the cache names by its sha256. A small one has a name of another kind.
    """
    snapshot = hub / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir(exist_ok=True)
    for name, content in ({"config_json": "{}", "model_safetensors": "W"} | contents).items():
        name = ".".join(name.rsplit("_", 1))
        data = content.encode()
        blob = sha256(data) if name.endswith(".safetensors") else hashlib.sha1(data).hexdigest()
        (hub / "blobs" / blob).write_bytes(b"" if name.endswith(".safetensors") else data)
        (snapshot / name).symlink_to(hub / "blobs" / blob)
    config = tiny_config()
    config._commit_hash = commit
    return replace(source, path="owner/name", config=config)
