"""Finds the models under test: a run, a folder, a hub model or a server, each with its chat format; and loads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from saro.config import THINK_TAGS, DataConfig, ModelConfig
from saro.data.chat_format import ChatFormat
from saro.demo import find_demo
from saro.draws.endpoint import EndpointGenerator, EndpointOptions
from saro.draws.lazy import LazyGenerator
from saro.draws.request import Generator
from saro.errors import SaroError
from saro.evaluate.options import LoadOptions, ServerOptions
from saro.manifest import read_manifest
from saro.model.adapter import find_adapter
from saro.model.load import dtype_name, load_policy, resolve_dtype
from saro.model.policy import Policy
from saro.model.source import ModelSource, find_model, first_line, template_hash, trained_format
from saro.runs.finished import FinishedRun, this_device

# Templates that show today's date show this one: with the real date, every answer and verdict would be drawn anew each day.
FIXED_DATE = date(2025, 1, 1)


@dataclass(frozen=True)
class Subject:
    """A model under test. Its weights are not read yet.

    Attributes:
        name: its name in tables.
        spec: as the user named it.
        think_tags: tags of its reasoning.
        chat: how its prompts become token ids; None for a server without a tokenizer.
        source, options: a local model, and how it is loaded; None for a server.
        server: how a server is asked; None for a local model.
    """

    name: str
    spec: str
    think_tags: tuple[str, str]
    chat: ChatFormat | None
    source: ModelSource | None = None
    options: ModelConfig | None = None
    server: EndpointOptions | None = None

    def generator(self, load: LoadOptions, device: torch.device, progress: bool = True) -> Generator:
        """Return what generates this model's answers. The weights of a local model are read when the first is drawn."""
        if self.server is not None:
            return EndpointGenerator(self.server)
        return LazyGenerator(
            self.source,
            self.options,
            self.chat.stop_ids,
            device,
            merge=load.merge,
            batch=load.batch,
            progress=progress,
        )

    def load_policy(self, device: torch.device) -> Policy:
        """Load a local model in eval mode, to score texts that are given."""
        return load_policy(self.source, self.options, device, seed=0).eval()

    def describe_format(self) -> dict[str, Any]:
        """Return what decides how this model's prompts become tokens, as far as it is known."""
        described: dict[str, Any] = {"think_tags": list(self.think_tags)}
        if self.chat is not None:
            described |= {
                "template": template_hash(self.chat.tokenizer.chat_template),
                "template_date": self.chat.template_date.isoformat(),
                "template_variables": dict(self.chat.template_variables or {}),
            }
        return described

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says of this model. Its files are hashed."""
        described = {"name": self.name, "spec": self.spec, **self.describe_format()}
        if self.source is not None:
            described |= {"model": self.source.identity(), "method": self.options.method}
        if self.server is not None:
            described |= {"server": self.server.url, "model": self.server.model, "revision": self.server.revision}
        return described


def find_subjects(
    models: Sequence[str], names: Sequence[str], load: LoadOptions, server: ServerOptions, data: DataConfig
) -> list[Subject]:
    """Find models by what the user calls them, before any weights are read.

    What a run was trained with, its method, think tags, template variables and date, holds for the models without a run
    too: the base model answers in the format of the model that was trained from it.

    Raises:
        SaroError: there is no such model, two models have one name, or a model and its base have different templates.
    """
    labels = [*names] if names else [*models]
    if len(set(labels)) < len(labels):
        raise SaroError("--models has a name twice; give different names with --names")
    for name in names:
        if "/" in name:
            raise SaroError(
                f"--names: {name!r} has a slash, which separates the parts of an answer's key; leave it out"
            )
    runs = [_find_run(spec) for spec in models]
    method, default = _first_run_setting(data, runs)
    subjects = []
    for label, spec, run in zip(labels, models, runs, strict=True):
        name = label if names else _short_name(spec)
        if _is_url(spec):
            subjects.append(_find_server(name, spec, server, default))
        else:
            subjects.append(_find_local(name, spec, run, load, data, default, method))
    labels = [subject.name for subject in subjects]
    if len(set(labels)) < len(labels):
        raise SaroError(f"--models are called {', '.join(labels)} for short; give each a name with --names")
    _check_same_templates(subjects)
    return subjects


def find_measured(run: str | None, model: str | None) -> Subject:
    """Find the model whose general ability is measured: that of a run, or ``model``; with both, ``model`` as the run's base.

    Its choices are scored and its texts are drawn in one dtype: that of the run, or else bfloat16 on a GPU and float32 on a CPU.
    ``find_subjects`` leaves the dtype open, and texts are then drawn in the faster one.

    Args:
        run: folder of a finished run.
        model: folder or hub name; in the format and precision of the run, if there is one.

    Raises:
        SaroError: neither is named, there is no such model, or the run has not finished.
    """
    if run is None and model is None:
        raise SaroError("nothing to measure; name a finished --run, or a --model")
    finished = None if run is None else FinishedRun.open(run)
    if model is None:
        source, options, chat = finished.source, finished.options, finished.chat_format()
    else:
        options = _measured_options(model, finished)
        source = find_model(options)
        chat = _measured_chat(source, finished)
    name = model or run
    return Subject(name, name, chat.think_tags, chat, source=source, options=options)


def _measured_options(model: str, run: FinishedRun | None) -> ModelConfig:
    adapter = find_adapter(model)
    # LoRA and full fine-tuning compute with the same dense base.
    method = "lora" if adapter is None or adapter.method is None else adapter.method
    if run is None:
        return ModelConfig(name=model, method=method, dtype=dtype_name(resolve_dtype("auto", this_device())))
    is_quantized = run.options.method == "qlora" and adapter is None
    return ModelConfig(
        name=model,
        method="qlora" if is_quantized else method,
        dtype=run.options.dtype,
        trust_remote_code=run.options.trust_remote_code,
    )


def _measured_chat(source: ModelSource, run: FinishedRun | None) -> ChatFormat:
    """Return the format of a run for another model; without a run the model's own, on the day of the measurement."""
    if run is not None:
        trained = run.chat_format()
        source.tokenizer.chat_template = trained.tokenizer.chat_template
        return replace(trained, tokenizer=source.tokenizer, stop_ids=source.stop_ids)
    data = source.continue_chat(DataConfig())
    # As lm-eval's own class does.
    day = date.today() if data.template_date is None else _parse_date(data.template_date)
    return source.chat_format(data, day)


