"""Tests the folder of a run: when a run may begin, resume or be removed, and what the manifest says."""

import hashlib
import json
import shutil
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from tiny import IM_END, tiny_config, tiny_tokenizer

from saro.config import DataConfig, ModelConfig, RWConfig, TrainConfig, as_dict
from saro.data.chat_format import ChatFormat
from saro.errors import SaroError
from saro.model.source import ModelSource
from saro.program import RunFlags, parse_recipe
from saro.runs import folder as run_folder
from saro.runs.folder import RunFolder


class OneProcess(SimpleNamespace):
    """Stands in for the parts of Runtime that a run's folder uses."""

    def __init__(self, is_main: bool = True) -> None:
        super().__init__(is_main=is_main, processes=1, threads=2, device=torch.device("cpu"), barriers=0, said=[])

    def barrier(self) -> None:
        self.barriers += 1

    def compare(self, values: dict[str, str], fix: str) -> None:
        """Nobody else has other values."""

    def on_main(self, decide):
        return decide()

    def say(self, text: str) -> None:
        self.said.append(text)


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def data_file(tmp_path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "Why?", "answer": "So."}\n')
    return path


@pytest.fixture
def source(tmp_path) -> ModelSource:
    """Make a model whose weights are a file of arbitrary bytes."""
    weights = tmp_path / "model"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"weights")
    (weights / "config.json").write_text("{}")
    return ModelSource(str(weights), tiny_config(), tiny_tokenizer(), frozenset({IM_END}))


def open_run(folder: Path, config: RWConfig | None = None, **options) -> RunFolder:
    given = {"resume": False, "overwrite": False, "template_date": None} | options
    flags = RunFlags(resume=given["resume"], overwrite=given["overwrite"])
    return RunFolder.open(config or RWConfig(), str(folder), flags, given["template_date"], OneProcess())


def manifest_of(run: RunFolder, source: ModelSource, files: list[object], reports=None) -> dict[str, object]:
    chat = run.chat_format(source, DataConfig(**run.config["data"]))
    dtype = run.decide_dtype(OneProcess(), source, ModelConfig(**run.config["model"])).dtype
    return run.manifest(OneProcess(), source, chat, dtype, None, [str(file) for file in files], reports or {})


def begin(folder: Path, source: ModelSource, data_file: Path, config: RWConfig | None = None, **options) -> RunFolder:
    """Open and begin a run on one data file."""
    run = open_run(folder, config, **options)
    runtime = OneProcess()
    run.begin(runtime, manifest_of(run, source, [data_file]))
    return run


def refusal(folder: Path, config: RWConfig | None = None, **options) -> str:
    with pytest.raises(SaroError) as caught:
        open_run(folder, config, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def raising(error: type[BaseException]):
    def call(*arguments, **options):
        raise error

    return call


def with_train(**changes) -> RWConfig:
    return RWConfig(train=TrainConfig(**changes))


def contents(folder: Path) -> dict[str, bytes]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# A new run


def test_opening_writes_nothing(folder):
    run = open_run(folder)
    assert not folder.exists()
    assert not run.resumed


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}], ids=["plain", "resume", "overwrite"])
def test_a_run_begins_in_a_missing_folder_with_any_flag(folder, source, data_file, flags):
    assert not begin(folder, source, data_file, **flags).resumed
    assert sorted(contents(folder)) == ["config.yaml", "manifest.json"]


def test_a_run_begins_in_an_empty_folder(folder, source, data_file):
    folder.mkdir()
    begin(folder, source, data_file)
    assert (folder / "manifest.json").is_file()


def test_a_run_makes_the_parents_of_its_folder(folder, source, data_file):
    begin(folder / "deep" / "down", source, data_file)
    assert (folder / "deep" / "down" / "manifest.json").is_file()


def test_hidden_files_do_not_prevent_a_run_and_are_kept(folder, source, data_file):
    folder.mkdir()
    (folder / ".gitignore").write_text("*")
    begin(folder, source, data_file)
    assert sorted(contents(folder)) == [".gitignore", "config.yaml", "manifest.json"]


