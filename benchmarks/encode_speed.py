"""Measure how fast pairs are encoded into the cache, and what it costs to open them again.

    python benchmarks/encode_speed.py [--pairs 20000] [--workers N]     # a million pairs take an hour of one core

Pairs of random words, two on each prompt, are encoded as the first rank of a machine does it, with the demo's tokenizer. A new
process opens them again, and prepares what a run needs before its model is loaded: the table of lengths, the schedule and
the first step. It does so once as a resumed run, for which the times of the files say that they have not changed, and once after
the files were touched, as copied ones are: they are hashed then.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from datetime import date
from functools import partial
from pathlib import Path

import psutil
from jsonargparse import auto_cli

from saro.checks.check_masks import check_masks
from saro.config import DataConfig, ModelConfig, TrainConfig
from saro.data import encoded_folder
from saro.data.dataset import PairSet
from saro.data.encoded_folder import map_encoded
from saro.data.lengths import LengthReport
from saro.data.steps import Schedule, Steps
from saro.demo import find_demo
from saro.model.source import find_model

# Words of a prompt, of the beginning that both sides share, and of the rest of each side.
PROMPT, SHARED, REST = 15, 25, 25


def write_pairs(path: Path, pairs: int) -> None:
    """Write pairs of random words."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 8))) for _ in range(5000)]

    def text(count: int) -> str:
        return " ".join(generator.choices(words, k=count)) + "."

    prompt = ""
    with path.open("w") as file:
        for i in range(pairs):
            if i % 2 == 0:
                prompt = text(PROMPT)
            shared = text(SHARED)
            sides = {name: {"reasoning": [shared, text(REST)], "answer": text(4)} for name in ("chosen", "rejected")}
            file.write(json.dumps({"id": f"pair-{i}", "prompt": prompt} | sides) + "\n")


def encode(path: str, model: str, workers: int) -> PairSet:
    """Return the pairs of a file through the cache."""
    encoded_folder.count_workers = lambda: workers
    source = find_model(ModelConfig(name=model))
    limits = source.token_limits()
    chat = source.chat_format(DataConfig(), date(2026, 1, 1))
    check = partial(check_masks, limits=limits)
    checked = {"vocabulary": limits.vocabulary}
    return map_encoded("pairs", [path], chat, DataConfig(), check=check, checked=checked, say=lambda text: None)


def measure(path: str, model: str, workers: int) -> None:
    """Encode or open pairs, and print what that and the start of a run take."""
    process = psutil.Process()
    before = process.memory_full_info().uss
    start, busy = time.perf_counter(), sum(os.times()[:4])
    data = encode(path, model, workers)
    mapped = time.perf_counter() - start
    options = DataConfig()
    report = LengthReport.of(data, data)
    steps = Steps(data, Schedule.of(data, options, TrainConfig()), options.pack_tokens)
    assert steps[0].packs
    ready = time.perf_counter() - start
    # With that of workers that have ended.
    busy = sum(os.times()[:4]) - busy
    own = process.memory_full_info().uss - before
    # Not ru_maxrss, which a process takes over from the one that started it.
    (peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    print(
        f"  {mapped:.1f} s to have them, {ready:.1f} s to the first step, {busy:.1f} s of CPU; {len(data):,} pairs, "
        f"{report.sharing.apart:,} tokens; {own / 2**20:,.0f} MiB of its own beside the mapping, "
        f"{int(peak) / 2**10:,.0f} MiB resident at the peak, mapped files included"
    )


def main(pairs: int = 20_000, workers: int = 1) -> None:
    """Measure encoding and opening a set of pairs.

    Args:
        pairs: Number of pairs; from 20,000 on, their file is large enough for the cache.
        workers: Processes that encode.
    """
    model = find_demo("demo")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, cache = folder / "pairs.jsonl", folder / "cache"
        write_pairs(file, pairs)
        print(f"{pairs:,} pairs, {file.stat().st_size / 2**20:,.0f} MiB of JSON")
        call = f"import encode_speed; encode_speed.measure({str(file)!r}, {model!r}, {workers})"
        for title in ("encoded:", "opened again:", "opened after they were touched:"):
            if "touched" in title:
                for column in cache.rglob("*.bin"):
                    column.touch()
            print(title, flush=True)
            subprocess.run(
                [sys.executable, "-c", call],
                check=True,
                cwd=Path(__file__).parent,
                env=os.environ | {"SARO_CACHE": str(cache)},
            )
        sizes = {column.name: column.stat().st_size / 2**20 for column in cache.rglob("*.bin")}
        largest = sorted(sizes, key=lambda name: -sizes[name])[:4]
        named = ", ".join(f"{name} {sizes[name]:,.1f}" for name in largest)
        print(f"on disk: {len(sizes)} files, {sum(sizes.values()):,.1f} MiB, most of it {named}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
