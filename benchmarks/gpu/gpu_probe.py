"""Ask a GPU what it is, how fast it can be at all, and whether each thing that saro asks of CUDA is right on it.

    python benchmarks/gpu/gpu_probe.py FILE.json

Errors are relative: the norm of the difference to float64, over the norm of the float64 result. The exit code is 1 if a
probe fails or an error exceeds its budget. Without a GPU, the probes run on the CPU as far as they can.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from yardstick import copy_per_second, seconds

from saro.files import atomic_write
from saro_kernels import choose_impl, nf4, token_logps
from saro_kernels.float32_products import add_product

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
# Relative error allowed where operands are bfloat16, and where products of bfloat16 are summed and written in float32.
BUDGET_BF16, BUDGET_FLOAT32 = 2e-2, 1e-4
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "huggingface_hub",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "datasets",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "jsonargparse",
    "pytest",
    "hypothesis",
)


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def check_errors(errors: dict[str, float], budget: float) -> dict[str, float]:
    """Return the errors. Raises ValueError if one exceeds the budget or is NaN."""
    wrong = {name: error for name, error in errors.items() if not error <= budget}
    if wrong:
        raise ValueError(f"errors above {budget}: {wrong}")
    return errors


def find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def probe_machine() -> dict:
    """Describe the machine and its packages; memory in GiB."""
    found = {
        "python": sys.version.split()[0],
        "cpus": os.cpu_count(),
        "memory_gib": psutil.virtual_memory().total / 2**30,
        "packages": {package: find_version(package) for package in PACKAGES},
        "free_gib": {folder: shutil.disk_usage(folder).free / 2**30 for folder in ("/dev/shm", "/tmp")},
    }
    if CUDA:
        card = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        found |= {
            "gpu": card.name,
            "multiprocessors": card.multi_processor_count,
            "l2_mib": card.L2_cache_size / 2**20,
            "capability": [card.major, card.minor],
            "gpu_gib": total / 2**30,
            "gpu_free_gib": free / 2**30,
            "cuda": torch.version.cuda,
        }
    return found


def median_seconds(work: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(3):
        work()
    return statistics.median(seconds(work, DEVICE) for _ in range(repeats))


def probe_ceilings() -> dict[str, float]:
    """Measure operations per second of three products of random numbers, and bytes per second of a copy."""
    n = 8192 if CUDA else 256
    vocabulary = 128256 if CUDA else 512
    shapes = {"square": (n, n, n), "up": (n, n // 2, n * 7 // 4), "head": (n // 4, n // 2, vocabulary)}
    found = {}
    for name, (rows, inner, columns) in shapes.items():
        a = torch.randn(rows, inner, device=DEVICE, dtype=DTYPE)
        b = torch.randn(columns, inner, device=DEVICE, dtype=DTYPE)
        out = torch.empty(rows, columns, device=DEVICE, dtype=DTYPE)
        took = median_seconds(lambda a=a, b=b, out=out: torch.mm(a, b.t(), out=out))
        found[f"{name}, {rows} x {inner} x {columns}, operations/s"] = 2 * rows * inner * columns / took
    found["copy, bytes/s"] = copy_per_second(DEVICE)
    return found


def probe_varlen() -> dict:
    """Check torch's attention over paths: fewer key heads, more keys than queries, with and without a window."""
    found: dict = {"parameters": list(inspect.signature(varlen.varlen_attn).parameters)}
    if CUDA:
        for window in (None, 40):
            found[f"window {window}"] = check_errors(varlen_errors(window), BUDGET_BF16)
    return found


