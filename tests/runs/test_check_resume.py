"""A resumed run may change some options, and none of its inputs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from run_files import ROOT
from run_folders import (
    NEW,
    OLD,
    OneProcess,
    begin,
    contents,
    make_hub_source,
    manifest_of,
    open_run,
    refusal,
    with_train,
)

from saro.config import DataConfig, ModelConfig, RWConfig, TrainConfig, as_dict
from saro.errors import SaroError
from saro.model.source import ModelSource
from saro.runs.check_resume import _FREE_ON_RESUME

pytestmark = pytest.mark.usefixtures("cache")


# Options


def test_resume_with_another_option_is_refused_with_both_values(folder, source, data_file):
    begin(folder, source, data_file, with_train(lr=0.5))
    assert refusal(folder, with_train(lr=0.25), resume=True) == (
        f"{folder}: the run began with train.lr 0.5, not 0.25; resume with the same, or start over with --overwrite"
    )


@pytest.mark.parametrize(
    ("option", "config"),
    [
        ("train.seed", with_train(seed=5)),
        ("train.records_per_step", with_train(records_per_step=5)),
        ("train.optimizer", with_train(optimizer="adamw8bit")),
        ("model.method", RWConfig(model=ModelConfig(method="full"))),
        ("model.dropout", RWConfig(model=ModelConfig(dropout=True))),
        ("data.weights", RWConfig(data=DataConfig(weights={"safety": 2.0}))),
    ],
)
def test_options_that_affect_training_may_not_change(folder, source, data_file, option, config):
    begin(folder, source, data_file)
    assert f"the run began with {option} " in refusal(folder, config, resume=True)
    # The option may not change back either.
    begin(folder, source, data_file, config, overwrite=True)
    assert f"the run began with {option} " in refusal(folder, resume=True)
    assert open_run(folder, config, resume=True).resumed


@pytest.mark.parametrize(
    "changes",
    [
        {"output": "elsewhere"},
        {"eval_every": 5},
        {"save_every": 5},
        {"keep_checkpoints": 5},
        {"log_every": 5},
        {"samples": 0},
        {"sample_tokens": 5},
        {"trackers": ["tensorboard"]},
        {"epochs": 5.0},
        {"max_steps": 7},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_of_output_and_length_may_change(folder, source, data_file, changes):
    begin(folder, source, data_file)
    assert open_run(folder, with_train(**changes), resume=True).resumed


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "sdpa"},
        {"head": "reference"},
        {"fused_lora": False},
        {"liger": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": "auto", "activation_offloading": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_that_change_results_only_by_rounding_may_change(folder, source, data_file, changes):
    begin(folder, source, data_file)
    assert open_run(folder, RWConfig(model=ModelConfig(**changes)), resume=True).resumed
    assert open_run(folder, RWConfig(data=DataConfig(pack_tokens=4096)), resume=True).resumed


def test_a_run_of_an_older_version_is_not_said_to_resume_with_another_dtype_or_day(folder, source, data_file):
    begin(folder, source, data_file).lock.release(force=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["model"]["dtype"] = "auto"
    manifest["config"]["data"]["template_date"] = None
    (folder / "manifest.json").write_text(json.dumps(manifest))
    run, runtime = open_run(folder, resume=True), OneProcess()
    run.begin(runtime, manifest_of(run, source, [data_file]))
    assert runtime.said == []
    assert "resumed" not in json.loads((folder / "manifest.json").read_text())


def test_a_run_that_did_not_know_an_option_began_with_its_default(folder, source, data_file):
    begin(folder, source, data_file)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["config"]["model"]["dropout"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert open_run(folder, resume=True).resumed
    dropout = RWConfig(model=ModelConfig(dropout=True))
    assert "the run began with model.dropout False, not True" in refusal(folder, dropout, resume=True)


def test_a_resume_with_changed_options_says_so_and_keeps_a_record(folder, source, data_file):
    begin(folder, source, data_file, with_train(max_steps=5)).lock.release(force=True)
    longer = RWConfig(train=TrainConfig(max_steps=9), data=DataConfig(pack_tokens=512))
    run, runtime = open_run(folder, longer, resume=True), OneProcess()
    run.begin(runtime, manifest_of(run, source, [data_file]))
    run.lock.release(force=True)
    assert runtime.said == [
        "resumed with other options: data.pack_tokens 2048 -> 512, train.max_steps 5 -> 9; "
        "config.yaml has the new ones, manifest.json also the old"
    ]
    manifest = json.loads((folder / "manifest.json").read_text())
    changed = {"data.pack_tokens": [2048, 512], "train.max_steps": [5, 9]}
    assert manifest["resumed"] == [changed]
    assert yaml.safe_load((folder / "config.yaml").read_text()) == as_dict(longer)
    assert (manifest["config"]["train"], manifest["config"]["data"]["pack_tokens"]) == (as_dict(longer.train), 512)
    begin(folder, source, data_file, with_train(max_steps=9), resume=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["resumed"] == [changed, {"data.pack_tokens": [512, 2048]}]


def test_the_page_names_every_option_that_may_change():
    section = (ROOT / "recipes/README.md").read_text().partition("### Resume")[2].partition("\n###")[0]
    assert [option for option in _FREE_ON_RESUME if option.partition(".")[2] not in re.findall(r"\w+", section)] == []


# Inputs


def changed_data(source, data_file):
    data_file.write_text(data_file.read_text() + '{"prompt": "And?", "answer": "No."}\n')
    return source


def changed_template(source, data_file):
    source.tokenizer.chat_template += " "
    return source


def changed_weights(source, data_file):
    (Path(source.path) / "model.safetensors").write_bytes(b"WEIGHTS")
    return source


def changed_model_config(source, data_file):
    (Path(source.path) / "config.json").write_text('{"rope_theta": 1}')
    return source


def other_model(source, data_file):
    return replace(source, path="owner/name")


CHANGES = [
    (changed_data, "data"),
    (changed_template, "template"),
    (changed_weights, "model"),
    (changed_model_config, "model"),
    (other_model, "model"),
]


def refused_resume(folder: Path, source: ModelSource, data_file: Path, part: str) -> None:
    """Check that a resume is refused because of ``part``, and changes nothing."""
    before = contents(folder)
    with pytest.raises(SaroError) as caught:
        begin(folder, source, data_file, resume=True)
    assert str(caught.value) == (
        f"{folder}: the {part} is not what the run began with; restore it, or start over with --overwrite"
    )
    assert contents(folder) == before


@pytest.mark.parametrize(("change", "part"), CHANGES)
def test_a_run_does_not_resume_with_other_inputs(folder, source, data_file, change, part):
    begin(folder, source, data_file)
    source = change(source, data_file)
    refused_resume(folder, source, data_file, part)
    assert not begin(folder, source, data_file, overwrite=True).resumed


def test_data_that_has_moved_is_the_same_data(folder, source, data_file, tmp_path):
    begin(folder, source, data_file, RWConfig(data=DataConfig(train=[str(data_file)]))).lock.release(force=True)
    moved = data_file.rename(tmp_path / "other-name.jsonl")
    config = RWConfig(data=DataConfig(train=[str(moved)]))
    assert begin(folder, source, moved, config, resume=True).resumed
    manifest = json.loads((folder / "manifest.json").read_text())
    assert list(manifest["data"]) == manifest["config"]["data"]["train"] == [str(moved)]


def test_files_in_another_order_are_other_data(folder, source, data_file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "And?", "answer": "No."}\n')
    runtime = OneProcess()
    for files, is_same in ([data_file, other], True), ([other, data_file], False):
        run = open_run(folder, resume=True)
        manifest = manifest_of(run, source, files)
        if is_same:
            run.begin(runtime, manifest)
            run.lock.release(force=True)
        else:
            with pytest.raises(SaroError, match="the data is not what the run began with"):
                run.begin(runtime, manifest)


@pytest.mark.parametrize(
    ("began", "now"),
    [({"train": "ab"}, {"train": "a", "heldout": "b"}), ({"train": "ab", "heldout": "a"}, {"train": "ab", "heldout": "b"})],
    ids=["a training file becomes a held-out one", "another training file is held out"],
)  # fmt: skip
def test_files_in_other_sets_are_other_data(folder, source, tmp_path, began, now):
    files = []
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name}", "answer": "So."}}\n')
        files.append(str(tmp_path / f"{name}.jsonl"))
    runtime = OneProcess()

    def options(train: str, heldout: str = "") -> RWConfig:
        by_name = dict(zip("ab", files, strict=True))
        return RWConfig(data=DataConfig(train=[by_name[n] for n in train], heldout=[by_name[n] for n in heldout]))

    run = open_run(folder, options(**began))
    run.begin(runtime, manifest_of(run, source, files))
    run.lock.release(force=True)
    run = open_run(folder, options(**now), resume=True)
    with pytest.raises(SaroError, match="the data is not what the run began with"):
        run.begin(runtime, manifest_of(run, source, files))


def test_a_model_that_has_moved_is_the_same_model(folder, source, data_file, tmp_path):
    begin(folder, source, data_file)
    moved = replace(source, path=str(Path(source.path).rename(tmp_path / "moved")))
    run = open_run(folder, RWConfig(model=ModelConfig(name=moved.path)), resume=True)
    assert run.start is None, "the old place holds nothing any more"
    run.check_unchanged(OneProcess(is_main=False), manifest_of(run, moved, [data_file]))


def test_a_commit_that_changes_only_the_readme_is_the_same_model(folder, source, data_file, hub):
    begin(folder, make_hub_source(hub, source, OLD, README_md="old"), data_file).lock.release(force=True)
    assert begin(folder, make_hub_source(hub, source, NEW, README_md="new"), data_file, resume=True).resumed


@pytest.mark.parametrize(
    "change", [{"model_safetensors": "V"}, {"config_json": "[]"}, {"tokenizer_json": "{}"}], ids=str
)
def test_a_commit_that_changes_what_the_model_is_is_refused(folder, source, data_file, hub, change):
    begin(folder, make_hub_source(hub, source, OLD, tokenizer_json="[]"), data_file).lock.release(force=True)
    refused_resume(folder, make_hub_source(hub, source, NEW, **{"tokenizer_json": "[]"} | change), data_file, "model")


def old_manifest(folder: Path) -> None:
    """Make the manifest one of a version that recorded hub models only by their commit, and no definition."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["model"]["definition"]
    if manifest["model"]["commit"]:
        manifest["model"]["files"] = {}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_of_an_older_version_resumes_if_nothing_has_changed(folder, source, data_file):
    begin(folder, source, data_file).lock.release(force=True)
    old_manifest(folder)
    begin(folder, source, data_file, resume=True).lock.release(force=True)
    refused_resume(folder, changed_weights(source, data_file), data_file, "model")


