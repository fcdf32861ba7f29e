"""The requests, results and records of `peers.py`: every side gets the same token ids in the same steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import nn

from saro.config import DataConfig
from saro.data.chat_format import ChatFormat
from saro.data.dataset import ExampleSet, PairSet
from saro.data.encode_files import encode_files, encode_pair_files
from saro.data.tree import ScoredSequence, SequenceTree, build_tree
from saro.errors import SaroError

Data = PairSet | ExampleSet

# Every side trains LoRA on all linear layers with AdamW at this constant learning rate.
LR = 1e-5
BETA = 0.1
MAX_GRAD_NORM = 1.0

# Default of the records per optimizer step. A record of SRPO is a pair of two sequences, a record of RW is one example.
PER_STEP = {"srpo": 4, "rw": 8}
# Trainers to compare, and how they are used; described in `peers.DESCRIPTIONS`.
SIDES = {
    "srpo": ("saro", "saro, no sharing", "trl", "trl, one by one"),
    "rw": ("saro", "trl, packed", "trl, padded"),
}
# The side with which the others are compared.
BASELINE = {"srpo": "trl", "rw": "trl, packed"}
# Metrics that depend only on the model and the data in the first step: up to rounding, equal on every side.
FIRST_METRICS = {"srpo": ("logps/chosen", "logps/rejected"), "rw": ("loss",)}


@dataclass(frozen=True)
class Part:
    """A part of a generated record; its length is log-normal.

    Attributes:
        median: median length in tokens.
        sigma: standard deviation of the length's logarithm.
        most: upper limit in tokens; longer draws become this long.
    """

    median: int
    sigma: float
    most: int

    def lengths(self, number: int, rng: np.random.Generator) -> np.ndarray:
        """Draw lengths in tokens, (number,) int64."""
        drawn = np.rint(self.median * np.exp(self.sigma * rng.standard_normal(number)))
        return np.clip(drawn, 1, self.most).astype(np.int64)


@dataclass(frozen=True)
class PartLengths:
    """The parts of a generated pair: a prompt, reasoning that both sides share, and the rest of each side."""

    prompt: Part = Part(80, 0.5, 300)
    shared: Part = Part(120, 0.6, 300)
    chosen: Part = Part(220, 0.6, 500)
    rejected: Part = Part(200, 0.6, 500)


LENGTHS = PartLengths()


@dataclass(frozen=True)
class Request:
    """One measurement.

    Attributes:
        task: "srpo" or "rw".
        side: one of ``SIDES[task]``.
        model: folder or hub name.
        device: "cpu" computes in float32, "cuda" in bfloat16.
        method: "lora" or "qlora", a 4-bit base.
        gradient_checkpointing: recompute activations.
        data: JSONL file; None for generated records.
        lengths: lengths of generated records.
        records: number of records.
        per_step: records of an optimizer step.
        pack_tokens: tokens per pack of this project.
        steps: measured steps.
        warmup: steps before these, which are not measured.
        threads: CPU threads.
        seed: seed of the generated records and the adapters.
    """

    task: str
    side: str
    model: str
    device: str
    method: str
    gradient_checkpointing: bool
    data: str | None
    lengths: PartLengths
    records: int
    per_step: int
    pack_tokens: int
    steps: int
    warmup: int
    threads: int
    seed: int

    @classmethod
    def parse(cls, text: str) -> Request:
        """Return the request that ``json.dumps(asdict(request))`` wrote."""
        values = json.loads(text)
        parts = {name: Part(**part) for name, part in values.pop("lengths").items()}
        return cls(**values, lengths=PartLengths(**parts))

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def trl_batch(self) -> int:
        """Records per forward pass of TRL, which accumulates gradients over the rest of the step."""
        return 1 if self.side == "trl, one by one" else self.per_step

    @property
    def all_steps(self) -> int:
        return self.warmup + self.steps


@dataclass(frozen=True)
class Result:
    """The figures of one measurement.

    Attributes:
        seconds: seconds of each measured step.
        records: records of all measured steps together.
        tokens: tokens of their sequences, with shared prefixes counted twice; equal on every side.
        read_tokens: tokens that the model reads for them: with padding, or with shared prefixes only once.
        first: metrics of the very first step, before any update; up to rounding, equal on every side.
        loaded_gib: memory after loading the model: of tensors on a GPU, else resident memory.
        peak_gib: peak of this memory; on a GPU only after loading.
        reference_seconds: seconds of scoring all records with the reference; None in RW.
        reserved_gib: peak of the memory that the allocator took from the GPU; None on a CPU.
        device: name of the GPU, or "cpu".
    """

    seconds: list[float]
    records: int
    tokens: int
    read_tokens: int
    first: dict[str, float]
    loaded_gib: float
    peak_gib: float
    reference_seconds: float | None
    reserved_gib: float | None = None
    device: str = "cpu"

    @property
    def records_per_second(self) -> float:
        return self.records / sum(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / sum(self.seconds)

    @property
    def read_share(self) -> float:
        """Tokens that the model reads per token of the sequences."""
        return self.read_tokens / self.tokens

    @property
    def above_load_gib(self) -> float:
        return self.peak_gib - self.loaded_gib


def measured(request: Request, per_epoch_step: Sequence[int]) -> int:
    """Return the sum over the measured steps of a value that is known for each step of an epoch."""
    return sum(per_epoch_step[step % len(per_epoch_step)] for step in range(request.warmup, request.all_steps))


def generate_pairs(number: int, vocabulary: int, stop_id: int, seed: int, lengths: PartLengths = LENGTHS) -> PairSet:
    """Return pairs of random token ids: a prompt, reasoning shared by both sides, and a remainder per side."""
    rng = np.random.default_rng(seed)
    parts = (lengths.prompt, lengths.shared, lengths.chosen, lengths.rejected)
    chosen, rejected = [], []
    for prompt, shared, *remainders in zip(*(part.lengths(number, rng) for part in parts), strict=True):
        start = rng.integers(0, vocabulary, prompt + shared)
        for side, remainder in zip((chosen, rejected), remainders, strict=True):
            tokens = np.concatenate([start, rng.integers(0, vocabulary, remainder), [stop_id]]).astype(np.int32)
            side.append((tokens, int(prompt), int(shared)))
    return PairSet(_example_set(chosen), _example_set(rejected), np.arange(number, dtype=np.int32))


def _example_set(sequences: Sequence[tuple[np.ndarray, int, int]]) -> ExampleSet:
    """Make a set from (token ids, tokens of the prompt, tokens of the reasoning) for each sequence."""
    tokens, prompt_tokens, think_tokens = zip(*sequences, strict=True)
    return ExampleSet(
        tokens=np.concatenate(tokens),
        offsets=np.cumsum([0, *map(len, tokens)]),
        prompt_tokens=np.array(prompt_tokens, np.int32),
        think_tokens=np.array(think_tokens, np.int32),
        kinds=np.zeros(len(tokens), np.uint8),
        ids=tuple(f"r{i}" for i in range(len(tokens))),
    )


def load_records(request: Request, chat: ChatFormat, vocabulary: int) -> Data:
    """Return pairs for SRPO or examples for RW, read from the request's file or generated.

    A generated example is the chosen side of a pair.

    Raises:
        SaroError: the file has too few records or invalid ones.
    """
    if request.data is None:
        pairs = generate_pairs(request.records, vocabulary, min(chat.stop_ids), request.seed, request.lengths)
        return pairs if request.task == "srpo" else pairs.chosen
    encode = encode_pair_files if request.task == "srpo" else encode_files
    data = encode([request.data], chat, DataConfig(pack_tokens=request.pack_tokens, too_long="drop"))
    if len(data) < request.records:
        raise SaroError(
            f"{request.data}: only {len(data)} records have at most {request.pack_tokens} tokens, but --pairs is "
            f"{request.records}; lower --pairs"
        )
    return data


class InOrder:
    """A schedule for ``Steps`` that does not shuffle: records 0, 1, ... in steps of equal size, every epoch the same."""

    def __init__(self, records: int, per_step: int) -> None:
        self.steps_per_epoch = records // per_step
        self._steps = np.arange(records).reshape(-1, per_step)

    def records(self, step: int) -> np.ndarray:
        """Return the indices of a step's records. Steps count from 0."""
        return self._steps[step % self.steps_per_epoch]


