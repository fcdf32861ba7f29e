"""Loads what the checks need: the user's model and a few short records that fit it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date

import numpy as np

from saro.config import DataConfig, ModelConfig
from saro.data.dataset import ExampleSet, PairSet
from saro.data.encode_files import encode_files, encode_pair_files
from saro.data.steps import Schedule, Steps
from saro.data.tree import SequenceTree
from saro.demo import demo_file, find_demo
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.model.load import load_policy
from saro.model.policy import Policy
from saro.model.source import ModelSource, find_model
from saro.model.training_dtype import decide_dtype

# Examples, and pairs: enough for every check, and seconds on a CPU.
_RECORDS = 3
# Each record is cut to _BEFORE tokens before the place where scoring begins, or where the sides of a pair part, and
# _AFTER tokens after it; _MORE for each further record, so that lengths differ.
_BEFORE, _AFTER, _MORE = 16, 24, 12


@dataclass(frozen=True, eq=False)
class CheckedModel:
    """A loaded model with records that fit it.

    Attributes:
        runtime: of one process.
        model: how the model was loaded.
        policy: the loaded model; some checks train it.
        examples: records for RW.
        pairs: records for SRPO.
        records: describes the examples and pairs in the doctor's table.
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
    def load(cls, runtime: Runtime, model: ModelConfig, pack_tokens: int) -> CheckedModel:
        """Find the model and load it.

        Raises:
            SaroError: there is no such model, or it cannot be trained as ``model`` says.
        """
        model = replace(model, name=find_demo(model.name))
        source = find_model(model)
        model = replace(model, dtype=decide_dtype(model.dtype, source.config, runtime.device))
        examples, pairs, records = _records(source)
        policy = load_policy(source, model, runtime.device, seed=0)
        return cls(runtime, model, policy, examples, pairs, records, pack_tokens)

    def example_trees(self, records: Sequence[int]) -> list[SequenceTree]:
        """Return a tree for each example."""
        return self.examples.trees(records, self.pack_tokens)

    def example_steps(self) -> Steps:
        """Return steps of all examples each."""
        return Steps(self.examples, Schedule(self.examples.kinds, len(self.examples), seed=0), self.pack_tokens)

    def pair_steps(self) -> Steps:
        """Return steps of all pairs each."""
        schedule = Schedule(self.pairs.kinds, len(self.pairs), seed=0, groups=self.pairs.prompts)
        return Steps(self.pairs, schedule, self.pack_tokens)


def _records(source: ModelSource) -> tuple[ExampleSet, PairSet, str]:
    """Return examples, pairs and their description: parts of demo records, or generated tokens.

    Tokens are generated if the model has no chat template that takes the demo records.
    """
    lengths = [_AFTER + _MORE * i for i in range(_RECORDS)]
    try:
        chat = source.chat_format(DataConfig(), date.today())
        examples = encode_files([demo_file("rw_heldout")], chat, DataConfig(pack_tokens=2**31))
        pairs = encode_pair_files([demo_file("srpo_heldout")], chat, DataConfig(pack_tokens=2**31))
    except SaroError:
        return *_generated_records(source.config.get_text_config().vocab_size, lengths), "generated tokens"
    parts = _cut(examples, examples.prompt_tokens, lengths)
    chosen = _cut(pairs.chosen, pairs.shared_tokens, lengths)
    rejected = _cut(pairs.rejected, pairs.shared_tokens, lengths)
    return _examples(parts), _pairs(chosen, rejected), "parts of demo records"


def _generated_records(vocab: int, lengths: list[int]) -> tuple[ExampleSet, PairSet]:
    """Return records of random tokens; the sides of a pair share their first tokens."""
    generator = np.random.default_rng(0)
    chosen = [generator.integers(vocab, size=_BEFORE + n).astype(np.int32) for n in lengths]
    rejected = [generator.integers(vocab, size=_BEFORE + n).astype(np.int32) for n in lengths]
    for chosen_tokens, rejected_tokens in zip(chosen, rejected, strict=True):
        rejected_tokens[:_BEFORE] = chosen_tokens[:_BEFORE]
    return _examples(chosen), _pairs(chosen, rejected)


def _cut(data: ExampleSet, places: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    """Return the tokens around ``places`` of the first records, ``lengths`` tokens after each place."""
    parts = []
    for i, length in enumerate(lengths):
        place = int(places[i])
        parts.append(data.sequence(i).tokens[max(0, place - _BEFORE) : place + length])
    return parts


def _pairs(chosen: list[np.ndarray], rejected: list[np.ndarray]) -> PairSet:
    return PairSet(_examples(chosen), _examples(rejected), np.arange(len(chosen), dtype=np.int32))


def _examples(tokens: list[np.ndarray]) -> ExampleSet:
    """Return examples scored from the eighth token on, which is before the sides of a pair part."""
    n = len(tokens)
    return ExampleSet(
        tokens=np.concatenate(tokens),
        offsets=np.cumsum([0, *map(len, tokens)]),
        prompt_tokens=np.full(n, _BEFORE // 2, np.int32),
        think_tokens=np.zeros(n, np.int32),
        kinds=np.zeros(n, np.uint8),
        ids=tuple(f"record {i + 1}" for i in range(n)),
    )