def test_the_written_config_can_be_used_again(folder, source, data_file):
    config = RWConfig(train=TrainConfig(lr=0.5, output=str(folder)), data=DataConfig(weights={"safety": 2.0}))
    begin(folder, source, data_file, config)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == as_dict(config)
    again, _ = parse_recipe(RWConfig, "rw.py", "Train.", ["--config", str(folder / "config.yaml")])
    assert again == config


def test_only_the_main_process_writes(folder, source, data_file):
    runtime = OneProcess(is_main=False)
    run = open_run(folder)
    run.begin(runtime, manifest_of(run, source, [data_file]))
    assert not folder.exists()
    assert runtime.barriers == 2


# The manifest


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_manifest_names_the_inputs_of_the_run(folder, source, data_file):
    begin(folder, source, data_file, template_date="1999-07-04")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["template_date"] == "1999-07-04"
    assert manifest["template"] == sha256(source.tokenizer.chat_template.encode())
    assert manifest["model"]["name"] == source.path
    assert manifest["model"]["files"] == {"model.safetensors": sha256(b"weights")}
    assert manifest["data"] == {str(data_file): sha256(data_file.read_bytes())}
    decided = {"think_tags": ["<think>", "</think>"], "template_variables": {}}
    options = as_dict(RWConfig())
    assert manifest["config"] == options | {
        "model": options["model"] | {"dtype": "float32"},
        "data": options["data"] | decided,
    }
    assert manifest["machine"] == {"processes": 1, "threads_per_process": 2, "device": "cpu"}
    assert manifest["versions"]["torch"] == version("torch")
    assert len(manifest["code"]) == 64


def test_the_manifest_holds_the_reports(folder, source, data_file):
    report = SimpleNamespace(as_dict=lambda: {"records": {"general": 3}})
    manifest = manifest_of(open_run(folder), source, [data_file], {"train": report})
    assert manifest["records"] == {"train": {"records": {"general": 3}}}


@pytest.mark.parametrize("template", [None, {"default": "a", "rag": "b"}], ids=["none", "several"])
def test_a_model_with_no_or_several_templates_also_has_a_manifest(folder, source, data_file, template):
    source.tokenizer.chat_template = template
    assert len(manifest_of(open_run(folder), source, [data_file])["template"]) == 64


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Give the test a cache of the hub of its own, and no network. Returns the folder of the model owner/name in it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub" / "models--owner--name"


def of_hub(hub: Path, source: ModelSource, commit: str, **contents: str) -> ModelSource:
    """Put a commit of owner/name into the hub's cache, with files of these contents, and return it as a source.

    ``model_safetensors="W"`` is a large file, which the cache names by its sha256. A small one has a name of another kind.
    """
    snapshot = hub / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir(exist_ok=True)
    for name, content in ({"config_json": "{}", "model_safetensors": "W"} | contents).items():
        name = ".".join(name.rsplit("_", 1))
        data = content.encode()
        blob = sha256(data) if name.endswith(".safetensors") else hashlib.sha1(data).hexdigest()
        (hub / "blobs" / blob).write_bytes(b"" if name.endswith(".safetensors") else data)
        (snapshot / name).symlink_to(hub / "blobs" / blob)
    config = tiny_config()
    config._commit_hash = commit
    return replace(source, path="owner/name", config=config)


OLD, NEW = "a" * 40, "b" * 40


def test_a_hub_model_is_recorded_by_the_hashes_of_its_files(folder, source, data_file, hub):
    """The cache names large files by their sha256, so they are not read: here they are empty."""
    hub_source = of_hub(hub, source, OLD)
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
    sharded = of_hub(hub, source, OLD, **files)
    (snapshot / "model.safetensors").unlink()
    (hub / ".no_exist" / OLD).mkdir(parents=True)
    (hub / ".no_exist" / OLD / "model.safetensors").touch()
    assert sharded.identity()["files"] == {"model-1.safetensors": sha256(b"1"), "model-2.safetensors": sha256(b"2")}


