"""What an adapter costs: forward and backward of a frozen linear layer, of PEFT's LoRA on it, and of `lora_linear`.

    python benchmarks/lora_linear.py [--rows 2048] [--rounds 15] [--json FILE]

The three take turns within each round, and ratios are medians of ratios within a round, so that a slow moment of the
machine slows all. The gradient reaches the input and, with an adapter, A and B.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from jsonargparse import auto_cli
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from rich.console import Console
from rich.table import Table
from torch import nn
from train_step import timed

from saro.distributed.runtime import Runtime
from saro_kernels import FrozenLinear, LoraLinear, lora_linear

# Layers by name: in and out features.
LAYERS = {
    "SmolLM2-135M q": (576, 576),
    "SmolLM2-135M up": (576, 1536),
    "SmolLM2-135M down": (1536, 576),
    "Llama-3-8B q": (4096, 4096),
    "Llama-3-8B up": (4096, 14336),
}
SIDES = ("plain", "peft", "saro")


def make(n_in: int, n_out: int, rank: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable]:
    """By side, a function of the input."""
    base = nn.Linear(n_in, n_out, bias=False, device=device, dtype=dtype).requires_grad_(False)
    peft = PeftLinear(base, "default", LoraConfig(r=rank, lora_alpha=2 * rank), r=rank, lora_alpha=2 * rank)
    a, b = peft.lora_A["default"].weight, peft.lora_B["default"].weight
    nn.init.normal_(b, std=0.02)
    layer = LoraLinear(FrozenLinear(base.weight), a, b, peft.scaling["default"])
    return {"plain": base, "peft": peft, "saro": lambda x: lora_linear(x, layer)}


def step_seconds(forward: Callable, x: torch.Tensor, upstream: torch.Tensor) -> float:
    """Forward and backward of one layer."""

    def step() -> None:
        forward(x).backward(upstream)

    seconds, _ = timed(step, x.device)
    x.grad = None
    return seconds


def main(
    rows: int = 2048, rank: int = 16, rounds: int = 15, layers: list[str] | None = None, json_file: str | None = None
) -> None:
    """Measure.

    Args:
        rows: Tokens.
        rank: Of the adapter.
        rounds: In each of which every side runs once.
        layers: Names of layers, as in the table; all where not given.
        json_file: Also write the figures here.
    """
    runtime = Runtime.start()
    device = runtime.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    table = Table(title=f"forward and backward, {rows:,} rows, r = {rank}, {dtype}, {device}".replace("torch.", ""))
    for column in ("layer", "plain, ms", "PEFT, ms", "saro, ms", "PEFT / plain", "saro / plain"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    results = {}
    for name in layers or LAYERS:
        n_in, n_out = LAYERS[name]
        sides = make(n_in, n_out, rank, device, dtype)
        x = torch.randn(rows, n_in, device=device, dtype=dtype, requires_grad=True)
        upstream = torch.randn(rows, n_out, device=device, dtype=dtype)
        for _ in range(3):
            for forward in sides.values():
                step_seconds(forward, x, upstream)
        found = [{side: step_seconds(sides[side], x, upstream) for side in SIDES} for _ in range(rounds)]
        median = {side: statistics.median(f[side] for f in found) for side in SIDES}
        ratio = {side: statistics.median(f[side] / f["plain"] for f in found) for side in ("peft", "saro")}
        results[name] = {"seconds": median, "ratio_to_plain": ratio}
        table.add_row(
            name, *(f"{1e3 * median[side]:.2f}" for side in SIDES), f"{ratio['peft']:.2f}", f"{ratio['saro']:.2f}"
        )
    Console().print(table)
    if json_file is not None:
        figures = {"rows": rows, "rank": rank, "rounds": rounds, "threads": runtime.threads, "layers": results}
        Path(json_file).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
