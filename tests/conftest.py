"""Fixtures that many tests share."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

# Triton reads this once, at import; its kernels then run on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from accelerate import Accelerator
from hypothesis import settings
from sets import with_other_prompts
from tiny import save_tiny_model

from saro.config import DataConfig, ModelConfig
from saro.data.encode_files import encode_pair_files
from saro.distributed.runtime import Runtime
from saro.model.load import load_policy
from saro.model.source import find_model

# No test depends on time: by default hypothesis fails an example that takes 200 ms, as on a busy machine.
settings.register_profile("saro", deadline=None)
settings.load_profile("saro")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files whose tests start processes: they take longest, and the last file to end should be a short one."""
    first = {item.path for item in items if "recipes" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in first)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run on one thread: small tensors gain nothing from more, and on a busy machine each call would wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function that gives the folder of a tiny model by kind. Each model is made once."""
    made: dict[str, str] = {}

    def get(kind: str = "llama") -> str:
        if kind not in made:
            made[kind] = str(save_tiny_model(tmp_path_factory.mktemp(kind) / "model", kind))
        return made[kind]

    return get


@pytest.fixture
def records_file(tmp_path: Path) -> Callable[..., str]:
    """Writes records to a JSONL file and returns its name."""

    def write(records: list[object], name: str = "records.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return str(path)

    return write


@pytest.fixture(scope="session")
def examples() -> list[dict[str, object]]:
    """24 short native records of both kinds, of different lengths."""
    return [
        {
            "id": f"r{i}",
            "kind": "safety" if i % 3 == 0 else "general",
            "prompt": f"Count to {i}." + "?" * (i % 5),
            "reasoning": [f"one step {j}" for j in range(1 + i % 4)],
            "answer": "a" * (3 + i % 7),
        }
        for i in range(24)
    ]


@pytest.fixture
def environment() -> dict[str, str]:
    """Return the environment for processes that tests start, without the variables of a surrounding launcher or make."""
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    dropped += ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    return {k: v for k, v in os.environ.items() if k not in dropped}


# Imports everything once, then forks a child for each request: a run of a recipe takes one second instead of ten. It
# forks before any library has started threads.
_FORKSERVER = """
import importlib.util, json, os, signal, sys, time, traceback
recipes = {}
for name in ("rw", "srpo", "evaluate", "synth"):
    spec = importlib.util.spec_from_file_location(name, f"recipes/{name}.py")
    recipes[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipes[name])
