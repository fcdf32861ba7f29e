"""A run's manifest is read; everything else is no run."""

from __future__ import annotations

import json

import pytest

from saro.manifest import read_manifest

MANIFEST = {"saro": "0.1.0", "config": {"model": {}}, "template_date": "2024-07-26"}


def test_a_runs_manifest_is_read_as_it_was_written(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST | {"more": ["é"]}), encoding="utf-8")
    assert read_manifest(tmp_path) == MANIFEST | {"more": ["é"]}


@pytest.mark.parametrize("missing", MANIFEST)
def test_a_manifest_without_a_runs_keys_is_another_programs(tmp_path, missing):
    (tmp_path / "manifest.json").write_text(json.dumps({k: v for k, v in MANIFEST.items() if k != missing}))
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"saro"', "\udcff"])
def test_a_broken_manifest_is_no_run(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert read_manifest(tmp_path) is None


def test_a_folder_without_a_manifest_is_no_run(tmp_path):
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "missing") is None
