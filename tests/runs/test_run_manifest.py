"""The manifest of a run names its inputs and hashes them."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace

import pytest
from run_folders import (
    OLD,
    begin,
    make_hub_source,
    manifest_of,
    open_run,
    sha256,
    with_data,
)
from tiny import tiny_config

from saro.config import RWConfig, as_dict

pytestmark = pytest.mark.usefixtures("cache")


def test_the_manifest_names_the_inputs_of_the_run(folder, source, data_file):
    begin(folder, source, data_file, with_data(template_date="1999-07-04"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["template_date"] == "1999-07-04"
    assert manifest["template"] == sha256(source.tokenizer.chat_template.encode())
    assert manifest["model"]["name"] == source.path
    assert manifest["model"]["files"] == {"model.safetensors": sha256(b"weights")}
    assert manifest["data"] == {str(data_file): sha256(data_file.read_bytes())}
    decided = {"think_tags": ["<think>", "</think>"], "template_date": "1999-07-04", "template_variables": {}}
    options = as_dict(RWConfig())
    assert manifest["config"] == options | {
        "model": options["model"] | {"dtype": "float32"},
        "data": options["data"] | decided,
    }
    assert manifest["machine"] == {"processes": 1, "threads_per_process": 2, "device": "cpu"}
    assert manifest["versions"]["torch"] == version("torch")
    assert len(manifest["code"]) == 64


def test_the_hash_of_the_code_is_that_of_the_kernels_too(folder, source, data_file, tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    monkeypatch.setattr("saro_kernels.__spec__.origin", str(tmp_path / "kernels" / "__init__.py"))
    hashes = []
    for text in ("a = 1", "a = 2"):
        (tmp_path / "kernels" / "one.py").write_text(text)
        hashes.append(manifest_of(open_run(folder), source, [data_file])["code"])
    assert hashes[0] != hashes[1]


def test_the_manifest_holds_the_reports(folder, source, data_file):
    report = SimpleNamespace(as_dict=lambda: {"records": {"general": 3}})
    manifest = manifest_of(open_run(folder), source, [data_file], {"train": report})
    assert manifest["records"] == {"train": {"records": {"general": 3}}}


@pytest.mark.parametrize("template", [None, {"default": "a", "rag": "b"}], ids=["none", "several"])
def test_a_model_with_no_or_several_templates_also_has_a_manifest(folder, source, data_file, template):
    source.tokenizer.chat_template = template
    assert len(manifest_of(open_run(folder), source, [data_file])["template"]) == 64


def test_a_hub_model_is_recorded_by_the_hashes_of_its_files(folder, source, data_file, hub):
    """The cache names large files by their sha256, so they are not read: here they are empty."""
    hub_source = make_hub_source(hub, source, OLD)
    model = manifest_of(open_run(folder), hub_source, [data_file])["model"]
    assert model == {
        "name": "owner/name",
        "commit": OLD,
        "files": {"model.safetensors": sha256(b"W")},
        "definition": {"config.json": sha256(b"{}")},
        "adapter": None,
    }


def test_a_sharded_hub_model_is_recorded_by_all_shards(source, hub):
    index = json.dumps(
        {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    )
    snapshot = hub / "snapshots" / OLD
    files = {"model.safetensors.index_json": index, "model-1_safetensors": "1", "model-2_safetensors": "2"}
    sharded = make_hub_source(hub, source, OLD, **files)
    (snapshot / "model.safetensors").unlink()
    (hub / ".no_exist" / OLD).mkdir(parents=True)
    (hub / ".no_exist" / OLD / "model.safetensors").touch()
    assert sharded.identity()["files"] == {"model-1.safetensors": sha256(b"1"), "model-2.safetensors": sha256(b"2")}


def test_a_hub_model_out_of_reach_is_recorded_by_its_commit(source, hub):
    config = tiny_config()
    config._commit_hash = OLD
    identity = replace(source, path="owner/name", config=config).identity()
    assert (identity["commit"], identity["files"]) == (OLD, {})