def _is_url(spec: str) -> bool:
    return spec.startswith(("http://", "https://"))


def _find_run(spec: str) -> tuple[Path, Mapping[str, Any]] | None:
    """Return the folder and manifest of the run whose folder, or ``final/``, is named."""
    if _is_url(spec):
        return None
    folder = Path(spec).expanduser()
    for run in (folder, folder.resolve().parent):
        manifest = read_manifest(run)
        if manifest is not None and "model" in manifest["config"]:
            return run, manifest
    return None


def _first_run_setting(
    data: DataConfig, runs: list[tuple[Path, Mapping[str, Any]] | None]
) -> tuple[str | None, DataConfig]:
    """Return the method, and the format of conversations, of the first run among the models."""
    for run in runs:
        if run is None:
            continue
        missing = {name: value for name, value in trained_format(run[1]).items() if getattr(data, name) is None}
        return run[1]["config"]["model"].get("method"), replace(data, **missing)
    return None, data


def _find_local(
    name: str,
    spec: str,
    run: tuple[Path, Mapping[str, Any]] | None,
    load: LoadOptions,
    asked: DataConfig,
    default: DataConfig,
    default_method: str | None,
) -> Subject:
    """Find a model on this machine or the hub."""
    manifest = None if run is None else run[1]
    path = find_demo(spec)
    if run is not None and run[0] == Path(spec).expanduser():
        path = str(run[0] / "final")
        if not Path(path).is_dir():
            raise SaroError(f"{spec}: the run has not finished (no final/); continue it with --resume")
    adapter = find_adapter(path)
    trained = None if manifest is None else manifest["config"]["model"].get("method")
    method = load.method or (None if adapter is None else adapter.method) or trained or default_method
    commit = None if manifest is None else manifest.get("model", {}).get("commit")
    options = ModelConfig(
        name=path,
        revision=commit,
        # Full fine-tuning and LoRA compute with the same dense base.
        method="qlora" if method == "qlora" else "lora",
        dtype=load.dtype,
        trust_remote_code=load.trust_remote_code,
    )
    source = find_model(options)
    data = default if run is None else source.continue_chat(asked)
    chat = source.chat_format(data, _parse_date(data.template_date))
    return Subject(name, spec, chat.think_tags, chat, source=source, options=options)


def _find_server(name: str, spec: str, server: ServerOptions, data: DataConfig) -> Subject:
    """Describe a server among the models, "URL#MODEL"."""
    url, _, model = spec.partition("#")
    tags = data.think_tags or THINK_TAGS
    endpoint = EndpointOptions(
        url=url,
        model=model or None,
        key_env=server.key_env,
        revision=server.revision,
        concurrency=server.concurrency,
        timeout=server.timeout,
        think_tags=tags,
    )
    chat = None if server.tokenizer is None else _read_chat_format(server.tokenizer, data, tags)
    return Subject(name, spec, tags, chat, server=endpoint)


def _read_chat_format(name: str, data: DataConfig, tags: tuple[str, str]) -> ChatFormat:
    """Return the chat format of a tokenizer without its model."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(find_demo(name))
    except (OSError, ValueError) as error:
        raise SaroError(f"--server.tokenizer {name}: {first_line(error)}") from error
    stop_ids = frozenset(() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))
    return ChatFormat(tokenizer, stop_ids, _parse_date(data.template_date), tags, data.template_variables or {})


def _parse_date(text: str | None) -> date:
    """Return the date that ``strftime_now`` gives to templates; ``FIXED_DATE`` if neither a run nor an option gives one."""
    if text is None:
        return FIXED_DATE
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise SaroError(f"--data.template_date is {text!r}; write it as YYYY-MM-DD") from error


def _short_name(spec: str) -> str:
    """Return a short name for tables: the folder of the run, the last part of a path, or the model of a URL."""
    url, _, model = spec.partition("#")
    if _is_url(spec):
        return model.rpartition("/")[2] or url.split("//")[1].partition("/")[0]
    parts = [part for part in spec.split("/") if part not in ("", ".", "final")]
    return parts[-1] if parts else spec


def _check_same_templates(subjects: list[Subject]) -> None:
    """Raise SaroError if two models with the same base read their prompts in different formats."""
    by_base: dict[str, Subject] = {}
    for subject in subjects:
        if subject.source is None:
            continue
        first = by_base.setdefault(subject.source.path, subject)
        mine, theirs = subject.describe_format(), first.describe_format()
        date = ("template_date",) if subject.chat.template.shows_date else ()
        for name in ("template", *date, "template_variables", "think_tags"):
            if mine[name] != theirs[name]:
                raise SaroError(
                    f"{subject.name} and {first.name} have the same base and differ in {name}, so their answers cannot be "
                    "compared; evaluate them apart, or train them in one format"
                )
