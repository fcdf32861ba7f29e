"""Load a model's weights as a policy: full fine-tuning, LoRA and QLoRA."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import torch
from bitsandbytes.nn import Params4bit
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import BitsAndBytesConfig, Mxfp4Config, PretrainedConfig, PreTrainedModel

from saro.config import ModelConfig
from saro.distributed.shard import DeviceMesh
from saro.errors import SaroError
from saro.model.adapter import continued_adapter, new_adapter
from saro.model.architectures import (
    OUTSIDE_TEXT_MODEL,
    WRAPPERS,
    auto_class,
    fully_trained_parts,
    is_mixture,
    is_mxfp4,
    is_quantized,
    remove_dropout,
)
from saro.model.attention_backend import choose_backend
from saro.model.fused_lora import fuse_lora
from saro.model.layerwise import Skeleton, make_skeleton
from saro.model.liger import choose_liger, use_liger
from saro.model.policy import Policy
from saro.model.recompute import enable_recomputation, recompute_layers
from saro.model.source import ModelSource, first_line
from saro_kernels import choose_impl


def load_policy(
    source: ModelSource, options: ModelConfig, device: torch.device, seed: int, mesh: DeviceMesh | None = None
) -> Policy:
    """Load the weights and make them trainable as ``options`` say.

    Trainable parameters are fp32 in every mode. Under LoRA and QLoRA the base stays in the compute dtype. If the source
    has an adapter, training continues on it: it is neither merged nor stacked.

    Args:
        device: the model is loaded onto this device.
        seed: seed of a new adapter's initial values.
        mesh: ranks that share the weights; None for a model of this rank only.

    Raises:
        SaroError: the model cannot be loaded, or cannot be trained as ``options`` say.
    """
    if source.adapter is not None and options.method == "full":
        raise SaroError(
            f"{options.name}: an adapter cannot be trained with --model.method full; give lora or qlora, "
            "or merge it first with saro export --merge"
        )
    check_method(source.config, options, is_shared=mesh is not None)
    dtype = resolve_dtype(options.dtype, device)
    try:
        attention = choose_backend(options.attention, device, dtype, _changed_config(source, options, dtype))
        head = choose_impl(options.head, device, dtype)
    except ValueError as error:
        raise SaroError(str(error)) from error
    liger = choose_liger(options.liger, source.config.model_type, device)
    stored_dtype = torch.float32 if options.method == "full" else dtype
    skeleton = None if mesh is None else _shared_base(source, options, device, stored_dtype)
    model = _load_base(source, options, device, stored_dtype, mesh is not None) if skeleton is None else skeleton.model
    _check_head(model)
    if liger:
        try:
            use_liger(model)
        except SaroError:
            if options.liger:
                raise
    model.requires_grad_(False)
    if options.method == "full":
        for part in fully_trained_parts(model):
            part.requires_grad_(True)
    else:
        if source.adapter is None:
            model = new_adapter(model, options, seed)
        else:
            model = continued_adapter(model, source.adapter, options)
        # Saved in adapter_config.json: peft then loads the base of this commit. None for a base in a folder.
        model.peft_config["default"].revision = getattr(source.config, "_commit_hash", None)
        if options.fused_lora:
            fuse_lora(model)
    recomputation = options.gradient_checkpointing
    if recomputation:
        lm = model.get_base_model() if isinstance(model, PeftModel) else model
        enable_recomputation(lm, options.activation_offloading)
        # isinstance would also hold for True, which is an int.
        if type(recomputation) is int:
            recompute_layers(lm, recomputation)
    autocast = dtype if options.method == "full" and dtype != torch.float32 else None
    policy = Policy(
        model, attention=attention, head=head, autocast=autocast, recomputes_as_needed=recomputation == "auto"
    )
    if mesh is not None:
        policy.shard(mesh, None if skeleton is None else skeleton.fill)
    return policy


def check_method(config: PretrainedConfig, options: ModelConfig, *, is_shared: bool) -> None:
    """Raise SaroError if a model of this config cannot be trained by this method, or not by ranks that share its weights."""
    if options.method == "full" and is_mixture(config):
        raise SaroError(
            f"{options.name}: is a mixture of experts, whose router needs an auxiliary loss that is not computed here; "
            "set --model.method lora, which trains its attention"
        )
    if is_mxfp4(config) and options.method == "qlora":
        raise SaroError(
            f"{options.name}: holds experts in MXFP4, which are dequantized and stay so under QLoRA; set --model.method lora"
        )
    if is_quantized(config):
        if options.method == "full":
            raise SaroError(
                f"{options.name}: holds 4-bit weights, which only adapters can be trained on; set --model.method qlora"
            )
        storage = config.quantization_config.get("bnb_4bit_quant_storage", "uint8")
        if is_shared and storage == "uint8":
            raise SaroError(
                f"{options.name}: its 4-bit weights are stored as uint8, which ranks cannot share; set --train.shard "
                "none, or give the original model"
            )


def _is_wrapper(source: ModelSource) -> bool:
    return source.config.model_type in WRAPPERS


def load_plain(source: ModelSource, options: ModelConfig, device: torch.device, dtype: torch.dtype) -> Policy:
    """Load the weights in ``dtype`` to read and generate text, without the source's adapter; nothing is trainable.

    Raises:
        SaroError: the model cannot be loaded.
    """
    model = _load_base(source, replace(options, method="full"), device, dtype)
    _check_head(model)
    return inference_policy(model, options)


def inference_policy(model: PreTrainedModel, options: ModelConfig) -> Policy:
    """Make a policy of a plain model, with the attention that ``options`` ask for. Nothing is trainable.

    Raises:
        SaroError: the attention cannot run on the model's device in its dtype.
    """
    model.requires_grad_(False)
    try:
        attention = choose_backend(options.attention, model.device, model.dtype, model.config)
    except ValueError as error:
        raise SaroError(str(error)) from error
    return Policy(model, attention=attention)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve "auto": bfloat16 on CUDA, float32 elsewhere. A run on a CPU decides with ``decide_dtype`` before it loads.

    Raises:
        SaroError: the GPU has no bfloat16.
    """
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    if not has_dtype(name, device):
        # A gradient scaler would not help: it prevents underflow in the backward, and these models overflow in the forward.
        raise SaroError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16, and in float16 the hidden states of some models that "
            "were trained in bfloat16 overflow; set --model.dtype float32, which is exact, but computes products without "
            "tensor cores, up to 8 times as slowly as half precision, and takes twice the memory for activations; "
            "with --model.method qlora the weights keep 4 bits"
        )
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as options have it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def has_dtype(name: str, device: torch.device) -> bool:
    """Return False for bfloat16 on a GPU that only emulates it."""
    return name != "bfloat16" or device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def _load_base(
    source: ModelSource,
    options: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    shared: bool = False,
) -> PreTrainedModel:
    """Load the base model in ``dtype``, or in NF4 with products in ``dtype``, and check that no weight is missing."""
    config = _changed_config(source, options, dtype)
    quantization = _quantization(source, options, dtype, shared=shared)
    try:
        model, loading = auto_class(config).from_pretrained(
            source.path,
            config=config,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="eager",  # every model has it; Policy replaces it with packed attention
            device_map={"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **({} if quantization is None else {"quantization_config": quantization}),
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise SaroError(f"{options.name}: {first_line(error)}") from error
    # transformers fills these weights with random numbers, and only logs that it did.
    wrong = sorted(loading["missing_keys"]) + sorted(key for key, *_ in loading["mismatched_keys"])
    if wrong:
        others = f" and {len(wrong) - 1} others" if len(wrong) > 1 else ""
        raise SaroError(
            f"{options.name}: the files hold no weight of the right shape for {wrong[0]}{others}; "
            "they are incomplete, or another model's; fetch or save the model again"
        )
    if is_quantized(source.config):
        _set_dtype(model, dtype)
    _keep_packing(model)
    return model


def _shared_base(
    source: ModelSource, options: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Skeleton | None:
    """Return the base model of ranks that share its weights, to be filled layer by layer; None if it cannot be."""
    config = _changed_config(source, options, dtype)
    quantization = _quantization(source, options, dtype, shared=True)
    try:
        skeleton = make_skeleton(source.path, config, options, device, dtype, quantization)
    except (OSError, ValueError, SafetensorError) as error:
        raise SaroError(f"{options.name}: {first_line(error)}") from error
    if skeleton is not None:
        _keep_packing(skeleton.model)
    return skeleton


def _changed_config(source: ModelSource, options: ModelConfig, dtype: torch.dtype) -> PretrainedConfig:
    """Return a copy of the model's config, without dropout unless it was asked for, and with 4-bit products in ``dtype``."""
    config = deepcopy(source.config)
    if not options.dropout:
        remove_dropout(config)
    if is_quantized(config):
        config.quantization_config["bnb_4bit_compute_dtype"] = dtype_name(dtype)
    return config


def _quantization(
    source: ModelSource, options: ModelConfig, dtype: torch.dtype, *, shared: bool
) -> BitsAndBytesConfig | Mxfp4Config | None:
    """Return how the base model is quantized, with products in ``dtype``; None if it is not, or was before it was saved.

    Experts in MXFP4 are dequantized: transformers cannot train with them.

    ``shared``: ranks share the weights. They can only if a floating dtype stores the bytes of 4-bit weights.
    """
    if is_mxfp4(source.config):
        return Mxfp4Config(dequantize=True)
    if options.method != "qlora" or is_quantized(source.config):
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.bfloat16 if shared else torch.uint8,
        # Only linear layers are quantized. lm_head is one of them, and so are those of a model's other parts.
        llm_int8_skip_modules=["lm_head", *([OUTSIDE_TEXT_MODEL] if _is_wrapper(source) else [])],
    )


def _keep_packing(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from changing how 4-bit weights are packed."""
    for layer in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks the weight in place in the first pass without gradient. Every
        # gradient after that would be wrong.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _set_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights of a model that was saved in 4 bits, of which transformers keeps the dtype of the files.

    4-bit weights are dequantized to this dtype, as bitsandbytes' product does, and not rounded to that of the files first.
    """
    for parameter in model.parameters():
        if isinstance(parameter, Params4bit):
            parameter.quant_state.dtype = dtype
        else:
            parameter.data = parameter.data.to(dtype)


def _check_head(model: PreTrainedModel) -> None:
    """Raise SaroError if the LM head is not a plain linear layer."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise SaroError(f"the LM head is a {type(head).__name__}, not a linear layer; it is not supported")
