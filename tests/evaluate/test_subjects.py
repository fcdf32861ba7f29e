"""Models that are compared read their prompts in the same format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from saro.config import DataConfig
from saro.errors import SaroError
from saro.evaluate.options import LoadOptions, ServerOptions
from saro.evaluate.subjects import find_subjects


@pytest.fixture
def runs(finished_run, tmp_path) -> list[Path]:
    """Two runs on one base that began on different days."""
    copies = [Path(shutil.copytree(finished_run(), tmp_path / name)) for name in ("first", "second")]
    for run, day in zip(copies, ("2020-02-28", "2020-02-29"), strict=True):
        manifest = json.loads((run / "manifest.json").read_text())
        (run / "manifest.json").write_text(json.dumps(manifest | {"template_date": day}))
    return copies


def find_names(runs: list[Path]) -> list[str]:
    found = find_subjects([*map(str, runs)], [], LoadOptions(), ServerOptions(), DataConfig())
    return [subject.name for subject in found]


def test_the_day_does_not_matter_to_a_template_that_shows_none(runs):
    assert find_names(runs) == ["first", "second"]


def test_a_day_that_the_template_shows_must_be_the_same(runs):
    for run in runs:
        template = run / "final" / "chat_template.jinja"
        template.write_text("{{ strftime_now('%Y') }}" + template.read_text())
    with pytest.raises(SaroError, match="second and first have the same base and differ in template_date"):
        find_names(runs)
