"""Tests of the documents: every link leads somewhere, and the README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from run_files import ROOT

DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(path for room in ("saro", "kernels", "recipes", "benchmarks") for path in (ROOT / room).rglob("*.md")),
]
# A reader takes in about 240 words a minute.
TEN_MINUTES = 2_400


def anchors(document: Path) -> set[str]:
    """Return the names that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_to_one_of_its_headings(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_the_readme_takes_ten_minutes_and_leads_to_every_other_document():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) < TEN_MINUTES
    pages = [path for path in DOCUMENTS if path.name == "README.md" and path.parent != ROOT]
    missing = [str(path.relative_to(ROOT)) for path in pages if f"]({path.relative_to(ROOT)})" not in text]
    assert missing == []
