"""Tests that files and folders are complete or absent, whatever happens in between, and the cached hashes of files."""

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from saro import files as files_module
from saro.errors import SaroError
from saro.files import (
    asked_hashes,
    atomic_folder,
    atomic_write,
    cache_dir,
    file_hash,
    file_hashes,
    lock_output,
    remove_temps,
    take_hashes,
)


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def write_and_fail(path: Path, error: type[BaseException]) -> None:
    with atomic_write(path) as file:
        file.write("new")
        raise error


def fill_and_fail(path: Path, error: type[BaseException]) -> None:
    with atomic_folder(path) as temp:
        (temp / "a.txt").write_text("new")
        raise error


def test_a_text_file_is_utf8_with_unix_line_ends(tmp_path):
    with atomic_write(tmp_path / "a.txt") as file:
        file.write("é\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\n"


def test_a_binary_file_holds_the_bytes(tmp_path):
    with atomic_write(tmp_path / "a.bin", "wb") as file:
        file.write(b"\r\n\x00")
    assert (tmp_path / "a.bin").read_bytes() == b"\r\n\x00"


def test_a_file_does_not_exist_before_it_is_complete(tmp_path):
    with atomic_write(tmp_path / "a.txt") as file:
        file.write("x")
        (temp,) = names(tmp_path)
        assert temp.startswith(".")
        assert temp.endswith(".tmp")
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(error):
        write_and_fail(tmp_path / "a.txt", error)
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_killed_write_keeps_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    code = f"""
import os, signal
from saro.files import atomic_write
with atomic_write({str(tmp_path / "a.txt")!r}) as file:
    file.write("new"); file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert (tmp_path / "a.txt").read_text() == "old"
    remove_temps(tmp_path / "a.txt")
    assert names(tmp_path) == ["a.txt"]


def test_files_and_folders_get_the_permissions_of_the_umask(tmp_path):
    with atomic_write(tmp_path / "a.txt") as file:
        file.write("x")
    with atomic_folder(tmp_path / "b"):
        pass
    (tmp_path / "plain.txt").write_text("x")
    (tmp_path / "plain").mkdir()
    for made, plain in (("a.txt", "plain.txt"), ("b", "plain")):
        assert stat.S_IMODE((tmp_path / made).stat().st_mode) == stat.S_IMODE((tmp_path / plain).stat().st_mode)


def test_a_file_is_flushed_to_disk_before_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    with atomic_write(tmp_path / "a.txt") as file:
        file.write("x")
    assert calls == ["fsync", "replace", "fsync"]


def test_writing_into_a_missing_folder_says_so(tmp_path):
    with (
        pytest.raises(SaroError, match=r"there is no folder .*missing; make it first"),
        atomic_write(tmp_path / "missing" / "a.txt"),
    ):
        pass


def test_writing_a_file_over_a_folder_is_refused_before_the_work(tmp_path):
    reached = False
    with pytest.raises(SaroError, match="is a folder"), atomic_write(tmp_path):
        reached = True
    assert not reached


def test_appending_to_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="mode"), atomic_write(tmp_path / "a.txt", "a"):
        pass


def test_a_folder_does_not_exist_before_it_is_complete(tmp_path):
    with atomic_folder(tmp_path / "final") as temp:
        (temp / "sub").mkdir()
        (temp / "sub" / "a.txt").write_text("x")
        assert names(tmp_path) == [temp.name]
        assert temp.name.startswith(".")
        assert temp.name.endswith(".tmp")
    assert names(tmp_path) == ["final"]
    assert (tmp_path / "final" / "sub" / "a.txt").read_text() == "x"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_folder_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        fill_and_fail(tmp_path / "final", error)
    assert names(tmp_path) == []


def test_every_file_of_a_folder_is_flushed(tmp_path, monkeypatch):
    flushed = set()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.add(os.fstat(fd).st_ino), fsync(fd)))
    with atomic_folder(tmp_path / "final") as temp:
        (temp / "sub").mkdir()
        (temp / "sub" / "a.txt").write_text("x")
        (temp / "gone").symlink_to("nowhere")
    final = tmp_path / "final"
    assert flushed == {item.stat().st_ino for item in (tmp_path, final, final / "sub", final / "sub" / "a.txt")}


def test_an_existing_folder_is_refused_before_the_work(tmp_path):
    (tmp_path / "final").mkdir()
    reached = False
    with pytest.raises(SaroError, match="exists already"), atomic_folder(tmp_path / "final"):
        reached = True
    assert not reached


def test_a_folder_that_appears_in_the_meantime_is_not_replaced(tmp_path):
    with pytest.raises(SaroError, match="exists already"), atomic_folder(tmp_path / "final"):
        (tmp_path / "final").mkdir()
    assert names(tmp_path) == ["final"]
    assert names(tmp_path / "final") == []


def test_a_folder_is_replaced_when_asked(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").touch()
    with atomic_folder(tmp_path / "final", replace=True) as temp:
        (temp / "new").touch()
        assert names(tmp_path / "final") == ["old"]
    assert names(tmp_path) == ["final"]
    assert names(tmp_path / "final") == ["new"]


@pytest.fixture
def replacing(tmp_path, monkeypatch):
    """Make an old folder, and replace it by a new one with the given error before the second rename."""
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").touch()

    def replace(error: BaseException) -> None:
        rename, renames = Path.rename, []

        def failing(self, target):
            renames.append(target)
            if len(renames) >= 2 and (len(renames) == 2 or isinstance(error, Killed)):
                raise error
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", failing)
            with pytest.raises(type(error)), atomic_folder(tmp_path / "final", replace=True) as temp:
                (temp / "new").touch()

    return replace


class Killed(BaseException):
    """Stands in for SIGKILL: after it no rename happens."""


def test_the_old_folder_is_back_if_the_new_one_cannot_be_renamed(tmp_path, replacing):
    replacing(OSError("planted"))
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "old").exists()


def test_the_old_folder_of_a_replacement_that_was_killed_is_put_back(tmp_path, replacing):
    replacing(Killed())
    assert not (tmp_path / "final").exists()
    remove_temps(tmp_path / "final")
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "old").exists()


def test_the_old_folder_of_a_replacement_that_was_killed_later_is_deleted(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / ".final.0123abcd.old.tmp").mkdir()
    remove_temps(tmp_path / "final")
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_file_is_never_replaced_by_a_folder(tmp_path):
    (tmp_path / "final").touch()
    with pytest.raises(SaroError, match="is a file"), atomic_folder(tmp_path / "final", replace=True):
        pass


def test_only_leftovers_of_that_name_are_removed(tmp_path):
    for name in (".final.0123abcd.tmp", ".final.b.0123abcd.tmp", ".final.tmp", "final", ".other.0123abcd.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").touch()
    remove_temps(tmp_path / "final")
    assert names(tmp_path) == [".final.b.0123abcd.tmp", ".final.tmp", ".other.0123abcd.tmp", "final"]


def test_removing_leftovers_in_a_missing_folder_does_nothing(tmp_path):
    remove_temps(tmp_path / "missing" / "final")
    assert names(tmp_path) == []


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SARO_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("SARO_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "saro"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "saro"
    assert names(tmp_path) == []


def test_an_output_that_another_process_writes_is_refused(tmp_path):
    folder = tmp_path / "new" / "output"
    lock_output(folder, FileLock(folder / ".lock"), "in use")
    lock = FileLock(folder / ".lock")
    with lock, pytest.raises(SaroError, match=r"^in use$"):
        lock_output(folder, FileLock(folder / ".lock"), "in use")
    lock_output(folder, lock, "in use")


def test_an_output_whose_folder_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "output"
    with pytest.raises(SaroError, match=r"output: cannot be written \(Not a directory\); give another --output$"):
        lock_output(folder, FileLock(folder / ".lock"), "in use")


# Hashes of files.


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def large_file(tmp_path: Path, content: bytes = b"a") -> Path:
    path = tmp_path / "large.safetensors"
    path.write_bytes(content * (2**20 + 1))
    return path


def forge_memory(cache: Path) -> None:
    """Replace every cached hash, so that cached hashes can be distinguished from computed ones."""
    memory = cache / "hashes.json"
    memory.write_text(json.dumps(dict.fromkeys(json.loads(memory.read_text()), "remembered")))


def test_the_hash_is_sha256(tmp_path, cache):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert file_hash(path) == sha256(b"abc")


def test_a_large_file_is_read_once(tmp_path, cache):
    path = large_file(tmp_path)
    assert file_hash(path) == sha256(path.read_bytes())
    forge_memory(cache)
    assert file_hash(path) == "remembered"


def test_the_hashes_of_several_large_files_are_cached(tmp_path, cache):
    one, two = large_file(tmp_path), tmp_path / "two"
    two.write_bytes(b"b" * 2**21)
    file_hash(one), file_hash(two)
    forge_memory(cache)
    assert (file_hash(one), file_hash(two)) == ("remembered", "remembered")


def test_a_file_written_again_is_read_again(tmp_path, cache):
    path = large_file(tmp_path)
    file_hash(path)
    forge_memory(cache)
    time = path.stat().st_mtime_ns
    path.write_bytes(b"b" * (2**20 + 1))
    os.utime(path, ns=(time + 1, time + 1))
    assert file_hash(path) == sha256(path.read_bytes())


def test_a_file_with_another_size_or_inode_is_read_again(tmp_path, cache):
    path = large_file(tmp_path)
    file_hash(path)
    forge_memory(cache)
    time = path.stat().st_mtime_ns
    with open(path, "ab") as file:
        file.write(b"b")
    os.utime(path, ns=(time, time))
    assert file_hash(path) == sha256(path.read_bytes())
    forge_memory(cache)
    other = tmp_path / "other"
    other.write_bytes(b"c" * path.stat().st_size)
    os.utime(other, ns=(time, time))
    other.replace(path)
    assert file_hash(path) == sha256(path.read_bytes())


def test_the_hash_of_a_small_file_is_not_cached(tmp_path, cache):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    file_hash(path)
    assert not cache.exists()


@pytest.mark.parametrize("memory", ["", "{", "\xff"], ids=["empty", "broken", "other encoding"])
def test_a_broken_cache_file_is_replaced(tmp_path, cache, memory):
    cache.mkdir()
    (cache / "hashes.json").write_text(memory, encoding="latin-1")
    path = large_file(tmp_path)
    assert file_hash(path) == sha256(path.read_bytes())
    forge_memory(cache)
    assert file_hash(path) == "remembered"


def test_several_files_are_hashed_in_their_order_and_all_are_cached(tmp_path, cache):
    files = [tmp_path / str(i) for i in range(5)]
    for i, file in enumerate(files):
        file.write_bytes(bytes([i]) * (2**20 + 1))
    assert file_hashes(files) == [sha256(file.read_bytes()) for file in files]
    forge_memory(cache)
    assert file_hashes(files) == ["remembered"] * 5


def test_a_hash_that_another_process_tells_holds_until_the_file_changes(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(files_module, "_told_hashes", {})
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    file_hash(path)
    take_hashes(dict.fromkeys(asked_hashes(), "told"))
    assert file_hash(path) == "told"
    path.write_bytes(b"abcd")
    assert file_hash(path) == sha256(b"abcd")
