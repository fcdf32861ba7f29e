"""The store of draws: what comes back, what stays, what several processes write, and files that are no store."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from draw_cases import chat_request
from hypothesis import given, settings
from hypothesis import strategies as st

from saro.data.records import Message
from saro.draws.request import FAILURES, FINAL_FAILURES, Draw, Request, Sampling
from saro.draws.store import DrawStore
from saro.errors import SaroError

ROOT = Path(__file__).parents[2]
MODEL = {"kind": "scripted", "model": "m"}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "draws.sqlite3"


@pytest.fixture
def store(path):
    with DrawStore.open(path) as store:
        yield store


def put(store: DrawStore, request: Request, draw: Draw, model=MODEL) -> str:
    key = request.key(model)
    store.put(model, {key: (request, draw)})
    return key


def test_a_draw_comes_back_from_another_opening_as_it_was(path):
    draw = Draw(
        ids=(1, 2),
        text="one\ntwo \x00 \ud800 é",
        finish="stop",
        choices=(-0.5, -1.25),
        usage={"prompt": 3},
        seconds=1.5,
        versions={"torch": "2"},
    )
    with DrawStore.open(path) as store:
        key = put(store, chat_request(), draw)
    with DrawStore.open(path) as store:
        assert store.get([key, "other"]) == {key: draw}


texts = st.text(max_size=20)
draws = st.builds(
    Draw,
    ids=st.none() | st.lists(st.integers(0, 2**31), max_size=5).map(tuple),
    text=st.none() | texts,
    finish=st.sampled_from(["stop", "length", None]),
    failure=st.sampled_from([None, *FAILURES]),
    detail=texts,
    choices=st.lists(st.floats(-50, 0), max_size=3).map(tuple),
    usage=st.dictionaries(texts, st.integers(0, 2**53), max_size=2),
    seconds=st.floats(0, 1e6),
)
messages = st.lists(st.builds(Message, texts, texts), max_size=3).map(tuple)
samplings = st.builds(Sampling, st.integers(1, 9), stop=st.lists(texts).map(tuple), choices=st.lists(texts).map(tuple))
requests = st.builds(Request, samplings, messages=messages, number=st.integers(0, 3)) | st.builds(
    Request, samplings, ids=st.lists(st.integers(0, 9)).map(tuple)
)


@settings(max_examples=30)  # Each writes to the disk.
@given(draw=draws, request_=requests)
def test_every_draw_and_request_survives_the_store(tmp_path_factory, draw, request_):
    with DrawStore.open(tmp_path_factory.mktemp("store") / "draws") as store:
        store.register(MODEL, [request_])
        assert [*store.read_open()] == [(request_.key(MODEL), MODEL, request_)]
        key = put(store, request_, draw)
        assert store.get([key]) == {key: draw}


def test_the_first_text_of_a_key_stays(store):
    key = put(store, chat_request(), Draw(text="first", finish="stop"))
    put(store, chat_request(), Draw(text="second", finish="stop"))
    put(store, chat_request(), Draw(failure="http"))
    assert store.get([key])[key].text == "first"


def test_failures_are_found_without_reading_texts(store):
    text = put(store, chat_request("text"), Draw(text="t", finish="stop"))
    failed = [put(store, chat_request(kind), Draw(failure=kind)) for kind in FAILURES]
    waiting = chat_request("waiting")
    store.register(MODEL, [waiting])
    found = store.find_failures([text, *failed, waiting.key(MODEL), "other"])
    assert found == {text: None} | dict(zip(failed, FAILURES, strict=True))


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_makes_room_for_a_text_unless_it_lasts(store, failure):
    key = put(store, chat_request(), Draw(failure=failure))
    put(store, chat_request(), Draw(text="text", finish="stop"))
    assert (store.get([key])[key].text == "text") == (failure not in FINAL_FAILURES)


def test_models_do_not_share_draws(store):
    key = put(store, chat_request(), Draw(text="text", finish="stop"))
    assert store.get([chat_request().key(MODEL | {"model": "n"})]) == {}
    assert store.get([key])


def test_a_group_is_stored_whole_or_not_at_all(store):
    requests = [chat_request(f"{i}") for i in range(3)]
    group = {request.key(MODEL): (request, Draw(text="text", finish="stop")) for request in requests}
    broken = group | {requests[-1].key(MODEL): (requests[-1], Draw(text="text", versions={"bad": object()}))}
    with pytest.raises(TypeError):
        store.put(MODEL, broken)
    assert store.get([*group]) == {}


def test_a_draw_under_the_key_of_another_request_is_refused(store):
    with pytest.raises(ValueError, match="not the key"):
        store.put(MODEL, {"0" * 64: (chat_request(), Draw(text="text", finish="stop"))})


def test_more_keys_than_one_statement_takes(store):
    requests = [chat_request(f"{i}") for i in range(1100)]
    store.put(MODEL, {r.key(MODEL): (r, Draw(text=r.messages[0].content, finish="stop")) for r in requests})
    found = store.get([r.key(MODEL) for r in requests])
    assert [found[r.key(MODEL)].text for r in requests] == [f"{i}" for i in range(1100)]


def test_a_person_can_read_where_a_text_comes_from(store, path):
    key = put(store, chat_request("Count.", temperature=0.5), Draw(text="1", finish="stop"))
    (found,) = store.find(key[:6])
    assert found["model"] == MODEL
    assert found["request"]["messages"] == [{"role": "user", "content": "Count."}]
    assert found["request"]["sampling"]["temperature"] == 0.5
    assert found["draw"] == {"finish": "stop", "text": "1"}


def test_the_store_counts_what_it_holds_by_model(store):
    put(store, chat_request("1"), Draw(text="1", finish="stop"))
    put(store, chat_request("2"), Draw(failure="refused"))
    store.register(MODEL | {"model": "n"}, [chat_request("3")])
    first, second = store.read_models()
    assert (first.identity, first.texts, first.failures, first.waiting) == (MODEL, 1, {"refused": 1}, 0)
    assert (second.identity["model"], second.texts, second.waiting) == ("n", 0, 1)


def test_only_the_owner_can_read_the_files(store, path):
    put(store, chat_request(), Draw(text="text", finish="stop"))
    files = list(path.parent.iterdir())
    assert path in files
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


WRITER = """
import sys
sys.path.insert(0, "tests/helpers")
from draw_cases import chat_request
from saro.draws.request import Draw
from saro.draws.store import DrawStore
model = {"kind": "scripted", "model": "m"}
name, path = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
with DrawStore.open(path) as store:
    for start in range(0, 200, 4):
        group = [chat_request(f"{i}") for i in range(start, start + 4)]
        store.put(model, {r.key(model): (r, Draw(text=name, finish="stop")) for r in group})
