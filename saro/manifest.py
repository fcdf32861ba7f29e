"""Reads manifest.json, which says what a run was made from, and tells what manifests say of packages."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Every run's manifest has these keys. Other programs write files of this name without them.
_KEYS = frozenset({"saro", "config", "template_date"})
_DRAWING_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of the run in a folder; None if the folder holds no run."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if _is_of_a_run(manifest) else None


def trained_dtype(manifest: Mapping[str, Any]) -> str:
    """Return the name of the dtype that a run computes in.

    Manifests of older versions have the option as it was given: "auto" was bfloat16 on a GPU and float32 on a CPU.
    """
    dtype = manifest["config"]["model"]["dtype"]
    if dtype != "auto":
        return dtype
    return "bfloat16" if manifest["machine"]["device"].startswith("cuda") else "float32"


def package_versions(names: Sequence[str] = _DRAWING_PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of packages, by name; by default those that can change what a model writes."""
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _is_of_a_run(manifest: Any) -> bool:
    if not isinstance(manifest, dict) or not manifest.keys() >= _KEYS:
        return False
    config = manifest["config"]
    groups = config.values() if isinstance(config, dict) else [None]
    # Readers look into these: a file that somebody has edited must not surprise them.
    return all(isinstance(part, dict) for part in (manifest.get("model", {}), *groups))
