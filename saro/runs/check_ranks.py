"""Check that all ranks of a run were given the same code, packages, model and records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from saro.data.dataset import ExampleSet, PairSet
from saro.data.unpaired_set import UnpairedSet
from saro.distributed.runtime import Runtime

# Part of the manifest that every rank makes for itself -> its name in an error.
_PARTS = {"code": "saro's code", "versions": "the versions of its packages", "template": "the chat template"}


def check_same_inputs(runtime: Runtime, manifest: Mapping[str, Any], sets: Mapping[str, ExampleSet | PairSet]) -> None:
    """Check, before a model is loaded, that all ranks were given the same.

    Args:
        manifest: the run's manifest, as this rank made it.
        sets: the encoded records by name, such as "train".

    Raises:
        SaroError: on every rank, if one of them differs from rank 0.
    """
    if runtime.processes == 1:
        return
    values = {name: json.dumps(manifest[part], sort_keys=True) for part, name in _PARTS.items()}
    for part in ("model", "reference"):
        values[f"the files of the {part}"] = json.dumps(_without_place(manifest[part]), sort_keys=True)
    values |= {f"the token ids of {name}": _hash_records(data) for name, data in sets.items()}
    runtime.compare(values, "give every rank the same files")


def _without_place(identity: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a model's identity without its folder: each machine may have its copy elsewhere."""
    identity = dict(identity or {})
    if identity.get("files"):
        del identity["name"]
    return identity


def _hash_records(data: ExampleSet | PairSet) -> str:
    """Return the sha256 of all that training reads of the records: tokens, masks, kinds, ids, prompts or turns, and forms."""
    if data.digest is not None:
        # The files were compared with it when they were mapped.
        return data.digest
    digest = hashlib.sha256()
    is_pairs = isinstance(data, PairSet)
    for side in (data.chosen, data.rejected) if is_pairs else (data,):
        for column in (side.tokens, side.offsets, side.prompt_tokens, side.think_tokens, side.kinds):
            digest.update(np.ascontiguousarray(column))
        digest.update(json.dumps(side.ids).encode())
    if isinstance(data, UnpairedSet):
        digest.update(np.ascontiguousarray(data.labels))
    if isinstance(data, PairSet | UnpairedSet):
        digest.update(np.ascontiguousarray(data.prompts))
        digest.update(json.dumps(data.forms).encode())
    elif data.conversations is not None:
        digest.update(data.conversations)
    return digest.hexdigest()
