"""Measure how fast texts are drawn: the engine of saro.draws, stage by stage, and transformers' padded generate.

    python benchmarks/generation_speed.py --prompts xstest_prompts.csv [--batch 32] [--number 64]
        [--max_tokens 400] [--rounds 3] [--model demo] [--sides generate,engine] [--output FILE.md]

All sides answer the same prompts, greedily, in batches of the same size, and take turns in each round. A side's speed is
the number of tokens that it drew over its seconds; bfloat16 draws other tokens than float32. Sides:

    generate        padded generate in float32, prompts as they come (saro.model.generate); PEFT's layers with an adapter
    sorted          the same, prompts sorted by length
    merged bf16     sorted, and in the dtype of the engine, with the adapter merged
    engine f32      the engine in float32, adapter merged: cache in place, keys never repeated, ended texts replaced
    engine waits    the engine in its dtype, but a batch ends before the next one begins
    engine          the engine in its dtype
"""

from __future__ import annotations

import csv
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from jsonargparse import auto_cli

from saro.config import DEMO, DataConfig, ModelConfig
from saro.data.records import Message
from saro.demo.fetch_model import demo_model
from saro.draws.decode import continue_texts
from saro.draws.local import LocalGenerator
from saro.draws.request import Request, Sampling
from saro.model.generate import generate
from saro.model.load import load_policy
from saro.model.policy import Policy
from saro.model.source import find_model
from saro.program import quiet_libraries

# Draws the texts of all prompts.
Side = Callable[[], list[list[int]]]
SIDES = ("generate", "sorted", "merged bf16", "engine f32", "engine waits", "engine")


@dataclass(frozen=True)
class Work:
    """The work that every side does.

    Attributes:
        prompts: token ids of each prompt.
        stop_ids: ids that end a text.
        batch: texts at a time.
        max_tokens: longest text.
    """

    prompts: Sequence[Sequence[int]]
    stop_ids: frozenset[int]
    batch: int
    max_tokens: int

    def padded(self, policy: Policy, is_sorted: bool) -> list[list[int]]:
        """Draw with padded batches and return the text of each prompt."""
        order = list(range(len(self.prompts)))
        if is_sorted:
            order.sort(key=lambda i: len(self.prompts[i]), reverse=True)
        texts: dict[int, list[int]] = {}
        for start in range(0, len(order), self.batch):
            part = order[start : start + self.batch]
            drawn = generate(policy, [self.prompts[i] for i in part], self.stop_ids, self.max_tokens)
            texts.update(zip(part, drawn, strict=True))
        return [texts[i] for i in range(len(order))]

    def drawn(self, generator: LocalGenerator, refill: bool) -> list[list[int]]:
        """Draw with the engine and return the text of each prompt; without ``refill``, one batch after the other."""
        requests = [Request(Sampling(self.max_tokens), ids=tuple(ids)) for ids in self.prompts]
        order = generator.order(requests)
        requests = [requests[i] for i in order]
        if refill:
            texts = {order[i]: draw.ids for group in generator.draw(requests) for i, draw in group}
        else:
            texts = {}
            for start in range(0, len(order), self.batch):
                batch = requests[start : start + self.batch]
                drawn = continue_texts(generator.policy, batch, self.stop_ids, self.batch)
                texts.update(zip(order[start : start + self.batch], (text.ids for text in drawn), strict=True))
        return [list(texts[i]) for i in range(len(order))]


@dataclass(frozen=True)
class TimedRun:
    """One run of a side: the texts of all prompts, and the seconds that they took."""

    texts: list[list[int]]
    seconds: float

    @property
    def tokens(self) -> int:
        """Number of drawn tokens."""
        return sum(map(len, self.texts))

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def read_prompts(file: Path, number: int) -> list[str]:
    """Return up to ``number`` prompts, evenly spread over the file: its column or key ``prompt``, or ``question``."""
    with open(file, encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines)) if file.suffix == ".csv" else [json.loads(line) for line in lines]
    texts = [row.get("prompt") or row["question"] for row in rows]
    step = max(1, len(texts) // number)
    return texts[::step][:number]


def make_sides(names: Sequence[str], options: ModelConfig, work: Work) -> dict[str, Side]:
    """Load the models that the sides need."""
    source = find_model(options)
    cpu = torch.device("cpu")
    device = torch.device("cuda") if torch.cuda.is_available() else cpu

    def load(dtype: str) -> LocalGenerator:
        return LocalGenerator.load(
            source, options, work.stop_ids, device, dtype=dtype, batch=work.batch, progress=False
        )

    trained = options if source.adapter else ModelConfig(name=options.name, method="full", dtype="float32")
    policy = load_policy(source, trained, device, seed=0)
    exact = load("float32") if "engine f32" in names else None
    fast = load("auto")
    sides = {
        "generate": lambda: work.padded(policy, is_sorted=False),
        "sorted": lambda: work.padded(policy, is_sorted=True),
        "merged bf16": lambda: work.padded(fast.policy, is_sorted=True),
        "engine f32": lambda: work.drawn(exact, refill=True),
        "engine waits": lambda: work.drawn(fast, refill=False),
        "engine": lambda: work.drawn(fast, refill=True),
    }
    return {name: sides[name] for name in names}


def measure(sides: dict[str, Side], rounds: int) -> dict[str, list[TimedRun]]:
    """Return the runs of each side. Every second round goes backwards."""
    results: dict[str, list[TimedRun]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            run = TimedRun(sides[name](), time.perf_counter() - start)
            results[name].append(run)
            print(f"round {number + 1}, {name}: {run.tokens:,} tokens, {run.seconds:.1f} s", flush=True)
    return results


def table(results: dict[str, list[TimedRun]]) -> list[str]:
    """Return a markdown table: tokens/s, its ratio to the first side's (medians over rounds), and the texts that agree."""
    first = next(iter(results.values()))
    lines = [
        "| side | tokens | tokens/s | times the first | same texts as the first |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, runs in results.items():
        ratio = statistics.median(run.speed / other.speed for run, other in zip(runs, first, strict=True))
        speed = statistics.median(run.speed for run in runs)
        same = sum(text == other for text, other in zip(runs[0].texts, first[0].texts, strict=True))
        lines.append(f"| {name} | {runs[0].tokens:,} | {speed:.0f} | {ratio:.2f} | {same} of {len(first[0].texts)} |")
    return lines


def main(
    prompts: Path,
    number: int = 64,
    batch: int = 32,
    max_tokens: int = 400,
    rounds: int = 3,
    model: str = DEMO,
    method: str = "lora",
    sides: str = ",".join(SIDES),
    output: Path | None = None,
) -> None:
    """Compare the sides.

    Args:
        prompts: CSV or JSONL file with prompts.
        number: How many of them, spread over the file.
        batch: Texts at a time, for all sides.
        max_tokens: Longest text.
        rounds: How often each side runs.
        model: Folder of a model or an adapter; "demo" is SmolLM2-135M-Instruct.
        method: How the adapter was trained: lora or qlora.
        sides: Names of the sides, separated by commas; the first is what the others are compared with.
        output: File to which the table is written.
    """
    quiet_libraries()
    options = ModelConfig(name=str(demo_model()) if model == DEMO else model, method=method)
    chat = find_model(options).chat_format(DataConfig(), date(2024, 7, 26))
    ids = [chat.prompt_ids((Message("user", text),)) for text in read_prompts(prompts, number)]
    work = Work(ids, chat.stop_ids, batch, max_tokens)
    lines = table(measure(make_sides(sides.split(","), options, work), rounds))
    print("\n".join(lines))
    if output is not None:
        output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
