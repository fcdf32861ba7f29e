"""Takes the reasoning out of native records: what training on answers alone would see, the baseline of training on chains.

To compare the two, both must see the same records: a chain may be too long for the packs of a run, and its answer never is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saro.data.jsonl import fault
from saro.data.records import SIDES
from saro.errors import SaroError
from saro.manifest import read_manifest


def drop_reasoning(source: dict[str, Any], number: int, where: str) -> dict[str, Any] | None:
    """Return a native example or pair without its reasoning and without ``meta``, which describes the whole record.

    Pairs become outcome pairs: without reasoning there is no process to compare.

    Returns:
        The record. None if a side has no answer, as open sides that end inside their reasoning, if both are the same, or
        if an open one is only the beginning of the other.

    Raises:
        SaroError: the record is not in our format, in which reasoning and answer are apart.
    """
    sides = [source.get(name) for name in SIDES]
    kept = {"id": source.get("id") or f"answers-{number:06d}", "prompt": source.get("prompt")}
    if source.get("tools") is not None:
        kept["tools"] = source["tools"]
    if all(isinstance(side, dict) for side in sides):
        chosen, rejected = ({name: side[name] for name in ("answer", "open") if side.get(name)} for side in sides)
        if "answer" not in chosen or "answer" not in rejected or _cannot_differ(chosen, rejected):
            return None
        return kept | {"kind": "op-cot", "chosen": chosen, "rejected": rejected}
    if "answer" not in source:
        fault(where, "is not in saro's own format, with a field for the answer", "convert it first")
    return kept | {name: source[name] for name in ("kind", "answer") if name in source}


def find_dropped(run: str) -> frozenset[str]:
    """Return the ids of the records that a run left out because they are longer than its packs.

    Raises:
        SaroError: the folder has no manifest of a run.
    """
    records = (read_manifest(Path(run)) or {}).get("records")
    if records is None:
        raise SaroError(
            f"--as_trained {run}: holds no run (no manifest.json); give the folder that --train.output named"
        )
    return frozenset(id for report in records.values() for id in report["dropped"])


def _cannot_differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return True if two sides have one answer, or one is open and the other goes on from it."""
    return one["answer"] == other["answer"] or any(
        a.get("open") and b["answer"].startswith(a["answer"]) for a, b in ((one, other), (other, one))
    )
