"""Identify a model by hashes of its weights and of the files that define it, not by names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_files

from saro.files import file_hashes

# Besides the weights, these files decide what a model computes and how text becomes its tokens. README, licence and
# chat template are not among them; a run compares its template by itself.
_DEFINING = ("config.json", "generation_config.json", "tokenizer.json")


def weight_hashes(path: str, commit: str | None) -> dict[str, str]:
    """Return the sha256 of each safetensors file of a model, by name.

    Args:
        path: folder of the model, or its hub name.
        commit: commit of a hub model. Its files come from the hub's cache; files that are not there yet are fetched, as
            loading the model would do moments later. If they cannot be fetched, the result is empty.
    """
    if Path(path).is_dir():
        files = sorted(Path(path).glob("*.safetensors"))
    else:
        files = _hub_weights(path, commit) if commit else []
    return _hash_contents(files)


def defining_hashes(path: str, commit: str | None, has_code: bool) -> dict[str, str]:
    """Return the sha256 of config, generation config and tokenizer, by file name, without files that do not exist.

    Args:
        path: folder of the model, or its hub name.
        commit: commit of a hub model. Only files in the hub's cache count, where loading config and tokenizer put them.
        has_code: the model has code of its own: its Python files count too.
    """
    folder = Path(path)
    if not folder.is_dir():
        config = _fetch(path, ["config.json"], commit, local_files_only=True) if commit else None
        if config is None:
            return {}
        folder = config[0].parent
    files = [folder / name for name in _DEFINING]
    if has_code:
        files += sorted(folder.glob("*.py"))
    return _hash_contents([file for file in files if file.is_file()])


def is_same_model(began: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> bool:
    """Return True if two identities (``ModelSource.identity``) are of one model, wherever its files are.

    Where one of them does not have a hash, as in manifests of older versions, the commit of the hub is compared for the
    weights, and nothing for the other files.
    """
    if began is None or now is None:
        return began is now
    if began.get("files") and now.get("files"):
        # The names of shards do not matter.
        same = sorted(began["files"].values()) == sorted(now["files"].values())
    else:
        same = began.get("commit") is not None and began["commit"] == now.get("commit")
    then, here = began.get("definition", {}), now.get("definition", {})
    same_definition = all(then[name] == here[name] for name in then.keys() & here.keys())
    return same and same_definition and began.get("adapter") == now.get("adapter")


def _hub_weights(path: str, commit: str) -> list[Path]:
    """Return the weight files that transformers loads for a hub model; an empty list if they cannot be fetched."""
    whole = _fetch(path, [SAFE_WEIGHTS_NAME], commit)
    if whole is not None:
        return whole
    index = _fetch(path, [SAFE_WEIGHTS_INDEX_NAME], commit)
    if index is None:
        return []
    shards = set(json.loads(index[0].read_text(encoding="utf-8"))["weight_map"].values())
    return _fetch(path, sorted(shards), commit) or []


def _fetch(path: str, names: list[str], commit: str, local_files_only: bool = False) -> list[Path] | None:
    """Return files of a hub model in the hub's cache, fetched if needed; None if one of them cannot be had."""
    try:
        found = cached_files(
            path,
            names,
            revision=commit,
            local_files_only=local_files_only,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:
        # Loading the model comes next, and reports what is wrong.
        return None
    complete = found is not None and len(found) == len(names) and all(found)
    return [Path(file) for file in found] if complete else None


def _hash_contents(files: Sequence[Path]) -> dict[str, str]:
    """Return the sha256 of files by name. The hub's cache names large files by it, so that they need not be read."""
    blobs = [file.resolve() for file in files]
    is_named = [blob.parent.name == "blobs" and bool(re.fullmatch(r"[0-9a-f]{64}", blob.name)) for blob in blobs]
    read = [file for file, named in zip(files, is_named, strict=True) if not named]
    hashed = dict(zip(read, file_hashes(read), strict=True))
    return {file.name: hashed.get(file, blob.name) for file, blob in zip(files, blobs, strict=True)}
