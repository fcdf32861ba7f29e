"""Says how long reasoning may be: a number of sentences that belongs to the level of risk.

Easy prompts need little reasoning and dangerous ones more: 2 to 3, 4 to 6, and 8 or more sentences (RAPO's three levels).
Models do not count well, so a chain of half to twice as many sentences is accepted too. Of STAR-1's 1,000 chains on
harmful prompts, 979 are in the band "high"; of GSM8K's 7,473 solutions, 7,472 are in the band "none"
(``tests/synth/test_bands.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from saro.data.chain import split_steps


@dataclass(frozen=True)
class Band:
    """Numbers of sentences that a chain of one level should have.

    Attributes:
        least, most: what the model is asked for.
    """

    least: int
    most: int

    @property
    def words(self) -> str:
        """The numbers as a template says them, such as "2 to 3"."""
        return f"{self.least} to {self.most}"

    @property
    def accepted(self) -> range:
        """The numbers that are accepted: half of ``least`` to twice ``most``."""
        return range(self.least // 2, 2 * self.most + 1)


BANDS: Mapping[str, Band] = {
    # From 0: a prompt that needs no thought may have an empty block, so that the token after the tag decides.
    "none": Band(1, 6),
    "low": Band(2, 3),
    "medium": Band(4, 6),
    # An end, since chains that go on without one are what small models do wrong.
    "high": Band(8, 12),
}


def count_sentences(think: str) -> int:
    """Return the number of sentences of a chain: its steps, as ``split_steps`` splits them."""
    return len(split_steps(think))


def in_band(think: str, level: str) -> bool:
    """Return True if a chain has a number of sentences that is accepted for a level, one of ``LEVELS``."""
    return count_sentences(think) in BANDS[level].accepted


def band_distance(think: str, level: str) -> int:
    """Return by how many sentences a chain misses what the model was asked for; 0 if it has as many."""
    number, band = count_sentences(think), BANDS[level]
    return max(band.least - number, number - band.most, 0)
