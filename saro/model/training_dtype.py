"""Decide in which dtype a run computes: on a CPU, by measuring whether bfloat16 products are faster than float32 ones."""

from __future__ import annotations

import statistics
import time

import torch
from transformers import PretrainedConfig

from saro.model.architectures import text_config
from saro.model.load import dtype_name, resolve_dtype

# bfloat16 has 8 bits of precision instead of 24, so it must be clearly faster. With instructions for it, products are 2 to 4
# times as fast, with tile units (AMX) more. A ratio near this limit means that the machine is busy with something else.
_FASTER = 1.3
# Products of smaller models take microseconds. Their rates are noise, and models of tests would depend on it.
_LEAST_WIDTH = 256
# Enough rows for the rate of long packs, and few enough for a model of 70 billion parameters to be measured in seconds.
_ROWS, _ROUNDS = 256, 5


def decide_dtype(name: str, config: PretrainedConfig, device: torch.device) -> str:
    """Return the name of the dtype in which a new run computes, "float32" or "bfloat16".

    "auto" is bfloat16 on a GPU, and on a CPU that computes products of the model's size clearly faster in it. The answer
    depends on the machine, so a run records it and keeps it.

    Args:
        name: option ``model.dtype``.

    Raises:
        SaroError: the GPU has no bfloat16.
    """
    if name == "auto" and device.type == "cpu" and has_bfloat16_instructions() and _is_bfloat16_faster(config):
        return "bfloat16"
    return dtype_name(resolve_dtype(name, device))


def has_bfloat16_instructions() -> bool:
    """Return True if this CPU has instructions that multiply bfloat16."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def _is_bfloat16_faster(config: PretrainedConfig) -> bool:
    config = text_config(config)
    width = config.hidden_size
    if width < _LEAST_WIDTH:
        return False
    inner = getattr(config, "intermediate_size", None) or 4 * width
    return measure_speedup(inner, width) >= _FASTER


def measure_speedup(n_out: int, n_in: int) -> float:
    """Return how many times as fast a linear layer's products are in bfloat16 as in float32 on this CPU.

    The products are those of the forward and of the gradient of the input. The two dtypes take turns.
    """
    sides = [_Products(n_out, n_in, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for side in sides:
        side.time()  # the first call lets the library choose its kernels, and touches new memory
    ratios = []
    for _ in range(_ROUNDS):
        in_float32, in_bfloat16 = (side.time() for side in sides)
        ratios.append(in_float32 / in_bfloat16)
    return statistics.median(ratios)


class _Products:
    """The forward of a linear layer, and the gradient of its input, in one dtype."""

    def __init__(self, n_out: int, n_in: int, dtype: torch.dtype) -> None:
        self._input = torch.ones(_ROWS, n_in, dtype=dtype)
        self._weight = torch.ones(n_out, n_in, dtype=dtype)
        self._upstream = torch.ones(_ROWS, n_out, dtype=dtype)

    def time(self) -> float:
        """Return the seconds that the two products take."""
        begin = time.perf_counter()
        self._input @ self._weight.t()
        self._upstream @ self._weight
        return time.perf_counter() - begin
