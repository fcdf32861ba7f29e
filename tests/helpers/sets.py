"""Small sets of examples and pairs, made by hand."""

from __future__ import annotations

import numpy as np

from saro.data.dataset import ExampleSet, PairSet

# Two records whose sides share the prompt only, and the prompt and a step.
PAIR_RECORDS = [
    {"id": "p", "prompt": "Why?", "chosen": {"reasoning": ["a", "b"], "answer": "c"}, "rejected": {"answer": "d"}},
    {
        "id": "q",
        "prompt": "How?",
        "chosen": {"reasoning": ["a", "b"], "answer": "c"},
        "rejected": {"reasoning": ["a", "x"], "answer": "c"},
    },
]


def with_other_prompts(records: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return the records with prompts of their own, so that they may be held out from training on ``records``."""
    return [record | {"prompt": f"Again: {record['prompt']}"} for record in records]


def by_hand(**changes) -> ExampleSet:
    """Make five records of 5, 6, 7, 12 and 8 tokens."""
    parts = {
        "tokens": np.zeros(38, np.int32),
        "offsets": np.array([0, 5, 11, 18, 30, 38]),
        "prompt_tokens": np.array([1, 2, 3, 4, 2], np.int32),
        "think_tokens": np.array([0, 2, 2, 5, 3], np.int32),
        "kinds": np.array([0, 1, 0, 0, 0], np.uint8),
        "ids": ("a", "b", "c", "d", "e"),
    }
    return ExampleSet(**parts | changes)


def a_side(*sequences: list[int], prompts: tuple[int, ...], **changes) -> ExampleSet:
    """Make a side from these sequences. All scored tokens but the last count as reasoning."""
    lengths = np.array([len(tokens) for tokens in sequences])
    parts = {
        "tokens": np.concatenate([np.array(tokens, np.int32) for tokens in sequences]),
        "offsets": np.cumsum([0, *lengths]),
        "prompt_tokens": np.array(prompts, np.int32),
        "think_tokens": (lengths - prompts - 1).astype(np.int32),
        "kinds": np.array([0, 1, 1], np.uint8),
        "ids": ("a", "b", "c"),
    }
    return ExampleSet(**parts | changes)


def pairs_by_hand(**changes) -> PairSet:
    """Make three pairs. The first and last have the prompt 7 8 and share one response token; the second shares none."""
    chosen = a_side([7, 8, 1, 2, 3], [5, 1, 1], [7, 8, 1, 4, 4, 4], prompts=(2, 1, 2), **changes)
    rejected = a_side([7, 8, 1, 9], [5, 2, 2, 2], [7, 8, 1, 9, 9], prompts=(2, 1, 2), **changes)
    return PairSet(chosen, rejected, np.array([0, 1, 0], np.int32))