def test_a_run_of_an_older_version_on_a_hub_model_resumes_on_the_same_commit_only(folder, source, data_file, hub):
    hub_source = make_hub_source(hub, source, OLD)
    begin(folder, hub_source, data_file).lock.release(force=True)
    old_manifest(folder)
    begin(folder, hub_source, data_file, resume=True).lock.release(force=True)
    refused_resume(folder, make_hub_source(hub, source, NEW), data_file, "model")


def dropping(*ids: str) -> dict[str, SimpleNamespace]:
    return {"train": SimpleNamespace(as_dict=lambda: {"dropped": list(ids)})}


def test_a_limit_that_leaves_out_other_records_is_refused(folder, source, data_file):
    runtime = OneProcess()
    run = open_run(folder)
    run.begin(runtime, manifest_of(run, source, [data_file], dropping("a")))
    run.lock.release(force=True)
    smaller = RWConfig(data=DataConfig(pack_tokens=512, too_long="drop"))
    run = open_run(folder, smaller, resume=True)
    with pytest.raises(SaroError) as caught:
        run.check_unchanged(runtime, manifest_of(run, source, [data_file], dropping("a", "b")))
    assert str(caught.value) == (
        f"{folder}: --data.pack_tokens and --data.too_long now leave out 2 train records, and 1 when the run began "
        "(data.pack_tokens 2048); resume with a limit that leaves out the same"
    )
    run.check_unchanged(runtime, manifest_of(run, source, [data_file], dropping("a")))
