"""Load the model that a finished run trained, for the tools that people use after training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from saro.config import DataConfig, ModelConfig
from saro.data.chat_format import ChatFormat
from saro.errors import SaroError, nearest
from saro.manifest import read_manifest, trained_dtype
from saro.model.identity import is_same_model
from saro.model.load import load_policy
from saro.model.policy import Policy
from saro.model.source import ModelSource, find_model


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder that has ``final/``.

    Attributes:
        folder: the run's folder.
        manifest: what the run was made from.
        options: options that load ``final/`` with the method and the precision of the training.
        source: the model of ``final/``: an adapter and its base, or a full model.
    """

    folder: Path
    manifest: dict[str, Any]
    options: ModelConfig
    source: ModelSource

    @classmethod
    def open(cls, folder: str) -> FinishedRun:
        """Read the manifest, config and tokenizer. No weights are loaded yet.

        Raises:
            SaroError: the folder holds no finished run, or the base model is not the one that was trained.
        """
        path = Path(folder).expanduser()
        manifest = read_manifest(path)
        if manifest is None:
            raise SaroError(f"{folder}: {_no_run(path)}")
        if not (path / "final").is_dir():
            raise SaroError(f"{folder}: the run has not finished (no final/); continue it with --resume")
        trained = manifest["config"]["model"]
        options = ModelConfig(
            name=str(path / "final"),
            # The base that the run used, even if the hub has a newer one.
            revision=manifest["model"]["commit"] or trained["revision"],
            method=trained["method"],
            dtype=trained_dtype(manifest),
            trust_remote_code=trained["trust_remote_code"],
        )
        return cls(path, manifest, options, find_model(options))

    @property
    def is_full(self) -> bool:
        """True if all weights were trained, False for an adapter."""
        return self.source.adapter is None

    def chat_format(self, think_tags: tuple[str, str] | None = None) -> ChatFormat:
        """Return the format of the run's conversations. The chat template is the one saved with the tokenizer."""
        trained = self.manifest["config"]["data"]
        tags = think_tags or tuple(trained["think_tags"])
        data = DataConfig(think_tags=tags, template_variables=trained["template_variables"])
        return self.source.chat_format(data, date.fromisoformat(self.manifest["template_date"]))

    def load(self, device: torch.device) -> Policy:
        """Load the trained model in eval mode."""
        return load_policy(self.source, self.options, device, seed=0).eval()

    def base(self) -> tuple[ModelSource, ModelConfig]:
        """Return the model before training and the options that load it. For an adapter run, both are those of the run.

        Raises:
            SaroError: the model that full fine-tuning began with no longer exists, or its weights have changed.
        """
        if not self.is_full:
            return self.source, self.options
        options = replace(self.options, name=self.manifest["model"]["name"])
        source = find_model(options)
        if not is_same_model(self.manifest["model"], source.identity()):
            raise SaroError(f"{options.name}: the weights are not those that the run began with; restore them")
        return source, options

    def load_base(self, device: torch.device) -> Policy:
        """Load, in eval mode, the model that full fine-tuning began with."""
        return load_policy(*self.base(), device, seed=0).eval()


def this_device() -> torch.device:
    """Return the device of a single process: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _no_run(path: Path) -> str:
    """Return what is wrong with a folder without a manifest, and what to do."""
    if read_manifest(path.parent) is not None:
        return f"is a part of a run; give the run's folder, {path.parent}"
    if path.is_dir():
        return "holds no run (no manifest.json); give the folder that --train.output named"
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    runs = [item for item in beside if read_manifest(item) is not None]
    return "there is no such folder" + (
        nearest(str(path), runs) if runs else "; give the one that --train.output named"
    )
