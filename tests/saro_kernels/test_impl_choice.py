"""Which implementation of the head runs: "auto" takes what can run, and one that is named never falls back."""

import subprocess
import sys

import pytest
import torch

from saro_kernels import choose_impl, token_logps, token_statistics
from saro_kernels import tile_ops as module
from saro_kernels.tile_ops import TorchTile, choose_tile_op, find_tile_op

CPU, CUDA, XPU = (torch.device(name) for name in ("cpu", "cuda", "xpu"))
FAMILY = ["auto", "tiled"]
WHY_NO_LAUNCHER = module._why_no_launcher


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device as seen by the choice, of compute capability 8.0, with Triton, and no interpreter."""
    monkeypatch.setattr(module, "_triton_is_here", lambda: True)
    monkeypatch.setattr(module, "_interpreted", lambda: False)
    monkeypatch.setattr(module, "_why_no_launcher", lambda: None)
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
    gpu.setattr(module, "_triton_is_here", lambda: False)
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
    """That GPU, and Triton's driver that compiles C at its first use, with no compiler."""
    pytest.importorskip("triton")
    from triton.runtime import driver

    def compile_launcher(self):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    gpu.setattr(type(driver), "active", property(compile_launcher))
    gpu.setattr(module, "_why_no_launcher", WHY_NO_LAUNCHER.__wrapped__)


@pytest.mark.parametrize("impl", FAMILY)
def test_auto_is_torch_where_triton_finds_no_c_compiler(no_compiler, impl):
    assert choose_impl(impl, CUDA, torch.bfloat16) == "tiled-torch"


def test_triton_by_name_without_a_c_compiler_is_an_error(no_compiler):
    reason = "its launcher cannot be made: Failed to find C compiler. .* variable; the nearest that is: 'torch'"
    with pytest.raises(ValueError, match=reason):
        choose_impl("tiled-triton", CUDA, torch.bfloat16)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("impl", ["reference", "tiled-torch"])
def test_a_named_one_is_itself(gpu, impl, device):
    assert choose_impl(impl, device, torch.bfloat16) == impl


UNABLE = {
    "not installed": ({"_triton_is_here": lambda: False}, CUDA, torch.bfloat16, "triton is not installed"),
    "float64": ({}, CUDA, torch.float64, "it has no float64"),
    "cpu": ({}, CPU, torch.float32, "triton does not compile for cpu"),
    "mps": ({}, torch.device("mps"), torch.float32, "triton does not compile for mps"),
}


@pytest.mark.parametrize(("state", "device", "dtype", "reason"), UNABLE.values(), ids=UNABLE)
def test_triton_by_name_where_it_cannot_run_is_an_error(gpu, state, device, dtype, reason):
    for name, value in state.items():
        gpu.setattr(module, name, value)
    with pytest.raises(ValueError, match=f"'triton' is not available: {reason}; the nearest that is: 'torch'"):
        choose_impl("tiled-triton", device, dtype)


def test_triton_by_name_on_an_old_gpu_is_an_error(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(
        ValueError, match=r"Some GPU is older than compute capability 8\.0; the nearest that is: 'torch'"
    ):
        choose_impl("tiled-triton", CUDA, torch.float32)


@pytest.mark.parametrize(
    ("impl", "nearest"),
    [
        ("tile", "tiled"),
        ("ref", "reference"),
        ("Auto", "auto"),
        ("triton", "tiled-triton"),
        ("tiled_torch", "tiled-torch"),
    ],
)
@pytest.mark.parametrize("function", [token_logps, token_statistics])
def test_unknown_impl_names_the_nearest(function, impl, nearest):
    arguments = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4])
    with pytest.raises(ValueError, match=rf"'{impl}' is not available; the nearest that is: '{nearest}' \(of auto, "):
        function(*arguments, impl=impl)


def test_unknown_tile_op_names_the_nearest():
    with pytest.raises(ValueError, match="tile op 'tritn' is not available; the nearest that is: 'triton'"):
        choose_tile_op("tritn", CPU, torch.float32)


def test_tile_ops_by_name():
    pytest.importorskip("triton")
    from saro_kernels.triton_tile import TritonTile

    assert find_tile_op("torch") is TorchTile
    assert find_tile_op("triton") is TritonTile


def run(code):
    """What `code` prints in a fresh interpreter that has no Triton."""
    code = "import sys; sys.modules['triton'] = None\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


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
    lines = run(code).splitlines()
    assert lines[0].endswith("tiled-torch")
    assert lines[1] == "tile op 'triton' is not available: triton is not installed; the nearest that is: 'torch'"
