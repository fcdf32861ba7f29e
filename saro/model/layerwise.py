"""Load a model layer by layer on ranks that share its weights. No rank ever holds more than its parts and one layer."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors import safe_open
from torch import nn
from transformers import BitsAndBytesConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from saro.config import ModelConfig
from saro.distributed.runtime import empty_weights
from saro.distributed.shard import is_part
from saro.model.architectures import auto_class


class Skeleton:
    """A model without its weights, and the files that they are in.

    Each parameter is a placeholder on the CPU that takes no memory. ``fill`` puts the weights of a part into their places.

    Attributes:
        model: the model. It can be changed, for example by adapters, before it is filled.
    """

    def __init__(
        self, model: PreTrainedModel, files: dict[str, Path], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model = model
        self._files = files
        self._device = device
        self._dtype = dtype
        self._stored: dict[nn.Parameter, str] = {}  # placeholder -> name of its tensor in the files
        names = {p: name for name, p in model.named_parameters(remove_duplicate=False) if name in files}
        replaced: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if parameter not in replaced:
                    empty = torch.zeros((), dtype=dtype).expand(parameter.shape)
                    replaced[parameter] = _parameter(empty, parameter)
                    self._stored[replaced[parameter]] = names[parameter]
                module._parameters[name] = replaced[parameter]

    def fill(self, part: nn.Module) -> None:
        """Read the weights of a part of the model onto the device, except those that ranks share already."""
        filled: dict[nn.Parameter, nn.Parameter] = {}
        for module in part.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or is_part(parameter):
                    continue
                if parameter not in filled:
                    filled[parameter] = self._filled(parameter)
                module._parameters[name] = filled[parameter]
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self._device)

    def _filled(self, parameter: nn.Parameter) -> nn.Parameter:
        stored = self._stored.get(parameter)
        # An adapter is not in the files and has its values already.
        value = parameter.data if stored is None else self._read(stored).to(self._dtype)
        if isinstance(parameter, Params4bit):
            return _parameter(value, parameter).to(self._device)  # this quantizes it
        return _parameter(value.to(self._device), parameter)

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name)


def _parameter(value: torch.Tensor, like: nn.Parameter) -> nn.Parameter:
    """Return a parameter with another value and all other properties of ``like``."""
    if isinstance(like, Params4bit):
        return Params4bit(value, requires_grad=False, **like.__dict__)
    return nn.Parameter(value, requires_grad=like.requires_grad)


def make_skeleton(
    path: str,
    config: PretrainedConfig,
    options: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None,
) -> Skeleton | None:
    """Return a model that can be filled layer by layer.

    None if transformers does more than read each weight under its own name: it converts the weights of some models, keeps
    some in another dtype, and reads weights that were saved quantized.
    """
    if getattr(config, "quantization_config", None) is not None:
        return None
    with empty_weights():
        model = auto_class(config).from_config(
            config, dtype=dtype, attn_implementation="eager", trust_remote_code=options.trust_remote_code
        )
    # The context has made one placeholder for each name of a tied weight.
    model.tie_weights()
    files = _find_tensors(path, options.revision)
    if model._keep_in_fp32_modules or not _are_stored(model, files):
        return None
    if quantization is not None:
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map={"": device})
        # The same parameter as before lies in a layer of bitsandbytes now, which must be one of plain linear layers.
        if any(isinstance(m, Linear4bit) and m.source_cls is not nn.Linear for m in model.modules()):
            return None
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    if model.can_generate():
        file = cached_file(
            path, "generation_config.json", revision=options.revision, _raise_exceptions_for_missing_entries=False
        )
        if file is not None:
            model.generation_config = GenerationConfig.from_pretrained(Path(file).parent)
    return Skeleton(model.eval(), files, device, dtype)


def _find_tensors(path: str, revision: str | None) -> dict[str, Path]:
    """Return the file of each tensor of a model's safetensors."""
    find_file = partial(cached_file, path, revision=revision, _raise_exceptions_for_missing_entries=False)
    index = find_file(SAFE_WEIGHTS_INDEX_NAME)
    if index is not None:
        shards, _ = get_checkpoint_shard_files(path, index, revision=revision)
        by_name = {Path(shard).name: Path(shard) for shard in shards}
        names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        return {name: by_name[file] for name, file in names.items()}
    file = find_file(SAFE_WEIGHTS_NAME)
    if file is None:
        return {}
    with safe_open(file, "pt") as tensors:
        return dict.fromkeys(tensors.keys(), Path(file))


def _are_stored(model: PreTrainedModel, files: dict[str, Path]) -> bool:
    """Return True if each weight is in the files under one of its names and in its shape, and no buffer has to be read."""
    shapes: dict[nn.Parameter, bool] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        is_stored = name in files and _shape(files[name], name) == tuple(parameter.shape)
        shapes[parameter] = shapes.get(parameter, False) or is_stored
    buffers = model.state_dict().keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return all(shapes.values()) and not buffers


def _shape(file: Path, name: str) -> tuple[int, ...]:
    with safe_open(file, "pt") as tensors:
        return tuple(tensors.get_slice(name).get_shape())
