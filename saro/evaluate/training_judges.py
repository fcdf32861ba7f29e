"""Finds the judges that labelled what a model was trained on."""

from __future__ import annotations

import os
from collections.abc import Iterable

from saro.data.read_rows import read_rows


def find_training_judges(files: Iterable[str | os.PathLike]) -> dict[str, str]:
    """Return the judges that chose the records of training files, and for each the first file that names it.

    ``saro synth`` writes a judge's name into ``meta.synth.judge`` of a record. Records that lost their ``meta`` name none.

    Raises SaroError for a file that cannot be read.
    """
    judges: dict[str, str] = {}
    for path in files:
        for _, _, record in read_rows(path, ("meta",)):
            meta = record.get("meta")
            synth = meta.get("synth") if isinstance(meta, dict) else None
            judge = synth.get("judge") if isinstance(synth, dict) else None
            if isinstance(judge, str):
                judges.setdefault(judge, os.fsdecode(path))
    return judges