def varlen_errors(window: int | None) -> dict[str, float]:
    """Return the errors of the output and the gradients of queries, keys and values."""
    torch.manual_seed(0)
    q_lengths, k_lengths, heads, groups, size = (64, 100, 37), (64, 180, 300), 8, 2, 128
    q, k, v, upstream = (
        torch.randn(sum(lengths), h, size, device=DEVICE, dtype=DTYPE)
        for lengths, h in ((q_lengths, heads), (k_lengths, groups), (k_lengths, groups), (q_lengths, heads))
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    bounds = [torch.tensor([0, *n]).cumsum(0).to(DEVICE, torch.int32) for n in (q_lengths, k_lengths)]
    options = {"scale": 0.1, "window_size": (-1, 0) if window is None else (window - 1, 0)}
    if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters:
        options["enable_gqa"] = True
    output = varlen.varlen_attn(q, k, v, *bounds, max(q_lengths), max(k_lengths), **options)
    values = [output, *torch.autograd.grad(output, leaves, upstream)]

    wide = [x.detach().double().requires_grad_() for x in leaves]
    parts = []
    split = [wide[0].split(q_lengths), *(x.repeat_interleave(heads // groups, 1).split(k_lengths) for x in wide[1:])]
    for a, b, c in zip(*split, strict=True):
        keys = torch.arange(len(b), device=DEVICE)
        distance = keys[len(b) - len(a) :, None] - keys  # (queries, keys)
        allowed = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        scores = torch.einsum("qhd,khd->hqk", a, b) * 0.1
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), c))
    exact = torch.cat(parts)
    exacts = [exact, *torch.autograd.grad(exact, wide, upstream.double())]
    names = ("output", "d query", "d key", "d value")
    return {name: relative_error(a, b) for name, a, b in zip(names, values, exacts, strict=True)}


def probe_float32_products() -> dict[str, float]:
    """Check products of bfloat16 matrices that are summed and written in float32."""
    a = torch.randn(512, 1024, device=DEVICE).bfloat16()
    b = torch.randn(1024, 1000, device=DEVICE).bfloat16()
    out = torch.ones(512, 1000, device=DEVICE)
    add_product(out, a, b, beta=1)
    return check_errors({"add_product": relative_error(out, 1 + a.double() @ b.double())}, BUDGET_FLOAT32)


def probe_nf4() -> dict[str, float]:
    """Check NF4 on this device against NF4 on the CPU, and our kernel against bitsandbytes; measure both.

    Our kernel must have the bits of bitsandbytes. On a CPU, both are bitsandbytes.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn((14336, 4096) if CUDA else (128, 64), device=DEVICE, dtype=DTYPE)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    dense = dequantize_4bit(packed, state)
    packed_cpu, state_cpu = quantize_4bit(weight.cpu(), quant_type="nf4", compress_statistics=True)
    dense_cpu = dequantize_4bit(packed_cpu, state_cpu)
    # A number that lies between two of NF4's may be rounded to either.
    errors = check_errors({"against the CPU": relative_error(dense.cpu(), dense_cpu)}, BUDGET_BF16)
    errors["against the weight"] = relative_error(dense, weight)
    moved = packed.nbytes + dense.nbytes
    figures = {
        "bytes/s": moved / median_seconds(lambda: dequantize_4bit(packed, state)),
        "bytes/s, saro": moved / median_seconds(lambda: nf4.dequantize(packed, state)),
        "host seconds": host_seconds(lambda: dequantize_4bit(packed, state)),
        "host seconds, saro": host_seconds(lambda: nf4.dequantize(packed, state)),
    }
    if CUDA and (problem := nf4.why_not_triton(packed, state)):
        raise ValueError(f"our kernel does not run: {problem}; measured {figures}")
    return {**errors, **figures, **check_errors(count_different_numbers(), 0)}


def count_different_numbers() -> dict[str, float]:
    """Return how many numbers of NF4 weights have other bits by our kernel than by bitsandbytes, for each dtype."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    different = {}
    for dtype in nf4.DTYPES:
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        count = 0
        # Whole programs, and a last block that is not full.
        for shape, double in itertools.product(((4096, 4096), (1000, 1000), (3, 8)), (False, True)):
            weight = torch.randn(shape, device=DEVICE, dtype=dtype)
            packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
            ours, theirs = nf4.dequantize(packed, state), dequantize_4bit(packed, state)
            count += (ours.view(bits) != theirs.view(bits)).sum().item()
        different[f"different, {str(dtype).removeprefix('torch.')}"] = count
    return different


def host_seconds(work: Callable[[], object], calls: int = 100) -> float:
    """Return the seconds that Python takes to launch the work, median of five; the device may lag behind."""
    times = []
    for _ in range(5):
        if CUDA:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        times.append((time.perf_counter() - begin) / calls)
    return statistics.median(times)


def probe_head() -> dict:
    """Check the fused log-softmax of this device on one shape, and time its first call with compilation."""
    begin = time.perf_counter()
    rows, width, vocabulary = (512, 1024, 50257) if CUDA else (8, 16, 97)
    hidden = torch.randn(rows, width, device=DEVICE, dtype=DTYPE, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=DEVICE, dtype=DTYPE) * (2 / width**0.5)
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    logps = token_logps(hidden, weight, targets)
    logps.sum().backward()
    first_call = time.perf_counter() - begin
    wide = hidden.detach().double().requires_grad_()
    exact = F.linear(wide, weight.double()).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    exact.sum().backward()
    errors = {"log-probs": relative_error(logps, exact), "d hidden": relative_error(hidden.grad, wide.grad)}
    return {"impl": choose_impl("auto", DEVICE, DTYPE), "first_call_seconds": first_call, **check_errors(errors, 1e-2)}


PROBES = {
    "machine": probe_machine,
    "ceilings": probe_ceilings,
    "varlen": probe_varlen,
    "float32 products": probe_float32_products,
    "nf4": probe_nf4,
    "head": probe_head,
}


def main() -> int:
    results, failed = {}, False
    for name, probe in PROBES.items():
        try:
            results[name] = probe()
        except Exception as error:  # whatever it is, the other probes tell more
            results[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            failed = True
        print(f"{name}: {json.dumps(results[name])}", flush=True)
        with atomic_write(sys.argv[1]) as out:
            out.write(json.dumps(results, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
