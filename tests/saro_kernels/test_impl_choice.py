"""Tests of the choice of the head's implementation: "auto" takes one that can run; a full name never falls back."""

import subprocess
import sys

import pytest
import torch

from saro_kernels import choose_impl, token_logps, token_statistics
from saro_kernels import tile_ops as module
from saro_kernels.tile_ops import choose_tile_op, find_tile_op
from saro_kernels.torch_tile import TorchTile

CPU, CUDA, XPU = (torch.device(name) for name in ("cpu", "cuda", "xpu"))
FAMILY = ["auto", "tiled"]
LAUNCHER_PROBLEM = module._launcher_problem


@pytest.fixture
def gpu(monkeypatch):
    """Make the choice see a CUDA device of compute capability 8.0, with Triton and without its interpreter."""
    monkeypatch.setattr(module, "_is_triton_installed", lambda: True)
    monkeypatch.setattr(module, "_is_interpreted", lambda: False)
    monkeypatch.setattr(module, "_launcher_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    return monkeypatch


@pytest.mark.parametrize("impl", FAMILY)
@pytest.mark.parametrize("device", [CUDA, XPU], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_auto_is_triton_on_an_accelerator(gpu, impl, device, dtype):
    assert choose_impl(impl, device, dtype) == "tiled-triton"


@pytest.mark.parametrize("impl", FAMILY)
def test_auto_is_torch_on_a_cpu(impl):
    assert choose_impl(impl, CPU, torch.float32) == "tiled-torch"


@pytest.mark.parametrize("impl", FAMILY)
def test_auto_is_torch_without_triton(gpu, impl):
    gpu.setattr(module, "_is_triton_installed", lambda: False)
    assert choose_impl(impl, CUDA, torch.bfloat16) == "tiled-torch"


@pytest.mark.parametrize("impl", FAMILY)
def test_auto_is_torch_in_float64(gpu, impl):
    assert choose_impl(impl, CUDA, torch.float64) == "tiled-torch"


@pytest.mark.parametrize("impl", FAMILY)
def test_auto_is_torch_on_an_old_gpu(gpu, impl):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_impl(impl, CUDA, torch.float32) == "tiled-torch"


@pytest.fixture
def no_compiler(gpu):
    """Like `gpu`, but Triton's driver finds no C compiler when it compiles its launcher at the first use."""
    pytest.importorskip("triton")
    from triton.runtime import driver

    def compile_launcher(self):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    gpu.setattr(type(driver), "active", property(compile_launcher))
    gpu.setattr(module, "_launcher_problem", LAUNCHER_PROBLEM.__wrapped__)


@pytest.mark.parametrize("impl", FAMILY)
def test_auto_is_torch_if_triton_finds_no_c_compiler(no_compiler, impl):
    assert choose_impl(impl, CUDA, torch.bfloat16) == "tiled-torch"


def test_triton_by_name_without_a_c_compiler_is_an_error(no_compiler):
    message = "its launcher cannot be built: Failed to find C compiler. .* variable; use 'torch'"
    with pytest.raises(ValueError, match=message):
        choose_impl("tiled-triton", CUDA, torch.bfloat16)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("impl", ["reference", "tiled-torch"])
def test_a_full_name_means_itself(gpu, impl, device):
    assert choose_impl(impl, device, torch.bfloat16) == impl


# Cases in which Triton cannot run: (patches of the module, device, dtype, reason in the message).
CANNOT_RUN = {
    "not installed": ({"_is_triton_installed": lambda: False}, CUDA, torch.bfloat16, "triton is not installed"),
    "float64": ({}, CUDA, torch.float64, "it does not support float64"),
    "cpu": ({}, CPU, torch.float32, "triton does not compile for cpu"),
    "mps": ({}, torch.device("mps"), torch.float32, "triton does not compile for mps"),
}


@pytest.mark.parametrize(("patches", "device", "dtype", "reason"), CANNOT_RUN.values(), ids=CANNOT_RUN)
def test_triton_by_name_is_an_error_if_it_cannot_run(gpu, patches, device, dtype, reason):
    for name, value in patches.items():
        gpu.setattr(module, name, value)
    with pytest.raises(ValueError, match=f"tile op 'triton' cannot run here: {reason}; use 'torch'"):
        choose_impl("tiled-triton", device, dtype)


def test_triton_by_name_on_an_old_gpu_is_an_error(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"Some GPU is older than compute capability 8\.0; use 'torch'"):
        choose_impl("tiled-triton", CUDA, torch.float32)


@pytest.mark.parametrize(
    ("impl", "closest"),
    [
        ("tile", "tiled"),
        ("ref", "reference"),
        ("Auto", "auto"),
        ("triton", "tiled-triton"),
        ("tiled_torch", "tiled-torch"),
    ],
)
@pytest.mark.parametrize("function", [token_logps, token_statistics])
def test_an_unknown_impl_names_the_closest(function, impl, closest):
    arguments = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4])
    with pytest.raises(ValueError, match=rf"'{impl}' is unknown; did you mean '{closest}'\? \(one of auto, "):
        function(*arguments, impl=impl)


def test_an_unknown_tile_op_names_the_closest():
    with pytest.raises(ValueError, match=r"tile op 'tritn' is unknown; did you mean 'triton'\?"):
        choose_tile_op("tritn", CPU, torch.float32)


def test_find_tile_op_returns_the_class_of_each_name():
    pytest.importorskip("triton")
    from saro_kernels.triton_tile import TritonTile

    assert find_tile_op("torch") is TorchTile
    assert find_tile_op("triton") is TritonTile


def run_without_triton(code):
    """Return what `code` prints in a new interpreter in which Triton cannot be imported."""
    code = "import sys; sys.modules['triton'] = None\n" + code
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_works_without_triton():
    code = """
import torch
from saro_kernels import choose_impl, token_logps
hidden, weight = torch.zeros(2, 3), torch.zeros(5, 3)
print(token_logps(hidden, weight, torch.tensor([0, 4])).tolist(), choose_impl("auto", torch.device("cuda"), hidden.dtype))
try:
    token_logps(hidden, weight, torch.tensor([0, 4]), impl="tiled-triton")
except ValueError as error:
    print(error)
"""
    lines = run_without_triton(code).splitlines()
    assert lines[0].endswith("tiled-torch")
    assert lines[1] == "tile op 'triton' cannot run here: triton is not installed; use 'torch'"
