"""LoRA adapters: create a new one, or load a trained one and continue training it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from saro.config import ModelConfig
from saro.errors import SaroError, nearest
from saro.files import file_hash
from saro.manifest import read_manifest
from saro.model.architectures import OUTSIDE_TEXT_MODEL, WRAPPERS, is_mixture
from saro.model.identity import weight_hashes

# Defaults for a new adapter.
RANK, ALPHA, DROPOUT = 16, 32, 0.0
WEIGHTS = "adapter_model.safetensors"
_BASE = "base_model_name_or_path"


@dataclass(frozen=True)
class AdapterSource:
    """A LoRA adapter on disk.

    Attributes:
        folder: holds adapter_config.json and the safetensors weights.
        base: the base model that it was trained on, as a folder or a hub name.
        method: "lora" or "qlora" if one of our runs wrote the adapter, else None.
        commit: commit of the base on the hub, if the adapter's config names one.
    """

    folder: str
    base: str
    method: str | None = None
    commit: str | None = None

    def check_base(self, path: str, commit: str | None) -> None:
        """Raise SaroError if the adapter was trained on a base with other weights than those in ``path``.

        Files can be compared only for adapters of our own runs, because a run's manifest lies beside its ``final/``. An
        adapter from elsewhere names its base, and perhaps the commit of it.

        Args:
            path: folder of the base model, or its hub name.
            commit: commit of a hub model.
        """
        manifest = read_manifest(Path(self.folder).resolve().parent)
        model = {} if manifest is None else manifest.get("model", {})
        hashes: dict[str, str] = model.get("files", {})
        # A base in a folder has no commit.
        trained_on = model.get("commit") if manifest is not None or commit is None else self.commit
        if commit is not None and commit == trained_on:
            return
        found = weight_hashes(path, commit) if hashes else {}
        wrong = [name for name, expected in hashes.items() if found.get(name) != expected]
        if trained_on is not None and (wrong or not hashes):
            raise SaroError(
                f"{self.folder}: was trained on commit {trained_on} of {path}; set --model.revision {trained_on}"
            )
        if wrong:
            raise SaroError(
                f"{self.folder}: was trained on another {wrong[0]} than that of {path}; restore the base model"
            )


def find_adapter(name: str) -> AdapterSource | None:
    """Return the adapter in the folder ``name``, or None if the folder holds none.

    Raises:
        SaroError: the adapter is not plain LoRA saved as safetensors.
    """
    folder = Path(name).expanduser()
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, base = config["peft_type"], config[_BASE]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SaroError(
            f"{file}: is not an adapter config ({type(error).__name__}); save it again with peft"
        ) from error
    if kind != "LORA":
        raise SaroError(f"{name}: an adapter of type {kind} cannot be continued; only LORA can")
    for option in ("modules_to_save", "trainable_token_indices", "target_parameters"):
        if config.get(option):
            raise SaroError(
                f"{name}: the adapter has {option}, weights of its own that the fused head and kernels would not read; "
                "merge it into its base first"
            )
    if config.get("bias", "none") != "none":
        raise SaroError(f"{name}: the adapter trains biases, which is not supported; merge it into its base first")
    if not (folder / WEIGHTS).is_file():
        raise SaroError(f"{name}: the adapter has no {WEIGHTS}; save it with peft as safetensors")
    if not base:
        raise SaroError(f"{file}: names no base model; write its folder or hub name as {_BASE}")
    manifest = read_manifest(folder.resolve().parent)
    method = None if manifest is None else manifest["config"].get("model", {}).get("method")
    revision = config.get("revision") or ""
    # Other programs may write a branch here.
    commit = revision if re.fullmatch("[0-9a-f]{40}", revision) else None
    return AdapterSource(str(folder), base, method, commit)


def adapter_identity(folder: str) -> dict[str, Any]:
    """Return what identifies an adapter: the sha256 of its weights, and its config."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    # Ignore the base's path, because a copy is the same base. Sort lists, because peft writes sets in arbitrary order.
    settings = {name: sorted(v) if isinstance(v, list) else v for name, v in config.items() if name != _BASE}
    return {WEIGHTS: file_hash(Path(folder) / WEIGHTS), "config": settings}


