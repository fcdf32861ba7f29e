"""Finds the judges that labelled what a model was trained on."""

from __future__ import annotations

import os
from collections.abc import Iterable

from saro.data.read_rows import read_rows
from saro.data.record_fields import get_synth


def find_training_judges(files: Iterable[str | os.PathLike]) -> dict[str, str]:
    """Return the judges that chose the records of training files, and for each the first file that names it.

    ``saro synth`` writes a judge's name into ``meta.synth.judge`` of a record. Records that lost their ``meta`` name none.

    Raises SaroError for a file that cannot be read.
    """
    judges: dict[str, str] = {}
    for path in files:
        for _, _, record in read_rows(path, ("meta",)):
            judge = get_synth(record).get("judge")
            if isinstance(judge, str):
                judges.setdefault(judge, os.fsdecode(path))
    return judges
