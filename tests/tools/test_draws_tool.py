"""`saro draws`: what it writes, takes back and prints."""

from __future__ import annotations

import json
from functools import partial

import pytest
from command import run_saro
from draw_cases import chat_reply, chat_request

from saro.cli import COMMANDS, Command
from saro.draws.handover import write_requests
from saro.draws.openai_api import make_identity
from saro.draws.store import DrawStore

MODEL = make_identity("localhost:8000", "tiny", "awq")
REQUESTS = [chat_request(f"{i}") for i in range(4)]


@pytest.fixture
def saro(monkeypatch, capsys):
    """Runs `saro draws` with arguments; returns exit code, stdout and stderr."""
    monkeypatch.setitem(COMMANDS, "draws", Command("saro.tools.draws_tool", ""))
    return partial(run_saro, monkeypatch, capsys, "draws")


@pytest.fixture
def store(tmp_path) -> str:
    """A store from which four requests were handed over."""
    path = tmp_path / "draws.sqlite3"
    with DrawStore.open(path) as store:
        write_requests(tmp_path / "first.jsonl", store, MODEL, REQUESTS)
    return str(path)


def results(tmp_path, *texts: str) -> str:
    rows = [
        {"custom_id": request.key(MODEL), "response": {"status_code": 200, "body": chat_reply(text)}}
        for request, text in zip(REQUESTS, texts, strict=False)
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "results.jsonl")


def test_a_batch_there_and_back(saro, store, tmp_path):
    again = tmp_path / "again.jsonl"
    assert saro("import", store, results(tmp_path, "one", "")) == (
        0,
        "1 texts stored\n1 empty stored as failures\n",
        "",
    )
    assert saro("requests", store, str(again)) == (0, f"3 requests in {again}\n", "")
    assert len(again.read_text().splitlines()) == 3
    _, out, _ = saro("import", store, results(tmp_path, *"1234"))
    assert out.splitlines() == ["3 texts stored", "1 were there already"]
    _, out, _ = saro("requests", store, str(tmp_path / "none.jsonl"))
    assert out.startswith("no request waits for a text")


def test_a_cut_file_and_repeated_and_foreign_results_are_told(saro, store, tmp_path):
    path = results(tmp_path, "one")
    with open(path, "r+") as file:
        line = file.read()
        file.write(line + line.replace(REQUESTS[0].key(MODEL), "f" * 64) + line[:50])
    _, out, _ = saro("import", store, path)
    assert out.splitlines() == [
        "1 texts stored",
        "1 repeat a result of the file; the first counts",
        "1 were not asked for by this store, and are left out",
        "the last line is cut; import the file again when it is complete",
    ]


def test_the_store_is_counted_by_model(saro, store, tmp_path):
    saro("import", store, results(tmp_path, "one", ""))
    _, out, _ = saro("show", store)
    assert out == (
        "host localhost:8000, kind endpoint, model tiny, revision awq, think_tags ['<think>', '</think>']: "
        "1 texts, 1 empty, 2 waiting\n"
    )


def test_a_draw_is_shown_with_where_it_comes_from_and_nothing_that_a_terminal_obeys(saro, store, tmp_path):
    saro("import", store, results(tmp_path, "red \x1b[31m \x9b0m [bold]"))
    key = REQUESTS[0].key(MODEL)
    _, out, _ = saro("show", store, key[:10])
    shown = json.loads(out)
    assert shown["key"] == key
    assert shown["model"] == MODEL
    assert shown["draw"]["text"] == "red \x1b[31m \x9b0m [bold]"
    assert "\x1b" not in out
    assert "\x9b" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "none.sqlite3"), "there is no such store"),
        (("import", "STORE"), "name the file: saro draws import"),
        (("requests", "STORE"), "name the file: saro draws requests"),
        (("show", "STORE", "zz"), "no key begins with zz"),
        (("shows", "STORE"), "unknown action 'shows'; did you mean show?"),
    ],
)
def test_a_mistake_is_one_line(saro, store, arguments, message):
    code, _, err = saro(*[store if argument == "STORE" else argument for argument in arguments])
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_an_empty_store_has_no_draws(saro, tmp_path):
    DrawStore.open(tmp_path / "draws").close()
    assert saro("show", str(tmp_path / "draws"))[1] == "no draws\n"
