"""Hands requests over as a JSONL file, for vLLM's run-batch or a batch API, and takes the results back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saro.data.jsonl import decode, fault, open_data
from saro.draws.openai_api import parse_reply, render_body
from saro.draws.request import Draw, Request
from saro.draws.store import DrawStore
from saro.errors import SaroError
from saro.files import atomic_write

# Results stored in one transaction.
_GROUP = 1000


@dataclass
class Imported:
    """Counts of what a file of results held.

    Attributes:
        texts: results that are texts, now stored.
        failures: results that are failures, now stored, by kind.
        known: results whose draw the store had already; it stays.
        repeated: further results for a request of the same file; the first counts.
        unknown: results for which this store has no request.
        is_cut: the last line is incomplete and was left out.
    """

    texts: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    known: int = 0
    repeated: int = 0
    unknown: int = 0
    is_cut: bool = False


def write_requests(
    path: str | os.PathLike,
    store: DrawStore,
    model: Mapping[str, Any],
    requests: Iterable[Request],
    model_name: str | None = None,
) -> int:
    """Write those requests that the store cannot answer as a batch file, and return their number.

    The file has one request a line in the form of OpenAI's batch API, with the key of the draw as ``custom_id``. It is
    readable only by its owner, and is not written if nothing is missing. The store remembers the requests, so that
    ``import_results`` needs only the results.

    Args:
        model: the ``Generator.identity`` of a server's model, under which the results are stored.
        model_name: name of the model in the file; default as in ``model``.

    Raises:
        SaroError: the file exists or cannot be written, or the model is not one of a server.
    """
    if model.get("kind") != "endpoint":
        raise SaroError(f"{os.fsdecode(path)}: only requests to a server can be handed over; name its url and model")
    requests = list(requests)
    store.register(model, requests)
    return _write(Path(path), store.read_open([request.key(model) for request in requests]), model_name)


def write_open_requests(path: str | os.PathLike, store: DrawStore) -> int:
    """Write the requests that were handed over and have no text yet as a batch file, and return their number.

    Raises:
        SaroError: the file exists or cannot be written.
    """
    rows = ((key, model, request) for key, model, request in store.read_open() if model.get("kind") == "endpoint")
    return _write(Path(path), rows, None)


def _write(path: Path, rows: Iterable[tuple[str, Mapping[str, Any], Request]], model_name: str | None) -> int:
    if path.exists():
        raise SaroError(f"{path}: exists already; name another file, or remove it")
    lines = []
    for key, model, request in rows:
        endpoint, body = render_body(request, model)
        if model_name is not None:
            body["model"] = model_name
        lines.append({"custom_id": key, "method": "POST", "url": f"/v1/{endpoint}", "body": body})
    if lines:
        with atomic_write(path) as file:
            os.chmod(file.name, 0o600)
            for line in lines:
                file.write(json.dumps(line) + "\n")
    return len(lines)


def import_results(store: DrawStore, path: str | os.PathLike) -> Imported:
    """Store the results of requests that were handed over, and return counts of them.

    The file is the output or the error file of a batch: one object a line with ``custom_id`` and ``response`` or
    ``error``. A result with an error is stored as a failure. It may be imported while the batch still runs, and again
    later.

    Raises:
        SaroError: the file cannot be read, a line other than the last is no JSON object with a ``custom_id``, or none
            of its results belongs to a request of this store.
    """
    name = os.fsdecode(path)
    imported = Imported()
    open_requests = {key: (model, request) for key, model, request in store.read_open()}
    seen: set[str] = set()
    groups: dict[str, dict[str, tuple[Request, Draw]]] = {}
    number = 0
    for where, line in _read_lines(name, imported):
        number += 1
        key = line.get("custom_id")
        if not isinstance(key, str):
            fault(where, "there is no custom_id", "give the output file of a batch")
        if key in seen:
            imported.repeated += 1
            continue
        seen.add(key)
        if key not in open_requests:
            imported.known += 1
            continue
        model, request = open_requests[key]
        draw = _parse_result(line, model, request)
        _count(imported, draw)
        group = groups.setdefault(json.dumps(model), {})
        group[key] = (request, draw)
        if len(group) == _GROUP:
            store.put(model, groups.pop(json.dumps(model)))
    # A key that was not open either has its draw already, or is in no store of ours.
    others = [key for key in seen if key not in open_requests]
    imported.unknown = len(others) - len(store.get(others))
    imported.known -= imported.unknown
    if number and imported.unknown == len(seen):
        fault(name, f"none of its {number:,} results was asked for by {store.path}", "name the store that asked")
    for model, group in groups.items():
        store.put(json.loads(model), group)
    return imported


def _read_lines(name: str, imported: Imported) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:line", object) of each line. A last line that is incomplete is noted and left out."""
    with open_data(name) as file:
        for line, raw in enumerate(file, start=1):
            where = f"{name}:{line}"
            if not raw.strip():
                continue
            is_cut = not raw.endswith(b"\n")
            try:
                value = json.loads(raw if is_cut else decode(raw, where))
            except (ValueError, RecursionError) as error:
                if is_cut:
                    imported.is_cut = True
                    return
                where_in_line = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                fault(where, f"broken JSON{where_in_line}", "get the file again")
            if not isinstance(value, dict):
                fault(where, "the line is no object", "give the output file of a batch")
            yield where, value


def _parse_result(line: dict[str, Any], model: Mapping[str, Any], request: Request) -> Draw:
    """Read one result as a draw. Never raises."""
    response, error = line.get("response"), line.get("error")
    if not isinstance(response, dict):
        response = {}
    # Some runners put the reply where others put {"status_code", "body"}.
    body = response if "choices" in response else response.get("body")
    status = response.get("status_code", 200)
    if not isinstance(status, int):
        status = 500
    if error:
        # A status beside an error is the server's; without one there was no reply.
        return parse_reply(request, model, status if status != 200 else 500, {"error": error})
    if body is None:
        return Draw(failure="parse", detail="the result has neither a reply nor an error")
    return parse_reply(request, model, status, body)


def _count(imported: Imported, draw: Draw) -> None:
    if draw.failure is None:
        imported.texts += 1
    else:
        imported.failures[draw.failure] = imported.failures.get(draw.failure, 0) + 1
