"""Choose how many layers a run recomputes: as few as fit into a GPU's memory."""

from __future__ import annotations

import math
from collections.abc import Callable

# Measure the peaks with no kept layer, with this many and with twice as many first.
_FIRST = 2


def find_most_kept(layers: int, peak: Callable[[int], int | None], limit: float) -> dict[int, int]:
    """Find the most layers whose activations can be kept, by a line through the peaks of a few kept layers.

    From some number on, the peak is a line: each kept layer adds its activations, less its input. Before, the peak may be
    elsewhere, and the line is flatter: a layer that is recomputed needs its activations too, and in full fine-tuning the
    gradients at the end of the backward may need most. So a line through two peaks may promise too much, but never too little,
    and each number that it promises is measured.

    Args:
        layers: layers of the model.
        peak: runs the largest pack with this number of kept layers; returns the peak in bytes, None if memory ran out.
        limit: bytes that a peak may have.

    Returns:
        The measured peaks within the limit by number of kept layers, ascending. The last one is the choice: one more layer
        would be too much. Empty if not even a pack fits of which all layers are recomputed.
    """
    fitting: dict[int, int] = {}
    most, too_many, guess = -1, layers + 1, 0
    while most < guess < too_many:
        measured = peak(guess)
        if measured is not None and measured <= limit:
            most = guess
            fitting[most] = measured
        else:
            too_many = guess
        promised = _promise(fitting, limit)
        # If the line promises a number that did not fit, halve the rest.
        guess = promised if promised < too_many else (most + too_many) // 2
        if promised >= too_many > layers:
            guess = layers
    return fitting


def _promise(fitting: dict[int, int], limit: float) -> float:
    """Return how many layers can be kept by the line through the last two peaks; a few if there are too few peaks."""
    if len(fitting) < 3:
        return _FIRST * len(fitting)
    (before, lower), (most, highest) = list(fitting.items())[-2:]
    slope = (highest - lower) / (most - before)
    return most + int((limit - highest) / slope) if slope > 0 else math.inf
