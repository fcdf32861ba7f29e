"""Drives headless Chromium through its DevTools protocol, over a pipe: no package, no port, no network."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Longer than a page takes on a busy machine; after it the browser is taken to hang.
_DEADLINE = 60


class Page:
    """One open page.

    Attributes:
        events: what the browser has reported: requests, console lines, exceptions, violations of the page's policy.
    """

    def __init__(self, commands: int, replies: int) -> None:
        self._commands, self._replies = commands, os.fdopen(replies, "rb")
        self._last, self._session, self.events = 0, None, []
        self._buffer = b""

    def call(self, method: str, **params: Any) -> Any:
        """Send a command and return its result; events that come before it are kept."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._read()
            if reply.get("id") == self._last:
                assert "error" not in reply, (method, reply["error"])
                return reply["result"]
            self.events.append(reply)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = self._replies.read1(2**20)
            assert part, "the browser has gone"
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, file: Path, width: int = 1280, height: int = 900, *, dark: bool = False, fragment: str = "") -> None:
        """Open a file and wait until it is loaded and has drawn its answers."""
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.events.clear()
        for domain in ("Page", "Runtime", "Network", "Log", "Audits"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Page.navigate", url=file.resolve().as_uri() + fragment)
        self.wait_for("document.readyState === 'complete' && document.querySelector('#list')?.children.length > 0")

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in the page, after its promise."""
        # A click counts as that of a user.
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        result = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until an expression is true; fails if it does not become true."""
        check = f"(async () => {{ for (let i = 0; i < 600; i++) {{ if ({expression}) return true; "
        check += "await new Promise((done) => setTimeout(done, 50)); } return false; })()"
        assert self.evaluate(check), f"never true: {expression}"

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        """Write a picture of the page, or of its visible part, as PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))[
            "data"
        ]
        file.write_bytes(base64.b64decode(data))

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def problems(self) -> list[str]:
        """Return console errors, exceptions, violations of the policy, and every request that would leave the machine."""
        self.evaluate("1")  # reads the events that are waiting
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(f"exception: {params['exceptionDetails']}")
            elif method == "Runtime.consoleAPICalled" or method == "Log.entryAdded":
                found.append(f"console: {params}")
            elif method == "Audits.issueAdded":
                found.append(f"issue: {params['issue']['code']}: {params['issue']['details']}")
            elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "data:")):
                found.append(f"request: {params['request']['url']}")
        return found


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """Run Chromium with its profile in a folder, and yield a page."""
    their_commands, commands = os.pipe()
    replies, their_replies = os.pipe()

    def place_pipes() -> None:
        # The protocol's pipes are descriptors 3 and 4 of the browser.
        first, second = os.dup(their_commands), os.dup(their_replies)
        os.dup2(first, 3)
        os.dup2(second, 4)
        # dup2 does nothing, and leaves a descriptor closed to the browser, if it has its number already.
        os.set_inheritable(3, True)
        os.set_inheritable(4, True)

    arguments = ["--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run"]
    arguments += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
    process = subprocess.Popen(
        [CHROMIUM, *arguments, f"--user-data-dir={folder}"],
        preexec_fn=place_pipes,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_commands)
    os.close(their_replies)
    try:
        yield Page(commands, replies)
    finally:
        process.terminate()
        process.wait(_DEADLINE)
        os.close(commands)