"""


def test_two_processes_open_a_new_store_and_write_it_at_once(path):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, name, str(path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.close()
    assert [writer.wait(60) for writer in writers] == [0, 0]
    keys = [chat_request(f"{i}").key(MODEL) for i in range(200)]
    with DrawStore.open(path) as store:
        found = store.get(keys)
    assert len(found) == 200
    # Whole groups of one writer or the other.
    names = [found[key].text for key in keys]
    assert all(len(set(names[start : start + 4])) == 1 for start in range(0, 200, 4))


# Opens each of 60 new stores in three processes at the same moment; prints how many could not.
OPENERS = """
import os, sys, time
from saro.draws.store import DrawStore
failed = 0
for number in range(60):
    start = time.monotonic() + 0.01
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            while time.monotonic() < start:
                pass
            try:
                DrawStore.open(f"{sys.argv[1]}/{number}.sqlite3")
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(child)
    failed += sum(os.waitpid(child, 0)[1] != 0 for child in children)
print(failed)
"""


def test_several_processes_may_make_the_same_store(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", OPENERS, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "0\n"


def refusal(path: Path) -> str:
    with pytest.raises(SaroError) as caught:
        DrawStore.open(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_is_missing_is_named(tmp_path):
    assert "there is no folder" in refusal(tmp_path / "none" / "draws.sqlite3")


def test_a_folder_is_no_store(tmp_path):
    assert "is a folder" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"not a database, but long enough to be one" * 40, b"short"])
def test_a_file_that_is_no_store_is_refused_and_kept(path, content):
    path.write_bytes(content)
    assert "is not a store of draws" in refusal(path)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_the_database_of_another_program_is_refused_and_kept(path):
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE notes (text TEXT)")
    before = path.read_bytes()
    assert "is not a store of draws" in refusal(path)
    assert path.read_bytes() == before


def test_a_store_of_a_newer_version_is_refused(path):
    DrawStore.open(path).close()
    with sqlite3.connect(path) as newer:
        newer.execute("PRAGMA user_version = 2")
    assert "newer version of saro" in refusal(path)


def test_a_damaged_store_is_named(path):
    with DrawStore.open(path) as store:
        requests = [chat_request(f"{i}" * 50) for i in range(300)]
        keys = [request.key(MODEL) for request in requests]
        store.put(MODEL, {r.key(MODEL): (r, Draw(text="long " * 100, finish="stop")) for r in requests})
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 8192] = b"\xff" * 8192
    path.write_bytes(content)
    with DrawStore.open(path) as store, pytest.raises(SaroError, match="is damaged; move it away"):
        store.get(keys)


def test_a_draw_that_is_no_json_is_damage(path):
    with DrawStore.open(path) as store:
        key = put(store, chat_request(), Draw(text="text", finish="stop"))
    with sqlite3.connect(path) as other:
        other.execute("UPDATE draws SET draw = substr(draw, 3)")
    with DrawStore.open(path) as store, pytest.raises(SaroError, match="is damaged"):
        store.get([key])


def test_a_store_that_cannot_be_written_is_named(path, monkeypatch):
    DrawStore.open(path).close()
    path.chmod(0o400)
    if os.geteuid() == 0:  # Root may write everything; let the system refuse.
        monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert "cannot be written (Permission denied)" in refusal(path)


def test_a_lock_that_another_process_keeps_is_named(path, monkeypatch):
    monkeypatch.setattr("saro.draws.store._BUSY_SECONDS", 0.05)
    with DrawStore.open(path) as store, sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(SaroError, match="another process has locked the store"):
            put(store, chat_request(), Draw(text="text", finish="stop"))
        other.execute("ROLLBACK")
        put(store, chat_request(), Draw(text="text", finish="stop"))


def test_a_request_that_was_handed_over_is_open_until_its_text_is_there(store):
    requests = [chat_request(f"{i}") for i in range(3)]
    store.register(MODEL, requests)
    put(store, requests[0], Draw(text="text", finish="stop"))
    put(store, requests[1], Draw(failure="http"))
    assert [request for _, _, request in store.read_open()] == requests[1:]
    assert [request for _, _, request in store.read_open([requests[2].key(MODEL)])] == requests[2:]


def test_handing_over_does_not_touch_a_draw(store):
    key = put(store, chat_request(), Draw(text="text", finish="stop"))
    store.register(MODEL, [chat_request(), replace(chat_request(), number=1)])
    assert store.get([key])[key].text == "text"
    assert len([*store.read_open()]) == 1
