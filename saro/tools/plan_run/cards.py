"""Holds what is known of cards: figures of their data sheets, and the share of them that steps have reached."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import psutil
import torch

from saro.errors import SaroError

# Share of an H100's bfloat16 rate that steps reach whose packs are large enough, and the seconds that Python takes to launch the
# kernels of a layer's forward and backward, which limit small packs. From benchmarks/results/gpu/h100-2026-11-27: Llama-3-8B,
# QLoRA, packs of 16,384 and of 2,048 tokens. Other cards are taken to reach the same share.
GPU_SHARE, LAUNCH_SECONDS = 0.48, 0.0091
# Share of the rate of a GEMM that steps reach on a CPU, from benchmarks/results/train_step.json.
CPU_SHARE = 0.75
# Products in float32 are computed without tensor cores: this many times as slow as in bfloat16.
FLOAT32_SLOWER = 8
# Share of a card's memory that tensors can have: CUDA takes about 0.5 GB, and the allocator loses up to 5 % to gaps.
USABLE = 0.92
# Bytes per second and direction between machines, for each card: a network of 400 Gbit/s for each.
NETWORK = 50e9

_GEMM_SIZE, _GEMM_ROUNDS = 2048, 5


@dataclass(frozen=True)
class Card:
    """What a process computes on.

    Attributes:
        memory: bytes.
        operations: bfloat16 operations per second that it promises (dense, summed in float32); for a CPU, those of a GEMM.
        bandwidth: bytes per second of its memory.
        link: bytes per second and direction to the other cards of its machine.
        source: where the figures are from.
    """

    memory: float
    operations: float
    bandwidth: float
    link: float
    source: str

    @property
    def is_gpu(self) -> bool:
        """True for all but this machine's CPU."""
        return self.source != _MEASURED


_MEASURED = "measured on this machine"
_SHEET = "NVIDIA's data sheet of the {}, dense rates"

_GEFORCE = "twice the published float32 rate; dense rates"

# GB are taken as 10^9 bytes; drivers report up to 7 % more. The data sheets were not read again: the figures were compared with
#   rates of A100, H100, H200, B200, L40S: github.com/pytorch/torchtitan, torchtitan/tools/utils.py, which names the data sheets
#   memory and link of H200 and B200: github.com/mlcommons, inference_results_v4.1 and _v6.0, closed/*/systems
#   bandwidth of H100, H200, B200: github.com/stas00/ml-engineering, compute/accelerator/README.md
#   A100, both sizes: glennklockwood.com/garden/processors/A100
#   L40S: its data sheet's table at mullet.se/product.html?product_id=355414
#   RTX 4090: waredb.com/processor/nvidia-geforce-rtx-4090
#   L4: github.com/huggingface/text-generation-inference, launcher/src/main.rs (rate); fpsbench.com/compare/gpu/nvidia-l4-vs-nvidia-tesla-m40
#   RTX 3090, 4080, 4060 Ti: github.com/nicejunjie/nicejunjie.github.io, _posts/2024-06-08-gpu-ranking.md (float32 rates and
#   bandwidths). Tensor cores of these cards multiply bfloat16, summed in float32, at twice the float32 rate, as the RTX 4090's do.
#   A10: its data sheet, from memory; not compared with another source
CARDS = {
    "b200": Card(180e9, 2250e12, 8.0e12, 900e9, _SHEET.format("B200 SXM")),
    "h200": Card(141e9, 989e12, 4.8e12, 450e9, _SHEET.format("H200 SXM")),
    "h100": Card(80e9, 989e12, 3.35e12, 450e9, _SHEET.format("H100 SXM")),
    "a100-80": Card(80e9, 312e12, 2.039e12, 300e9, _SHEET.format("A100 80GB SXM")),
    "a100-40": Card(40e9, 312e12, 1.555e12, 300e9, _SHEET.format("A100 40GB SXM")),
    "l40s": Card(48e9, 362e12, 0.864e12, 32e9, _SHEET.format("L40S")),
    "rtx4090": Card(24e9, 165e12, 1.008e12, 32e9, "waredb.com, dense rates"),
    "rtx4080": Card(16e9, 97e12, 0.717e12, 32e9, _GEFORCE),
    "rtx4060ti-16gb": Card(16e9, 44e12, 0.288e12, 16e9, _GEFORCE),
    "rtx3090": Card(24e9, 71e12, 0.936e12, 32e9, _GEFORCE),
    "a10": Card(24e9, 125e12, 0.6e12, 32e9, _SHEET.format("A10")),
    "l4": Card(24e9, 121e12, 0.3e12, 32e9, _SHEET.format("L4")),
}


def find_card(name: str, processes: int, dtype: torch.dtype) -> Card:
    """Return a card by its name, or this machine's CPU for "cpu", whose rates are measured in a second.

    Args:
        processes: number of processes that share the CPU and its memory.

    Raises:
        SaroError: there is no such card.
    """
    if name == "cpu":
        rate, copied = _measure_gemm(dtype), _measure_copy()
        memory = psutil.virtual_memory().available
        return Card(memory / processes, rate / processes, copied / processes, copied / processes, _MEASURED)
    if name not in CARDS:
        raise SaroError(
            f"--card: unknown card {name!r}; known are {', '.join(CARDS)} and cpu; for another card name the one most like it, "
            "and give --memory and --rate"
        )
    return CARDS[name]


def _measure_gemm(dtype: torch.dtype) -> float:
    """Return the operations per second of a square product on the CPU."""
    a, b, out = (torch.randn(_GEMM_SIZE, _GEMM_SIZE).to(dtype) for _ in range(3))
    seconds = []
    for _ in range(_GEMM_ROUNDS):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * _GEMM_SIZE**3 / statistics.median(seconds)


def _measure_copy() -> float:
    """Return the bytes per second that a copy reads and writes on the CPU."""
    source = torch.ones(2**24)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(_GEMM_ROUNDS):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(seconds)
