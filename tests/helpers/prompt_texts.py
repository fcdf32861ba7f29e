"""What tests of the demo's prompts share: words, what published sets hold, and what makes twins parallel."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter

import pytest
from run_files import ROOT

TRAINING = ("rw_train", "rw_heldout", "srpo_train", "srpo_heldout")
_SHARED = ROOT.parent / "shared" / "data"
needs_published = pytest.mark.skipif(not _SHARED.is_dir(), reason="the folder of public data sets is not here")


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def eight_grams(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[start : start + 8]) for start in range(len(found) - 7)}


def published_eight_grams() -> set[tuple[str, ...]]:
    """Return all eight words in a row of the prompts of the public data sets."""
    prompts = [record["question"] for record in json.loads((_SHARED / "star1.json").read_text(encoding="utf-8"))]
    for path in _SHARED.glob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        prompts += [record.get("prompt") or record.get("question") for record in records]
    for path in _SHARED.glob("*.csv"):
        with open(path, newline="", encoding="utf-8-sig") as file:
            prompts += [value for row in csv.DictReader(file) for name, value in row.items() if "prompt" in name]
    assert len(prompts) > 5000
    return set().union(*map(eight_grams, map(str, prompts)))


def assert_parallel(twins: list[tuple[str, str]]) -> None:
    """Assert that a harmless prompt and its harmful twin share words and are about as long."""
    for harmless, harmful in twins:
        shared = Counter(words(harmless)) & Counter(words(harmful))
        assert shared.total() >= 3, harmless
        assert 0.4 < len(words(harmless)) / len(words(harmful)) < 2.2, harmless


def assert_lengths_tell_nothing(twins: list[tuple[str, str]]) -> None:
    """Assert that harmful prompts are neither longer nor shorter than their harmless twins."""
    differences = [len(words(harmful)) - len(words(harmless)) for harmless, harmful in twins]
    longer, shorter = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    assert abs(sum(differences) / len(differences)) < 1.5
    assert longer < 2.5 * shorter
