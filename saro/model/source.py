"""Find a model before its weights are read: config, tokenizer, stop ids, identity."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from saro.config import DEMO, THINK_TAGS, DataConfig, ModelConfig
from saro.data.chat_format import ChatFormat
from saro.errors import SaroError
from saro.manifest import read_manifest
from saro.model.adapter import AdapterSource, adapter_identity, find_adapter
from saro.model.architectures import TokenLimits, check_supported, token_limits
from saro.model.identity import defining_hashes, weight_hashes


@dataclass(frozen=True)
class ModelSource:
    """A model that exists and is supported. Its weights are not read yet.

    Attributes:
        path: folder or hub name of the model; that of the base model if there is an adapter.
        config: the model's config.
        tokenizer: its tokenizer.
        stop_ids: ids at which its generation ends.
        adapter: folder of the LoRA adapter that is continued, or None.
    """

    path: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    adapter: str | None = None

    def identity(self) -> dict[str, Any]:
        """Return what distinguishes this model from all others, in the form that a run's manifest has.

        ``name`` and ``commit`` say where it was found. The rest is compared by ``is_same_model``: ``files`` has the
        sha256 of every weight file, ``definition`` that of config, tokenizer and the model's own code, and ``adapter``
        that of the adapter's weights and its config, or is None.
        """
        commit = getattr(self.config, "_commit_hash", None)
        has_code = bool(getattr(self.config, "auto_map", None))
        return {
            "name": self.path,
            "commit": commit,
            "files": weight_hashes(self.path, commit),
            "definition": defining_hashes(self.path, commit, has_code),
            "adapter": adapter_identity(self.adapter) if self.adapter else None,
        }

    def token_limits(self) -> TokenLimits:
        """Return the limits on the model's sequences."""
        return token_limits(self.config)

    def chat_format(self, data: DataConfig, template_date: date) -> ChatFormat:
        """Return the format by which conversations become this model's token ids.

        If ``data`` names a chat template, it becomes the tokenizer's. Raises SaroError if it cannot be read.
        """
        if data.chat_template is not None:
            self.tokenizer.chat_template = _read_template(data.chat_template)
        tags = THINK_TAGS if data.think_tags is None else data.think_tags
        return ChatFormat(self.tokenizer, self.stop_ids, template_date, tags, data.template_variables or {})

    def continue_chat(self, data: DataConfig) -> DataConfig:
        """Return the options with the think tags, template variables and template date of the run that trained this model.

        The run is known by its manifest, beside the model's folder ``final/``. A copy of ``final/`` without its run, a
        base model and a hub model tell nothing: the options are then returned as they are. The chat template itself is
        in the folder, with the tokenizer.

        Raises:
            SaroError: an option is given and is not what the run had.
        """
        folder = Path(self.adapter or self.path)
        manifest = read_manifest(folder.resolve().parent) if folder.is_dir() else None
        if manifest is None:
            return data
        known = trained_format(manifest)
        for name, value in known.items():
            asked = getattr(data, name)
            if None not in (asked, value) and asked != value:
                raise SaroError(
                    f"data.{name} is {asked}, and the run that trained {folder} had {value}; leave the option out"
                )
        if data.chat_template is not None and template_hash(_read_template(data.chat_template)) != manifest.get(
            "template"
        ):
            raise SaroError(
                f"data.chat_template {data.chat_template} is not the template of the run that trained {folder}; "
                "leave the option out: the template is saved with the model"
            )
        return replace(data, **{name: value for name, value in known.items() if value is not None})


