"""Measure how fast pairs are encoded into the cache, and what it costs to open a million of them again.

    python benchmarks/encode_speed.py [--encoded 20000] [--opened 1000000] [--workers N]

First, pairs of random words, two on each prompt, are encoded as the first rank of a machine does it, with the demo's tokenizer.
Then a set of random token ids is written in the same form, because encoding a million pairs takes half an hour of one core.
A new process opens each set, and prepares what a run needs of it before its model is loaded: the table of lengths, the schedule
and the first step. The third opening is that of a resumed run: the times of the files say that they have not changed.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from jsonargparse import auto_cli

from saro.checks.check_masks import check_masks
from saro.config import DataConfig, ModelConfig, TrainConfig
from saro.data import encoded_folder
from saro.data.columns import FileColumns
from saro.data.dataset import PairSet
from saro.data.encoded_folder import find_fault, map_encoded, open_encoded, write_description
from saro.data.lengths import LengthReport
from saro.data.records import SIDES
from saro.data.steps import Schedule, Steps
from saro.demo import find_demo
from saro.model.source import find_model

# Words of a prompt, of the beginning that both sides share, and of the rest of each side.
PROMPT, SHARED, REST = 15, 25, 25
# Tokens of the random set: of a prompt, of the beginning of both sides with it, and the most and least of a side.
PROMPT_TOKENS, SHARED_TOKENS, LEAST, MOST = 40, 100, 120, 400
KEY = "random token ids"


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


def write_random_set(folder: Path, pairs: int) -> None:
    """Write pairs of random token ids in the form of encoded ones, each on a prompt of its own."""
    generator = np.random.default_rng(0)
    with closing(FileColumns(folder)) as columns:
        for start in range(0, pairs, 10_000):
            numbers = np.arange(start, min(start + 10_000, pairs), dtype=np.int32)
            count = len(numbers)
            for side in SIDES:
                lengths = generator.integers(LEAST, MOST, count)
                columns.append(f"{side}.tokens", generator.integers(0, 49_152, lengths.sum()).astype(np.int32))
                columns.append_offsets(f"{side}.offsets", lengths)
                columns.append(f"{side}.prompt_tokens", np.full(count, PROMPT_TOKENS, np.int32))
                columns.append(f"{side}.think_tokens", (lengths - PROMPT_TOKENS - 10).astype(np.int32))
                columns.append(f"{side}.is_open", np.zeros(count, bool))
            columns.append("kinds", (numbers % 2).astype(np.uint8))
            columns.append_texts("ids", [f"pair-{i}" for i in numbers])
            columns.append_texts("where", [f"pairs.jsonl:{i + 1}" for i in numbers])
            columns.append("prompts", numbers)
            columns.append("forms", np.zeros(count, np.uint16))
            columns.append("shared_tokens", np.full(count, SHARED_TOKENS, np.int32))
        about = {"kind": "pairs", "dropped": [], "forms": [None], "ignored": []}
        write_description(folder, columns, about, ["pairs.jsonl"])
    (folder / "key.json").write_text(KEY)


def encode(path: str, model: str, workers: int) -> PairSet:
    """Return the pairs of a file through the cache."""
    encoded_folder.count_workers = lambda: workers
    source = find_model(ModelConfig(name=model))
    limits = source.token_limits()
    chat = source.chat_format(DataConfig(), date(2026, 1, 1))
    check = partial(check_masks, limits=limits)
    checked = {"vocabulary": limits.vocabulary}
    return map_encoded("pairs", [path], chat, DataConfig(), check=check, checked=checked, say=lambda text: None)


def open_random_set(folder: str) -> PairSet:
    """Map the set of ``write_random_set``."""
    assert find_fault(Path(folder), KEY) is None
    return open_encoded(Path(folder), ["pairs.jsonl"])


def measure(function: str, *arguments: str | int) -> None:
    """Call a function of this file that returns pairs, and print what that and the start of a run take."""
    process = psutil.Process()
    before = process.memory_full_info().uss
    start, busy = time.perf_counter(), sum(os.times()[:4])
    data: PairSet = globals()[function](*arguments)
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


def _measure_apart(cache: Path, title: str, *call: str | int) -> None:
    print(title, flush=True)
    code = f"import encode_speed; encode_speed.measure(*{call!r})"
    environment = os.environ | {"SARO_CACHE": str(cache)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent, env=environment)


def _print_sizes(folder: Path) -> None:
    sizes = {file.name: file.stat().st_size / 2**20 for file in folder.rglob("*.bin")}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:4]
    named = ", ".join(f"{name} {sizes[name]:,.1f}" for name in largest)
    print(f"  on disk: {len(sizes)} files, {sum(sizes.values()):,.1f} MiB, most of it {named}")


def main(encoded: int = 20_000, opened: int = 1_000_000, workers: int = 1) -> None:
    """Measure encoding and opening large sets of pairs.

    Args:
        encoded: Number of pairs to encode.
        opened: Number of pairs of random token ids.
        workers: Processes that encode.
    """
    model = find_demo("demo")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "pairs.jsonl"
        write_pairs(file, encoded)
        print(f"{encoded:,} pairs, {file.stat().st_size / 2**20:,.0f} MiB of JSON")
        for title in ("encoded:", "opened again:"):
            _measure_apart(folder / "cache", title, "encode", str(file), model, workers)
        _print_sizes(folder / "cache")
        random_set = folder / "random"
        random_set.mkdir()
        write_random_set(random_set, opened)
        for title in ("random set, hashed:", "opened again:", "once more:"):
            _measure_apart(folder / "cache", title, "open_random_set", str(random_set))
        _print_sizes(random_set)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
