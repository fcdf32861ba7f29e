"""Measure how fast a training step is, compared with what the machine can do.

    python benchmarks/train_step.py [--model demo] [--method lora] [--pack_tokens 2048] [--peft true] [--json_file FILE]

One step is one pack of random token ids: forward, head, backward, AdamW. Steps alternate with a measurement of the GEMM
rate, so that a slow moment of the machine slows both, and the figures are medians. With `--peft true`, steps with PEFT's
own LoRA layers and steps without adapters take turns with them. Without adapters the gradient goes to the embeddings: no
adapter can be faster. On a GPU, a step is timed by the clock, with Python's launches. The floor of a step is the time of its operations at the GEMM rate, or of its bytes at the rate of
a copy (`saro.train.step_floor`): recomputation and all that is not a matrix product count as lost time.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from yardstick import copy_per_second, gemm_per_second

from saro.config import ModelConfig, TrainConfig
from saro.data.packs import Pack
from saro.data.random_packs import random_pack
from saro.demo import find_demo
from saro.distributed.runtime import Runtime
from saro.files import atomic_write
from saro.model.load import load_policy
from saro.model.policy import Policy
from saro.model.source import find_model
from saro.model.unmodified import own_layers
from saro.train.losses import nll_sum
from saro.train.optim import make_optimizer
from saro.train.step_floor import floor_of_step


@dataclass(frozen=True)
class Times:
    """One round: seconds of the parts of a step, and of the step with PEFT's layers and without adapters.

    Attributes:
        gemm_rate: floating-point operations per second of a GEMM in the same round.
    """

    forward: float
    head: float
    backward: float
    optimizer: float
    gemm_rate: float = math.nan
    peft_step: float = math.nan
    bare_step: float = math.nan

    @property
    def step(self) -> float:
        return self.forward + self.head + self.backward + self.optimizer


def time_step(policy: Policy, pack: Pack, optimizer: torch.optim.Optimizer) -> Times:
    """Run one training step and time its parts."""
    device = pack.input_ids.device
    decoder = policy.causal_lm.get_decoder()
    marks: list[float] = []

    def mark(*_: object) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    mark()
    hook = decoder.register_forward_hook(mark)
    logps = policy(pack, gradient_rows=pack.margin_rows)
    hook.remove()
    mark()
    (nll_sum(logps) / pack.rows).backward()
    mark()
    optimizer.step()
    mark()
    optimizer.zero_grad(set_to_none=True)
    forward, head, backward, update = np.diff(marks).tolist()
    return Times(forward=forward, head=head, backward=backward, optimizer=update)


def time_round(policy: Policy, pack: Pack, optimizer: torch.optim.Optimizer, peft: bool) -> Times:
    """Time a step and a GEMM; with ``peft``, also the step with PEFT's layers and the step without adapters."""
    ours = time_step(policy, pack, optimizer)
    theirs = bare = math.nan
    if peft:
        with own_layers(policy.causal_lm):
            theirs = time_step(policy, pack, optimizer).step
        with policy.model.disable_adapter(), embeddings_with_gradient(policy):
            bare = time_step(policy, pack, optimizer).step
    device = pack.input_ids.device
    return replace(ours, gemm_rate=gemm_per_second(device, policy.compute_dtype), peft_step=theirs, bare_step=bare)


@contextmanager
def embeddings_with_gradient(policy: Policy) -> Iterator[None]:
    """Make the embeddings' output require gradients, so that these go through all layers even if none is trained."""
    embeddings = policy.causal_lm.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    try:
        yield
    finally:
        hook.remove()


