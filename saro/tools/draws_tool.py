"""`saro draws`: a store of draws -> a batch file of requests; results of a batch -> the store; what a store holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from saro.draws.handover import import_results, write_open_requests
from saro.draws.store import DrawStore
from saro.errors import SaroError
from saro.program import positional

ACTIONS = ("requests", "import", "show")
# Draws that `show` prints for the beginning of a key.
_SHOWN = 10


@dataclass(frozen=True)
class Options:
    """Options of `saro draws`.

    Attributes:
        action: requests writes those that were handed over and have no text yet as a batch file, import takes the
            results of a batch, show counts what the store holds.
        store: The store, such as ~/.cache/saro/draws.sqlite3.
        file: With requests, the JSONL file to write; with import, the one to read; with show, the beginning of a key,
            whose draws are printed with their texts.
    """

    action: str = field(metadata=positional(choices=ACTIONS))
    store: str = field(metadata=positional())
    file: str = field(default="", metadata=positional())


def run(options: Options, console: Console) -> int:
    """Hand over requests for texts, take the results back, or show what a store of draws holds.

    Raises:
        SaroError: there is no such store, the file is missing or faulty.
    """
    path = Path(options.store).expanduser()
    if not path.is_file():
        raise SaroError(f"{path}: there is no such store; check the path")
    if options.action != "show" and not options.file:
        raise SaroError(f"name the file: saro draws {options.action} {options.store} FILE.jsonl")
    with DrawStore.open(path) as store:
        if options.action == "requests":
            lines = [_write_requests(store, options.file)]
        elif options.action == "import":
            lines = _import(store, options.file)
        elif options.file:
            lines = _show_draws(store, options.file)
        else:
            lines = _show_models(store)
    for line in lines:
        console.out(line, highlight=False)
    return 0


def _write_requests(store: DrawStore, file: str) -> str:
    if number := write_open_requests(file, store):
        return f"{number:,} requests in {file}"
    return "no request waits for a text; `saro evaluate --requests` hands requests over"


def _import(store: DrawStore, file: str) -> list[str]:
    imported = import_results(store, file)
    lines = [f"{imported.texts:,} texts stored"]
    if imported.failures:
        lines.append(f"{_count_kinds(imported.failures)} stored as failures")
    if imported.known:
        lines.append(f"{imported.known:,} were there already")
    if imported.repeated:
        lines.append(f"{imported.repeated:,} repeat a result of the file; the first counts")
    if imported.unknown:
        lines.append(f"{imported.unknown:,} were not asked for by this store, and are left out")
    if imported.is_cut:
        lines.append("the last line is cut; import the file again when it is complete")
    return lines


def _show_models(store: DrawStore) -> list[str]:
    lines = []
    for model in store.read_models():
        parts = [f"{model.texts:,} texts"]
        if model.failures:
            parts.append(_count_kinds(model.failures))
        if model.waiting:
            parts.append(f"{model.waiting:,} waiting")
        lines.append(f"{_describe(model.identity)}: {', '.join(parts)}")
    return lines or ["no draws"]


def _show_draws(store: DrawStore, prefix: str) -> list[str]:
    draws = store.find(prefix, _SHOWN)
    if not draws:
        raise SaroError(f"{store.path}: no key begins with {prefix}; `saro draws show` without a key counts the draws")
    # ASCII: texts of models may hold control characters that a terminal would obey.
    return [json.dumps(draw, indent=2, ensure_ascii=True) for draw in draws]


def _describe(identity: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in identity.items() if value not in (None, "", {}, []))


def _count_kinds(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {kind}" for kind, number in sorted(kinds.items()))
