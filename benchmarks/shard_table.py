"""Predict the memory of each rank for a model of 70 billion parameters whose weights many ranks share.

    PYTHONPATH=benchmarks/gpu python benchmarks/shard_table.py [--ranks 8 64] [--into benchmarks/README.md]

The project's own sharding (saro/distributed/shard.py, torch's FSDP2) runs on fake tensors, as rank 0 of a process group that exchanges
nothing: figures are counted from the storages that it makes, not computed from shapes. As in `saro plan`, few layers are run, and the
line is extended to all. 4-bit weights are stand-ins of their size. All layers are recomputed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from gpu_tables import publish, table
from random_model import SHAPES

from saro.config import ModelConfig
from saro.train.predict_memory import Ranks, Setting, Workload, predict_costs

MARKERS = ("<!-- shard table: begin -->", "<!-- shard table: end -->")
METHODS = {"full": "full fine-tuning", "lora": "LoRA, bf16", "qlora": "QLoRA"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-70b", help="Shape of the model.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64], help="Numbers of ranks.")
    parser.add_argument("--tokens", type=int, default=8192, help="Tokens of the pack.")
    parser.add_argument("--into", type=Path, help="Document whose table is replaced; without it, it is printed.")
    options = parser.parse_args()
    rows = []
    for method, name in METHODS.items():
        model = ModelConfig(method=method, gradient_checkpointing=True)
        setting = Setting(SHAPES[options.shape](), model, torch.bfloat16, is_gpu=True)
        workload = Workload("rw", 512)
        for number in options.ranks:
            (cost,) = predict_costs(setting, workload, [options.tokens], Ranks("full", number))
            rest = cost.working - cost.gathered - cost.layers
            parts = [cost.weights + cost.adapters, cost.gradients, cost.optimizer, cost.gathered, cost.layers]
            rows.append([f"{name}, {number} ranks", *(f"{part / 2**30:.1f}" for part in [*parts, rest, cost.peak])])
    header = [
        f"{options.shape}, {options.tokens:,} tokens, GiB on a rank",
        "weights",
        "gradients",
        "optimizer",
        "embedding and head",
        "activations",
        "rest of the step",
        "peak",
    ]
    publish(table(header, rows), options.into, MARKERS)


if __name__ == "__main__":
    main()
