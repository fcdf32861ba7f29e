"""What `peers.py` measures, and on which records: the same token ids, in the same steps, for every side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from torch import nn

from saro.data.chat_format import ChatFormat
from saro.data.dataset import ExampleSet, PairSet, encode_files, encode_pair_files
from saro.data.tree import ScoredSequence, SequenceTree, build_tree
from saro.errors import SaroError

Data = PairSet | ExampleSet

# Of every side: LoRA on all linear layers, AdamW at a constant rate.
LR = 1e-5
BETA = 0.1
MAX_GRAD_NORM = 1.0

# Records of an optimizer step: pairs of two sequences in SRPO, examples of one in RW.
PER_STEP = {"srpo": 4, "rw": 8}
# Whose trainer, and how it is used.
SIDES = {
    "srpo": ("saro", "saro, no sharing", "trl", "trl, one by one"),
    "rw": ("saro", "trl, packed", "trl, padded"),
}
# The side that the others are compared with.
BASELINE = {"srpo": "trl", "rw": "trl, packed"}
# Metrics that depend on the model and the data alone in the first step: the same on every side but for rounding.
FIRST = {"srpo": ("logps/chosen", "logps/rejected"), "rw": ("loss",)}


@dataclass(frozen=True)
class Request:
    """One measurement.

    Attributes:
        task: "srpo" or "rw".
        side: one of ``SIDES[task]``.
        model: folder or hub name.
        data: JSONL file; None for generated records.
        records: number of records.
        pack_tokens: budget of this project's packs.
        steps, warmup: measured steps, and those before them.
        threads: of the CPU.
        seed: of generated records and of the adapters.
    """

    task: str
    side: str
    model: str
    data: str | None
    records: int
    pack_tokens: int
    steps: int
    warmup: int
    threads: int
    seed: int

    @property
    def per_step(self) -> int:
        return PER_STEP[self.task]

    @property
    def trl_batch(self) -> int:
        """Records of one forward pass of TRL's; it accumulates gradients over the rest of the step."""
        return 1 if self.side == "trl, one by one" else self.per_step

    @property
    def all_steps(self) -> int:
        return self.warmup + self.steps


