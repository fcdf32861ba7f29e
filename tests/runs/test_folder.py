"""The folder of a run: when a run may begin, resume or be removed, and what is kept in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from run_folders import (
    OneProcess,
    begin,
    contents,
    manifest_of,
    open_run,
    refusal,
    with_train,
)

from saro.config import DataConfig, RWConfig, TrainConfig, as_dict
from saro.errors import SaroError
from saro.program import RunFlags, parse_recipe
from saro.runs.folder import RunFolder

pytestmark = pytest.mark.usefixtures("cache")


def raising(error: type[BaseException]):
    def call(*arguments, **options):
        raise error

    return call


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


@pytest.mark.parametrize("deep", ["run", "deep/down/run"])
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path, deep):
    (tmp_path / "file").touch()
    message = f"cannot be made, {tmp_path / 'file'} is a file; give another folder with --train.output"
    assert message in refusal(tmp_path / "file" / deep)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    # The administrator may write everywhere.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    assert f"{tmp_path} is not writable; give another folder with --train.output" in refusal(tmp_path / "deep" / "run")


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


def test_resuming_where_there_is_no_run_begins_one_and_says_so(folder):
    runtime = OneProcess()
    run = RunFolder.open(RWConfig(), str(folder), RunFlags(resume=True, overwrite=False), runtime)
    assert not run.resumed
    assert runtime.said == [f"no run in {folder}; beginning a new one"]
