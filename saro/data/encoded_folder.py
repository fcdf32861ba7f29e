"""Keep encoded records on disk: each file is encoded once, and mapped by every rank of every run that reads it.

    $SARO_CACHE/encoded/KEY/key.json    what the token ids depend on
                           /set.json    dtype and sha256 of each column, and what else ``make_set`` needs
                           /*.bin       the columns, such as chosen.tokens.bin: (T,) int32

A folder appears complete or not at all. It may be deleted whenever no run uses it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from saro.config import KINDS, PAIR_KINDS, DataConfig
from saro.data.chat_format import ChatFormat
from saro.data.columns import FileColumns, Texts, map_columns
from saro.data.dataset import ExampleSet, PairSet, Repeats, make_set
from saro.data.encode_files import Check, encode_into
from saro.data.jsonl import open_data
from saro.data.lengths import count_repeats
from saro.data.workers import count_workers
from saro.errors import SaroError
from saro.files import atomic_folder, cache_dir, file_hash, file_hashes, remove_temps

# Data files of fewer bytes in all are encoded in memory by every rank. That takes less than half a minute, and an edited file
# leaves nothing behind. A million pairs take half an hour of a core, and gigabytes of every rank.
MAPPED_BYTES = 2**24


def map_encoded(
    kind: str,
    paths: Sequence[str],
    chat: ChatFormat,
    options: DataConfig,
    *,
    check: Check,
    checked: Mapping[str, Any],
    say: Callable[[str], None],
    progress: bool = False,
) -> ExampleSet | PairSet:
    """Return the set of some data files, mapped from the cache. It is encoded now if it is not there, or is damaged.

    Args:
        kind: "examples" or "pairs".
        check: checks some records at a time while they are encoded. A set in the cache has passed.
        checked: what ``check`` depends on besides, as plain data.
        say: prints a line for the user.
        progress: show a progress bar on a terminal.

    Raises:
        SaroError: names the first record that is wrong, or a file that cannot be read; or the folder cannot be written.
    """
    for path in paths:
        open_data(path).close()
    key = _make_key(kind, paths, chat, options, checked)
    text = json.dumps(key, sort_keys=True, indent=2)
    folder = cache_dir() / "encoded" / hashlib.sha256(text.encode()).hexdigest()[:32]
    if find_fault(folder, text) is not None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Another process, here or on another machine of the same file system, may be encoding the same files: wait for it.
            with FileLock(folder.with_name(f"{folder.name}.lock")):
                fault = find_fault(folder, text)
                if fault is not None:
                    say(f"{', '.join(paths)}: {fault}; encoding into {folder}")
                    _remove_old(folder)
                    with atomic_folder(folder) as temp, closing(FileColumns(temp)) as columns:
                        about = encode_into(
                            columns, kind, paths, chat, options, progress=progress, check=check, workers=count_workers()
                        )
                        write_description(temp, columns, about, paths)
                        (temp / "key.json").write_text(text, encoding="utf-8")
                    # Hash the files now, so that the other ranks of this machine need not.
                    find_fault(folder, text)
        except OSError as error:
            raise SaroError(
                f"{folder}: cannot be written ({error.strerror}); set SARO_CACHE to a folder with room"
            ) from error
    return open_encoded(folder, paths)


def _remove_old(folder: Path) -> None:
    """Remove a damaged set, and what killed processes left beside it."""
    remove_temps(folder)
    if folder.exists():
        shutil.rmtree(folder)


def write_description(folder: Path, columns: FileColumns, about: Mapping[str, Any], paths: Sequence[str]) -> None:
    """Write set.json. ``repeats`` is counted now, once: it takes all tokens."""
    described = {"files": list(paths), "about": about, "columns": columns.finish()}
    repeats = count_repeats(_map(folder, described, paths))
    (folder / "set.json").write_text(json.dumps(described | {"repeats": asdict(repeats)}), encoding="utf-8")


def open_encoded(folder: Path, paths: Sequence[str]) -> ExampleSet | PairSet:
    """Map an encoded set. ``paths`` are the data files, as ``where`` names them."""
    described = json.loads((folder / "set.json").read_text(encoding="utf-8"))
    columns = described["columns"].items()
    # Leave out the names of files, which may differ between machines.
    hashes = {name: column["sha256"] for name, column in columns if not name.startswith("where.")}
    digest = hashlib.sha256(json.dumps([hashes, described["about"]], sort_keys=True).encode()).hexdigest()
    return replace(_map(folder, described, paths), digest=digest, repeats=Repeats(**described["repeats"]))


def find_fault(folder: Path, key: str) -> str | None:
    """Return what is wrong with the folder of an encoded set; None if nothing has changed since it was written.

    A file whose time has not changed since it was last read is taken to have the same content.
    """
    try:
        if (folder / "key.json").read_text(encoding="utf-8") != key:
            return "the cache has other records in its place"
        described = json.loads((folder / "set.json").read_text(encoding="utf-8"))
        hashes = [column["sha256"] for column in described["columns"].values()]
        found = file_hashes([folder / f"{name}.bin" for name in described["columns"]])
    except FileNotFoundError:
        return "damaged in the cache" if folder.exists() else "not encoded yet"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "damaged in the cache"
    return None if found == hashes else "damaged in the cache"


def _map(folder: Path, described: Mapping[str, Any], paths: Sequence[str]) -> ExampleSet | PairSet:
    columns: dict[str, Any] = dict(map_columns(folder, described["columns"]))
    # Files may have moved since: name them as they are called now.
    moved = {f"{old}:": f"{new}:" for old, new in zip(described["files"], paths, strict=True) if old != new}
    for name, renamed in (("ids", {}), ("where", moved)):
        columns[name] = Texts(columns[f"{name}.content"], columns[f"{name}.offsets"], renamed)
    return make_set(columns, described["about"])


def _make_key(
    kind: str, paths: Sequence[str], chat: ChatFormat, options: DataConfig, checked: Mapping[str, Any]
) -> dict[str, object]:
    """Return everything that the columns of a set depend on, and what they were checked with."""
    tokenizer = chat.tokenizer
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return {
        "kind": kind,
        # Columns store kinds as indices into these.
        "kinds": [KINDS, PAIR_KINDS],
        # A record without an id is named after its file.
        "files": [[Path(path).stem, file_hash(Path(path))] for path in paths],
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        # Not in the tokenizer's text: special tokens in a prompt are then split like other text.
        "split_special_tokens": tokenizer.backend_tokenizer.encode_special_tokens,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": hashlib.sha256(json.dumps(tokenizer.chat_template).encode()).hexdigest(),
        "template_date": chat.template_date.isoformat() if chat.template.shows_date else None,
        "template_variables": json.loads(json.dumps(dict(chat.template_variables or {}), default=str)),
        "think_tags": list(chat.think_tags),
        "stop_ids": sorted(chat.stop_ids),
        "pack_tokens": options.pack_tokens,
        "too_long": options.too_long,
        "equal_sides": options.equal_sides,
        "train_on": options.train_on,
        "checked": dict(checked),
        # Hash the code: if somebody forgot to raise a version, old token ids would be trained on silently.
        "code": hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest(),
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "jinja2")},
    }
