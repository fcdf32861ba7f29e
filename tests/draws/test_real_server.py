"""The generator of a server, on `transformers serve` with a tiny model: a chat, a prefilled text, and a restart."""

from __future__ import annotations

import importlib.util

import pytest
from draw_cases import chat_request
from serve import Serve
from tiny import CHATML, tiny_tokenizer

from saro.data.records import Message
from saro.draws.draw_all import draw_missing
from saro.draws.endpoint import EndpointGenerator, EndpointOptions
from saro.draws.request import Request, Sampling
from saro.draws.store import DrawStore

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")),
    reason="transformers serve needs fastapi, uvicorn and openai",
)


@pytest.fixture
def server(tiny_model, environment):
    server = Serve(tiny_model(), environment)
    server.start()
    yield server
    server.kill()


def test_a_server_is_killed_and_started_again_between_the_tries(server, tmp_path):
    messages = (Message("user", "Count to 3."),)
    prompt = tiny_tokenizer(CHATML).apply_chat_template(
        [{"role": "user", "content": "Count to 3."}], add_generation_prompt=True, tokenize=False
    )
    sampling = Sampling(max_tokens=8)
    chat, text = Request(sampling, messages=messages), Request(sampling, text=prompt)
    starts = []

    async def restart(seconds: float) -> None:
        starts.append(seconds)
        server.start()

    generator = EndpointGenerator(EndpointOptions(server.url, server.model, concurrency=1), sleep=restart)
    with DrawStore.open(tmp_path / "draws.sqlite3") as store:
        first = draw_missing(store, generator, [chat, text])
        # The same prompt by both ways: the chat endpoint renders the template that the text has.
        assert first[0].text == first[1].text
        assert first[0].text
        assert {draw.finish for draw in first} <= {"stop", "length"}
        assert first[0].usage["completion"] in range(1, 9)
        assert first[0].usage["prompt"] == len(tiny_tokenizer().encode(prompt))
        assert starts == []

        server.kill()
        again = draw_missing(store, generator, [chat, text, chat_request("Count to 4.", max_tokens=8)])
    assert again[:2] == first
    assert again[2].text
    assert len(starts) == 1