from saro.distributed.run_ranks import run_ranks
# Each child would import this or make it again. The mapping is a thousand regular expressions.
import peft.tuners.lora.bnb, pytest, transformers.models.llama.modeling_llama
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
get_checkpoint_conversion_mapping("llama")
print("ready", flush=True)
while line := sys.stdin.readline():
    request = json.loads(line)
    if "wait" in request:
        deadline = time.monotonic() + request["timeout"]
        while not (found := os.waitpid(request["wait"], os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.killpg(request["wait"], signal.SIGKILL)
                found = os.waitpid(request["wait"], 0)
                break
            time.sleep(0.01)
        print(os.waitstatus_to_exitcode(found[1]), flush=True)
        continue
    if pid := os.fork():
        print(pid, flush=True)
        continue
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(request["environment"])
    for descriptor, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    os.chdir(request["folder"])
    sys.argv = [request["recipe"] + ".py", *request["arguments"]]
    try:
        if request["call"]:
            sys.path[:] = request["path"]
            file, _, function = request["call"].rpartition(":")
            spec = importlib.util.spec_from_file_location("called", file)
            module = sys.modules["called"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.exit(getattr(module, function)(*request["arguments"]))
        run_ranks(recipes[request["recipe"]].main)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)  # a normal exit of the interpreter takes longer than many of these runs
"""


@dataclass
class Process:
    """A started child. If a signal ended it, ``code`` is negative, as in subprocess."""

    server: Recipes
    pid: int
    out_file: Path
    err_file: Path

    @property
    def out(self) -> str:
        return self.out_file.read_text() if self.out_file.exists() else ""

    @property
    def err(self) -> str:
        return self.err_file.read_text() if self.err_file.exists() else ""

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 120) -> Process:
        """Wait until it ends; kill it at the timeout."""
        self.code = self.server.ask({"wait": self.pid, "timeout": timeout})
        return self


class Recipes:
    """Runs a recipe, or a function of a test module, in child processes of their own session."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self._started = 0
        self._server = subprocess.Popen(
            [sys.executable, "-c", _FORKSERVER],
            cwd=Path(__file__).parents[1],
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdout.readline() == "ready\n"

    def ask(self, request: dict[str, object]) -> int:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def start(
        self,
        *arguments: object,
        recipe: str = "rw",
        call: str = "",
        environment: dict[str, str] | None = None,
        folder: str | None = None,
    ) -> Process:
        """Start it with these command line arguments. ``call`` names a function to run instead: "file:function"."""
        self._started += 1
        out, err = (self.folder / f"{self._started}.{name}" for name in ("out", "err"))
        request = {
            "arguments": [str(a) for a in arguments],
            "recipe": recipe,
            "call": call,
            # One thread: tiny models gain nothing from two, and are much slower on a shared machine.
            "environment": {"LOCAL_WORLD_SIZE": str(os.cpu_count())} | (environment or {}),
            "folder": folder or str(Path(__file__).parents[1]),
            "path": sys.path,
            "out": str(out),
            "err": str(err),
        }
        return Process(self, self.ask(request), out, err)

    def run(self, *arguments: object, **options: object) -> Process:
        """Start it and wait until it ends."""
        return self.start(*arguments, **options).wait()

    def start_ranks(
        self, ranks: int, *arguments: object, variables: dict[str, str] | None = None, **options: object
    ) -> list[Process]:
        """Start ``ranks`` processes of one process group with the environment that torchrun sets, one thread each.

        There is no agent that ends the others when one fails. ``variables`` are added to the environment.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"} | (variables or {})
        return [
            self.start(
                *arguments,
                environment=group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port},
                **options,
            )
            for rank in range(ranks)
        ]

    def run_ranks(self, ranks: int, *arguments: object, **options: object) -> list[Process]:
        """Start them and wait until all end."""
        return [process.wait() for process in self.start_ranks(ranks, *arguments, **options)]

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=120)  # on a busy machine it may still be importing


@pytest.fixture(scope="session")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recipes]:
    """Provide fast child processes that run the recipes."""
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    server = Recipes(tmp_path_factory.mktemp("recipes"), {k: v for k, v in os.environ.items() if k not in dropped})
    yield server
    server.close()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, tiny_model, recipes, examples) -> Callable[..., Path]:
    """Return a function that gives the folder of a finished RW run. Each is made once; tests must not change it."""
    made: dict[tuple[str, str], Path] = {}

    def get(method: str = "lora", kind: str = "llama") -> Path:
        if (method, kind) not in made:
            folder = tmp_path_factory.mktemp(f"{method}_{kind}")
            for name, records in (("train", examples), ("heldout", with_other_prompts(examples[:6]))):
                (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
            options = {
                "model.name": tiny_model(kind),
                "model.method": method,
                "data.train": json.dumps([str(folder / "train.jsonl")]),
                "data.heldout": json.dumps([str(folder / "heldout.jsonl")]),
                "data.pack_tokens": 256,
                "data.template_date": "2024-07-26",
                "train.output": folder / "run",
                "train.records_per_step": 4,
                "train.max_steps": 4,
                "train.lr": 1e-2,
                "train.samples": 0,
            }
            done = recipes.run(*(part for k, v in options.items() for part in (f"--{k}", v)))
            assert done.code == 0, done.err
            made[method, kind] = folder / "run"
        return made[method, kind]

    return get


def _short_run(model: str, file: str, heldout: str, output: Path) -> Callable[..., list[str]]:
    """Return a function that makes the command line of a short run: flags, and options that keywords change.

    None leaves an option out.
    """

    def get(*flags: str, **changes: object) -> list[str]:
        options: dict[str, object] = {
            "model_name": model,
            "model_method": "lora",
            "data_train": json.dumps([file]),
            "data_heldout": json.dumps([heldout]),
            "data_pack_tokens": 256,
            "train_output": output,
            "train_records_per_step": 4,
            "train_samples": 0,
            "train_max_steps": 4,
            "train_save_every": 1,
            "train_lr": 1e-2,
        }
        named = {k.replace("_", ".", 1): v for k, v in (options | changes).items()}
        return [*flags, *(part for k, v in named.items() if v is not None for part in (f"--{k}", str(v)))]

    return get


@pytest.fixture
def rw_arguments(tiny_model, records_file, examples, tmp_path) -> Callable[..., list[str]]:
    """Command line of a short RW run on a tiny model: 24 records, 4 in a step, output in ``tmp_path / "run"``.

    Keyword arguments change options: ``rw_arguments("--resume", model_method="full", train_max_steps=2)``.
    """
    file = records_file(examples, "train.jsonl")
    heldout = records_file(with_other_prompts(examples[:5]), "heldout.jsonl")
    return _short_run(tiny_model(), file, heldout, tmp_path / "run")


@pytest.fixture(scope="session")
def pairs() -> list[dict[str, object]]:
    """24 short native pairs of both kinds, of different lengths, two per prompt. Both chains of a pair share a step."""
    return [
        {
            "id": f"p{i}",
            "kind": "pp-cot" if i % 3 else "op-cot",
            "prompt": f"Count to {i // 2}." + "?" * (i // 2 % 5),
            "chosen": {"reasoning": [f"step {i // 2}", *["good"] * (1 + i % 3)], "answer": "a" * (3 + i % 5)},
            "rejected": {"reasoning": [f"step {i // 2}", "bad"], "answer": "b" * (3 + i % 4)},
        }
        for i in range(24)
    ]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Give the test a cache folder of its own."""
    monkeypatch.setenv("SARO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def srpo_arguments(tiny_model, records_file, pairs, tmp_path) -> Callable[..., list[str]]:
    """Command line of a short SRPO run on a tiny model: 24 pairs, 4 in a step, output in ``tmp_path / "run"``.

    Keyword arguments change options: ``srpo_arguments("--resume", preference_beta=0.5, train_max_steps=2)``.
    """
    file = records_file(pairs, "pairs.jsonl")
    heldout = records_file(with_other_prompts(pairs[:5]), "heldout-pairs.jsonl")
    return _short_run(tiny_model(), file, heldout, tmp_path / "run")


@pytest.fixture
def srpo(recipes, cache) -> Callable:
    """Return a function that runs recipes/srpo.py with the test's own cache and waits until it ends."""

    def run(*arguments, **options):
        environment = {"SARO_CACHE": str(cache)} | options.pop("environment", {})
        return recipes.run(*arguments, recipe="srpo", environment=environment, **options)

    return run


@pytest.fixture
def rw_final(recipes, rw_arguments, tmp_path) -> Path:
    """Train a stage 1 adapter on the tiny model and return its folder."""
    done = recipes.run(*rw_arguments(train_output=tmp_path / "rw", model_lora_rank=4))
    assert done.code == 0, done.err
    return tmp_path / "rw" / "final"


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    """One process, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Runtime(Accelerator(cpu=True, mixed_precision="no"), 0, 1, 1)
    torch.set_num_threads(threads)


@pytest.fixture
def world(tiny_model, records_file, pairs):
    """Return a function that makes source, policy and pairs of a tiny model."""

    def make(records=pairs, **options):
        options = ModelConfig(**{"name": tiny_model(), "method": "lora"} | options)
        source = find_model(options)
        chat = source.chat_format(DataConfig(), date(2024, 7, 26))
        data = encode_pair_files([records_file(records, "pairs.jsonl")], chat, DataConfig(pack_tokens=512))
        return source, load_policy(source, options, torch.device("cpu"), seed=0), data

    return make
