"""Finds the model whose general ability is measured: that of a finished run, or another one in the run's chat format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from saro.config import DataConfig, ModelConfig
from saro.data.chat_format import ChatFormat
from saro.draws.request import Generator
from saro.errors import SaroError
from saro.model.adapter import find_adapter
from saro.model.load import load_policy, resolve_dtype
from saro.model.policy import Policy
from saro.model.source import ModelSource, find_model, template_hash
from saro.runs.finished import FinishedRun, this_device


@dataclass(frozen=True)
class MeasuredModel:
    """A model that exists. Its weights are not read yet.

    Attributes:
        name: as the user named it.
        source: where it is.
        options: how it is loaded.
        chat: how conversations become its tokens.
    """

    name: str
    source: ModelSource
    options: ModelConfig
    chat: ChatFormat

    @classmethod
    def find(cls, run: str | None, model: str | None) -> MeasuredModel:
        """Find the model of a run, or ``model``; with both, ``model`` in the format and precision of the run.

        Raises:
            SaroError: neither is named, there is no such model, or the run has not finished.
        """
        if run is None and model is None:
            raise SaroError("nothing to measure; name a finished --run, or a --model")
        finished = None if run is None else FinishedRun.open(run)
        if model is None:
            return cls(run, finished.source, finished.options, finished.chat_format())
        adapter = find_adapter(model)
        # LoRA and full fine-tuning compute with the same dense base.
        method = "lora" if adapter is None or adapter.method is None else adapter.method
        # Resolved here, so that choices and texts come from the same computation: a generator resolves it by speed.
        dtype = str(resolve_dtype("auto", this_device())).removeprefix("torch.")
        options = ModelConfig(name=model, method=method, dtype=dtype)
        if finished is not None:
            is_quantized = finished.options.method == "qlora" and adapter is None
            options = replace(
                options,
                method="qlora" if is_quantized else method,
                dtype=finished.options.dtype,
                trust_remote_code=finished.options.trust_remote_code,
            )
        source = find_model(options)
        if finished is not None:
            trained = finished.chat_format()
            source.tokenizer.chat_template = trained.tokenizer.chat_template
            return cls(model, source, options, replace(trained, tokenizer=source.tokenizer, stop_ids=source.stop_ids))
        data = source.continue_chat(DataConfig())
        day = date.today() if data.template_date is None else date.fromisoformat(data.template_date)
        return cls(model, source, options, source.chat_format(data, day))

    def load_policy(self) -> Policy:
        """Load the model that scores, in eval mode."""
        return load_policy(self.source, self.options, this_device(), seed=0).eval()

    def load_generator(self) -> Generator:
        """Load the model that generates."""
        # Here, because log-likelihoods need no generator.
        from saro.draws.local import LocalGenerator

        return LocalGenerator.load(self.source, self.options, self.chat.stop_ids, this_device())

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says of this model: contents, format and precision."""
        return {
            "name": self.name,
            "model": self.source.identity(),
            "method": self.options.method,
            "dtype": self.options.dtype,
            "device": str(this_device()),
            "template": template_hash(self.chat.tokenizer.chat_template),
            "template_date": self.chat.template_date.isoformat(),
            "template_variables": dict(self.chat.template_variables or {}),
            "think_tags": list(self.chat.think_tags),
        }
