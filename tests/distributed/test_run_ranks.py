"""Tests that all ranks end when one fails, with one line each, and that a slow rank is never taken for a dead one.

Every test starts real processes without an agent, as `srun` does: nobody else ends the ranks that are left.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from run_files import ROOT, wait_for

from saro.distributed import watch
from saro.distributed.run_ranks import run_ranks
from saro.distributed.runtime import Runtime
from saro.errors import SaroError

RANK = int(os.environ.get("RANK", "0"))
# Longer than any test waits: a rank that is not ended fails the test.
HOURS = 10_000
# Seconds that ranks give each other to end, in tests in which they wait that long.
GRACE = 2.0
KILLED = "ended without an error message; it may have been killed, for example when memory ran out: "
# What rank 0, or the rank in ``failing``, does. The others wait as ``waiting`` says.


def run_impatient_ranks(main: Callable[[], int]) -> None:
    watch._GRACE_SECONDS = GRACE
    run_ranks(main)


def fail(how: str) -> None:
    if how == "error":
        raise SaroError("train.jsonl:3: wrong; fix it")
    os.kill(os.getpid(), signal.SIGKILL)


def wait(how: str) -> None:
    """Wait for the failing rank: in a collective, or in long work without one."""
    if how == "collective":
        Runtime.start().barrier()
    time.sleep(HOURS)


def one_fails(failing: str, how: str, moment: str, waiting: str) -> None:
    """One rank fails before or after it joins the process group."""

    def main() -> int:
        if moment == "after":
            Runtime.start().barrier()
        if int(failing) == RANK:
            fail(how)
        wait(waiting)
        return 0

    run_impatient_ranks(main)


@pytest.mark.parametrize("waiting", ["collective", "long work"])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("how", ["error", "kill"])
@pytest.mark.parametrize("failing", [0, 1])
def test_all_ranks_end_with_one_line_when_one_fails(recipes, failing, how, moment, waiting):
    ranks = recipes.run_ranks(3, failing, how, moment, waiting, call=f"{__file__}:one_fails")
    for rank, process in enumerate(ranks):
        where = f"[rank {rank}] " if rank else ""
        if rank == failing:
            assert process.code == (2 if how == "error" else -signal.SIGKILL)
            assert process.err == (f"{where}error: train.jsonl:3: wrong; fix it\n" if how == "error" else "")
            continue
        assert process.code == 2, process.err
        if how == "error":
            assert process.err == f"{where}error: rank {failing} failed: train.jsonl:3: wrong; fix it\n"
        else:
            # torch may log that its store is gone, if a rank was about to ask it.
            (line,) = [line for line in process.err.splitlines() if "error: " in line and not line.startswith("[W")]
            assert line.startswith(f"{where}error: rank {failing} {KILLED}")
            assert "Traceback" not in process.err


def all_fail(kind: str) -> None:
    def main() -> int:
        Runtime.start().barrier()
        raise {"error": SaroError("same"), "bug": ZeroDivisionError("same"), "torch": RuntimeError("same")}[kind]

    run_ranks(main)


def test_an_error_of_all_ranks_is_one_line_of_each(recipes):
    ranks = recipes.run_ranks(3, "error", call=f"{__file__}:all_fail")
    assert [p.code for p in ranks] == [2, 2, 2]
    assert [p.err for p in ranks] == ["error: same\n", "[rank 1] error: same\n", "[rank 2] error: same\n"]


@pytest.mark.parametrize("kind", ["bug", "torch"])
def test_a_bug_that_all_ranks_meet_is_one_traceback(recipes, kind):
    ranks = recipes.run_ranks(3, kind, call=f"{__file__}:all_fail")
    assert sorted(p.code for p in ranks) == [1, 2, 2]
    (traceback,) = [p.err for p in ranks if "Traceback" in p.err]
    assert traceback.count("Traceback") == 1
    lines = [p.err for p in ranks if p.err != traceback]
    assert all(line.count("\n") == 1 and "Error: same" in line for line in lines), lines


def interrupted() -> None:
    def main() -> int:
        time.sleep(HOURS)
        return 0

    run_ranks(main)


def test_ctrl_c_ends_every_rank_as_shells_expect(recipes):
    """A terminal sends it to all."""
    ranks = recipes.start_ranks(2, call=f"{__file__}:interrupted")
    for process in ranks:
        wait_for(lambda p=process: is_watching(p.pid), process)
    for process in ranks:
        process.send(signal.SIGINT)
    assert [p.wait().code for p in ranks] == [130, 130]
    assert [p.err for p in ranks] == ["", ""]


def is_watching(pid: int) -> bool:
    """Return True if the process has met another rank."""
    return any(c.status == psutil.CONN_ESTABLISHED for c in psutil.Process(pid).net_connections())


# Ranks that are slow, stopped or done have not failed.


def slow() -> None:
    """Rank 1 holds the GIL for longer than any rank is waited for."""

    def main() -> int:
        runtime = Runtime.start()
        if RANK == 1:
            ctypes.PyDLL(None).sleep(int(GRACE * 1.5))
        total = runtime.sum_(torch.ones(1))
        runtime.end()
        return int(total) - 2

    run_impatient_ranks(main)


def test_a_rank_that_holds_the_gil_is_waited_for(recipes):
    ranks = recipes.run_ranks(2, call=f"{__file__}:slow")
    assert [(p.code, p.err) for p in ranks] == [(0, ""), (0, "")]


def meets() -> None:
    def main() -> int:
        runtime = Runtime.start()
        print("started", flush=True)
        time.sleep(0.5)
        total = runtime.sum_(torch.ones(1))
        runtime.end()
        return int(total) - 2

    run_impatient_ranks(main)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_for_a_while_is_waited_for(recipes, stopped):
    """As by SIGSTOP, a debugger, or a machine that sleeps."""
    ranks = recipes.start_ranks(2, call=f"{__file__}:meets")
    wait_for(lambda: "started" in ranks[stopped].out, ranks[stopped])
    ranks[stopped].send(signal.SIGSTOP)
    time.sleep(GRACE * 1.5)
    ranks[stopped].send(signal.SIGCONT)
    assert [(p.wait().code, p.err) for p in ranks] == [(0, ""), (0, "")]


def ends_early(early: str) -> None:
    """One rank is done, while the other writes files for a while."""

    def main() -> int:
        runtime = Runtime.start()
        runtime.barrier()
        if int(early) != RANK:
            time.sleep(GRACE * 1.5)
        runtime.end()
        return 0

    run_impatient_ranks(main)


@pytest.mark.parametrize("early", [0, 1])
def test_ranks_may_be_done_at_different_times(recipes, early):
    ranks = recipes.run_ranks(2, early, call=f"{__file__}:ends_early")
    assert [(p.code, p.err) for p in ranks] == [(0, ""), (0, "")]


def strangers_connect() -> None:
    """Rank 0 connects to its own ports like a stranger, says something and leaves."""

    def main() -> int:
        runtime = Runtime.start()
        if RANK == 0:
            mine = psutil.Process().net_connections()
            for port in {c.laddr.port for c in mine if c.status == psutil.CONN_LISTEN} - {
                int(os.environ["MASTER_PORT"])
            }:
                for text in (b"", b"GET / HTTP/1.1\n\n", b"1\n", b'{"token": "x", "rank": 1}\n', b'{"failed": "x"}\n'):
                    with socket.create_connection(("127.0.0.1", port)) as stranger:
                        stranger.sendall(text)
            time.sleep(GRACE * 1.5)
        runtime.barrier()
        runtime.end()
        return 0

    run_impatient_ranks(main)


def test_strangers_who_connect_are_not_ranks(recipes):
    ranks = recipes.run_ranks(2, call=f"{__file__}:strangers_connect")
    assert [(p.code, p.err) for p in ranks] == [(0, ""), (0, "")]


def helped() -> None:
    run_ranks(lambda: sys.exit(0))


def test_a_program_that_only_prints_help_is_no_failure(recipes):
    ranks = recipes.run_ranks(2, call=f"{__file__}:helped")
    assert [(p.code, p.err) for p in ranks] == [(0, ""), (0, "")]


# Ranks that never come, and ranks without others.


def impatient() -> None:
    watch._JOIN_SECONDS = 3.0
    interrupted()


def test_a_rank_that_does_not_come_is_named(recipes):
    """It may have been killed while it loaded libraries."""
    done = recipes.run(
        call=f"{__file__}:impatient",
        environment={"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
    )
    assert done.code == 2
    fix = "start as many processes as WORLD_SIZE says, and look at their logs"
    assert done.err == f"error: ranks 1, 2 did not come within 0 minutes; {fix}\n"


def test_rank_0_that_does_not_come_is_missed(recipes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = recipes.run(call=f"{__file__}:impatient", environment=variables)
    assert done.code == 2
    assert f"[rank 1] error: cannot meet the other ranks at 127.0.0.1:{port} (" in done.err.splitlines()[-1]


def alone() -> None:
    def main() -> int:
        print([thread.name for thread in threading.enumerate()])
        return 0

    run_ranks(main)


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_a_single_process_is_not_watched(recipes, variables):
    done = recipes.run(call=f"{__file__}:alone", environment=variables)
    assert (done.code, done.out) == (0, "['MainThread']\n")


# Under the launchers, whose agent ends the other ranks too.

_SCRIPT = """
from saro.distributed.run_ranks import run_ranks
from saro.distributed.runtime import Runtime
from saro.errors import SaroError

