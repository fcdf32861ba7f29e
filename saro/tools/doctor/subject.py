"""What the checks run on: the user's model, and a few short records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial

import numpy as np

from saro.config import DataConfig, ModelConfig
from saro.data.dataset import ExampleSet, PairSet, encode_files, encode_pair_files
from saro.data.steps import Schedule
from saro.data.tree import SequenceTree, build_tree
from saro.demo import demo_file
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.model.load import ModelSource, find_model, load_policy
from saro.model.policy import Policy
from saro.train.steps import Steps

# Parts of so many records of each kind, of so many tokens before and after the place where scoring begins, or where the
# sides of a pair part, and some more of each further record: enough for every check, and seconds on a CPU.
_RECORDS = 3
_BEFORE, _AFTER, _MORE = 16, 24, 12


@dataclass(frozen=True, eq=False)
class Subject:
    """A loaded model with records that fit it.

    Attributes:
        runtime: one process.
        model: how the model was loaded.
        policy: it, trained by some checks.
        examples: of RW.
        pairs: of SRPO.
        records: what they are, for people.
        pack_tokens: budget of a pack.
    """

    runtime: Runtime
    model: ModelConfig
    policy: Policy
    examples: ExampleSet
    pairs: PairSet
    records: str
    pack_tokens: int

    @classmethod
    def load(cls, runtime: Runtime, model: ModelConfig, pack_tokens: int) -> Subject:
        """Find the model and load it.

        Raises:
            SaroError: there is no such model, or it cannot be trained as ``model`` says.
        """
        source = find_model(model)
        examples, pairs, records = _records(source)
        policy = load_policy(source, model, runtime.device, seed=0)
        return cls(runtime, model, policy, examples, pairs, records, pack_tokens)

    def example_trees(self, records: Sequence[int]) -> list[SequenceTree]:
        """A tree for each example."""
        return [build_tree([self.examples.sequence(record)]) for record in records]

    def example_steps(self) -> Steps:
        """Steps of all examples each."""
        return Steps(Schedule(self.examples.kinds, len(self.examples), 0), self.example_trees, self.pack_tokens)

    def pair_steps(self) -> Steps:
        """Steps of all pairs each."""
        schedule = Schedule(self.pairs.kinds, len(self.pairs), 0, groups=self.pairs.prompts)
        return Steps(schedule, partial(self.pairs.trees, budget=self.pack_tokens), self.pack_tokens)


def _records(source: ModelSource) -> tuple[ExampleSet, PairSet, str]:
    """Parts of demo records; generated tokens where the model has no chat template that takes them."""
    lengths = [_AFTER + _MORE * i for i in range(_RECORDS)]
    try:
        chat = source.chat_format(DataConfig(), date.today())
        whole = {"max_tokens": 2**31}
        examples = encode_files([demo_file("rw_heldout")], chat, **whole)
        pairs = encode_pair_files([demo_file("srpo_heldout")], chat, **whole)
    except SaroError:
        vocab, generator = source.config.get_text_config().vocab_size, np.random.default_rng(0)
        sides = [[generator.integers(vocab, size=_BEFORE + n).astype(np.int32) for n in lengths] for _ in range(2)]
        for chosen, rejected in zip(*sides, strict=True):
            rejected[:_BEFORE] = chosen[:_BEFORE]
        return _examples(sides[0]), _pairs(*sides), "generated tokens"
    parts = [_part(examples.sequence(i).tokens, int(examples.prompt_tokens[i]), n) for i, n in enumerate(lengths)]
    shared = pairs.shared_tokens
    sides = [
        [_part(side.sequence(i).tokens, int(shared[i]), n) for i, n in enumerate(lengths)]
        for side in (pairs.chosen, pairs.rejected)
    ]
    return _examples(parts), _pairs(*sides), "parts of demo records"


def _part(tokens: np.ndarray, at: int, length: int) -> np.ndarray:
    return tokens[max(0, at - _BEFORE) : at + length]


def _pairs(chosen: list[np.ndarray], rejected: list[np.ndarray]) -> PairSet:
    return PairSet(_examples(chosen), _examples(rejected), np.arange(len(chosen), dtype=np.int32))


def _examples(tokens: list[np.ndarray]) -> ExampleSet:
    """Scored from the eighth token on: before the sides of a pair part."""
    n = len(tokens)
    return ExampleSet(
        np.concatenate(tokens),
        np.cumsum([0, *map(len, tokens)]),
        np.full(n, _BEFORE // 2, np.int32),
        np.zeros(n, np.int32),
        np.zeros(n, np.uint8),
        tuple(f"record {i + 1}" for i in range(n)),
    )
