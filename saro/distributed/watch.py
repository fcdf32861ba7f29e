"""Tells every rank of a run when one of them has failed or died, so that none waits for it in a collective.

Each rank holds a connection to rank 0. The system closes it when the process ends, for whatever reason, and keeps it open
while the process computes, loads, holds the GIL or is stopped. There is no heartbeat that could be late, so a slow rank is
never taken for a dead one. Only a machine that answers nothing for a minute is given up (``_keep_alive``).

Messages are JSON objects, one per line. A rank sends hello, then failed or done. Rank 0 sends start when all ranks have
come, failed with the first failure of any rank, and done when it leaves.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

from saro.errors import SaroError

# Machines may start their processes minutes apart. Until all have come, a dead rank cannot be told from a slow one.
_JOIN_SECONDS = 600.0
# All ranks often find the same error. This long, each may end with its own line, or finish a file, before it is ended.
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Failure:
    """The first failure of any rank: its text, or None if the rank ended without a word."""

    rank: int
    text: str | None

    def __str__(self) -> str:
        if self.text is not None:
            return f"rank {self.rank} failed: {self.text}"
        return (
            f"rank {self.rank} ended without an error message; it may have been killed, for example when memory ran "
            "out: look at the system's log of its machine, then continue with --resume"
        )


class Watch:
    """This rank's view of all ranks. A thread ends the process when another rank has failed.

    Args:
        rank: number of this rank.
        ranks: number of all ranks.
        address: host name of rank 0.
        port: port of the launcher's store on that host.
        hosts_store: True if this process must open the store, as rank 0 does unless torchrun's agent has.
        attempt: how often the launcher has started the ranks before; it may keep its store.
    """

    def __init__(self, rank: int, ranks: int, address: str, port: int, *, hosts_store: bool, attempt: str) -> None:
        self.rank = rank
        self._ranks = ranks
        self._address = address
        self._port = port
        self._hosts_store = hosts_store
        self._key = f"saro/watch/{attempt}"  # of the store: where rank 0 listens
        self._failure: Failure | None = None
        self._failed_at = 0.0
        self._connections: dict[int, _Connection] = {}  # by rank; ranks other than 0 hold only the one to rank 0
        self._has_left = False
        self._lock = threading.Lock()
        self._ready = threading.Event()  # all ranks have come, or one has failed
        self._failed = threading.Event()
        self._ending = threading.Lock()  # held by the thread that ends this process

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Watch | None:
        """Make the watch of a launcher's variables; None if they describe only one rank, or no address to meet at."""
        ranks = int(environment.get("WORLD_SIZE", "1"))
        if ranks == 1 or not environment.keys() >= {"RANK", "MASTER_ADDR", "MASTER_PORT"}:
            return None
        rank = int(environment["RANK"])
        return cls(
            rank,
            ranks,
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            hosts_store=rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )

    def join(self) -> None:
        """Wait until all ranks have come.

        Raises:
            SaroError: a rank did not come, or has failed already.
        """
        threading.Thread(target=self._run, name="watch", daemon=True).start()
        # In this thread nothing blocks but the event, so that Ctrl-C works.
        self._ready.wait()
        if self._failure is not None:
            # This thread ends the process: where the others are slow, the watch would print the same line once more.
            self._claim_end()
            raise SaroError(self._failure.text if self._failure.rank == self.rank else str(self._failure))

    def leave(self) -> None:
        """Say that this rank is done: from now on its end is no failure."""
        self._has_left = True
        self._send(done=True)

    def report(self, text: str) -> None:
        """Tell the other ranks that this one fails. The caller must end the process."""
        self._claim_end()
        self._tell_failure(text)

    def find_cause(self, text: str) -> Failure | None:
        """Return the failure of another rank that explains an unexpected error of this one, or None.

        A rank that waits for a dead one in a collective gets an error of the network, often before the watch knows why.
        If no other rank has failed after a moment, ``text`` is reported as the failure of this one. The caller must end
        the process.
        """
        self._claim_end()
        if not self._failed.wait(_GRACE_SECONDS):
            self._tell_failure(text)
            self._failed.wait(_GRACE_SECONDS)
        failure = self._failure
        return None if failure is None or failure.rank == self.rank else failure

    def outlive_others(self) -> None:
        """After a failure, let rank 0 wait a while until the others have ended.

        It holds the store: without it, a rank that still meets the others gets an error that hides the failure.
        """
        while self.rank == 0 and self._connections and self._seconds_left() > 0:
            time.sleep(0.05)

    def _seconds_left(self) -> float:
        """Return how long rank 0 still serves the others after a failure: longer than any of them takes to end."""
        return self._failed_at + 2 * _GRACE_SECONDS - time.monotonic()

    def _claim_end(self) -> None:
        """Reserve the end of the process for the calling thread; does not return if the watch ends it already."""
        self._ending.acquire()

    def _tell_failure(self, text: str) -> None:
        if self.rank == 0:
            self._note(Failure(0, text))
        else:
            self._send(failed=text)

    def _send(self, **message: Any) -> None:
        with self._lock:
            for connection in self._connections.values():
                connection.send(message)

    def _note(self, failure: Failure) -> None:
        """Keep the first failure. Rank 0 passes it on."""
        with self._lock:
            is_first = self._failure is None
            if is_first:
                self._failure = failure
                self._failed_at = time.monotonic()
        if not is_first:
            return
        if self.rank == 0:
            self._send(failed=failure.text, rank=failure.rank)
        self._failed.set()
        self._ready.set()

    def _run(self) -> None:
        """Watch until a rank fails. If it is another one, end this process."""
        try:
            self._meet()
        except (OSError, RuntimeError, ValueError) as error:
            first = str(error).strip().partition("\n")[0]
            self._note(Failure(self.rank, f"cannot meet the other ranks at {self._address}:{self._port} ({first})"))
            return
        if self._failed.is_set() and self._failure.rank != self.rank:
            time.sleep(max(0.0, self._failed_at + _GRACE_SECONDS - time.monotonic()))
            self._end()

    def _meet(self) -> None:
        store = TCPStore(
            self._address,
            self._port,
            is_master=self._hosts_store,
            timeout=timedelta(seconds=_JOIN_SECONDS),
            wait_for_workers=False,
            multi_tenant=True,  # the process group opens it once more
        )
        if self.rank == 0:
            self._serve(store)
        else:
            self._follow(store)

    def _serve(self, store: TCPStore) -> None:
        """Rank 0: accept the other ranks and read what they send, until a rank fails."""
        family, dual = (socket.AF_INET6, True) if socket.has_dualstack_ipv6() else (socket.AF_INET, False)
        token = secrets.token_hex(16)
        deadline = time.monotonic() + _JOIN_SECONDS
        with (
            socket.create_server(("", 0), family=family, backlog=self._ranks, dualstack_ipv6=dual) as listener,
            selectors.DefaultSelector() as selector,
        ):
            selector.register(listener, selectors.EVENT_READ)
            store.set(self._key, json.dumps({"port": listener.getsockname()[1], "token": token}))

            def serve(seconds: float | None) -> bool:
                events = selector.select(seconds)
                for key, _ in events:
                    if key.fileobj is listener:
                        connection = _Connection(listener.accept()[0])
                        selector.register(connection.socket, selectors.EVENT_READ, connection)
                    elif not self._hear(key.data, token):
                        selector.unregister(key.fileobj)
                return bool(events)

            while not self._failed.is_set():
                left = None if self._ready.is_set() else max(0.0, deadline - time.monotonic())
                if not serve(left):
                    missing = sorted(set(range(1, self._ranks)) - self._connections.keys())
                    self._note(Failure(0, _did_not_come(missing)))
            while self._connections and self._seconds_left() > 0:
                serve(self._seconds_left())

    def _hear(self, connection: _Connection, token: str) -> bool:
        """Rank 0: read what a rank has sent. Returns False if its connection has ended."""
        messages = connection.receive()
        for message in messages or ():
            if connection.rank is None:
                # Anyone can connect, but only our ranks can read the store.
                if message.get("token") != token:
                    return False
                self._add(connection, message["rank"])
            elif "failed" in message:
                self._note(Failure(connection.rank, message["failed"]))
            elif "done" in message:
                connection.is_done = True
        if messages is None and connection.rank is not None:
            with self._lock:
                self._connections.pop(connection.rank, None)
            if not connection.is_done:
                self._note(Failure(connection.rank, None))
        return messages is not None

    def _add(self, connection: _Connection, rank: int) -> None:
        connection.rank = rank
        with self._lock:
            self._connections[rank] = connection
        if len(self._connections) == self._ranks - 1:
            self._send(start=True)
            self._ready.set()

    def _follow(self, store: TCPStore) -> None:
        """Connect to rank 0 and read what it sends, until a rank fails or rank 0 is done."""
        meeting = json.loads(store.get(self._key))
        connection = _Connection(socket.create_connection((self._address, meeting["port"])))
        with self._lock:
            self._connections[0] = connection
        connection.send({"token": meeting["token"], "rank": self.rank})
        while not self._failed.is_set():
            messages = connection.receive()
            for message in messages or ():
                if "failed" in message:
                    self._note(Failure(message["rank"], message["failed"]))
                elif "start" in message:
                    self._ready.set()
                elif "done" in message:
                    return
            if messages is None:
                self._note(Failure(0, None))

    def _end(self) -> None:
        """End the process with one line, unless it is ending by itself."""
        if self._has_left or not self._ending.acquire(blocking=False):
            return
        where = f"[rank {self.rank}] " if self.rank else ""
        print(f"{where}error: {self._failure}", file=sys.stderr, flush=True)
        # The main thread may wait in a collective for hours; only this ends it.
        os._exit(2)


class _Connection:
    """A socket that carries JSON objects.

    Attributes:
        rank: the rank at the other end, once rank 0 knows it.
        is_done: that rank has said that it is done.
    """

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.rank: int | None = None
        self.is_done = False
        self._rest = b""
        _keep_alive(connected)

    def send(self, message: Mapping[str, Any]) -> None:
        # If the other end is gone, reading says so.
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Wait, and return the messages that have arrived in full; None at the end of the connection."""
        try:
            data = self.socket.recv(2**16)
            *lines, self._rest = (self._rest + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
            return [message for message in messages if isinstance(message, dict)] if data else None
        except (OSError, ValueError):
            return None


def _keep_alive(connected: socket.socket) -> None:
    """Let the system give up the connection when the other machine answers nothing for a minute.

    Its system answers, not the process: a stopped process is not given up.
    """
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Seconds until the first probe, seconds between probes, number of probes. macOS lacks the first.
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 8)):
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _did_not_come(missing: list[int]) -> str:
    names = ", ".join(map(str, missing))
    return (
        f"rank{'s' if len(missing) > 1 else ''} {names} did not come within {_JOIN_SECONDS / 60:.0f} minutes; "
        "start as many processes as WORLD_SIZE says, and look at their logs"
    )
