"""Reads manifest.json, which says what a run was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Every run's manifest has these keys. Other programs write files of this name without them.
_KEYS = frozenset({"saro", "config", "template_date"})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of the run in a folder; None if the folder holds no run."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_run = isinstance(manifest, dict) and manifest.keys() >= _KEYS
    return manifest if is_run else None
