"""Measure packed attention of Llama-3-8B's shape, varlen beside SDPA: forward, and forward and backward.

python benchmarks/gpu/attention_speed.py FILE.json
"""

from __future__ import annotations

import json
import statistics
import sys

import torch
from peers_data import Part, PartLengths, generate_pairs
from yardstick import seconds

from saro.data.packs import Pack, lay_out
from saro.data.random_packs import random_pack
from saro.files import atomic_write
from saro.model.attention import AttentionPlan, packed_attention

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
HEADS, GROUPS, SIZE = (32, 8, 128) if CUDA else (4, 2, 16)
# Tokens of a pack, and of the sequences that fill it: which backend is faster depends on their length.
TOKENS, LENGTHS = (8192, (256, 1024, 2048, 4096, 8192)) if CUDA else (64, (16, 64))
LONG_PAIRS = PartLengths(
    prompt=Part(256, 0.5, 1024),
    shared=Part(384, 0.6, 1024),
    chosen=Part(640, 0.6, 2048),
    rejected=Part(600, 0.6, 2048),
)
WARMUP, ROUNDS = (3, 10) if CUDA else (1, 1)


class Causal(torch.nn.Module):
    """Stands for the attention layer of a decoder."""

    is_causal = True


def make_packs() -> dict[str, Pack]:
    """Return the packs that are measured, by description."""
    pairs = generate_pairs(4, 1000, 2, 0, LONG_PAIRS if CUDA else PartLengths())
    packs = {f"{TOKENS // length} sequences of {length}": random_pack(TOKENS, 1000, length, 0.5) for length in LENGTHS}
    return {**packs, "trees of 4 pairs": lay_out(pairs.trees(range(4), 2**31))}


def measure(pack: Pack) -> dict:
    """Measure both backends on a pack. Seconds; operations of the scores that count; difference of the results."""
    pack = pack.to(DEVICE)
    tokens = pack.tokens
    q, k, v, upstream = (
        torch.randn(1, heads, tokens, SIZE, device=DEVICE, dtype=DTYPE) for heads in (HEADS, GROUPS, GROUPS, HEADS)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    # As in saro.train.step_floor; the backward has 2.5 times as many operations as the forward, since it computes scores again.
    operations = 4 * (pack.position_ids.sum().item() + tokens / 2) * HEADS * SIZE
    entry: dict = {"tokens": tokens, "segments": len(pack.segments), "forward_operations": operations}
    results = {}
    for backend in ("sdpa", "varlen") if CUDA else ("sdpa",):
        plan = AttentionPlan.of(pack, backend)

        def forward(plan: AttentionPlan = plan) -> torch.Tensor:
            return packed_attention(Causal(), *leaves, None, plan=plan)[0]

        def both(forward=forward) -> tuple[torch.Tensor, ...]:
            output = forward()
            return output, *torch.autograd.grad(output, leaves, upstream.transpose(1, 2))

        results[backend] = both()
        for _ in range(WARMUP):
            forward()
            both()
        entry[backend] = {
            "forward_seconds": statistics.median(seconds(forward, DEVICE) for _ in range(ROUNDS)),
            "both_seconds": statistics.median(seconds(both, DEVICE) for _ in range(ROUNDS)),
        }
        entry[backend]["operations_per_second"] = 3.5 * operations / entry[backend]["both_seconds"]
    if len(results) == 2:
        pairs = zip(results["varlen"], results["sdpa"], strict=True)
        entry["difference"] = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs]
        again = both()
        entry["varlen_is_reproducible"] = all(torch.equal(a, b) for a, b in zip(again, results["varlen"], strict=True))
    return entry


def main() -> None:
    results = {}
    for name, pack in make_packs().items():
        results[name] = measure(pack)
        print(name, json.dumps(results[name]), flush=True)
        with atomic_write(sys.argv[1]) as out:
            out.write(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
