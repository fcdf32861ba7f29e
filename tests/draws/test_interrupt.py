"""An interrupt while a server works on requests."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

from draw_cases import chat_reply, chat_request

from saro.draws.endpoint import EndpointGenerator, EndpointOptions
from saro.draws.store import DrawStore

ROOT = Path(__file__).parents[2]

WAITING = """
import signal, sys
# A shell starts background jobs with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, "tests/helpers")
from draw_cases import chat_request
from saro.draws.draw_all import draw_missing
from saro.draws.endpoint import EndpointGenerator, EndpointOptions
from saro.draws.store import DrawStore
from saro.program import run_program

def main():
    with DrawStore.open(sys.argv[1]) as store:
        generator = EndpointGenerator(EndpointOptions(sys.argv[2], "tiny", concurrency=2))
        draw_missing(store, generator, [chat_request(f"{i}") for i in range(5)])
    return 0

run_program(main)
"""


def read_request(connection: socket.socket) -> None:
    """Read one request with its body."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    headers, _, body = received.partition(b"\r\n\r\n")
    length = int(headers.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)


def test_ctrl_c_ends_a_run_that_waits_for_the_server_and_keeps_what_came(tmp_path, environment):
    path = tmp_path / "draws.sqlite3"
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        run = subprocess.Popen(
            [sys.executable, "-c", WAITING, str(path), url],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        connections = [server.accept()[0] for _ in range(2)]
        for connection in connections:
            read_request(connection)
        # The first request is answered and the next one comes on the same connection: its draw is stored.
        body = json.dumps(chat_reply("came")).encode()
        connections[0].sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        read_request(connections[0])
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=30)
    assert (run.returncode, out, err) == (130, "", "")
    identity = EndpointGenerator(EndpointOptions(url, "tiny")).identity
    with DrawStore.open(path) as store:
        found = store.get([chat_request(f"{i}").key(identity) for i in range(5)])
    assert [draw.text for draw in found.values()] == ["came"]
