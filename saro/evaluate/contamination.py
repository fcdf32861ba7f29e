"""Finds prompts of suites that a model was trained on: the same words, or 13 words in a row."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saro.data.records import Record, read_examples, read_pairs
from saro.errors import SaroError
from saro.evaluate.suite import Item
from saro.files import file_hash
from saro.manifest import read_manifest

# The n-gram that GPT-3's authors used for the same purpose (Brown et al. 2020, arXiv:2005.14165, appendix C).
NGRAM = 13
# A run continues another one, which may continue another one: two stages have one such step.
_MOST_STAGES = 8


@dataclass(frozen=True)
class Contamination:
    """One prompt of a suite that a training record has too.

    Attributes:
        suite, item: the prompt.
        file, record: the first training record that has it.
        kind: "exact" if the words are the same, "13-gram" if they share 13 words in a row.
    """

    suite: str
    item: str
    file: str
    record: str
    kind: str


@dataclass(frozen=True)
class TrainingData:
    """What a model was trained on, as far as its runs' manifests say.

    Attributes:
        files: training files, of all stages, with the function that reads their records.
        unknown: files that are gone or have changed since.
    """

    files: tuple[tuple[str, bool], ...]
    unknown: tuple[str, ...]

    def prompts(self) -> Iterator[tuple[str, str, str]]:
        """Yield (file, id, text of the last turn) of each record."""
        for file, is_pairs in self.files:
            record: Record
            for record in read_pairs(file) if is_pairs else read_examples(file):
                text = record.prompt if isinstance(record.prompt, str) else record.prompt[-1].content
                yield file, record.id, text


def find_training_data(manifest: Mapping[str, Any]) -> TrainingData:
    """Return the training files of a run and of the runs that it continues."""
    files: dict[str, bool] = {}
    unknown: list[str] = []
    stage: Mapping[str, Any] | None = manifest
    for _ in range(_MOST_STAGES):
        if stage is None:
            break
        trained = list(stage.get("data", {}).items())[: len(stage["config"].get("data", {}).get("train", []))]
        for file, expected in trained:
            if Path(file).is_file() and file_hash(Path(file)) == expected:
                files[file] = "preference" in stage["config"]
            else:
                unknown.append(file)
        start = stage.get("start")
        stage = read_manifest(Path(start).resolve().parent) if start and Path(start).is_dir() else None
    return TrainingData(tuple(files.items()), tuple(unknown))


def find_contamination(items: Sequence[Item], prompts: Iterable[tuple[str, str, str]]) -> list[Contamination]:
    """Return the items whose prompt is in the training prompts, (file, id, text) each; one finding for each item."""
    by_words: dict[tuple[str, ...], list[int]] = {}
    by_ngram: dict[tuple[str, ...], list[int]] = {}
    for i, item in enumerate(items):
        words = _words(item.prompt[-1].content)
        by_words.setdefault(words, []).append(i)
        for ngram in _ngrams(words):
            by_ngram.setdefault(ngram, []).append(i)
    found: dict[int, Contamination] = {}
    for file, record, text in prompts:
        words = _words(text)
        for i in by_words.get(words, ()):
            if i not in found or found[i].kind != "exact":
                found[i] = Contamination(items[i].suite, items[i].id, file, record, "exact")
        for ngram in _ngrams(words):
            for i in by_ngram.get(ngram, ()):
                found.setdefault(i, Contamination(items[i].suite, items[i].id, file, record, "13-gram"))
    return [found[i] for i in sorted(found)]


def check_contamination(model: str, found: Sequence[Contamination], allow: bool) -> None:
    """Check that a model was not trained on what it is asked.

    Raises:
        SaroError: it was, and ``allow`` is False.
    """
    if found and not allow:
        first = found[0]
        raise SaroError(
            f"{model}: was trained on {len(found):,} prompts of the suites, such as {first.suite}/{first.item} "
            f"({first.kind} overlap with {first.record} of {first.file}); leave them out, or give --allow_contaminated"
        )


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _ngrams(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    return (words[i : i + NGRAM] for i in range(len(words) - NGRAM + 1))
