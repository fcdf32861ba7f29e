"""Requests as a batch file, and the results of a batch back into the store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from draw_cases import Server, chat_reply, chat_request

from saro.draws.draw_all import draw_missing
from saro.draws.handover import import_results, write_open_requests, write_requests
from saro.draws.openai_api import make_identity
from saro.draws.request import Draw, Request, Sampling
from saro.draws.store import DrawStore
from saro.errors import SaroError

MODEL = make_identity("localhost:8000", "tiny", None)
REQUESTS = [chat_request("a"), chat_request("b", temperature=1.0), Request(Sampling(4), ids=(1, 2))]
KEYS = [request.key(MODEL) for request in REQUESTS]
TEXT = {"choices": [{"text": " on", "finish_reason": "length"}], "usage": {"completion_tokens": 4}}


@pytest.fixture
def store(tmp_path):
    with DrawStore.open(tmp_path / "draws.sqlite3") as store:
        yield store


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "requests.jsonl"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def success(key: str, body: dict | None = None, **fields) -> dict:
    """Return a line of a batch's output."""
    response = {"status_code": 200, "request_id": "r", "body": body or chat_reply(f"to {key[:4]}")}
    return {"id": "batch_req_1", "custom_id": key, "response": response, "error": None} | fields


def results(tmp_path: Path, *lines: dict | str) -> Path:
    path = tmp_path / "results.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_requests_are_lines_of_a_batch_file(store, path):
    assert write_requests(path, store, MODEL, REQUESTS) == 3
    lines = read(path)
    assert [line["custom_id"] for line in lines] == KEYS
    assert [line["method"] for line in lines] == ["POST"] * 3
    assert [line["url"] for line in lines] == ["/v1/chat/completions"] * 2 + ["/v1/completions"]
    assert lines[0]["body"] == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 16,
        "temperature": 0.0,
        "top_p": 1.0,
    }
    assert lines[2]["body"]["prompt"] == [1, 2]
    # Batch APIs take ids of up to 64 characters.
    assert all(len(line["custom_id"]) == 64 for line in lines)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_asks_what_a_server_is_asked(store, path):
    server = Server(chat_reply())
    generator = server.generator(url="http://localhost:8000", concurrency=1)
    write_requests(path, store, generator.identity, REQUESTS[:2])
    draw_missing(store, generator, REQUESTS[:2])
    assert [line["body"] for line in read(path)] == [body for _, _, body in server.requests]


def test_only_what_is_missing_is_handed_over_and_each_request_once(store, path, tmp_path):
    store.put(MODEL, {KEYS[0]: (REQUESTS[0], Draw(text="1", finish="stop"))})
    assert write_requests(path, store, MODEL, [*REQUESTS, *REQUESTS]) == 2
    assert [line["custom_id"] for line in read(path)] == KEYS[1:]
    store.put(MODEL, {key: (r, Draw(text="1", finish="stop")) for key, r in zip(KEYS, REQUESTS, strict=True)})
    assert write_requests(tmp_path / "none.jsonl", store, MODEL, REQUESTS) == 0
    assert not (tmp_path / "none.jsonl").exists()


def test_the_file_may_name_the_model_as_the_batch_server_does(store, path):
    write_requests(path, store, MODEL, REQUESTS, "org/tiny-deployment")
    assert {line["body"]["model"] for line in read(path)} == {"org/tiny-deployment"}


def test_a_file_that_exists_is_kept(store, path):
    path.write_text("mine")
    with pytest.raises(SaroError, match="exists already"):
        write_requests(path, store, MODEL, REQUESTS)
    assert path.read_text() == "mine"


def test_requests_to_a_local_model_cannot_be_handed_over(store, path):
    with pytest.raises(SaroError, match="only requests to a server"):
        write_requests(path, store, {"kind": "local"}, REQUESTS)


def test_results_are_draws_that_nothing_asks_for_again(store, path, tmp_path):
    server = Server(chat_reply("from the server"))
    generator = server.generator(url="http://localhost:8000")
    write_requests(path, store, generator.identity, REQUESTS)
    done = import_results(store, results(tmp_path, success(KEYS[2], TEXT), success(KEYS[0]), success(KEYS[1])))
    assert (done.texts, done.failures, done.unknown, done.is_cut) == (3, {}, 0, False)
    draws = draw_missing(store, generator, REQUESTS)
    assert server.requests == []
    assert [draw.text for draw in draws] == [f"to {KEYS[0][:4]}", f"to {KEYS[1][:4]}", " on"]
    assert (draws[2].finish, draws[2].usage) == ("length", {"completion": 4})


def test_reasoning_of_a_result_is_put_into_the_tags_of_the_request(store, path, tmp_path):
    model = make_identity("h", "m", None, ("[T]", "[/T]"))
    write_requests(path, store, model, REQUESTS[:1])
    key = REQUESTS[0].key(model)
    import_results(store, results(tmp_path, success(key, chat_reply("42.", reasoning="6 times 7"))))
    assert store.get([key])[key].text == "[T]\n6 times 7\n[/T]\n\n42."