def test_a_hub_model_out_of_reach_is_recorded_by_its_commit(source, hub):
    config = tiny_config()
    config._commit_hash = OLD
    identity = replace(source, path="owner/name", config=config).identity()
    assert (identity["commit"], identity["files"]) == (OLD, {})


# A folder that holds a run


def test_a_run_is_neither_resumed_nor_removed_without_a_flag(folder, source, data_file):
    begin(folder, source, data_file)
    before = contents(folder)
    assert refusal(folder) == (
        f"{folder}: holds a run already; add --resume to continue it, or --overwrite to start over"
    )
    assert contents(folder) == before


def test_both_flags_are_refused(folder, source, data_file):
    begin(folder, source, data_file)
    assert refusal(folder, resume=True, overwrite=True).startswith("--resume continues a run and --overwrite removes")


def test_overwrite_removes_the_run_when_the_new_one_begins(folder, source, data_file):
    begin(folder, source, data_file)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "old").write_text("old")
    open_run(folder, overwrite=True)
    assert (folder / "checkpoints" / "old").is_file()
    begin(folder, source, data_file, with_train(lr=0.5), overwrite=True)
    assert sorted(contents(folder)) == ["config.yaml", "manifest.json"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["lr"] == 0.5


def test_a_run_interrupted_at_its_start_can_be_resumed_and_overwritten(folder, source, data_file, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(yaml, "safe_dump", raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            begin(folder, source, data_file)
    assert sorted(contents(folder)) == ["manifest.json"]
    assert "holds a run already" in refusal(folder)
    begin(folder, source, data_file, resume=True)
    assert sorted(contents(folder)) == ["config.yaml", "manifest.json"]
    begin(folder, source, data_file, overwrite=True)


def test_two_runs_never_write_to_one_folder(folder, source, data_file):
    first = begin(folder, source, data_file)
    for flags in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(SaroError, match="another process trains in this folder"):
            begin(folder, source, data_file, **flags)
    assert sorted(contents(folder)) == ["config.yaml", "manifest.json"]
    first.lock.release()
    begin(folder, source, data_file, resume=True)


@pytest.mark.parametrize("text", ["{}", '{"name": "My site"}', "[1]", "{broken"])
def test_the_manifest_of_another_program_is_not_that_of_a_run(folder, text):
    folder.mkdir()
    (folder / "manifest.json").write_text(text)
    assert "holds files that are not a run's" in refusal(folder, overwrite=True)


def test_overwrite_keeps_hidden_files(folder, source, data_file):
    begin(folder, source, data_file)
    (folder / ".gitignore").write_text("*")
    begin(folder, source, data_file, overwrite=True)
    assert (folder / ".gitignore").is_file()


def test_resume_keeps_existing_files(folder, source, data_file):
    begin(folder, source, data_file)
    (folder / "metrics.jsonl").write_text("{}\n")
    before = contents(folder)
    assert begin(folder, source, data_file, resume=True).resumed
    assert contents(folder) == before


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


# The dtype that a run computes in


@pytest.fixture
def fast_bfloat16(monkeypatch):
    """Return a function that makes "auto" choose bfloat16 on this CPU, or float32."""

    def choose(is_fast: bool) -> None:
        chosen = {True: "bfloat16", False: "float32"}[is_fast]
        monkeypatch.setattr(run_folder, "decide_dtype", lambda name, *_: chosen if name == "auto" else name)

    return choose


def decided(run: RunFolder, source: ModelSource, **options) -> tuple[str, list[str]]:
    """Return the dtype that a run decides on, and what it said."""
    runtime = OneProcess()
    return run.decide_dtype(runtime, source, ModelConfig(**options)).dtype, runtime.said


def test_a_choice_of_bfloat16_on_a_cpu_is_told_with_the_way_out_of_it(folder, source, fast_bfloat16):
    fast_bfloat16(True)
    dtype, said = decided(open_run(folder), source)
    assert dtype == "bfloat16"
    assert said == ["computing in bfloat16, which is faster on this CPU; for float32 set --model.dtype float32"]
    assert decided(open_run(folder), source, dtype="bfloat16") == ("bfloat16", [])
    assert decided(open_run(folder), source, dtype="float32") == ("float32", [])
    fast_bfloat16(False)
    assert decided(open_run(folder), source) == ("float32", [])


@pytest.mark.parametrize(("began", "other"), [(True, "float32"), (False, "bfloat16")])
def test_a_resumed_run_keeps_its_dtype_although_the_machine_would_choose_another(
    folder, source, data_file, fast_bfloat16, began, other
):
    fast_bfloat16(began)
    begin(folder, source, data_file).lock.release(force=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    dtype = "bfloat16" if began else "float32"
    assert manifest["config"]["model"]["dtype"] == dtype
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["dtype"] == "auto"
    fast_bfloat16(not began)
    assert decided(open_run(folder, resume=True), source) == (dtype, [])
    same = RWConfig(model=ModelConfig(dtype=dtype))
    assert open_run(folder, same, resume=True).resumed
    assert f"the run began with model.dtype {dtype}, not {other}" in refusal(
        folder, RWConfig(model=ModelConfig(dtype=other)), resume=True
    )
    begin(folder, source, data_file, resume=True)
    assert json.loads((folder / "manifest.json").read_text()) == manifest


def test_a_run_in_bfloat16_is_not_resumed_on_a_gpu_without_it(folder, source, data_file, fast_bfloat16, monkeypatch):
    fast_bfloat16(True)
    begin(folder, source, data_file)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    old_gpu = OneProcess()
    old_gpu.device = torch.device("cuda")
    with pytest.raises(
        SaroError, match="the run computes in bfloat16, which this GPU has not; resume it where there is bfloat16"
    ):
        open_run(folder, resume=True).decide_dtype(old_gpu, source, ModelConfig())


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda:0", "bfloat16")])
def test_a_run_of_an_older_version_that_recorded_no_choice_keeps_what_auto_meant(
    folder, source, data_file, fast_bfloat16, device, dtype
):
    begin(folder, source, data_file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["model"]["dtype"] = "auto"
    manifest["machine"]["device"] = device
    (folder / "manifest.json").write_text(json.dumps(manifest))
    fast_bfloat16(dtype == "float32")
    assert decided(open_run(folder, resume=True), source)[0] == dtype
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    assert open_run(folder, RWConfig(model=ModelConfig(dtype=dtype)), resume=True).resumed
    assert f"the run began with model.dtype {dtype}, not {other}" in refusal(
        folder, RWConfig(model=ModelConfig(dtype=other)), resume=True
    )


def test_a_run_of_an_older_version_is_not_said_to_resume_with_another_dtype(folder, source, data_file):
    begin(folder, source, data_file).lock.release(force=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["model"]["dtype"] = "auto"
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


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}], ids=["plain", "resume", "overwrite"])
def test_files_that_do_not_belong_to_a_run_are_refused_and_kept(folder, flags):
    (folder / "photos").mkdir(parents=True)
    (folder / "photos" / "cat.png").write_bytes(b"cat")
    assert refusal(folder, **flags) == (
        f"{folder}: holds files that are not a run's; give an empty folder with --train.output"
    )
    assert contents(folder) == {"photos/cat.png": b"cat"}


def test_files_that_appear_after_opening_are_kept(folder, source, data_file):
    # Minutes may pass between open and begin, while the model loads.
    run, runtime = open_run(folder), OneProcess()
    folder.mkdir()
    (folder / "cat.png").write_bytes(b"cat")
    run.begin(runtime, manifest_of(run, source, [data_file]))
    assert (folder / "cat.png").read_bytes() == b"cat"


def test_a_file_in_place_of_the_folder_is_refused(folder):
    folder.write_text("file")
    assert refusal(folder) == f"{folder}: is a file; give a folder with --train.output"
    assert folder.read_text() == "file"


# The inputs of a resumed run


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


def test_a_training_file_that_becomes_a_held_out_one_is_other_data(folder, source, tmp_path):
    files = []
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name}", "answer": "So."}}\n')
        files.append(str(tmp_path / f"{name}.jsonl"))
    runtime = OneProcess()
    run = open_run(folder, RWConfig(data=DataConfig(train=files, heldout=[])))
    run.begin(runtime, manifest_of(run, source, files))
    run.lock.release(force=True)
    run = open_run(folder, RWConfig(data=DataConfig(train=files[:1], heldout=files[1:])), resume=True)
    with pytest.raises(SaroError, match="the data is not what the run began with"):
        run.begin(runtime, manifest_of(run, source, files))


def test_a_model_that_has_moved_is_the_same_model(folder, source, data_file, tmp_path):
    begin(folder, source, data_file)
    moved = replace(source, path=str(Path(source.path).rename(tmp_path / "moved")))
    run = open_run(folder, RWConfig(model=ModelConfig(name=moved.path)), resume=True)
    assert run.start is None, "the old place holds nothing any more"
    run.check_unchanged(OneProcess(is_main=False), manifest_of(run, moved, [data_file]))


def test_a_commit_that_changes_only_the_readme_is_the_same_model(folder, source, data_file, hub):
    begin(folder, of_hub(hub, source, OLD, README_md="old"), data_file).lock.release(force=True)
    assert begin(folder, of_hub(hub, source, NEW, README_md="new"), data_file, resume=True).resumed


@pytest.mark.parametrize(
    "change", [{"model_safetensors": "V"}, {"config_json": "[]"}, {"tokenizer_json": "{}"}], ids=str
)
def test_a_commit_that_changes_what_the_model_is_is_refused(folder, source, data_file, hub, change):
    begin(folder, of_hub(hub, source, OLD, tokenizer_json="[]"), data_file).lock.release(force=True)
    refused_resume(folder, of_hub(hub, source, NEW, **{"tokenizer_json": "[]"} | change), data_file, "model")


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
    hub_source = of_hub(hub, source, OLD)
    begin(folder, hub_source, data_file).lock.release(force=True)
    old_manifest(folder)
    begin(folder, hub_source, data_file, resume=True).lock.release(force=True)
    refused_resume(folder, of_hub(hub, source, NEW), data_file, "model")


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


# The day


def test_the_day_is_the_one_given(folder):
    assert open_run(folder, template_date="1999-07-04").template_date == date(1999, 7, 4)


def test_the_default_day_is_today(folder):
    before = date.today()
    assert before <= open_run(folder).template_date <= date.today()


@pytest.mark.parametrize("text", ["today", "04.07.1999", "1999-13-01", "1999-7-4"])
def test_an_invalid_day_is_refused(folder, text):
    assert refusal(folder, template_date=text) == f"data.template_date is {text!r}; write it as YYYY-MM-DD"


@pytest.mark.parametrize("given", [None, "2024-02-29"], ids=["no day", "another day"])
def test_a_resumed_run_keeps_the_day_on_which_it_began(folder, source, data_file, given):
    begin(folder, source, data_file, template_date="1999-07-04")
    assert open_run(folder, resume=True, template_date=given).template_date == date(1999, 7, 4)


def test_an_overwritten_run_has_a_new_day(folder, source, data_file):
    begin(folder, source, data_file, template_date="1999-07-04")
    assert open_run(folder, overwrite=True).template_date > date(1999, 7, 4)


# The format of conversations


def test_a_run_has_the_default_format_of_conversations_if_nothing_is_known(folder, source, data_file):
    chat = open_run(folder).chat_format(source, DataConfig())
    assert (chat.think_tags, chat.template_variables) == (("<think>", "</think>"), {})
    assert chat.template_date == open_run(folder).template_date


@pytest.fixture
def trained(tmp_path, source, data_file) -> ModelSource:
    """Make ``final/`` of a run that had its own tags, variables and date."""
    given = DataConfig(think_tags=("<a>", "</a>"), template_variables={"x": 1}, template_date="1999-07-04")
    folder = tmp_path / "earlier"
    begin(folder, source, data_file, RWConfig(data=given), template_date="1999-07-04").lock.release()
    shutil.copytree(source.path, folder / "final")
    return replace(source, path=str(folder / "final"))


FORMAT = (("<a>", "</a>"), {"x": 1}, date(1999, 7, 4))


def format_of(chat: ChatFormat) -> tuple[object, object, object]:
    return chat.think_tags, chat.template_variables, chat.template_date


def test_a_run_takes_tags_variables_and_date_from_the_run_that_trained_its_model(folder, trained, data_file):
    """Otherwise stage 2 would train the model on prompts that it has never seen, and on other ones every day."""
    assert format_of(open_run(folder).chat_format(trained, DataConfig())) == FORMAT
    begin(folder, trained, data_file)
    manifest = json.loads((folder / "manifest.json").read_text())
    recorded = manifest["config"]["data"]
    assert (recorded["think_tags"], recorded["template_variables"]) == (["<a>", "</a>"], {"x": 1})
    assert manifest["template_date"] == "1999-07-04"


def test_the_format_of_conversations_passes_through_several_runs(folder, trained, data_file, tmp_path):
    begin(tmp_path / "second", trained, data_file)
    third = replace(trained, path=str(shutil.copytree(trained.path, tmp_path / "second" / "final")))
    assert format_of(open_run(folder).chat_format(third, DataConfig())) == FORMAT


@pytest.mark.parametrize(
    "given",
    [{"think_tags": ("<b>", "</b>")}, {"template_variables": {}}, {"template_date": "1999-07-05"}],
    ids=lambda given: next(iter(given)),
)
def test_an_option_that_contradicts_the_run_that_trained_the_model_is_an_error(folder, trained, given):
    (name,) = given
    with pytest.raises(
        SaroError, match=rf"data\.{name} is .*, and the run that trained .*final had .*; leave the option"
    ) as e:
        open_run(folder).chat_format(trained, DataConfig(**given))
    assert "\n" not in str(e.value)


def test_options_that_agree_with_the_run_that_trained_the_model_may_be_given(folder, trained):
    given = DataConfig(think_tags=("<a>", "</a>"), template_variables={"x": 1}, template_date="1999-07-04")
    assert format_of(open_run(folder).chat_format(trained, given)) == FORMAT


def test_another_template_than_that_of_the_run_that_trained_the_model_is_an_error(folder, trained, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(trained.tokenizer.chat_template)
    assert format_of(open_run(folder).chat_format(trained, DataConfig(chat_template=str(file)))) == FORMAT
    file.write_text(trained.tokenizer.chat_template + " ")
    with pytest.raises(SaroError, match=r"is not the template of the run that trained .*final; leave the option out"):
        open_run(folder).chat_format(trained, DataConfig(chat_template=str(file)))


def test_a_copy_of_a_model_without_its_run_tells_nothing(folder, trained, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    copy = replace(trained, path=str(shutil.copytree(trained.path, tmp_path / "elsewhere" / "final")))
    run = open_run(folder)
    assert format_of(run.chat_format(copy, DataConfig())) == (("<think>", "</think>"), {}, run.template_date)


def test_a_resumed_run_keeps_its_format_of_conversations_although_its_start_is_gone(folder, trained, data_file):
    begin(folder, trained, data_file)
    (Path(trained.path).parent / "manifest.json").unlink()
    assert format_of(open_run(folder, resume=True).chat_format(trained, DataConfig())) == FORMAT
    other = RWConfig(data=DataConfig(think_tags=("<b>", "</b>")))
    assert "the run began with data.think_tags ['<a>', '</a>'], not ['<b>', '</b>']" in refusal(
        folder, other, resume=True
    )
    other = RWConfig(data=DataConfig(template_variables={}))
    assert "the run began with data.template_variables {'x': 1}, not {}" in refusal(folder, other, resume=True)


# Measurements that are made once


def test_a_measurement_is_kept_for_the_resumed_run(folder, source, data_file):
    measured = begin(folder, source, data_file).once(OneProcess(), "before.json", lambda: {"loss": 0.1, "name": "é"})
    resumed = begin(folder, source, data_file, resume=True)
    again = resumed.once(OneProcess(), "before.json", lambda: pytest.fail("measured again"))
    assert measured == again == {"loss": 0.1, "name": "é"}


def test_a_resumed_run_makes_missing_measurements(folder, source, data_file):
    begin(folder, source, data_file)
    resumed = begin(folder, source, data_file, resume=True)
    assert resumed.once(OneProcess(), "after.json", lambda: {"loss": 0.1}) == {"loss": 0.1}
    assert json.loads((folder / "after.json").read_text()) == {"loss": 0.1}


def test_an_overwritten_run_measures_again(folder, source, data_file):
    begin(folder, source, data_file).once(OneProcess(), "before.json", lambda: {"loss": 0.1})
    run = begin(folder, source, data_file, overwrite=True)
    assert run.once(OneProcess(), "before.json", lambda: {"loss": 0.2}) == {"loss": 0.2}


def test_a_new_run_does_not_use_existing_measurements(folder, source, data_file):
    run = begin(folder, source, data_file)
    (folder / "before.json").write_text('{"loss": 0.1}')
    assert run.once(OneProcess(), "before.json", lambda: {"loss": 0.2}) == {"loss": 0.2}
    assert json.loads((folder / "before.json").read_text()) == {"loss": 0.2}


def test_all_processes_measure_and_the_main_one_writes(folder, source, data_file):
    run = begin(folder, source, data_file)
    assert run.once(OneProcess(is_main=False), "before.json", lambda: {"loss": 0.1}) == {"loss": 0.1}
    assert not (folder / "before.json").exists()


# What happens to the folder while a run checks its inputs.


def test_a_run_that_began_and_ended_meanwhile_is_not_deleted(folder, source, data_file):
    late = open_run(folder)
    begin(folder, source, data_file).lock.release(force=True)
    (folder / "final").mkdir()
    before = contents(folder)
    with pytest.raises(SaroError, match="holds a run already; add --resume to continue it, or --overwrite"):
        late.begin(OneProcess(), manifest_of(late, source, [data_file]))
    assert contents(folder) == before
    assert (folder / "final").is_dir()


def test_a_resumed_run_that_another_process_has_changed_meanwhile_is_refused(folder, source, data_file):
    begin(folder, source, data_file).lock.release(force=True)
    late = open_run(folder, resume=True)
    begin(folder, source, data_file, with_train(max_steps=7), resume=True).lock.release(force=True)
    with pytest.raises(SaroError, match="another process has changed the run meanwhile; start again with --resume"):
        late.check_unchanged(OneProcess(), manifest_of(late, source, [data_file]))


def test_fewer_steps_than_were_made_are_refused_before_anything_is_written(folder, source, data_file):
    begin(folder, source, data_file).lock.release(force=True)
    (folder / "checkpoints" / "step_000004").mkdir(parents=True)
    before = contents(folder)
    late = open_run(folder, with_train(max_steps=2), resume=True)
    with pytest.raises(SaroError, match=r"the run has made 4 steps, and .* now ask for 2; ask for 4 or more"):
        late.check_steps(OneProcess(), 2)
    late.check_steps(OneProcess(), 4)
    assert contents(folder) == before


# Trackers.


def tracked(run: RunFolder) -> dict[str, str]:
    """Return the arguments with which a run opens its trackers."""
    opened: list[dict[str, str]] = []
    runtime = OneProcess()
    runtime.start_trackers = lambda project, config, name, id: opened.append({"name": name, "id": id})
    run.start_trackers(runtime, "saro-rw")
    run.lock.release(force=True)
    return opened[0]


def test_a_resumed_run_has_the_id_of_its_beginning_in_trackers_and_a_new_run_another(folder, source, data_file):
    config = with_train(trackers=["wandb"])
    first = tracked(begin(folder, source, data_file, config))
    assert first["name"] == folder.name
    named = with_train(trackers=["wandb"], run_name="again")
    resumed = tracked(begin(folder, source, data_file, named, resume=True))
    assert resumed == {"name": "again", "id": first["id"]}
    assert tracked(begin(folder, source, data_file, config, overwrite=True))["id"] != first["id"]


def test_without_trackers_no_id_is_written(folder, source, data_file):
    run = begin(folder, source, data_file)
    run.start_trackers(OneProcess(), "saro-rw")
    assert not (folder / "trackers.json").exists()