def sequences(data: PairSet | ExampleSet, records: Sequence[int]) -> list[ScoredSequence]:
    """Return the sequences of some records; for pairs, all chosen sides and then all rejected ones, as in TRL's collator."""
    if isinstance(data, ExampleSet):
        return [data.sequence(r) for r in records]
    return [side.sequence(r) for side in (data.chosen, data.rejected) for r in records]


def unshared(pair: tuple[ScoredSequence, ScoredSequence]) -> SequenceTree:
    """Return a pair as a tree with two roots that share nothing, even if the two sides have a common prefix."""
    (chosen,), (rejected,) = (build_tree([side]).nodes for side in pair)
    return SequenceTree((chosen, rejected), pair, ((0,), (1,)))


def synchronize(device: str) -> None:
    """Wait for the work that was launched on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def loaded_gib(model: nn.Module, device: str) -> float:
    """Return the memory after loading in GiB: of tensors on a GPU, whose peaks start here; else resident memory.

    On a CPU, read every weight first. Weight files are mapped, so that a weight takes memory only when it is first read.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    for parameter in model.parameters():
        parameter.detach().sum()
    return psutil.Process().memory_info().rss / 2**30


def memory_figures(device: str) -> dict:
    """Return the fields of ``Result`` about the device and its peak memory.

    On a CPU not by ru_maxrss, which starts at the parent's peak.
    """
    if device == "cuda":
        return {
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
            "device": torch.cuda.get_device_name(),
        }
    lines = Path("/proc/self/status").read_text().splitlines()
    return {"peak_gib": next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20}