@pytest.mark.parametrize(
    ("line", "failure"),
    [
        # The error file of OpenAI's batch API.
        ({"response": None, "error": {"code": "batch_expired", "message": "not executed in time"}}, "http"),
        ({"response": {"status_code": 429, "body": {"error": {"message": "slow down"}}}, "error": None}, "http"),
        ({"response": {"status_code": 400, "body": {"error": {"code": "content_filter"}}}}, "refused"),
        ({"response": {"status_code": 401, "body": {"error": {"message": "no"}}}}, "http"),
        # vLLM's run-batch.
        ({"response": {"status_code": 400, "body": None}, "error": "maximum context length is 8"}, "length"),
        (
            {
                "response": {"status_code": 400, "body": None},
                "error": {"error": {"message": "maximum context length is 8", "code": 400}},
            },
            "length",
        ),
        ({"response": {"status_code": 200, "body": None}, "error": None}, "parse"),
        ({"response": {"status_code": 200, "body": {}}}, "parse"),
        ({"response": {"status_code": "x", "body": {}}}, "http"),
        ({"response": []}, "parse"),
        ({}, "parse"),
    ],
)
def test_a_result_with_an_error_is_a_failure(store, path, tmp_path, line, failure):
    write_requests(path, store, MODEL, REQUESTS[:1])
    done = import_results(store, results(tmp_path, {"custom_id": KEYS[0]} | line))
    assert (done.texts, done.failures) == (0, {failure: 1})
    assert store.get(KEYS)[KEYS[0]].failure == failure


def test_failures_that_may_not_last_are_handed_over_again(store, path, tmp_path):
    write_requests(path, store, MODEL, REQUESTS)
    failed = {"custom_id": KEYS[0], "response": None, "error": {"code": "batch_expired"}}
    refused = {"custom_id": KEYS[1], "response": {"status_code": 400, "body": {"error": {"code": "content_filter"}}}}
    import_results(store, results(tmp_path, failed, refused, success(KEYS[2], TEXT)))
    again = tmp_path / "again.jsonl"
    assert write_open_requests(again, store) == 1
    assert [line["custom_id"] for line in read(again)] == KEYS[:1]
    assert import_results(store, results(tmp_path, success(KEYS[0]))).texts == 1
    assert write_open_requests(tmp_path / "none.jsonl", store) == 0


def test_a_result_without_status_may_be_the_reply_itself(store, path, tmp_path):
    write_requests(path, store, MODEL, REQUESTS[:1])
    assert import_results(store, results(tmp_path, {"custom_id": KEYS[0], "response": chat_reply("1")})).texts == 1


def test_repeated_known_and_unknown_results_are_counted_and_change_nothing(store, path, tmp_path):
    write_requests(path, store, MODEL, REQUESTS)
    import_results(store, results(tmp_path, success(KEYS[0])))
    file = results(
        tmp_path,
        success(KEYS[0], chat_reply("other")),
        success(KEYS[1], chat_reply("first")),
        success(KEYS[1], chat_reply("second")),
        success("f" * 64),
        "\n",
    )
    done = import_results(store, file)
    assert (done.texts, done.known, done.repeated, done.unknown) == (1, 1, 1, 1)
    found = store.get(KEYS)
    assert found[KEYS[0]].text == f"to {KEYS[0][:4]}"
    assert found[KEYS[1]].text == "first"


def test_the_results_of_another_store_are_refused(store, path, tmp_path):
    write_requests(path, store, MODEL, REQUESTS)
    with pytest.raises(SaroError, match=r"none of its 1 results was asked for by .*; name the store that asked"):
        import_results(store, results(tmp_path, success("f" * 64)))


def test_a_last_line_that_is_cut_is_left_out(store, path, tmp_path):
    write_requests(path, store, MODEL, REQUESTS)
    done = import_results(store, results(tmp_path, success(KEYS[0]), json.dumps(success(KEYS[1]))[:-9]))
    assert (done.texts, done.is_cut) == (1, True)
    done = import_results(store, results(tmp_path, success(KEYS[0]), json.dumps(success(KEYS[1]))))
    assert (done.texts, done.known, done.is_cut) == (1, 1, False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"custom_id": \n', "results.jsonl:2: broken JSON at column"),
        ("[1]\n", "results.jsonl:2: the line is no object"),
        ('{"id": 1}\n', "results.jsonl:2: there is no custom_id"),
        ('{"custom_id": 7}\n', "results.jsonl:2: there is no custom_id"),
    ],
)
def test_a_broken_line_is_named(store, path, tmp_path, line, message):
    write_requests(path, store, MODEL, REQUESTS)
    with pytest.raises(SaroError) as caught:
        import_results(store, results(tmp_path, success(KEYS[0]), line, success(KEYS[1])))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_is_named(store, tmp_path):
    with pytest.raises(SaroError, match="there is no such file"):
        import_results(store, tmp_path / "none.jsonl")
