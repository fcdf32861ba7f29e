"""Finds records that repeat others: duplicates in a set, and prompts that two sets have in common.

Records are compared by their token ids, as the model reads them, so their format does not matter. Only a hash of each is
kept, so any number of records fits into memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

from saro.data.dataset import ExampleSet, PairSet


def count_duplicates(data: ExampleSet | PairSet) -> int:
    """Return the number of records that repeat an earlier one: the same prompt and response, or both responses."""
    if isinstance(data, ExampleSet):
        return len(data) - len(set(_hash_sequences(data)))
    pairs = zip(_hash_sequences(data.chosen), _hash_sequences(data.rejected), strict=True)
    return len(data) - len(set(pairs))


def find_overlap(heldout: ExampleSet | PairSet, train: ExampleSet | PairSet) -> list[tuple[int, int]]:
    """Return (held-out record, first training record on its prompt) for each held-out prompt that is trained on."""
    first: dict[bytes, int] = {}
    for record, prompt in enumerate(_hash_prompts(train)):
        first.setdefault(prompt, record)
    return [(record, first[prompt]) for record, prompt in enumerate(_hash_prompts(heldout)) if prompt in first]


def _hash_prompts(data: ExampleSet | PairSet) -> Iterator[bytes]:
    # Both sides of a pair have the same prompt.
    side = data.chosen if isinstance(data, PairSet) else data
    for start, prompt in zip(side.offsets[:-1].tolist(), side.prompt_tokens.tolist(), strict=True):
        yield _hash(side.tokens[start : start + prompt].tobytes())


def _hash_sequences(side: ExampleSet) -> Iterator[bytes]:
    starts, stops = side.offsets[:-1].tolist(), side.offsets[1:].tolist()
    for start, stop, prompt in zip(starts, stops, side.prompt_tokens.tolist(), strict=True):
        # With the length of the prompt: the same tokens, scored from elsewhere, teach something else.
        yield _hash(prompt.to_bytes(8) + side.tokens[start:stop].tobytes())


def _hash(content: bytes) -> bytes:
    # With 128 bits, two of a billion records collide with a probability of 1e-21.
    return blake2b(content, digest_size=16).digest()
