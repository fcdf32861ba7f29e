"""The only reader of manifest.json: what a run was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What every manifest of a run has, and what its parts have.
_KEYS = frozenset({"saro", "config", "template_date", "model", "machine"})
_CONFIG_KEYS = frozenset({"model", "data", "train"})
_MODEL_KEYS = frozenset({"name", "commit", "files"})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of the run in a folder; None if there is no run: other programs write a manifest.json too."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if _is_of_a_run(manifest) else None


def _is_of_a_run(manifest: Any) -> bool:
    return _has(manifest, _KEYS) and _has(manifest["config"], _CONFIG_KEYS) and _has(manifest["model"], _MODEL_KEYS)


def _has(value: Any, keys: frozenset[str]) -> bool:
    return isinstance(value, dict) and keys <= value.keys()