def continued_adapter(model: PreTrainedModel, folder: str, options: ModelConfig) -> PeftModel:
    """Load the adapter in ``folder`` onto its base model for further training, with its parameters in fp32.

    Raises:
        SaroError: an option asks for a rank, alpha, scale or target layers that the adapter does not have, or its weights
            do not fit the base.
    """
    config = LoraConfig.from_pretrained(folder)
    saved = {
        "lora_rank": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_rslora": config.use_rslora,
        "lora_targets": config.target_modules,
    }
    for name, value in saved.items():
        asked = getattr(options, name)
        if asked is None:
            continue
        same = set(asked) == set(value) if name == "lora_targets" else asked == value
        if not same:
            raise SaroError(
                f"model.{name} is {asked}, and the adapter in {folder} has {value}; leave the option out, "
                "or train a new adapter on a merged model (saro export --merge)"
            )
    config.inference_mode = False
    if options.lora_dropout is not None:
        config.lora_dropout = options.lora_dropout
    path = Path(folder) / WEIGHTS
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
        # peft replaces each layer that it adapts with a wrapper, so a changed layer means that it is adapted.
        if model.get_input_embeddings() is not embedding or model.get_output_embeddings() is not head:
            raise SaroError(f"{folder}: the adapter is on the embedding or the LM head; the fused head cannot read it")
        result = set_peft_model_state_dict(adapted, load_file(path))
    except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
        first = str(error).strip().partition("\n")[0]
        raise SaroError(f"{path}: does not fit the base model ({first})") from error
    missing = sorted(name for name in result.missing_keys if "lora_" in name)
    wrong = [*missing, *sorted(result.unexpected_keys)]
    if wrong:
        raise SaroError(
            f"{path}: does not fit the adapter's config or its base: {wrong[0]} and {len(wrong) - 1} others"
        )
    return adapted


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of the decoder's linear layers as PEFT matches them: the last part only, such as q_proj.

    The LM head is not among them. If the last part is a number, which PEFT would find in other lists too, the name has
    two parts, such as ffn.0.
    """
    return sorted({_last_part(name) for name, _ in _decoder_linears(model)})


def _last_part(name: str) -> str:
    """Return the last part of a module's name; if it is a number, with the part before it."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def _decoder_linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """Yield (name, layer) for each linear layer of the decoder that can have an adapter.

    Those of a mixture of experts are in its attention: PEFT would take the name of a dense MLP's layer for the experts too.
    """
    only_attention = is_mixture(model.config)
    for name, layer in model.get_decoder().named_modules():
        if isinstance(layer, nn.Linear) and (not only_attention or ".self_attn." in name):
            yield name, layer


def new_adapter(model: PreTrainedModel, options: ModelConfig, seed: int) -> PeftModel:
    """Put a new adapter on the model, with initial values drawn from ``seed``.

    Raises:
        SaroError: a target is not a linear layer of the decoder.
    """
    valid = linear_layers(model)
    if not valid:
        raise SaroError("the decoder has no linear layers for adapters; set --model.method full")
    targets = valid if options.lora_targets is None else options.lora_targets
    if not targets:
        raise SaroError("model.lora_targets is empty; name linear layers, or leave the option out for all of them")
    layers = [f".{name}" for name, _ in _decoder_linears(model)]
    excluded = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    excluded_names = {_last_part(name) for name, layer in model.named_modules() if id(layer) in excluded}
    for target in targets:
        last = _last_part(target)
        if last in excluded_names:
            raise SaroError(
                f"model.lora_targets: {target} is the embedding or the LM head; the fused head cannot read an adapter, "
                "and if the two are tied, a merge would change both; leave it out"
            )
        if last not in valid:
            raise SaroError(f"model.lora_targets: the model has no linear layer {target!r}{nearest(last, valid)}")
        if not any(layer.endswith(f".{target}") for layer in layers):
            raise SaroError(
                f"model.lora_targets: no linear layer's name ends with {target!r}; {last!r} matches all of that name"
            )
    rank = RANK if options.lora_rank is None else options.lora_rank
    alpha = ALPHA if options.lora_alpha is None else options.lora_alpha
    dropout = DROPOUT if options.lora_dropout is None else options.lora_dropout
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=bool(options.lora_rslora),
        lora_dropout=dropout,
        target_modules=list(targets),
        exclude_modules=OUTSIDE_TEXT_MODEL if model.config.model_type in WRAPPERS else None,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    return get_peft_model(model, config, autocast_adapter_dtype=True)
