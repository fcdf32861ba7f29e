"""A run that has finished: what it trained, loaded as it was trained. For what is done with a model after training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from saro.config import DataConfig, ModelConfig
from saro.data.chat_format import ChatFormat
from saro.errors import SaroError, nearest
from saro.model.load import ModelSource, find_model, load_policy
from saro.model.policy import Policy
from saro.runs.folder import manifest_of


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, once ``final/`` is there.

    Attributes:
        folder: of the run.
        manifest: what it was made from.
        options: how ``final/`` is loaded: with the method and the precision of the training.
        source: the model of ``final/``: an adapter and its base, or a full model.
    """

    folder: Path
    manifest: dict[str, Any]
    options: ModelConfig
    source: ModelSource

    @classmethod
    def open(cls, folder: str) -> FinishedRun:
        """Read what is small. No weights are loaded yet.

        Raises:
            SaroError: the folder holds no finished run, or the base model is not the one that was trained.
        """
        path = Path(folder).expanduser()
        manifest = manifest_of(path)
        if manifest is None:
            raise SaroError(f"{folder}: {_no_run(path)}")
        if not (path / "final").is_dir():
            raise SaroError(f"{folder}: the run has not finished (no final/); go on with it with --resume")
        trained = manifest["config"]["model"]
        on_gpu = manifest["machine"]["device"].startswith("cuda")
        automatic = "bfloat16" if on_gpu else "float32"
        options = ModelConfig(
            name=str(path / "final"),
            # The base is that of the run even where the hub has a newer one.
            revision=manifest["model"]["commit"] or trained["revision"],
            method=trained["method"],
            dtype=automatic if trained["dtype"] == "auto" else trained["dtype"],
            trust_remote_code=trained["trust_remote_code"],
        )
        return cls(path, manifest, options, find_model(options))

    @property
    def full(self) -> bool:
        """All weights were trained, and not an adapter."""
        return self.source.adapter is None

    def chat_format(self, think_tags: tuple[str, str] | None = None) -> ChatFormat:
        """How the run's conversations became token ids; the chat template is the one saved with the tokenizer."""
        of_run = self.manifest["config"]["data"]
        tags = think_tags or tuple(of_run["think_tags"])
        data = DataConfig(think_tags=tags, template_variables=of_run["template_variables"])
        return self.source.chat_format(data, date.fromisoformat(self.manifest["template_date"]))

    def load(self, device: torch.device) -> Policy:
        """The trained model, in evaluation mode."""
        return load_policy(self.source, self.options, device, seed=0).eval()

    def base(self) -> tuple[ModelSource, ModelConfig]:
        """The model before training, and how to load it. That of an adapter is the same, with the adapter off.

        Raises:
            SaroError: the model that full fine-tuning began with is not there any more, or its weights have changed.
        """
        if not self.full:
            return self.source, self.options
        options = replace(self.options, name=self.manifest["model"]["name"])
        source = find_model(options)
        if source.identity()["files"] != self.manifest["model"]["files"]:
            raise SaroError(f"{options.name}: the weights are not those that the run began with; restore them")
        return source, options

    def load_base(self, device: torch.device) -> Policy:
        """The model with which full fine-tuning began, in evaluation mode."""
        return load_policy(*self.base(), device, seed=0).eval()


def this_device() -> torch.device:
    """Where one process computes: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _no_run(path: Path) -> str:
    """What is wrong with a folder without a manifest, and what to do."""
    if manifest_of(path.parent) is not None:
        return f"is a part of a run; give the run's folder, {path.parent}"
    if path.is_dir():
        return "holds no run (no manifest.json); give the folder that --train.output named"
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    runs = [item for item in beside if manifest_of(item) is not None]
    return "there is no such folder" + (nearest(str(path), runs) if runs else "; give that which --train.output named")