def trained_format(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of ``DataConfig`` that a run's conversations were formatted with; None for one that is not known."""
    trained = manifest["config"].get("data", {})
    tags = trained.get("think_tags")
    return {
        "think_tags": None if tags is None else tuple(tags),
        "template_variables": trained.get("template_variables"),
        "template_date": manifest["template_date"],
    }


def template_hash(template: str | dict[str, str] | None) -> str:
    """Return the sha256 of a chat template, as a run's manifest has it."""
    return hashlib.sha256(str(template or "").encode()).hexdigest()


def _read_template(file: str) -> str:
    try:
        # An editor may begin the file with a mark, which would be a part of every prompt.
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SaroError(f"{file}: is not UTF-8; save it as UTF-8") from error
    except OSError as error:
        raise SaroError(f"{file}: {error.strerror}; give the file of a Jinja template") from error


def find_model(options: ModelConfig) -> ModelSource:
    """Find a model and read its config, tokenizer and end tokens.

    If the name is a folder with an adapter, such as ``final/`` of a run, the model is the adapter's base, and the
    tokenizer is the one that was saved with the adapter.

    Raises:
        SaroError: there is no such model, its weights are not safetensors, its type is not supported, or the adapter
            was trained on another base or with another method.
    """
    adapter = find_adapter(options.name)
    if adapter is not None and {adapter.method, options.method} == {"lora", "qlora"}:
        raise SaroError(
            f"{options.name}: was trained with --model.method {adapter.method}, on another base than {options.method} "
            f"gives it; set --model.method {adapter.method}"
        )
    path = _find_weights(options.name if adapter is None else adapter.base)
    try:
        config = AutoConfig.from_pretrained(
            path, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
        check_supported(config)
        if adapter is not None:
            adapter.check_base(path, getattr(config, "_commit_hash", None))
    except (OSError, ValueError, StrictDataclassError) as error:
        raise SaroError(f"{options.name}: {first_line(error)}") from error
    return read_source(path, config, adapter, options)


def read_source(
    path: str, config: PretrainedConfig, adapter: AdapterSource | None, options: ModelConfig
) -> ModelSource:
    """Read the tokenizer and the end tokens of a model whose config has been read.

    Raises:
        SaroError: it has no tokenizer.
    """
    hub = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    try:
        has_tokenizer = adapter is not None and (Path(adapter.folder) / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(adapter.folder if has_tokenizer else path, **hub)
    except (OSError, ValueError) as error:
        raise SaroError(
            f"{options.name}: no tokenizer of this model loads; save it beside the weights (tokenizer.json, "
            f"tokenizer_config.json): {first_line(error)}"
        ) from error
    return ModelSource(
        path=path,
        config=config,
        tokenizer=tokenizer,
        stop_ids=_stop_ids(path, options.revision, config, tokenizer),
        adapter=None if adapter is None else adapter.folder,
    )


def _stop_ids(
    path: str, revision: str | None, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Return the end ids of the generation config, or else of the tokenizer; empty if neither has any."""
    try:
        generation = GenerationConfig.from_pretrained(path, revision=revision)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    eos = generation.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset(eos) if isinstance(eos, list) else frozenset({eos})


def _find_weights(name: str) -> str:
    """Return the folder with a model's safetensors, or the name if it can be a hub name."""
    if name == DEMO:
        raise SaroError(
            f"{DEMO}: is a name for recipes and tools only; give the demo model's folder (saro.demo.find_demo)"
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise SaroError(f"{name}: the base of an adapter holds an adapter itself; give the plain model")
        if not (folder / "config.json").is_file():
            raise SaroError(f"{name}: the folder holds no model (no config.json); give a folder saved by transformers")
        if not list(folder.glob("*.safetensors")):
            pickled = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
            weights = f"only pickled weights ({pickled[0]}), which can run code" if pickled else "no weights"
            raise SaroError(f"{name}: {weights}; save the model with transformers as safetensors")
        return str(folder)
    if folder.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SaroError(f"{name}: no such folder; give a model's folder or its hub name, such as org/model")
    return name


def first_line(error: Exception) -> str:
    """Return the first line of an error, and the second one too if the first ends with a colon."""
    first, *others = str(error).strip().split("\n")
    return f"{first} {others[0].strip()}" if others and first.endswith(":") else first
