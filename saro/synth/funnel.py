"""Counts what goes into each stage of data construction and what comes out, and why the rest was left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LeftOut:
    """One line of NAME.left_out.jsonl. It has no text.

    Attributes:
        id: id of the prompt.
        stage: where it was left out, such as "gates".
        reason: why, such as "unfinished". One reason has one spelling, so that reasons can be counted.
        draw: key of the draw that was left out; None if it is the prompt.
    """

    id: str
    stage: str
    reason: str
    draw: str | None = None


@dataclass
class Funnel:
    """Collects counts in the order in which they come, and what was left out.

    Attributes:
        counts: stage -> name -> number.
        left_out: in the order of the prompts.
    """

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)

    def count(self, stage: str, name: str, number: int = 1) -> None:
        """Add to one count of a stage."""
        counts = self.counts.setdefault(stage, {})
        counts[name] = counts.get(name, 0) + number

    def leave_out(self, id: str, stage: str, reason: str, draw: str | None = None) -> None:
        """Note that a prompt or a draw goes no further."""
        self.left_out.append(LeftOut(id, stage, reason, draw))

    def as_dict(self) -> dict[str, Any]:
        """Return the counts, and the number of what was left out by stage and reason, as plain JSON."""
        reasons: dict[str, Counter[str]] = {}
        for one in self.left_out:
            reasons.setdefault(one.stage, Counter())[one.reason] += 1
        return {
            "counts": {stage: dict(counts) for stage, counts in self.counts.items()},
            "left_out": {stage: dict(sorted(counts.items())) for stage, counts in reasons.items()},
        }
