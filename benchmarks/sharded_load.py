"""Measure what each of several processes holds while they load a model whose weights they share.

    PYTHONPATH=benchmarks/gpu python benchmarks/sharded_load.py [--shape llama-1b] [--processes 2] [--method lora]

A model of random weights in bfloat16 is written into a temporary folder, which is deleted afterwards. Each process is a rank of a gloo
group, and loads it as a run does (`load_policy`). Memory is resident memory above that before loading: own memory, and with the
parts of the safetensors that are mapped, which the system can take back. The bound is a rank's parts, plus the largest group that is
ever whole: a layer, or embedding and head.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from gpu_tables import publish, table
from random_model import SHAPES, write_model

from saro.config import ModelConfig
from saro.distributed.runtime import Runtime
from saro.distributed.shard import local
from saro.model.architectures import decoder_layers
from saro.model.load import load_policy
from saro.model.source import find_model
from saro.train.resident_memory import give_freed_memory_back, own_bytes, resident_bytes, resident_peak

MARKERS = ("<!-- sharded load: begin -->", "<!-- sharded load: end -->")


def load(folder: str, method: str, is_sharded: bool) -> dict[str, int]:
    """Load the model in this process, a rank of the launcher's, and return what it took in bytes."""
    runtime = Runtime.start(shard="full" if is_sharded else "none")
    torch.set_num_threads(1)
    give_back_at_once()
    options = ModelConfig(name=folder, method=method, dtype="bfloat16")
    source = find_model(options)
    # Libraries allocate some memory once; it must not count.
    torch.randn(64, 64) @ torch.randn(64, 64)
    runtime.barrier()
    before_own, before_all = own_bytes(), resident_bytes()
    policies = []
    peaks: dict[str, int] = {}

    def read() -> int:
        peaks["with_files"] = max(peaks.get("with_files", 0), resident_bytes() - before_all)
        return own_bytes()

    def work() -> None:
        policies.append(load_policy(source, options, runtime.device, 0, runtime.mesh))

    peaks["own"] = resident_peak(work, read) - before_own
    give_freed_memory_back()
    peaks["afterwards"] = own_bytes() - before_own
    (policy,) = policies
    parameters = list(policy.parameters())
    layers = decoder_layers(policy.causal_lm)
    in_layers = {id(p) for layer in layers for p in layer.parameters()}
    groups = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers]
    groups.append(sum(p.numel() * p.element_size() for p in parameters if id(p) not in in_layers))
    peaks["parts"] = sum(local(p).nbytes for p in parameters)
    peaks["whole"] = sum(p.numel() * p.element_size() for p in parameters)
    peaks["layer"], peaks["largest_group"] = groups[0], max(groups)
    runtime.barrier()
    runtime.end()
    return peaks


def give_back_at_once() -> None:
    """Let the C library give freed blocks back at once, so that only what lives counts. ``Runtime.start`` lets it keep them."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 2**17)  # M_TRIM_THRESHOLD


def run_ranks(folder: Path, processes: int, method: str) -> list[dict[str, int]]:
    """Load the model in this many processes at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--folder", str(folder), "--method", method]
    start = partial(subprocess.Popen, command, stdout=subprocess.PIPE, text=True)
    ranks = [start(env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)]
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        sys.exit("a rank failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-1b", help="Shape of the model.")
    parser.add_argument("--processes", type=int, default=2, help="Number of ranks.")
    parser.add_argument("--method", choices=("full", "lora", "qlora"), default="lora")
    parser.add_argument("--into", type=Path, help="Document whose table is replaced; without it, it is printed.")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(load(options.folder, options.method, int(os.environ["WORLD_SIZE"]) > 1)))
        return
    names = ("whole", "parts", "layer", "largest_group", "own", "with_files", "afterwards")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        write_model(options.shape, Path(temporary))
        for rank, found in enumerate(run_ranks(Path(temporary), options.processes, options.method)):
            label = f"{options.shape}, {options.method}, rank {rank} of {options.processes}"
            rows.append([label, *(f"{found[name] / 2**20:,.0f}" for name in names)])
    publish(table(["MiB", *(name.replace("_", " ") for name in names)], rows), options.into, MARKERS)


if __name__ == "__main__":
    main()
