"""Measure what an adapter costs: forward and backward of a frozen linear layer, with PEFT's LoRA, and with `lora_linear`.

    python benchmarks/lora_linear.py [--rows 2048] [--rounds 15] [--json_file FILE]

The three take turns in each round, and the ratios are medians of the ratios within a round, so that a slow moment of the
machine slows all three. Gradients are computed for the input and, with an adapter, for A and B.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable

import torch
from jsonargparse import auto_cli
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from rich.console import Console
from rich.table import Table
from torch import nn
from yardstick import seconds

from saro.distributed.runtime import Runtime
from saro.files import atomic_write
from saro_kernels import FrozenLinear, LoraLinear, lora_linear

# name -> (in features, out features)
LAYERS = {
    "SmolLM2-135M q": (576, 576),
    "SmolLM2-135M up": (576, 1536),
    "SmolLM2-135M down": (1536, 576),
    "Llama-3-8B q": (4096, 4096),
    "Llama-3-8B up": (4096, 14336),
}
SIDES = ("plain", "peft", "saro")


def make_sides(n_in: int, n_out: int, rank: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable]:
    """Return {side: function that applies the layer to its input}; all sides share their weights."""
    base = nn.Linear(n_in, n_out, bias=False, device=device, dtype=dtype).requires_grad_(False)
    peft = PeftLinear(base, "default", LoraConfig(r=rank, lora_alpha=2 * rank), r=rank, lora_alpha=2 * rank)
    a, b = peft.lora_A["default"].weight, peft.lora_B["default"].weight
    nn.init.normal_(b, std=0.02)
    layer = LoraLinear(FrozenLinear(base.weight), a, b, peft.scaling["default"])
    return {"plain": base, "peft": peft, "saro": lambda x: lora_linear(x, layer)}


def step_seconds(forward: Callable, x: torch.Tensor, upstream: torch.Tensor) -> float:
    """Return the seconds of one forward and backward of a layer."""

    def step() -> None:
        forward(x).backward(upstream)

    elapsed = seconds(step, x.device)
    x.grad = None
    return elapsed


def main(
    rows: int = 2048, rank: int = 16, rounds: int = 15, layers: list[str] | None = None, json_file: str | None = None
) -> None:
    """Measure forward and backward of a frozen linear layer, with PEFT's LoRA, and with `lora_linear`.

    Args:
        rows: Rows of the input (tokens).
        rank: Rank of the adapter.
        rounds: Measured rounds; each side runs once per round.
        layers: Names of the layers, as in the table; default all.
        json_file: Also write the figures to this file.
    """
    runtime = Runtime.start()
    device = runtime.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    table = Table(title=f"forward and backward, {rows:,} rows, r = {rank}, {dtype}, {device}".replace("torch.", ""))
    for column in ("layer", "plain, ms", "PEFT, ms", "saro, ms", "PEFT / plain", "saro / plain"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"{runtime.threads} CPU threads"
    results = {}
    for name in layers or LAYERS:
        n_in, n_out = LAYERS[name]
        sides = make_sides(n_in, n_out, rank, device, dtype)
        x = torch.randn(rows, n_in, device=device, dtype=dtype, requires_grad=True)
        upstream = torch.randn(rows, n_out, device=device, dtype=dtype)
        for _ in range(3):
            for forward in sides.values():
                step_seconds(forward, x, upstream)
        times = [{side: step_seconds(sides[side], x, upstream) for side in SIDES} for _ in range(rounds)]
        median = {side: statistics.median(t[side] for t in times) for side in SIDES}
        ratio = {side: statistics.median(t[side] / t["plain"] for t in times) for side in ("peft", "saro")}
        results[name] = {"seconds": median, "ratio_to_plain": ratio}
        milliseconds = [f"{1e3 * median[side]:.2f}" for side in SIDES]
        table.add_row(name, *milliseconds, f"{ratio['peft']:.2f}", f"{ratio['saro']:.2f}")
    Console().print(table)
    if json_file is not None:
        figures = {"device": device_name, "rows": rows, "rank": rank, "rounds": rounds, "layers": results}
        with atomic_write(json_file) as out:
            out.write(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
