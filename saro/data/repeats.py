"""Find records that repeat others: duplicates in a set, and prompts that two sets have in common.

Records are compared by their token ids, as the model reads them, so their format does not matter. Only a hash of each is
kept, so any number of records fits into memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from saro.data.dataset import ExampleSet, PairSet


def count_duplicates(data: ExampleSet | PairSet) -> int:
    """Return the number of records that repeat an earlier one: the same prompt and response, or both responses."""
    sides = (data.chosen, data.rejected) if isinstance(data, PairSet) else (data,)
    hashed = (b"".join(hashes) for hashes in zip(*map(_hash_sequences, sides), strict=True))
    # Use an array: a set of Python objects would take ten times the memory.
    return len(data) - len(np.unique(np.fromiter(hashed, f"S{16 * len(sides)}", len(data))))


def find_overlap(heldout: ExampleSet | PairSet, train: ExampleSet | PairSet) -> list[tuple[int, int]]:
    """Return (held-out record, first training record on its prompt) for each held-out prompt that is trained on."""
    prompts = list(_hash_prompts(heldout))
    wanted = set(prompts)
    first: dict[bytes, int] = {}
    for record, prompt in enumerate(_hash_prompts(train)):
        if prompt in wanted:
            first.setdefault(prompt, record)
    return [(record, first[prompt]) for record, prompt in enumerate(prompts) if prompt in first]


def _hash_prompts(data: ExampleSet | PairSet) -> Iterator[bytes]:
    # Both sides of a pair have the same prompt.
    side = data.chosen if isinstance(data, PairSet) else data
    for start, prompt in zip(side.offsets[:-1].tolist(), side.prompt_tokens.tolist(), strict=True):
        yield _hash(side.tokens[start : start + prompt].tobytes())


def _hash_sequences(side: ExampleSet) -> Iterator[bytes]:
    starts, stops = side.offsets[:-1].tolist(), side.offsets[1:].tolist()
    for start, stop, prompt in zip(starts, stops, side.prompt_tokens.tolist(), strict=True):
        # Include the length of the prompt: the same tokens teach something else if they are scored from elsewhere.
        yield _hash(prompt.to_bytes(8) + side.tokens[start:stop].tobytes())


def _hash(content: bytes) -> bytes:
    # With 128 bits, two of a billion records collide with a probability of 1e-21.
    return blake2b(content, digest_size=16).digest()
