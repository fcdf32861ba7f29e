"""The generator of a server: what it sends, what it makes of each reply and fault, and what it never tells."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from email.utils import formatdate
from itertools import pairwise

import httpx2
import pytest
from draw_cases import KEY, URL, Server, chat_reply, chat_request, draw_all
from hypothesis import given, settings
from hypothesis import strategies as st

from saro.data.records import Message
from saro.draws.draw_all import draw_missing
from saro.draws.endpoint import EndpointGenerator, EndpointOptions
from saro.draws.request import Draw, Request, Sampling
from saro.draws.store import DrawStore
from saro.errors import SaroError


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("SARO_API_KEY", KEY)


def draw_one(server: Server, request: Request | None = None, **options) -> Draw:
    return draw_all(server.generator(**options), request or chat_request())[0]


def refusal(server: Server, **options) -> str:
    with pytest.raises(SaroError) as caught:
        draw_one(server, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert KEY not in message
    return message


def error(message: str = "sorry", **fields) -> dict:
    return {"error": {"message": message, "type": "invalid_request_error"} | fields}


def test_a_conversation_goes_to_the_chat_endpoint_and_its_answer_comes_back():
    server = Server(chat_reply("1 2 3"))
    messages = (Message("system", "Be brief."), Message("user", "Count."))
    draw = draw_one(
        server, Request(Sampling(max_tokens=7, temperature=0.5, top_p=0.9, top_k=4, stop=("!",)), messages=messages)
    )
    ((method, path, body),) = server.requests
    assert (method, path) == ("POST", "/v1/chat/completions")
    seed = body.pop("seed")
    assert 0 <= seed < 2**31
    assert body == {
        "model": "tiny",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Count."}],
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "stop": ["!"],
    }
    assert (draw.text, draw.finish, draw.failure, draw.ids) == ("1 2 3", "stop", None, None)
    assert draw.usage == {"prompt": 5, "completion": 3}
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("prompt", "sent"), [({"text": "<think>\nSo"}, "<think>\nSo"), ({"ids": (1, 5, 2)}, [1, 5, 2])]
)
def test_text_and_ids_go_to_the_completions_endpoint_as_they_are(prompt, sent):
    server = Server({"choices": [{"text": " on", "finish_reason": "length"}], "system_fingerprint": "fp_1"})
    draw = draw_one(server, Request(Sampling(max_tokens=2), **prompt))
    assert server.requests == [
        (
            "POST",
            "/v1/completions",
            {"model": "tiny", "prompt": sent, "max_tokens": 2, "temperature": 0.0, "top_p": 1.0},
        )
    ]
    assert (draw.text, draw.finish, draw.versions) == (" on", "length", {"server": "fp_1"})


def test_several_draws_of_a_prompt_have_different_seeds_and_greedy_ones_have_none():
    server = Server(chat_reply())
    requests = [chat_request(number=number, temperature=1.0) for number in range(3)]
    draw_all(server.generator(), *requests, chat_request())
    seeds = [body.get("seed") for _, _, body in server.requests]
    assert len({*seeds[:3]}) == 3
    assert seeds[3] is None


def test_extra_fields_are_sent_and_null_removes_one():
    server = Server(chat_reply())
    draw_one(server, extra={"max_completion_tokens": 9, "max_tokens": None})
    body = server.requests[0][2]
    assert body["max_completion_tokens"] == 9
    assert "max_tokens" not in body


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_that_comes_apart_is_put_in_front_in_tags(name):
    draw = draw_one(Server(chat_reply("\n\n42.", **{name: "\n6 times 7\n"})))
    assert draw.text == "<think>\n6 times 7\n</think>\n\n42."


def test_the_tags_of_reasoning_are_an_option():
    draw = draw_one(Server(chat_reply("42.", reasoning="6 times 7")), think_tags=("[THINK]", "[/THINK]"))
    assert draw.text == "[THINK]\n6 times 7\n[/THINK]\n\n42."


def test_reasoning_that_was_cut_stays_open():
    draw = draw_one(Server(chat_reply(None, "length", reasoning_content="6 times")))
    assert (draw.text, draw.finish) == ("<think>\n6 times", "length")


def test_reasoning_tokens_are_counted():
    reply = chat_reply("42.", reasoning="6 times 7")
    reply["usage"]["completion_tokens_details"] = {"reasoning_tokens": 2}
    assert draw_one(Server(reply)).usage == {"prompt": 5, "completion": 3, "reasoning": 2}


def test_token_ids_are_kept_if_the_server_was_asked_for_them():
    reply = {"choices": [{"text": " on", "finish_reason": "stop", "token_ids": [7, 2]}]}
    assert draw_one(Server(reply), Request(Sampling(2), ids=(1,)), extra={"return_token_ids": True}).ids == (7, 2)


CHAT_LOGPROBS = {
    "content": [{"token": "no", "top_logprobs": [{"token": "no", "logprob": -0.1}, {"token": "yes", "logprob": -2.5}]}]
}
TEXT_LOGPROBS = {"tokens": ["no"], "top_logprobs": [{"no": -0.1, "yes": -2.5}]}


@pytest.mark.parametrize(
    ("prompt", "logprobs"),
    [
        ({"messages": (Message("user", "?"),)}, CHAT_LOGPROBS),
        ({"text": "?"}, TEXT_LOGPROBS),
        ({"text": "?"}, CHAT_LOGPROBS),  # llama.cpp
    ],
)
def test_choices_get_the_log_probs_of_the_next_token(prompt, logprobs):
    choice = {"text": "no", "message": {"content": "no"}, "logprobs": logprobs, "finish_reason": "length"}
    server = Server({"choices": [choice]})
    draw = draw_one(server, Request(Sampling(50, temperature=1.0, choices=("yes", "no")), **prompt))
    assert draw.choices == (-2.5, -0.1)
    body = server.requests[0][2]
    assert (body["max_tokens"], body["temperature"]) == (1, 0.0)
    assert 20 in (body["logprobs"], body.get("top_logprobs"))


def test_a_choice_that_is_not_listed_gets_the_lowest_log_prob_that_is():
    choice = {"text": "no", "logprobs": TEXT_LOGPROBS, "finish_reason": "length"}
    draw = draw_one(Server({"choices": [choice]}), Request(Sampling(1, choices=("no", "maybe")), text="?"))
    assert draw.choices == (-0.1, -2.5)


@pytest.mark.parametrize(
    ("logprobs", "detail"),
    [
        (None, "gives no log-probs"),
        ({"content": []}, "gives no log-probs"),
        ({"top_logprobs": [{"a": float("nan")}]}, "gives no log-probs"),
        (TEXT_LOGPROBS, "no choice is among the 2 likeliest"),
    ],
)
def test_choices_without_log_probs_are_a_failure(logprobs, detail):
    reply = {"choices": [{"text": "no", "logprobs": logprobs, "finish_reason": "length"}]}
    # Bytes: JSON of httpx2 has no NaN.
    draw = draw_one(Server((200, json.dumps(reply).encode())), Request(Sampling(1, choices=("A", "B")), text="?"))
    assert draw.failure == "parse"
    assert detail in draw.detail


def test_a_server_with_too_many_requests_is_given_the_time_that_it_asks_for():
    server = Server((429, error(), {"retry-after": "7"}), (429, error(), {"retry-after": "0.5"}), chat_reply())
    assert draw_one(server).text == "1 2 3"
    assert server.waits == [7.0, 0.5]


def test_a_retry_after_may_be_a_date():
    server = Server((503, b"", {"retry-after": formatdate(1_000_030, usegmt=True)}), chat_reply())
    draw_one(server, clock=lambda: 1_000_000)
    assert server.waits == [30.0]


@pytest.mark.parametrize("value", ["soon", "-5", "99999999999999999999", "Wed, 99 Foo 2026 00:00:00 GMT"])
def test_a_retry_after_that_says_nothing_is_not_obeyed(value):
    server = Server((429, error(), {"retry-after": value}), chat_reply())
    draw_one(server)
    assert len(server.waits) == 1
    assert 0.5 <= server.waits[0] <= 1.0


def test_a_server_cannot_ask_for_a_wait_of_hours():
    server = Server((429, error(), {"retry-after": "86400"}), chat_reply())
    draw_one(server)
    assert server.waits == [300.0]


@pytest.mark.parametrize(
    "fault",
    [
        (500, b"Internal Server Error"),
        (502, b"<html>bad gateway</html>"),
        (408, error()),
        (409, error()),
        httpx2.ReadTimeout("slow"),
        httpx2.ConnectError("restarts"),
        httpx2.RemoteProtocolError("peer closed connection without sending complete message body"),
        httpx2.ReadError("reset"),
    ],
)
def test_a_fault_that_passes_is_met_by_another_try(fault):
    server = Server(fault, fault, chat_reply())
    assert draw_one(server).text == "1 2 3"
    assert len(server.requests) == 3
    assert 0.5 <= server.waits[0] <= 1.0 <= server.waits[1] <= 2.0


def test_tries_wait_longer_each_time_up_to_a_minute():
    server = Server((503, b""))
    draw_one(server, retries=12)
    assert len(server.waits) == 12
    assert all(wait <= 60.0 for wait in server.waits)
    assert server.waits[-1] >= 30.0


@pytest.mark.parametrize(
    ("fault", "detail"),
    [
        ((500, b"oh"), "HTTP 500"),
        ((503, error("overloaded")), "HTTP 503: overloaded"),
        (httpx2.ReadTimeout("slow"), "no reply within 120 seconds"),
        (httpx2.RemoteProtocolError("cut"), "the connection failed (RemoteProtocolError)"),
    ],
)
def test_a_fault_that_stays_is_a_failure_of_this_draw(fault, detail):
    server = Server(fault)
    draw = draw_one(server, retries=2)
    assert (draw.failure, draw.detail) == ("http", detail)
    assert len(server.requests) == 3


def test_a_reply_that_never_ends_is_cut_off():
    async def hang(_):
        await asyncio.sleep(3600)

    generator = EndpointGenerator(
        EndpointOptions(URL, "tiny", timeout=0.01, retries=0), transport=httpx2.MockTransport(hang)
    )
    assert draw_all(generator, chat_request())[0].detail == "no reply within 0.01 seconds"


@pytest.mark.parametrize(
    ("reply", "failure", "detail"),
    [
        ((200, b'{"choices": [{"mess'), "parse", "the reply is not JSON"),
        ((200, b"<html>login</html>"), "parse", "the reply is not JSON"),
        ([], "parse", "the reply has no choices"),
        ({"choices": []}, "parse", "the reply has no choices"),
        ({"choices": [{"finish_reason": "stop"}]}, "parse", "the reply has no text"),
        ({"choices": [{"message": {"role": "assistant"}, "finish_reason": "stop"}]}, "parse", "the reply has no text"),
        (chat_reply("text", None), "parse", "finish_reason is not known"),
        (chat_reply("text", "tool_calls"), "parse", "finish_reason is tool_calls"),
        (chat_reply(""), "empty", "no text, finish_reason stop"),
        (chat_reply(None, "length"), "empty", "no text, finish_reason length"),
        (chat_reply("par", "content_filter"), "refused", "finish_reason content_filter"),
        ((400, error("no", code="content_filter")), "refused", "HTTP 400: no"),
        ((403, error("Your input was flagged")), "refused", "HTTP 403: Your input was flagged"),
        (
            (400, error("blocked", innererror={"code": "ResponsibleAIPolicyViolation"})),
            "refused",
            "HTTP 400: blocked",
        ),
        ((400, error("too long", code="context_length_exceeded")), "length", "HTTP 400: too long"),
        ((500, error("Context size has been exceeded.")), "length", "HTTP 500: Context size has been exceeded."),
        ((400, {"object": "error", "message": "maximum context length is 9"}), "length", None),
        ((400, {"detail": "Server is pinned to 'a'"}), "http", "HTTP 400: Server is pinned to 'a'"),
        ((422, {"detail": [{"loc": ["body"], "input": "Count"}]}), "http", "HTTP 422"),
        ((200, error("down", code=503)), "http", "HTTP 503: down"),
        ((200, {"error": "down"}), "http", "HTTP 500: down"),
    ],
)
def test_each_reply_that_is_no_text_is_a_failure_with_a_reason(reply, failure, detail):
    draw = draw_one(Server(reply), retries=0)
    assert draw.failure == failure
    assert detail is None or draw.detail == detail
    assert draw.finish is None


@pytest.mark.parametrize("status", [400, 500])
def test_what_another_try_would_repeat_is_asked_once(status):
    server = Server((status, error("maximum context length is 512 tokens")))
    assert draw_one(server).failure == "length"
    assert len(server.requests) == 1


def test_a_refusal_that_the_model_wrote_is_an_answer():
    assert draw_one(Server(chat_reply(None, refusal="I cannot help with that."))).text == "I cannot help with that."


def test_half_a_surrogate_pair_is_replaced():
    draw = draw_one(Server((200, b'{"choices": [{"message": {"content": "a\\ud83d"}, "finish_reason": "stop"}]}')))
    assert draw.text.startswith("a")
    draw.text.encode()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, error("bad key")), "refuses the key in $SARO_API_KEY (HTTP 401); check it"),
        ((403, error("no access")), "refuses the key in $SARO_API_KEY (HTTP 403)"),
        ((404, error("The model `tiny` does not exist")), "the server has no model tiny, or no such endpoint"),
        ((405, b""), "does not offer this endpoint"),
        ((402, error("pay")), "no credit left"),
        ((429, error("quota", code="insufficient_quota")), "no credit left"),
        ((307, b"", {"location": "https://elsewhere.example.org"}), "is at another address"),
    ],
)
def test_what_would_meet_every_request_ends_the_run(reply, message):
    server = Server(reply)
    assert message in refusal(server)
    assert len(server.requests) == 1


def test_a_server_that_wants_a_key_is_told_apart_from_a_wrong_key(monkeypatch):
    monkeypatch.delenv("SARO_API_KEY")
    assert "wants a key (HTTP 401); put it in" in refusal(Server((401, b"")), url="http://127.0.0.1:8000")


def test_a_server_elsewhere_needs_a_key_before_anything_is_sent(monkeypatch):
    monkeypatch.delenv("SARO_API_KEY")
    server = Server(chat_reply())
    assert "there is no key; put it in the environment variable SARO_API_KEY" in refusal(server)
    assert server.requests == []


def test_a_server_on_this_machine_needs_no_key(monkeypatch):
    monkeypatch.delenv("SARO_API_KEY")
    server = Server(chat_reply())
    assert draw_one(server, url="http://localhost:8000").text == "1 2 3"
    assert "authorization" not in server.headers[0]


def test_a_key_with_a_line_break_is_refused_unseen(monkeypatch):
    monkeypatch.setenv("SARO_API_KEY", f"{KEY}\nHost: other")
    assert "holds characters that no key has" in refusal(Server(chat_reply()))


def test_no_server_at_all_ends_the_run():
    server = Server(httpx2.ConnectError("refused"))
    assert f"{URL}: no server answers there; start it, or check the url" in refusal(server, retries=2)
    assert len(server.requests) == 3


def test_a_server_that_went_away_is_a_failure_of_each_draw():
    server = Server(chat_reply(), httpx2.ConnectError("refused"))
    draws = draw_all(server.generator(concurrency=1, retries=0), chat_request("a"), chat_request("b"))
    assert [draw.failure for draw in draws] == [None, "http"]


def test_the_only_model_of_a_server_is_taken():
    server = Server({"object": "list", "data": [{"id": "the-one"}]}, chat_reply())
    generator = server.generator(model=None)
    assert generator.identity["model"] == "the-one"
    assert draw_all(generator, chat_request())[0].text == "1 2 3"
    assert [path for _, path, _ in server.requests] == ["/v1/models", "/v1/chat/completions"]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"data": [{"id": "a"}, {"id": "b"}]}, "lists a, b; say which one with model"),
        ({"data": []}, "lists no model; say which one"),
        ((200, b"<html>"), "gives no list (HTTP 200)"),
        ((404, b""), "gives no list (HTTP 404)"),
        ((401, b""), "refuses the key"),
        (httpx2.ConnectError("refused"), "no server answers there"),
        (httpx2.ReadTimeout("slow"), "no reply within 120 seconds; check the server"),
    ],
)
def test_a_server_without_one_model_is_asked_which(reply, message):
    with pytest.raises(SaroError, match=re.escape(message)):
        Server(reply).generator(model=None, retries=1)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://llm.example.org", "plain http to another machine"),
        ("http://10.0.0.7:8000/v1", "plain http to another machine"),
        ("http://localhost.example.org", "plain http to another machine"),
        ("http://0.0.0.0:8000", "plain http to another machine"),
        ("llm.example.org", "is no address of a server"),
        ("ftp://llm.example.org", "is no address of a server"),
        ("https://", "is no address of a server"),
        ("https://user:sk-secret@llm.example.org", "give the address alone"),
        ("https://llm.example.org/v1?key=sk-secret", "give the address alone"),
        ("https://llm.example.org:port", "url is no address"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_without_its_secrets(url, message):
    with pytest.raises(SaroError) as caught:
        EndpointOptions(url)
    assert message in str(caught.value)
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1/chat/completions"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1/chat/completions"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1/chat/completions"),
        ("https://a.example.org/v1/", "https://a.example.org/v1/chat/completions"),
        ("https://a.example.org/v1/chat/completions", "https://a.example.org/v1/chat/completions"),
        ("https://a.example.org/api", "https://a.example.org/api/v1/chat/completions"),
        ("https://a.example.org/v1beta/openai", "https://a.example.org/v1beta/openai/chat/completions"),
        ("https://a.example.org/api/paas/v4", "https://a.example.org/api/paas/v4/chat/completions"),
    ],
)
def test_an_address_is_taken_with_or_without_its_version(url, sent):
    seen = []

    def answer(request):
        seen.append(str(request.url))
        return httpx2.Response(200, json=chat_reply())

    generator = EndpointGenerator(EndpointOptions(url, "tiny"), transport=httpx2.MockTransport(answer))
    draw_all(generator, chat_request())
    assert seen == [sent]


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"timeout": 0}, {"timeout": float("nan")}, {"retries": -1}])
def test_an_option_out_of_range_is_named(options):
    with pytest.raises(SaroError, match=next(iter(options))):
        EndpointOptions(URL, **options)


def test_a_generator_needs_an_address():
    with pytest.raises(SaroError, match="give its url"):
        EndpointGenerator(EndpointOptions())


def test_no_more_requests_are_under_way_than_asked_for_and_all_come_back():
    under_way, most = 0, 0

    async def answer(request):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        under_way -= 1
        return httpx2.Response(200, json=chat_reply(request.read().decode()[-30:]))

    generator = EndpointGenerator(EndpointOptions(URL, "tiny", concurrency=5), transport=httpx2.MockTransport(answer))
    draws = draw_all(generator, *[chat_request(f"{i}") for i in range(40)])
    assert most == 5
    assert len(draws) == 40


def test_what_came_before_an_error_that_ends_the_run_is_stored(tmp_path):
    def answer(body):
        is_last = body["messages"][0]["content"] == "9"
        return (401, error()) if is_last else chat_reply(body["messages"][0]["content"])

    requests = [chat_request(f"{i}") for i in range(10)]
    with DrawStore.open(tmp_path / "draws") as store:
        generator = Server(answer).generator(concurrency=4)
        with pytest.raises(SaroError, match="refuses the key"):
            draw_missing(store, generator, requests)
        found = store.get([request.key(generator.identity) for request in requests])
    assert sorted(draw.text for draw in found.values()) == [f"{i}" for i in range(9)]


def test_a_caller_that_stops_early_leaves_nothing_behind(recwarn, caplog):
    groups = Server(chat_reply()).generator(concurrency=3).draw([chat_request(f"{i}") for i in range(9)])
    next(groups)
    groups.close()
    assert not caplog.records
    assert not recwarn.list


def test_the_key_is_in_no_file_and_no_log(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    echo = f"your key {KEY} is fine"
    server = Server(chat_reply(echo), (400, error(echo)), (500, error(echo)), (200, echo.encode()), (429, error(echo)))
    requests = [chat_request(f"{i}") for i in range(5)]
    with DrawStore.open(tmp_path / "draws.sqlite3") as store:
        generator = server.generator(concurrency=1, retries=0)
        draws = draw_missing(store, generator, requests)
        assert draws[0].text == "your key *** is fine"
        assert draws[1].detail == "HTTP 400: your key *** is fine"
        files = [file for file in tmp_path.rglob("*") if file.is_file()]
        assert files
        assert all(KEY.encode() not in file.read_bytes() for file in files)
    assert KEY not in caplog.text
    assert KEY not in repr(generator) + repr(vars(generator)) + repr(generator.options)


def test_a_message_that_repeats_the_prompt_is_not_kept():
    prompt = "Please count the number of all the stars that one can see."
    message = f"invalid value: 'please  COUNT the number of all the stars {'x' * 300}"
    draw = draw_one(Server((400, error(message))), chat_request(prompt))
    assert draw.detail == "HTTP 400: the server's message repeats the prompt"


def test_a_message_of_several_lines_becomes_one():
    draw = draw_one(Server((400, error("bad\nvalue\x1b[31m of\ttop_k " + "y" * 500))))
    assert draw.detail.startswith("HTTP 400: bad value [31m of top_k yyy")
    assert len(draw.detail) < 250
    assert draw.detail.isprintable()


def test_the_error_that_ends_a_run_holds_no_prompt(tmp_path):
    generator = Server((400, error("no such field"))).generator()
    with DrawStore.open(tmp_path / "draws") as store, pytest.raises(SaroError) as caught:
        draw_missing(store, generator, [chat_request(f"secret prompt {i}") for i in range(60)])
    assert "no such field" in str(caught.value)
    assert "secret prompt" not in str(caught.value)


def shared(first, second) -> int:
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=8), st.randoms())
def test_requests_are_ordered_as_a_trie_whatever_order_they_come_in(prompts, rng):
    requests = [Request(Sampling(8), ids=tuple(ids), number=number) for number, ids in enumerate(prompts)]
    generator = Server(chat_reply()).generator()
    ordered = [requests[i] for i in generator.order(requests)]
    # A prefix cache that holds only the prompt before reads no more tokens than the trie has nodes.
    read = sum(len(ids) - shared(before, ids) for before, ids in pairwise([(), *(r.ids for r in ordered)]))
    assert read == len({r.ids[:n] for r in requests for n in range(1, len(r.ids) + 1)})
    mixed = rng.sample(requests, len(requests))
    assert [mixed[i] for i in generator.order(mixed)] == ordered


def test_conversations_and_ids_can_be_ordered_together():
    ids = Request(Sampling(8), ids=(1,))
    long, short = chat_request("Count to 10."), chat_request("Count to 1")
    requests = [long, ids, chat_request("Add."), short]
    assert Server(chat_reply()).generator().order(requests) == [1, 2, 3, 0]


def test_the_server_gets_what_is_missing_in_that_order_and_the_draws_keep_the_order_of_the_requests(tmp_path):
    def reply(body):
        return chat_reply(f"to {body['messages'][0]['content']}")

    requests = [chat_request(text) for text in ("b1", "a", "c", "b2", "b", "ab")]
    server = Server(reply)
    with DrawStore.open(tmp_path / "draws") as store:
        draw_missing(store, server.generator(concurrency=1), requests[2:3])
        draws = draw_missing(store, server.generator(concurrency=1), requests)
    assert [draw.text for draw in draws] == ["to b1", "to a", "to c", "to b2", "to b", "to ab"]
    sent = [body["messages"][0]["content"] for _, _, body in server.requests]
    assert sent == ["c", "a", "ab", "b", "b1", "b2"]
