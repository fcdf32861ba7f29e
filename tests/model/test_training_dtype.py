"""Tests in which dtype a run computes: what "auto" means, and what it is decided by."""

import math

import pytest
import torch
from tiny import tiny_config
from transformers import GPT2Config

from saro.errors import SaroError
from saro.model import training_dtype
from saro.model.training_dtype import decide_dtype, measure_speedup

CPU = torch.device("cpu")


@pytest.fixture
def cpu(monkeypatch):
    """Return a function that gives this machine a CPU by its instructions and by how much faster bfloat16 is on it.

    It returns the list of the layers that are measured.
    """

    def install(*instructions: str, speedup: float = math.nan) -> list[tuple[int, int]]:
        measured: list[tuple[int, int]] = []

        def measure(*shape: int) -> float:
            measured.append(shape)
            return speedup

        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))
        monkeypatch.setattr(training_dtype, "measure_speedup", measure)
        return measured

    return install


def config_of(hidden_size: int, **changes):
    config = tiny_config()
    config.hidden_size = hidden_size
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16"])
@pytest.mark.parametrize(
    ("speedup", "dtype"), [(0.4, "float32"), (1.29, "float32"), (1.31, "bfloat16"), (8.0, "bfloat16")]
)
def test_auto_is_bfloat16_on_a_cpu_only_if_it_is_measured_to_be_clearly_faster(cpu, instructions, speedup, dtype):
    cpu(instructions, speedup=speedup)
    assert decide_dtype("auto", config_of(576), CPU) == dtype


def test_the_measured_layer_has_the_size_of_the_models_mlp(cpu):
    measured = cpu("avx512_bf16", speedup=2.0)
    decide_dtype("auto", config_of(576, intermediate_size=1536), CPU)
    decide_dtype("auto", GPT2Config(n_embd=768), CPU)
    assert measured == [(1536, 576), (4 * 768, 768)]


def test_a_cpu_without_instructions_computes_in_float32_unmeasured(cpu):
    measured = cpu("avx512_f", "avx2", speedup=2.0)
    assert decide_dtype("auto", config_of(576), CPU) == "float32"
    assert not measured


def test_a_model_too_small_to_measure_computes_in_float32(cpu):
    measured = cpu("amx_bf16", speedup=8.0)
    assert decide_dtype("auto", config_of(255), CPU) == "float32"
    assert not measured
    assert decide_dtype("auto", config_of(256), CPU) == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_that_is_given_is_kept_whatever_is_faster(cpu, dtype):
    measured = cpu("amx_bf16", speedup=1.0 if dtype == "bfloat16" else 8.0)
    assert decide_dtype(dtype, config_of(576), CPU) == dtype
    assert not measured


def test_auto_is_bfloat16_on_a_gpu_and_refused_where_it_is_emulated(cpu, monkeypatch):
    measured = cpu("amx_bf16", speedup=1.0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert decide_dtype("auto", config_of(576), torch.device("cuda")) == "bfloat16"
    assert not measured
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(SaroError, match="Tesla T4 has no bfloat16"):
        decide_dtype("auto", config_of(576), torch.device("cuda"))


def test_the_measurement_compares_the_two_dtypes_and_leaves_the_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert 0 < measure_speedup(128, 64) < math.inf
    assert torch.equal(torch.rand(1), expected)


def test_the_speedup_is_the_median_of_the_ratios_of_a_round(monkeypatch):
    # Each product reads the clock twice: seconds that pass in between, after one product of each dtype to warm up.
    seconds = [9.0, 9.0, *(s for ratio in (1.0, 2.0, 3.0, 90.0, 2.5) for s in (ratio, 1.0))]
    ticks = iter([t for s in seconds for t in (0.0, s)])
    monkeypatch.setattr(training_dtype.time, "perf_counter", lambda: next(ticks))
    assert measure_speedup(8, 8) == 2.5
    assert next(ticks, None) is None
