"""Measure how long a large cache of reference log-probs takes to load, and how much memory this needs.

    python benchmarks/reference_cache_speed.py [--sequences 100000] [--tokens 500]

It writes random log-probs for sequences of random token ids into a temporary cache. Then it finds and loads all of them
in a new process, with the steps of a run: keys from token ids, index, shards.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli

from saro.train.reference_cache import ReferenceCache, sequence_key

KEY = {"benchmark": 1}


def sequence(i: int, tokens: int) -> np.ndarray:
    """Return the token ids of a random sequence; all tokens but the first are scored."""
    return np.random.default_rng(i).integers(0, 49_152, tokens + 1).astype(np.int32)


def fill(sequences: int, tokens: int) -> None:
    """Write the cache in portions of 5,000 sequences, as scoring does."""
    cache = ReferenceCache.of(KEY)
    for start in range(0, sequences, 5_000):
        numbers = range(start, min(start + 5_000, sequences))
        logps = np.random.default_rng(start).normal(-2, 1, (len(numbers), tokens)).astype(np.float32)
        cache.add({sequence_key(sequence(i, tokens), 1): row for i, row in zip(numbers, logps, strict=True)})


def load(sequences: int, tokens: int) -> None:
    """Load the cache, and print seconds and memory as JSON."""
    all_sequences = [sequence(i, tokens) for i in range(sequences)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    cache = ReferenceCache.of(KEY)
    keys = [sequence_key(s, 1) for s in all_sequences]
    assert all(cache.find(keys))
    logps, _ = cache.load(keys, [tokens] * sequences)
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 2**10
    print(json.dumps({"seconds": seconds, "result_bytes": logps.nbytes, "peak_growth_bytes": grown}))


def main(sequences: int = 100_000, tokens: int = 500) -> None:
    """Measure the time and memory of loading a reference cache.

    Args:
        sequences: Cached sequences.
        tokens: Scored tokens per sequence.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SARO_CACHE"] = folder
        fill(sequences, tokens)
        code = f"import reference_cache_speed; reference_cache_speed.load({sequences}, {tokens})"
        for title in ("first load, which makes the index", "second load"):
            process = subprocess.run(
                [sys.executable, "-c", code],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parent,
            )
            figures = json.loads(process.stdout)
            print(
                f"{title}: {sequences:,} sequences of {tokens} tokens in {figures['seconds']:.1f} s; "
                f"{figures['result_bytes'] / 2**20:.0f} MiB of log-probs, memory grew by "
                f"{figures['peak_growth_bytes'] / 2**20:.0f} MiB at the peak"
            )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
