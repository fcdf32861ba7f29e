"""Tokenizer and model: full fine-tuning, LoRA and QLoRA."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from saro.config import DEMO, DataConfig, ModelConfig
from saro.data.chat_format import ChatFormat
from saro.errors import SaroError
from saro.files import file_hash
from saro.model.adapter import adapter_identity, continued_adapter, find_adapter, new_adapter
from saro.model.architectures import check_supported
from saro.model.attention import choose_backend
from saro.model.fused_lora import fuse_lora
from saro.model.liger import check_liger, use_liger
from saro.model.policy import Policy
from saro_kernels import choose_impl


@dataclass(frozen=True)
class ModelSource:
    """A model that is known to exist and to be supported, before its weights are read.

    Attributes:
        path: folder, or hub name; of the base model, where the name is an adapter's.
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
        """What tells these weights from others: sha256 of every weight file, or name and commit of a hub model.

        ``adapter``: the same of an adapter's weights, and its config, or None.
        """
        folder = Path(self.path)
        weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        return {
            "name": self.path,
            "commit": getattr(self.config, "_commit_hash", None),
            "files": {p.name: file_hash(p) for p in weights},
            "adapter": adapter_identity(self.adapter) if self.adapter else None,
        }

    def chat_format(self, data: DataConfig, template_date: date) -> ChatFormat:
        """How conversations become token ids with this model."""
        if data.chat_template is not None:
            try:
                self.tokenizer.chat_template = Path(data.chat_template).read_text(encoding="utf-8")
            except OSError as error:
                raise SaroError(f"{data.chat_template}: {error.strerror}; give the file of a Jinja template") from error
        return ChatFormat(self.tokenizer, self.stop_ids, template_date, data.think_tags, data.template_variables)


def find_model(options: ModelConfig) -> ModelSource:
    """Find a model and read what is small: config, tokenizer, end tokens.

    Where the name is a folder with an adapter, such as ``final/`` of a run, the model is the adapter's base, and the
    tokenizer the one that was saved with the adapter.

    Raises:
        SaroError: there is no such model, its weights are not safetensors, its kind is not supported, or the base is
            not the one that the adapter was trained on.
    """
    adapter = find_adapter(options.name)
    if adapter is not None and {adapter.method, options.method} == {"lora", "qlora"}:
        raise SaroError(
            f"{options.name}: was trained with --model.method {adapter.method}, on another base than {options.method} "
            f"gives it; set --model.method {adapter.method}"
        )
    path = _resolve(options.name if adapter is None else adapter.base)
    hub = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, **hub)
        check_supported(config)
        if adapter is not None:
            adapter.check_base(path, getattr(config, "_commit_hash", None))
    except (OSError, ValueError, StrictDataclassError) as error:
        raise SaroError(f"{options.name}: {_first_line(error)}") from error
    try:
        own = adapter is not None and (Path(adapter.folder) / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(adapter.folder if own else path, **hub)
    except (OSError, ValueError) as error:
        raise SaroError(
            f"{options.name}: no tokenizer of this model loads; save it beside the weights (tokenizer.json, "
            f"tokenizer_config.json): {_first_line(error)}"
        ) from error
    try:
        generation = GenerationConfig.from_pretrained(path, revision=options.revision)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    eos = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    stop_ids = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return ModelSource(path, config, tokenizer, stop_ids, adapter.folder if adapter is not None else None)


def _resolve(name: str) -> str:
    if name == DEMO:
        from saro.demo.demo_model import demo_model

        return str(demo_model())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise SaroError(f"{name}: the base of an adapter holds an adapter itself; give the plain model")
        if not (folder / "config.json").is_file():
            raise SaroError(f"{name}: the folder holds no model (no config.json); give a folder saved by transformers")
        if not list(folder.glob("*.safetensors")):
            pickled = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
            found = f"only pickled weights ({pickled[0]}), which can run code" if pickled else "no weights"
            raise SaroError(f"{name}: {found}; save the model with transformers as safetensors")
        return str(folder)
    if folder.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SaroError(f"{name}: no such folder; give a model's folder or its hub name, such as org/model")
    return name


def load_policy(source: ModelSource, options: ModelConfig, device: torch.device, seed: int) -> Policy:
    """Load the weights and make them trainable as ``options`` say.

    Trainable parameters are fp32 in every mode. Under LoRA and QLoRA the base stays in the compute dtype. An adapter of
    the source goes on as the one adapter: neither merged nor stacked.

    Args:
        device: where the model goes.
        seed: of the adapters' initial values.

    Raises:
        SaroError: for what cannot be loaded or trained.
    """
    if source.adapter is not None and options.method == "full":
        raise SaroError(
            f"{options.name}: an adapter cannot be trained with --model.method full; give lora or qlora, "
            "or merge it first with saro export --merge"
        )
    dtype = compute_dtype(options.dtype, device)
    try:
        attention = choose_backend(options.attention, device, dtype, source.config)
        head = choose_impl(options.head, device, dtype)
    except ValueError as error:
        raise SaroError(str(error)) from error
    if options.liger:
        check_liger(source.config.model_type, device)
    model = _load_base(source, options, device, torch.float32 if options.method == "full" else dtype)
    _check_head(model)
    if options.liger:
        use_liger(model)
    if options.method == "full":
        model.requires_grad_(True)
    else:
        model.requires_grad_(False)
        model = (
            new_adapter(model, options, seed)
            if source.adapter is None
            else continued_adapter(model, source.adapter, options)
        )
        if options.fused_lora:
            fuse_lora(model)
    if options.gradient_checkpointing:
        lm = model.get_base_model() if isinstance(model, PeftModel) else model
        lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    autocast = dtype if options.method == "full" and dtype != torch.float32 else None
    return Policy(model, attention=attention, head=head, autocast=autocast)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve "auto": bfloat16 on CUDA, float32 elsewhere. Raises SaroError on a GPU without bfloat16."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise SaroError(f"{torch.cuda.get_device_name(device)} has no bfloat16; set --model.dtype float32")
    return getattr(torch, name)


def dropout_options(config: PretrainedConfig) -> dict[str, float]:
    """The model's own dropout rates, by their names in its config."""
    return {name: value for name, value in config.to_dict().items() if isinstance(value, float) and "drop" in name}


def _load_base(source: ModelSource, options: ModelConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    config = deepcopy(source.config)
    if not options.dropout:
        for name in dropout_options(config):
            setattr(config, name, 0.0)
    quantization = {}
    if options.method == "qlora":
        # Embeddings and norms are no linear layers; the head is one, and stays in the compute dtype by name.
        quantization["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head"],
        )
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            source.path,
            config=config,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="eager",  # any model has it; the policy puts packed attention in its place
            device_map={"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **quantization,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise SaroError(f"{options.name}: {_first_line(error)}") from error
    # transformers fills these with random numbers and goes on.
    wrong = sorted(loading["missing_keys"]) + sorted(key for key, *_ in loading["mismatched_keys"])
    if wrong:
        raise SaroError(
            f"{options.name}: the files hold no weight of the right shape for {wrong[0]}"
            + (f" and {len(wrong) - 1} others" if len(wrong) > 1 else "")
            + "; they are incomplete, or another model's; fetch or save the model again"
        )
    for layer in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks the weight in place at the first pass without gradient, and
        # every gradient after that is wrong.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def _check_head(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise SaroError(f"the LM head is a {type(head).__name__}, not a linear layer; it is not supported")


def _first_line(error: Exception) -> str:
    """The first line of a message, and the second where the first announces it."""
    first, *others = str(error).strip().split("\n")
    return f"{first} {others[0].strip()}" if others and first.endswith(":") else first