def main():
    runtime = Runtime.start()
    runtime.barrier()
    if runtime.rank == 1:
        raise SaroError("train.jsonl:3: wrong; fix it")
    runtime.barrier()

run_ranks(main)
"""
_TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
_ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
_ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


# A thread of a library, such as one of a process group, is never out of C++ for long.
_BUSY_SCRIPT = """
import atexit, os, threading, time
from torch.distributed import TCPStore
from saro.distributed.run_ranks import run_ranks
from saro.distributed.runtime import Runtime

def say(line):
    # In one call: print() may let another rank write before the end of the line.
    os.write(1, f"{line}\\n".encode())

def main():
    runtime = Runtime.start()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def work():
        while True:
            store.set("key", "value")

    threading.Thread(target=work, daemon=True).start()
    threading.Thread(target=lambda: time.sleep(0.5) or say(f"thread {runtime.rank}")).start()
    atexit.register(lambda: say(f"atexit {runtime.rank}"))
    runtime.end()
    return 0

run_ranks(main)
"""


def launch(
    options: list[str], folder: Path, environment: dict[str, str], script: str = _SCRIPT
) -> subprocess.CompletedProcess:
    (folder / "script.py").write_text(script)
    command = [sys.executable, *options, str(folder / "script.py")]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("launcher", [_TORCHRUN, _ACCELERATE], ids=["torchrun", "accelerate launch"])
def test_under_a_launcher_a_failure_is_one_line_and_no_traceback_of_a_rank(launcher, tmp_path, environment):
    done = launch(launcher, tmp_path, environment)
    assert done.returncode != 0
    assert done.stderr.count("[rank 1] error: train.jsonl:3: wrong; fix it\n") == 1
    assert "exitcode  : 2 " in done.stderr
    # The launcher's own, which names the rank that failed first.
    assert done.stderr.count("Traceback") == 1
    assert "script.py FAILED" in done.stderr


def test_ranks_that_are_done_wait_for_their_threads_and_are_not_aborted_by_those_of_libraries(tmp_path, environment):
    """The interpreter's own end aborts a process whose thread comes back from C++."""
    done = launch(_TORCHRUN, tmp_path, environment, _BUSY_SCRIPT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for rank in (0, 1):
        assert [line for line in lines if line.endswith(str(rank))] == [f"thread {rank}", f"atexit {rank}"]
