"""Reads a page of the report as a program: its texts with the attributes around them, and the answers packed into it."""

from __future__ import annotations

import base64
import json
import random
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

_VOID = {"meta", "link", "br", "input", "img"}


class Text(NamedTuple):
    """A text of the page, and the (tag, attributes) of the elements around it, from the outside in."""

    text: str
    around: tuple[tuple[str, dict[str, str]], ...]

    def has(self, name: str) -> bool:
        """Return True if an element around the text has an attribute."""
        return any(name in attributes for _, attributes in self.around)

    def within(self, *tags: str) -> bool:
        return any(tag in tags for tag, _ in self.around)

    def of_class(self, *names: str) -> bool:
        return any(set(names) & set((attributes.get("class") or "").split()) for _, attributes in self.around)

    def attribute(self, name: str) -> str | None:
        return next((attributes[name] for _, attributes in reversed(self.around) if name in attributes), None)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.texts: list[Text] = []
        self.tags: list[tuple[str, dict[str, str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, {name: value or "" for name, value in attrs})
        self.tags.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1][0]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(Text(data.strip(), tuple(self.open)))


def read_page(html: str) -> tuple[list[Text], list[tuple[str, dict[str, str]]]]:
    """Return the texts of a page, and its (tag, attributes); fails if an element is not closed in order."""
    reader = _Reader()
    reader.feed(html)
    assert not reader.open
    return reader.texts, reader.tags


def unpack(html: str, folder: int = 0) -> dict[str, Any]:
    """Return the items and answers that a page holds."""
    packed = re.search(rf'<script type="application/octet-stream" id="data-{folder}"[^>]*>([^<]*)</script>', html)[1]
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def write_training_run(folder: Path, steps: int = 6, *, pairs: int = 4) -> Path:
    """Write the files of a made-up training run over pairs; without ``pairs`` one over examples."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    lengths = {"prompt": {"least": 7, "median": 9, "p95": 14, "most": 21, "total": 99}}
    manifest = {
        "saro": "0",
        "config": {"model": {}},
        "template_date": "2026-01-01",
        "records": {"train": {"records": {"op-cot": 1200, "pp-cot": 2}, "lengths": lengths}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "loss": 3 / step, "grad_norm": rng.random(), "lr": 1e-4 * step}
        line |= {"tokens_per_second": 100 + rng.random(), "peak_memory_gib": 2.5}
        if pairs:
            line |= {"rewards/margins": step / 3, "delta_logps/chosen": 0.5, "delta_logps/rejected": -step}
        lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        {"step": step, "id": f"p{i}", "kind": "op-cot", "margin": step * rng.random()}
        for step in (0, steps)
        for i in range(pairs)
    ]
    if rows:
        (folder / "margins.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
