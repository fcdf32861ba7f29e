"""The generator of a server, on `transformers serve` with a tiny model: a chat, a prefilled text, and a restart."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time

import httpx2
import pytest
from draw_cases import chat_request
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


class Serve:
    """`transformers serve` in a process of its own, at a port that stays the same after a restart."""

    def __init__(self, model: str, environment: dict[str, str]) -> None:
        self.model, self.environment = model, environment
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", self.model]
        self.process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", f"{self.port}", "--device", "cpu"],
            env=self.environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while self.process.poll() is None:
            try:
                if httpx2.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return
            except httpx2.TransportError:
                time.sleep(0.1)
        raise AssertionError(f"the server ended with {self.process.returncode}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


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