@dataclass(frozen=True)
class Result:
    """What was measured.

    Attributes:
        seconds: of each measured step.
        records: of all measured steps.
        tokens: of their sequences, each counted whole; the same on every side.
        read_tokens: what the model reads for them: with padding, or with shared prefixes once.
        first: metrics of the very first step, before any update; on every side the same but for rounding.
        loaded_gib: resident memory once the model is loaded.
        peak_gib: most resident memory.
        reference_seconds: of scoring all records under the reference; None in RW.
    """

    seconds: list[float]
    records: int
    tokens: int
    read_tokens: int
    first: dict[str, float]
    loaded_gib: float
    peak_gib: float
    reference_seconds: float | None

    @property
    def records_per_second(self) -> float:
        return self.records / sum(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / sum(self.seconds)

    @property
    def read_share(self) -> float:
        """Tokens that the model reads for one token of a sequence."""
        return self.read_tokens / self.tokens

    @property
    def above_load_gib(self) -> float:
        return self.peak_gib - self.loaded_gib


def measured(request: Request, per_epoch_step: Sequence[int]) -> int:
    """Sum over the measured steps of something known for each step of an epoch."""
    return sum(per_epoch_step[step % len(per_epoch_step)] for step in range(request.warmup, request.all_steps))


@dataclass(frozen=True)
class Part:
    """A part of a generated record, its length log-normal.

    Attributes:
        median: tokens.
        sigma: standard deviation of the length's logarithm.
        most: tokens; longer draws are cut to it.
    """

    median: int
    sigma: float
    most: int

    def lengths(self, number: int, rng: np.random.Generator) -> np.ndarray:
        """(number,) int64, tokens."""
        drawn = np.rint(self.median * np.exp(self.sigma * rng.standard_normal(number)))
        return np.clip(drawn, 1, self.most).astype(np.int64)


PROMPT = Part(80, 0.5, 300)
SHARED = Part(120, 0.6, 300)
CHOSEN = Part(220, 0.6, 500)
REJECTED = Part(200, 0.6, 500)


def generate_pairs(number: int, vocabulary: int, stop_id: int, seed: int) -> PairSet:
    """Pairs of random token ids: a prompt, reasoning that both sides share, and what each side has of its own."""
    rng = np.random.default_rng(seed)
    lengths = [part.lengths(number, rng) for part in (PROMPT, SHARED, CHOSEN, REJECTED)]
    chosen, rejected = [], []
    for prompt, shared, *remainders in zip(*lengths, strict=True):
        start = rng.integers(0, vocabulary, prompt + shared)
        for side, remainder in zip((chosen, rejected), remainders, strict=True):
            tokens = np.concatenate([start, rng.integers(0, vocabulary, remainder), [stop_id]]).astype(np.int32)
            side.append((tokens, int(prompt), int(shared)))
    return PairSet(_example_set(chosen), _example_set(rejected), np.arange(number, dtype=np.int32))


def _example_set(sequences: Sequence[tuple[np.ndarray, int, int]]) -> ExampleSet:
    """Of token ids, tokens of the prompt and tokens of the reasoning."""
    tokens, prompts, thinks = zip(*sequences, strict=True)
    return ExampleSet(
        np.concatenate(tokens),
        np.cumsum([0, *map(len, tokens)]),
        np.array(prompts, np.int32),
        np.array(thinks, np.int32),
        np.zeros(len(tokens), np.uint8),
        tuple(f"r{i}" for i in range(len(tokens))),
    )


def load_records(request: Request, chat: ChatFormat, vocabulary: int) -> Data:
    """Pairs for SRPO, examples for RW: those of a file, or generated ones.

    A generated example is the chosen side of a pair.

    Raises:
        SaroError: the file holds fewer records than asked for, or wrong ones.
    """
    if request.data is None:
        pairs = generate_pairs(request.records, vocabulary, min(chat.stop_ids), request.seed)
        return pairs if request.task == "srpo" else pairs.chosen
    encode = encode_pair_files if request.task == "srpo" else encode_files
    data = encode([request.data], chat, max_tokens=request.pack_tokens, too_long="drop")
    if len(data) < request.records:
        raise SaroError(
            f"{request.data}: {len(data)} records of at most {request.pack_tokens} tokens, and {request.records} are "
            "asked for; lower --pairs"
        )
    return data


class InOrder:
    """A schedule without shuffling, as ``Steps`` takes it: records 0, 1, ... in steps of one size, over and over."""

    def __init__(self, records: int, per_step: int) -> None:
        self.steps_per_epoch = records // per_step
        self._steps = np.arange(records).reshape(-1, per_step)

    def records(self, step: int) -> np.ndarray:
        """Indices of the records of a step, counted from 0."""
        return self._steps[step % self.steps_per_epoch]


def sequences(data: PairSet | ExampleSet, records: Sequence[int]) -> list[ScoredSequence]:
    """Of the records' pairs all chosen sides, then all rejected ones, as TRL's collator has them; or of examples."""
    if isinstance(data, ExampleSet):
        return [data.sequence(r) for r in records]
    return [side.sequence(r) for side in (data.chosen, data.rejected) for r in records]


def unshared(pair: tuple[ScoredSequence, ScoredSequence]) -> SequenceTree:
    """A pair as two roots that share nothing, whatever prefix they have in common."""
    (chosen,), (rejected,) = (build_tree([side]).nodes for side in pair)
    return SequenceTree((chosen, rejected), pair, ((0,), (1,)))


def loaded_gib(model: nn.Module) -> float:
    """Resident memory of this process, GiB, once every weight is in it: they are mapped, and read when first used."""
    for parameter in model.parameters():
        parameter.detach().sum()
    return psutil.Process().memory_info().rss / 2**30


def peak_gib() -> float:
    """Most resident memory of this process, GiB. (ru_maxrss begins with that of the process which started this one.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
