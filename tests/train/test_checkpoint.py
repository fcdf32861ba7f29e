"""Checkpoints are complete or absent, bounded in number, and enough to resume bit for bit."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import Training
from torch import nn
from train_state import State

from saro.errors import SaroError
from saro.train import checkpoint
from saro.train.checkpoint import find_intact_checkpoint, list_checkpoints, set_aside_later_checkpoints

OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")


def leftovers(root: Path) -> list[str]:
    return [p.name for p in root.iterdir() if not p.name.startswith("step_")]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_restores_every_bit(tmp_path, optimizer):
    saved = State(optimizer).train(4)
    folder = saved.save(tmp_path, 4)
    loaded = State(optimizer, seed=1).train(1)
    assert loaded.load(folder) == 4
    for name, parameter in saved.trainable.items():
        assert torch.equal(loaded.trainable[name], parameter)
    for a, b in zip(saved.states(), loaded.states(), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if isinstance(value, torch.Tensor):
                assert b[key].dtype == value.dtype, key
                assert torch.equal(b[key], value), key
            else:
                assert b[key] == value
    assert loaded.scheduler.state_dict() == saved.scheduler.state_dict()
    assert loaded.optimizer.param_groups[0]["lr"] == saved.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_resumes_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path, optimizer):
    unbroken = State(optimizer).train(4)
    folder = unbroken.save(tmp_path, 4)
    resumed = State(optimizer, seed=1)
    resumed.load(folder)
    resumed._random.set_state(unbroken._random.get_state())
    unbroken.train(4)
    resumed.train(4)
    for name, parameter in unbroken.trainable.items():
        assert torch.equal(resumed.trainable[name], parameter)


def test_a_paged_optimizers_state_is_still_in_pages_after_loading(tmp_path, monkeypatch):
    """On a GPU, plain tensors would fill the memory that paging saves. This test checks the calls; it pages nothing."""
    folder = State("paged_adamw8bit").train(1).save(tmp_path, 1)
    loaded = State("paged_adamw8bit", seed=1)
    pages = []
    make = loaded.optimizer.get_state_buffer
    monkeypatch.setattr(loaded.optimizer, "get_state_buffer", lambda *a: pages.append(make(*a)) or pages[-1])
    loaded.load(folder)
    states = [state[name] for state in loaded.states() for name in ("state1", "state2")]
    assert {id(state) for state in states} == {id(page) for page in pages}
    loaded.train(1)
    assert {id(state[name]) for state in loaded.states() for name in ("state1", "state2")} == {id(p) for p in pages}


@pytest.mark.parametrize("optimizer", OPTIMIZERS[1:])
def test_8_bit_optimizers_keep_their_state_in_8_bits(optimizer):
    large = State(optimizer).train(1).states()[0]
    assert large["state1"].dtype == large["state2"].dtype == torch.uint8


def test_a_checkpoint_holds_safetensors_weights_and_a_state_that_loads_with_weights_only(tmp_path):
    folder = State().train(1).save(tmp_path, 1)
    assert sorted(p.name for p in folder.iterdir()) == ["optimizer.pt", "state.json", "trainable.safetensors"]
    files = {"weights": "trainable.safetensors", "optimizer": "optimizer.pt"}
    hashes = {name: sha256((folder / file).read_bytes()).hexdigest() for name, file in files.items()}
    assert json.loads((folder / "state.json").read_text()) == {"step": 1, **hashes}
    torch.load(folder / "optimizer.pt", weights_only=True)
    assert load_file(folder / "trainable.safetensors").keys() == State().trainable.keys()


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("harmful",)


def test_an_optimizer_state_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = State().train(1).save(tmp_path, 1)
    torch.save({"optimizer": Harmful(), "scheduler": {}}, folder / "optimizer.pt")
    with pytest.raises((pickle.UnpicklingError, SaroError)):
        State().load(folder)
    assert not Path("harmful").exists()


@pytest.mark.parametrize("change", ["shape", "missing", "more"])
def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_loaded(tmp_path, change):
    folder = State(shape=(60, 80) if change == "shape" else (80, 60)).train(1).save(tmp_path, 1)
    state = State(seed=1)
    if change == "missing":
        state.trainable["another"] = nn.Parameter(torch.zeros(2))
    if change == "more":
        state.trainable.pop("bias")
    before = {name: p.detach().clone() for name, p in state.trainable.items()}
    with pytest.raises(SaroError, match="made with another model or other adapters; start over with --overwrite"):
        state.load(folder)
    assert all(torch.equal(p, before[name]) for name, p in state.trainable.items())
    assert not state.optimizer.state


def test_adapters_of_another_rank_are_refused(tiny_model, records_file, examples, tmp_path, runtime):
    file = records_file(examples)
    Training.on(tiny_model(), file, tmp_path / "run").fit(runtime, 1)
    other = Training.on(tiny_model(), file, tmp_path / "run", model={"lora_rank": 4})
    with pytest.raises(SaroError, match="step_000001: made with another model or other adapters"):
        other.fit(runtime, 2, resume=True)


# Complete or absent, and bounded.


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    state = State().train(1)
    for step in range(1, 6):
        state.save(tmp_path, step, keep=2)
        assert [s for s, _ in list_checkpoints(tmp_path)] == [max(1, step - 1), step][-min(step, 2) :]
    assert leftovers(tmp_path) == []


def test_checkpoints_are_listed_by_number_not_by_name(tmp_path):
    for step in (9, 999_999, 1_000_000, 10):
        (tmp_path / f"step_{step:06d}").mkdir()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9, 10, 999_999, 1_000_000]


def test_partial_checkpoints_and_other_names_are_ignored(tmp_path):
    State().train(1).save(tmp_path, 1)
    (tmp_path / ".step_000002.0a1b2c3d.tmp").mkdir()
    (tmp_path / "step_000003.good").mkdir()
    (tmp_path / "step_000004").write_text("a file")
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1]
    assert list_checkpoints(tmp_path / "absent") == []


def test_the_next_checkpoint_removes_the_leftovers_of_killed_runs(tmp_path):
    """It removes those of any step: the step of a half-removed checkpoint, or of an old save_every, may never recur."""
    state = State().train(1)
    for name in (".step_000001.00000000.tmp", ".step_000003.0a1b2c3d.tmp", ".step_000004.0a1b2c3d.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainable.safetensors").write_text("half")
    state.save(tmp_path, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000004"]


def test_a_failed_write_leaves_nothing_and_keeps_older_checkpoints(tmp_path, monkeypatch):
    state = State().train(1)
    state.save(tmp_path, 1, keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        state.save(tmp_path, 2, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_partial_one(tmp_path, monkeypatch):
    state = State().train(1)
    state.save(tmp_path, 1, keep=1)

    def killed(folder: Path) -> None:
        (Path(folder) / "state.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        state.save(tmp_path, 2, keep=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]


def test_a_checkpoints_files_are_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    rename = Path.rename
    at_rename: list[list[str]] = []
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", lambda self, to: (at_rename.append(list(synced)), rename(self, to))[1])
    State().train(1).save(tmp_path, 1)
    assert {"optimizer.pt", "state.json", "trainable.safetensors"} <= set(at_rename[0])
    assert tmp_path.name in synced


# Damaged checkpoints.


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def zero_the_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 512] = bytes(512)
    path.write_bytes(content)


def zero_the_end(file: Path) -> None:
    """Keep the header, from which safetensors knows the size."""
    content = file.read_bytes()
    file.write_bytes(content[:-64] + bytes(64))


DAMAGES = [
    (name, damage)
    for name in ("trainable.safetensors", "optimizer.pt", "state.json")
    for damage in (cut, empty, zero, Path.unlink)
]


@pytest.mark.parametrize(
    ("name", "damage"), [*DAMAGES, ("optimizer.pt", zero_the_middle), ("trainable.safetensors", zero_the_end)]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, name, damage):
    state = State().train(1)
    intact, newest = state.save(tmp_path, 1), state.save(tmp_path, 2)
    assert find_intact_checkpoint(tmp_path, lambda line: pytest.fail(line)) == newest
    damage(newest / name)
    said: list[str] = []
    assert find_intact_checkpoint(tmp_path, said.append) == intact
    (line,) = said
    assert line.startswith(f"{newest}: the checkpoint is damaged ({name} ")
    assert line.endswith("resuming from step_000001 instead")
    assert State(seed=1).load(intact) == 1


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.pt"])
def test_a_changed_bit_anywhere_in_a_file_is_damage(tmp_path, name):
    """In the structure of optimizer.pt, torch would read the number of steps from elsewhere, or raise errors of many types."""
    file = State(shape=(2, 3)).train(1).save(tmp_path, 1) / name
    content = file.read_bytes()
    for index in range(0, len(content), 3):
        file.write_bytes(content[:index] + bytes([content[index] ^ 1 << index % 8]) + content[index + 1 :])
        with pytest.raises(SaroError, match=rf"damaged \({name} is not what was written\)"):
            find_intact_checkpoint(tmp_path, lambda line: pytest.fail(line))


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.pt"])
def test_without_a_hash_from_an_older_version_a_file_that_cannot_be_read_is_damage(tmp_path, name):
    folder = State().train(1).save(tmp_path, 1)
    (folder / "state.json").write_text('{"step": 1}')
    assert find_intact_checkpoint(tmp_path, lambda line: pytest.fail(line)) == folder
    cut(folder / name)
    with pytest.raises(SaroError, match=rf"damaged \({name} cannot be read\)"):
        find_intact_checkpoint(tmp_path, lambda line: pytest.fail(line))


def test_without_a_hash_from_an_older_version_the_check_sums_of_the_optimizers_file_are_read(tmp_path):
    folder = State().train(1).save(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({"step": state["step"]}))
    with zipfile.ZipFile(folder / "optimizer.pt") as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        numbers = archive.read(largest)
    content = (folder / "optimizer.pt").read_bytes()
    changed = bytes([numbers[0] ^ 1]) + numbers[1:]
    assert content.count(numbers) == 1
    (folder / "optimizer.pt").write_bytes(content.replace(numbers, changed))
    torch.load(folder / "optimizer.pt", weights_only=True)
    with pytest.raises(SaroError, match=r"damaged \(optimizer.pt is not what was written\)"):
        find_intact_checkpoint(tmp_path, lambda line: pytest.fail(line))


def test_a_checkpoint_of_another_step_than_its_name_says_is_damaged(tmp_path):
    state = State().train(1)
    intact = state.save(tmp_path, 1)
    intact.rename(tmp_path / "step_000007")
    state.save(tmp_path, 1)
    said: list[str] = []
    assert find_intact_checkpoint(tmp_path, said.append) == intact
    assert "step_000007: the checkpoint is damaged (state.json is not that of step 7)" in said[0]


def test_without_an_intact_checkpoint_there_is_one_error_and_no_start_from_scratch(tmp_path):
    state = State().train(1)
    for step in (1, 2):
        cut(state.save(tmp_path, step) / "optimizer.pt")
    with pytest.raises(SaroError, match="and there is no intact one; restore it from a copy") as caught:
        find_intact_checkpoint(tmp_path, lambda line: pytest.fail(line))
    assert "\n" not in str(caught.value)
    assert "step_000002: the checkpoint is damaged (optimizer.pt is not what was written)" in str(caught.value)


def test_a_run_without_checkpoints_has_no_intact_one_and_no_error(tmp_path):
    assert find_intact_checkpoint(tmp_path / "absent", lambda line: pytest.fail(line)) is None


def test_later_checkpoints_are_set_aside_so_that_their_steps_are_saved_again(tmp_path):
    state = State().train(1)
    for step in (1, 2):
        state.save(tmp_path, step)
    (tmp_path / "step_000002.damaged").mkdir()
    set_aside_later_checkpoints(tmp_path, 1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1]
    assert (tmp_path / "step_000002.damaged" / "optimizer.pt").is_file()
    assert state.save(tmp_path, 2).is_dir()
