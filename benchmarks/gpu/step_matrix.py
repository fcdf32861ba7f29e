"""Measure training steps of one large model in many ways, with one load: size of the pack, recomputation, layers.

    python benchmarks/gpu/step_matrix.py MODEL_FOLDER FILE.json --seconds 150 [--packs 8192 2048] [--trace FILE.json.gz]

One step is one pack of random sequences of 512 tokens, as in `train_step.py`, or with ``--task srpo`` of random pairs of 2,048:
forward, head, backward, AdamW. The cases come in order of importance. Cases for which no time is left are named in the file,
which is written after each one. Shares are those of the rate of a square GEMM that is measured beside each case, and count only
the operations that the mathematics needs; of pairs 0.7 % too many, as if the rows that both sides share had a gradient in the head.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from train_step import Times, time_step
from yardstick import gemm_per_second

from saro.config import ModelConfig, TrainConfig
from saro.data.packs import Pack
from saro.data.random_packs import random_pack, random_pairs
from saro.distributed.runtime import Runtime
from saro.files import atomic_write
from saro.model.load import load_policy
from saro.model.policy import Policy
from saro.model.recompute import enable_recomputation, recompute_layers
from saro.model.source import find_model
from saro.model.unmodified import own_layers
from saro.train.losses import nll_sum
from saro.train.optim import make_optimizer
from saro.train.step_floor import floor_of_step

CUDA = torch.cuda.is_available()
SEQUENCE_TOKENS = 512 if CUDA else 16
PAIR_TOKENS = 4 * SEQUENCE_TOKENS
SCORED_SHARE = 0.75
# Steps that are timed by parts, and as a whole. Without a GPU, all of it is only tried out.
WARMUP, PART_ROUNDS, ROUNDS = (2, 3, 5) if CUDA else (1, 1, 1)
GEMM_SIZE = None if CUDA else 256


@dataclass(frozen=True)
class Case:
    """A way to run the step.

    Attributes:
        pack_tokens: tokens of the pack.
        checkpointing: recompute activations in the backward.
        layers: "saro", or "peft" for PEFT's own LoRA layers.
        attention: None for the backend that `auto` chooses.
        offload: keep the inputs of recomputed layers in host memory.
    """

    pack_tokens: int
    checkpointing: bool
    layers: str = "saro"
    attention: str | None = None
    offload: bool = False


def list_cases(packs: list[int], task: str) -> list[Case]:
    """Return the cases in order of importance; the first size is the one that is looked at closely."""
    first, *others = packs
    rest = [Case(tokens, checkpointing) for tokens in others for checkpointing in (False, True)]
    cases = [Case(first, True), Case(first, False)]
    if task == "srpo":
        return cases + rest
    cases += [*rest[:1], Case(first, True, offload=True)]
    cases += [Case(first, True, layers="peft"), Case(first, True, attention="sdpa")]
    return [*cases, *rest[2:], *rest[1:2]]


def make_pack(task: str, tokens: int, vocabulary: int) -> Pack:
    """Fill a pack of a task: "rw" with sequences, "srpo" with pairs."""
    if task == "srpo":
        return random_pairs(tokens, vocabulary, PAIR_TOKENS)
    return random_pack(tokens, vocabulary, SEQUENCE_TOKENS, SCORED_SHARE)


@contextmanager
def case_applied(policy: Policy, case: Case) -> Iterator[None]:
    """Set the policy up for a case, in this context only."""
    attention = policy.attention
    if case.checkpointing:
        enable_recomputation(policy.causal_lm, case.offload)
    policy.attention = case.attention or attention
    try:
        with own_layers(policy.causal_lm) if case.layers == "peft" else nullcontext():
            yield
    finally:
        policy.attention = attention
        if case.checkpointing:
            recompute_layers(policy.causal_lm, 0)


def memory_gib() -> dict[str, float]:
    """Return the most that tensors held, and that the allocator took from the device."""
    if not CUDA:
        return {"allocated_gib": 0.0, "reserved_gib": 0.0}
    return {
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def reset_memory() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(policy: Policy, optimizer: torch.optim.Optimizer, pack: Pack, case: Case) -> dict:
    """Measure a case: seconds of the parts, tokens per second, share of the GEMM rate, peak memory."""
    device = policy.causal_lm.device
    floor = floor_of_step(policy, pack)
    operations = sum(work.operations for work in floor.values())
    dtype = torch.bfloat16 if CUDA else torch.float32
    reset_memory()
    with case_applied(policy, case):
        for _ in range(WARMUP):
            time_step(policy, pack, optimizer)
        times: list[Times] = [time_step(policy, pack, optimizer) for _ in range(PART_ROUNDS)]
        # Parts are timed with a pause of the device between them; the whole step, as training runs it, has none.
        whole = [whole_step_seconds(policy, pack, optimizer) for _ in range(ROUNDS)]
    memory = memory_gib()
    step = statistics.median(whole)
    gemm_rate = statistics.median(gemm_per_second(device, dtype, GEMM_SIZE) for _ in range(3))
    return {
        **asdict(case),
        "seconds": step,
        "parts": {part: statistics.median(getattr(t, part) for t in times) for part in PARTS},
        "tokens_per_second": pack.tokens / step,
        "operations": {part: work.operations for part, work in floor.items()},
        "operations_per_second": operations / step,
        "gemm_operations_per_second": gemm_rate,
        "share_of_gemm_rate": operations / step / gemm_rate,
        **memory,
    }


PARTS = ("forward", "head", "backward", "optimizer")


def run_step(policy: Policy, pack: Pack, optimizer: torch.optim.Optimizer) -> None:
    (nll_sum(policy(pack, gradient_rows=pack.margin_rows)) / pack.rows).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def whole_step_seconds(policy: Policy, pack: Pack, optimizer: torch.optim.Optimizer) -> float:
    begin = time.perf_counter()
    run_step(policy, pack, optimizer)
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def profile_step(policy: Policy, optimizer: torch.optim.Optimizer, pack: Pack, case: Case, trace: str | None) -> dict:
    """Return where the device's time of a step goes, by kernel; write a trace for Perfetto."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if CUDA:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with case_applied(policy, case):
        whole_step_seconds(policy, pack, optimizer)
        with torch.profiler.profile(activities=activities) as profile:
            took = whole_step_seconds(policy, pack, optimizer)

    def own_microseconds(event) -> float:
        return event.self_device_time_total if CUDA else event.self_cpu_time_total

    events = [e for e in profile.key_averages() if not CUDA or e.device_type == torch.autograd.DeviceType.CUDA]
    events = sorted((e for e in events if own_microseconds(e) > 0), key=own_microseconds, reverse=True)
    busy = sum(map(own_microseconds, events)) / 1e6
    if trace is not None:
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(plain))
            with open(plain, "rb") as source, gzip.open(trace, "wb", 6) as target:
                shutil.copyfileobj(source, target)
    return {
        "case": asdict(case),
        "seconds_with_profiler": took,
        "busy_seconds": busy,
        "launches": sum(e.count for e in events),
        "kernels": [
            {
                "name": e.key[:150],
                "calls": e.count,
                "seconds": own_microseconds(e) / 1e6,
                "share": own_microseconds(e) / 1e6 / busy,
            }
            for e in events[:40]
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="Folder of the model.")
    parser.add_argument("file", help="JSON file to write.")
    parser.add_argument("--packs", type=int, nargs="+", default=[8192, 2048, 4096, 16384], help="Tokens of the packs.")
    parser.add_argument("--task", choices=("rw", "srpo"), default="rw", help="What fills the packs.")
    parser.add_argument("--seconds", type=float, default=150, help="No case is started later than this.")
    parser.add_argument("--trace", help="Write a trace of the second case to this file, gzipped.")
    parser.add_argument("--without_liger", action="store_true", help="Leave liger-kernel's layers out.")
    options = parser.parse_args()
    begin = time.monotonic()
    runtime = Runtime.start()
    config = ModelConfig(name=options.model, method="qlora", liger=False if options.without_liger else None)
    source = find_model(config)
    reset_memory()
    policy = load_policy(source, config, runtime.device, seed=0).train()
    optimizer = make_optimizer(policy.trainable().values(), TrainConfig(lr=1e-6))
    results: dict = {
        "model": Path(options.model).name,
        "task": options.task,
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "policy": policy.summary(),
        "load_seconds": time.monotonic() - begin,
        "load_gib": memory_gib(),
        "cases": [],
        "left_out": [],
        "profile": None,
    }

    def pack_of(case: Case) -> Pack:
        return make_pack(options.task, case.pack_tokens, source.config.vocab_size).to(runtime.device)

    def record(name: str, run: Callable[[], None]) -> None:
        """Run a part if time is left; its failure is recorded, and stops no other part."""
        left = options.seconds - (time.monotonic() - begin)
        if left < 0:
            results["left_out"].append(f"{name}: no time left")
        else:
            try:
                run()
            except Exception as error:  # also out of memory: the next case may be smaller
                first = str(error).strip().partition("\n")[0]
                results["left_out"].append(f"{name}: {type(error).__name__}: {first}"[:400])
                optimizer.zero_grad(set_to_none=True)
                print(results["left_out"][-1], flush=True)
        with atomic_write(options.file) as out:
            out.write(json.dumps(results, indent=1) + "\n")

    def run_case(case: Case) -> None:
        entry = measure(policy, optimizer, pack_of(case), case)
        results["cases"].append(entry)
        print(
            f"{case}: {entry['seconds']:.3f} s, {entry['tokens_per_second']:,.0f} tokens/s, "
            f"{entry['share_of_gemm_rate']:.1%} of the GEMM rate, {entry['allocated_gib']:.2f} GiB",
            flush=True,
        )

    def run_profile(case: Case) -> None:
        results["profile"] = profile_step(policy, optimizer, pack_of(case), case, options.trace)

    cases = list_cases(options.packs, options.task)
    for number, case in enumerate(cases):
        record(str(case), lambda case=case: run_case(case))
        if number == 1:
            record("profile", lambda case=case: run_profile(case))
    return int(not results["cases"])


if __name__ == "__main__":
    sys.exit(main())
