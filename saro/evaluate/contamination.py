"""Finds suite prompts that a model was trained on: the same text, or 13 words in a row of it.

Texts are compared as words in lower case, without punctuation and white space. 13-grams are those of GPT-3's analysis
(Brown et al. 2020, appendix C). A prompt of fewer words is found only if it is the same.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import saro
from saro.data.records import Message
from saro.data.unpaired_records import read_records
from saro.evaluate.suite import Item
from saro.files import file_hash
from saro.manifest import read_manifest

WORDS = 13
# Files of trained models: an adapter's config, and the note of `saro export`.
_TRAINED = ("adapter_config.json", "export.json")
# Chinese characters and Japanese syllables are words of their own, because nothing separates words there.
_CJK = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


@dataclass(frozen=True)
class Contamination:
    """One item of which a training prompt holds the text or a part of it.

    Attributes:
        suite, item: names of the item.
        record: name of the first training record that holds it.
        kind: "exact" if the texts are the same, "13-gram" if they share 13 words in a row.
    """

    suite: str
    item: str
    record: str
    kind: Literal["exact", "13-gram"]


@dataclass(frozen=True)
class TrainingFiles:
    """The files that a model was trained on, as far as they are known.

    Attributes:
        files: training files of all stages, the last stage first, unchanged since training.
        unknown: one line for each file or stage that is gone or has changed, so that its prompts cannot be compared.
    """

    files: tuple[Path, ...] = ()
    unknown: tuple[str, ...] = ()


def find_contamination(items: Sequence[Item], training_prompts: Iterable[tuple[str, str]]) -> list[Contamination]:
    """Return the items whose prompts are in training prompts, in the order of the items, each once.

    An item is compared by its user turns, joined. An exact match counts before one of 13 words.

    Args:
        items: of any suites.
        training_prompts: (name of a record, text of its prompt), such as ``read_training_prompts`` yields. They are read
            once, and only the items are kept in memory.
    """
    texts = [_words(_user_text(item.prompt)) for item in items]
    by_text: dict[tuple[str, ...], list[int]] = {}
    by_gram: dict[tuple[str, ...], list[int]] = {}
    for i, words in enumerate(texts):
        if words:
            by_text.setdefault(tuple(words), []).append(i)
        for gram in set(_grams(words)):
            by_gram.setdefault(gram, []).append(i)
    exact: dict[int, str] = {}
    partial: dict[int, str] = {}
    for record, text in training_prompts:
        words = _words(text)
        for i in by_text.get(tuple(words), ()):
            exact.setdefault(i, record)
        # Most records share nothing with any item: tell these apart without a loop over their words in Python.
        if not by_gram.keys().isdisjoint(_grams(words)):
            for i in chain.from_iterable(by_gram.get(gram, ()) for gram in _grams(words)):
                partial.setdefault(i, record)
    found: list[Contamination] = []
    for i, item in enumerate(items):
        if i in exact:
            found.append(Contamination(item.suite, item.id, exact[i], "exact"))
        elif i in partial:
            found.append(Contamination(item.suite, item.id, partial[i], "13-gram"))
    return found


def find_training_files(model: str | os.PathLike) -> TrainingFiles:
    """Return the files on which a model was trained, from the manifests of its run and of the runs before it.

    Args:
        model: folder of a model or an adapter, such as RUN/final; the manifest of its run lies beside it. The run that it
            started from, such as RW for SRPO, is found through the folder that its manifest names. A model without a
            manifest, such as a base model from the hub, has no known files: nobody can say what it was trained on.
    """
    files: list[Path] = []
    unknown: list[str] = []
    folder: Path | None = Path(model).expanduser()
    seen: set[Path] = set()
    while folder is not None and folder.is_dir() and folder.resolve() not in seen:
        seen.add(folder.resolve())
        run = folder.resolve().parent
        manifest = read_manifest(run)
        if manifest is None:
            if any((folder / name).is_file() for name in _TRAINED):
                unknown.append(f"{folder}: no manifest lies beside it; evaluate it in the folder of its run")
            break
        hashes = _training_hashes(manifest)
        if not hashes:
            unknown.append(f"{run.name}: its manifest names no training files")
        for name, sha256 in hashes:
            file = _find_file(name, sha256, run)
            if isinstance(file, Path):
                files.append(file)
            else:
                unknown.append(f"{run.name}: {name} {file}")
        folder = _find_start(manifest, run)
        if folder is None and _started_from_folder(manifest):
            unknown.append(f"{run.name}: {manifest.get('start')}, from which it started, is gone or has changed")
    return TrainingFiles(tuple(dict.fromkeys(files)), tuple(unknown))


def read_training_prompts(files: Iterable[str | os.PathLike]) -> Iterator[tuple[str, str, str]]:
    """Yield (file, id of the record, text) for the prompts of training files, in any form.

    The text is that of the user turns. A conversation of several turns is yielded whole, and then each turn by itself.

    Raises SaroError for a file that cannot be read as records.
    """
    for path in files:
        name = os.fsdecode(path)
        for record in read_records(path):
            if isinstance(record.prompt, str):
                yield name, record.id, record.prompt
                continue
            yield name, record.id, _user_text(record.prompt)
            turns = [turn.content for turn in record.prompt if turn.role == "user"]
            for text in turns if len(turns) > 1 else ():
                yield name, record.id, text


def _user_text(prompt: Sequence[Message]) -> str:
    return "\n".join(turn.content for turn in prompt if turn.role == "user")


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _grams(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(WORDS)), strict=False)


def _training_hashes(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, sha256) of the training files: the manifest has them before the held-out ones."""
    names = manifest["config"].get("data", {}).get("train", [])
    return list(manifest.get("data", {}).items())[: len(set(names))]


def _find_file(name: str, sha256: str, run: Path) -> Path | str:
    """Return a training file whose content is that of training, or what is wrong with it."""
    # Names may be relative to the folder in which the run was started. Demo files are in the package, wherever it is now.
    places = [Path(name), *(folder / name for folder in run.parents)]
    places.append(Path(saro.__file__).parent / "demo" / Path(name).name)
    existing = [place for place in places if place.is_file()]
    for place in existing:
        if file_hash(place) == sha256:
            return place.resolve()
    return "has changed since training" if existing else "is gone"


def _started_from_folder(manifest: dict[str, Any]) -> bool:
    """Return True if a run started from a folder, which may be that of another run, and not from a model of the hub."""
    model = manifest.get("model", {})
    return model.get("adapter") is not None or (model.get("commit") is None and bool(model.get("files")))


def _find_start(manifest: dict[str, Any], run: Path) -> Path | None:
    """Return the folder that a run started from, if its weights are still those; None if there is none."""
    start, model = manifest.get("start"), manifest.get("model", {})
    if not start or not _started_from_folder(manifest):
        return None
    weights = model.get("files", {}) if model.get("adapter") is None else model["adapter"]
    hashes = {name: value for name, value in weights.items() if name.endswith(".safetensors")}
    for place in (Path(start).expanduser(), *(folder / start for folder in run.parents)):
        if all((place / name).is_file() and file_hash(place / name) == value for name, value in hashes.items()):
            return place
    return None