def write_trace(policy: Policy, pack: Pack, optimizer: torch.optim.Optimizer, path: str) -> None:
    """Write a profiler trace of one step, for chrome://tracing or Perfetto."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if pack.input_ids.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        time_step(policy, pack, optimizer)
    profile.export_chrome_trace(path)


def main(
    model: str = "demo",
    method: str = "lora",
    dtype: str = "auto",
    rank: int = 16,
    pack_tokens: int = 2048,
    sequence_tokens: int = 256,
    scored_share: float = 0.75,
    steps: int = 8,
    warmup: int = 3,
    gradient_checkpointing: bool = False,
    peft: bool = False,
    fused_lora: bool = True,
    trace: str | None = None,
    json_file: str | None = None,
) -> None:
    """Measure a training step.

    Args:
        model: Folder or hub name of a causal LM.
        method: full, lora or qlora.
        dtype: float32 or bfloat16; auto is float32 on a CPU, unlike in the recipes, and bfloat16 on a GPU.
        rank: Rank of the adapters.
        pack_tokens: Tokens of the pack.
        sequence_tokens: Tokens of each sequence in it.
        scored_share: Share of each sequence's tokens that are scored.
        steps: Measured steps.
        warmup: Steps before these; they touch new memory and are slow.
        gradient_checkpointing: Recompute activations.
        peft: Also time a step with PEFT's own LoRA layers and a step without adapters, after each step.
        fused_lora: false measures only PEFT's own layers, to see their peak memory.
        trace: Also write a profiler trace of one step to this file.
        json_file: Also write the figures to this file; it is complete or absent.
    """
    runtime = Runtime.start()
    options = ModelConfig(
        name=find_demo(model),
        method=method,
        dtype=dtype,
        lora_rank=rank,
        gradient_checkpointing=gradient_checkpointing,
        fused_lora=fused_lora,
    )
    source = find_model(options)
    policy = load_policy(source, options, runtime.device, seed=0).train()
    loaded_gib = runtime.memory()
    if runtime.device.type == "cuda":
        # From here on, the peaks are those of steps: loading may have needed more.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    optimizer = make_optimizer(policy.trainable().values(), TrainConfig())
    pack = random_pack(pack_tokens, source.config.vocab_size, sequence_tokens, scored_share).to(runtime.device)
    measured = [time_round(policy, pack, optimizer, peft) for _ in range(warmup + steps)][warmup:]
    median = {
        part: statistics.median(getattr(t, part) for t in measured)
        for part in ("forward", "head", "backward", "optimizer", "step", "peft_step", "bare_step")
    }
    floor = floor_of_step(policy, pack)
    operations = sum(work.operations for work in floor.values())
    gemm_rate = statistics.median(t.gemm_rate for t in measured)
    # Read the peaks before the copy below allocates memory.
    peak_gib = runtime.memory()
    reserved_gib = torch.cuda.max_memory_reserved() / 2**30 if runtime.device.type == "cuda" else None
    copy_rate = copy_per_second(runtime.device)
    # Take the median of the ratios of each round: a slow moment of the machine then slows both sides.
    share = statistics.median(operations / t.step / t.gemm_rate for t in measured)
    result = {
        "model": model,
        "method": method,
        "dtype": str(policy.compute_dtype).removeprefix("torch."),
        "rank": rank,
        "device": torch.cuda.get_device_name() if runtime.device.type == "cuda" else "cpu",
        "threads": runtime.threads,
        "tokens": pack.tokens,
        "scored_rows": pack.rows,
        "tokens_per_second": pack.tokens / median["step"],
        "seconds": median,
        "operations": {part: work.operations for part, work in floor.items()},
        "bytes": {part: work.bytes for part, work in floor.items()},
        "gemm_operations_per_second": gemm_rate,
        "copy_bytes_per_second": copy_rate,
        "share_of_gemm_rate": share,
        "floor_seconds": {part: work.seconds(gemm_rate, copy_rate) for part, work in floor.items()},
        "peft_to_saro": statistics.median(t.peft_step / t.step for t in measured),
        "bare_to_saro": statistics.median(t.bare_step / t.step for t in measured),
        "loaded_memory_gib": loaded_gib,
        "peak_memory_gib": peak_gib,
        "peak_reserved_gib": reserved_gib,
    }
    show(result)
    if json_file is not None:
        with atomic_write(json_file) as out:
            out.write(json.dumps(result, indent=2) + "\n")
    if trace is not None:
        write_trace(policy, pack, optimizer, trace)


def show(result: dict) -> None:
    """Print the figures of a result."""
    console = Console()
    seconds = result["seconds"]
    table = Table(
        title=f"{result['model']}, {result['method']}, {result['dtype']}, {result['tokens']} tokens, {result['device']}"
    )
    table.add_column("part")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for part in ("forward", "head", "backward", "optimizer"):
        table.add_row(part, f"{seconds[part]:.3f}", f"{seconds[part] / seconds['step']:.0%}")
    table.add_row("step", f"{seconds['step']:.3f}", "")
    console.print(table)
    floor = result["floor_seconds"]
    floor_table = Table(title="floor: the least work of the step", title_justify="left")
    for column in ("part", "TFLOP", "GiB", "floor, s"):
        floor_table.add_column(column, justify="left" if column == "part" else "right")
    for part, value in floor.items():
        operations, moved = result["operations"][part] / 1e12, result["bytes"][part] / 2**30
        floor_table.add_row(part, f"{operations:.3f}", f"{moved:.2f}", f"{value:.3f}")
    console.print(floor_table)
    console.print(
        f"floor {sum(floor.values()):.3f} s at the rates of a GEMM and of a copy "
        f"({result['copy_bytes_per_second'] / 2**30:.1f} GiB/s); the step takes "
        f"{seconds['step'] / sum(floor.values()):.2f} times its floor"
    )
    if not math.isnan(result["peft_to_saro"]):
        console.print(
            f"with PEFT's own layers {seconds['peft_step']:.3f} s, {result['peft_to_saro']:.2f} times as long; "
            f"without adapters {seconds['bare_step']:.3f} s, {result['bare_to_saro']:.2f} times"
        )
    reserved = "" if result["peak_reserved_gib"] is None else f", {result['peak_reserved_gib']:.2f} reserved"
    console.print(
        f"{result['tokens_per_second']:.0f} tokens/s; {sum(result['operations'].values()) / 1e12:.3f} TFLOP per step; "
        f"GEMM rate {result['gemm_operations_per_second'] / 1e9:.0f} GFLOP/s, of which a step reaches "
        f"{result['share_of_gemm_rate']:.0%}; peak memory {result['peak_memory_gib']:.2f} GiB "
        f"({result['loaded_memory_gib']:.2f} after loading{reserved})"
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
