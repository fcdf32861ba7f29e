"""A real server with OpenAI's API, on this machine."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import httpx2


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
