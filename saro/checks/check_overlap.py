"""Check that no held-out prompt is trained on."""

from __future__ import annotations

from saro.data.dataset import ExampleSet, PairSet
from saro.data.jsonl import shown
from saro.data.repeats import find_overlap
from saro.errors import SaroError

# The error names this many records and counts the others: a whole file given twice would fill the screen.
_NAMED = 10


def check_overlap(heldout: ExampleSet | PairSet, train: ExampleSet | PairSet) -> None:
    """Check that no held-out record has the prompt of a training record, in the tokens that the model reads.

    Call it before ``PairSet.divergent``, which counts the shared part of the responses as prompt.

    Raises:
        SaroError: counts the held-out records whose prompts are trained on, and names them and the training records.
    """
    overlap = find_overlap(heldout, train)
    if not overlap:
        return
    named = [f"{_name(heldout, i)} that of {_name(train, j)}" for i, j in overlap[:_NAMED]]
    if len(overlap) > _NAMED:
        named.append(f"and {len(overlap) - _NAMED:,} more")
    raise SaroError(
        f"{len(overlap):,} of {len(heldout):,} held-out records have the prompt of a training record: "
        f"{', '.join(named)}; remove them from one of the two, or set --data.allow_overlap true"
    )


def _name(data: ExampleSet | PairSet, record: int) -> str:
    """Return a record's id and place, for the error message."""
    side = data.chosen if isinstance(data, PairSet) else data
    return f"{shown(side.ids[record])} ({side.where[record]})"
