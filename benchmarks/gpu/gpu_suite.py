"""Run the steps of the GPU suite in order of importance, each with its own limit, log and results. See run.sh.

A step that fails or takes too long stops no other. After each step, OUT holds all that is known: summary.md, results.json,
step_matrix.trace.json.gz and logs.tar.gz.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gpu_tables import summarize

from saro.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "benchmarks/gpu"
DRY = os.environ.get("DRY") == "1"
# Seconds after which all that is known is written again while a command runs, in case the whole call is killed.
WRITE_EVERY = 10
# Heads of the loss kernels, in order of importance.
HEADS = ("Llama-3-8B", "SmolLM2-135M", "Qwen2.5-0.5B", "Gemma-2-2B")
# Sides of the loss kernels. The last one is measured apart, because it tries many kernels before its first result, and one that
# fails may leave the GPU unusable for the others.
HEAD_SIDES = ("saro, Triton tiles", "saro, torch tiles", "Liger", "TRL", "log_softmax", "cross_entropy")
CUT_SIDES = ("saro, Triton tiles", "saro, torch tiles", "cut cross-entropy")
# Sides of the comparison with TRL, in order of importance.
SRPO_SIDES = ("saro", "trl, one by one", "trl", "saro, no sharing")
# A dry run has few cores, all of which are busy.
SLOWNESS = 10 if DRY else 1


@dataclass(frozen=True)
class Step:
    """One step of the suite.

    Attributes:
        name: names its log and its results.
        limit: seconds after which it is stopped.
        commands: run one after the other, until one fails.
        models: shapes that must be there first, see random_model.py.
        environment: environment variables of its own.
        alone: nothing else may run beside it, because it measures time.
    """

    name: str
    limit: float
    commands: tuple[Sequence[str], ...]
    models: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    alone: bool = True


@dataclass(frozen=True)
class Folders:
    """Folders of a run of the suite: results and logs of the steps, models, runs of the recipes, and what is sent back."""

    results: Path
    logs: Path
    models: Path
    runs: Path
    out: Path

    @classmethod
    def make(cls, work: Path, out: Path) -> Folders:
        shared_memory = Path("/dev/shm")
        # A large model is read fastest from memory.
        fits = not DRY and shared_memory.is_dir() and shutil.disk_usage(shared_memory).free > 24e9
        models = shared_memory / "saro-gpu-models" if fits else work / "models"
        folders = cls(work / "results", work / "results/logs", models, work / "runs", out)
        for folder in (folders.results, folders.logs, folders.models, folders.runs, folders.out):
            folder.mkdir(parents=True, exist_ok=True)
        return folders


def list_steps(folders: Folders) -> list[Step]:
    """Return all steps in order of importance."""
    small, middle, large = ("tiny-llama", "tiny-qwen3", "tiny-llama") if DRY else ("llama-1b", "qwen3-0.6b", "llama-8b")
    pack_tokens = 256 if DRY else 4096

    def python(script: str, *arguments: object) -> list[str]:
        return [sys.executable, str(ROOT / script), *map(str, arguments)]

    def saro(*arguments: object) -> list[str]:
        return [sys.executable, "-m", "saro", *map(str, arguments)]

    def pytest(*arguments: object) -> list[str]:
        # A line for each test: if the step is stopped, its log still says which tests passed.
        options = ("-vv", "-p", "no:randomly", "-p", "no:cacheprovider")
        return [sys.executable, "-m", "pytest", *options, *map(str, arguments)]

    def results(name: str) -> Path:
        return folders.results / f"{name}.json"

    def doctor(model: str, method: str) -> Step:
        name = f"doctor-{model}-{method}"
        options = ("--model.name", folders.models / model, "--model.method", method)
        command = saro("doctor", *options, "--data.pack_tokens", pack_tokens, "--json", results(name))
        return Step(name, 130, (command,), models=(model,), alone=False)

    rw, srpo = folders.runs / "rw", folders.runs / "srpo"
    common = ("--model.method", "qlora", "--train.samples", 1, "--train.sample_tokens", 8, "--train.lr", 1e-3)
    common += ("--data.pack_tokens", 4096, "--train.records_per_step", 2 if DRY else 8, "--train.save_every", 1)
    two_steps = ("--train.max_steps", "2", "--overwrite")
    rw_command = python("recipes/rw.py", "--model.name", folders.models / middle, "--train.output", rw, *common)
    recipes = (
        [*rw_command, *two_steps],
        [*rw_command, "--train.max_steps", "3", "--resume"],
        python("recipes/srpo.py", "--model.name", rw / "final", "--train.output", srpo, *common, *two_steps),
        saro("export", "--run", srpo, "--overwrite"),
        saro("export", "--run", srpo, "--merge", "--output", folders.runs / "merged", "--overwrite"),
    )
    packs = (64, 128) if DRY else (8192, 2048, 4096, 16384)
    matrix = python(
        "benchmarks/gpu/step_matrix.py", folders.models / large, results("step_matrix"), "--packs", *packs,
        "--trace", folders.results / "step_matrix.trace.json.gz", "--seconds", 80 * SLOWNESS,
    )  # fmt: skip
    pair_matrix = python(
        "benchmarks/gpu/step_matrix.py", folders.models / large, results("step_matrix_srpo"), "--packs", *packs,
        "--task", "srpo", "--seconds", 60 * SLOWNESS,
    )  # fmt: skip
    without_liger = python(
        "benchmarks/gpu/step_matrix.py", folders.models / large, results("step_matrix_without_liger"), "--packs", *packs[:2],
        "--seconds", 40, "--without_liger",
    )  # fmt: skip
    heads = ("--smoke",) if DRY else ("--rounds", 8, "--rows", 8192, "--heads", *HEADS)
    loss_kernels = python("benchmarks/loss_kernels.py", *heads, "--json", results("loss_kernels"))
    loss_kernels += ["--passes", "frozen", "trainable", "--sides", *HEAD_SIDES]
    cut = python("benchmarks/loss_kernels.py", *heads, "--json", results("loss_kernels_cut"))
    cut += ["--passes", "frozen", "--sides", *CUT_SIDES]
    long_pairs = ("--prompt_tokens", "256,0.5,1024", "--shared_tokens", "384,0.6,1024")
    long_pairs += ("--chosen_tokens", "640,0.6,2048", "--rejected_tokens", "600,0.6,2048")
    peers = python("benchmarks/peers.py", "--model", folders.models / large, "--method", "qlora", "--rounds", 1)
    peers += ["--gradient_checkpointing", "--warmup", "1", "--limit", str(75 * SLOWNESS)]
    if DRY:
        pairs = ("--pairs", 4, "--steps", 1, "--pack_tokens", 2048)
    else:
        pairs = ("--pairs", 16, "--steps", 3, "--pack_tokens", 8192, *long_pairs)
    sides = ("saro", "trl") if DRY else SRPO_SIDES
    srpo_peers = [*peers, *map(str, ("--task", "srpo", "--side", *sides, *pairs, "--json", results("srpo")))]
    rows = ("--rows", 32, "--rounds", 1, "--layers", '["SmolLM2-135M q"]') if DRY else ("--rows", 8192)
    compiled_tests = (
        "tests/saro_kernels/test_triton_tile.py",
        "tests/saro_kernels/test_gated_activation.py",
        "tests/saro_kernels/test_nf4.py",
        "tests/model/test_liger.py",
        "tests/model/test_recompute.py",
    )
    few_tests = ("-k", "test_rows_are_aligned or test_kinds_that_it_knows") if DRY else ()
    all_tests = ("tests/saro_kernels", "-k", "test_tile_height") if DRY else ("tests", "--maxfail", "60")

    return [
        Step("probe", 90, (python("benchmarks/gpu/gpu_probe.py", results("probe")),)),
        Step(
            "tests",
            180,
            (pytest(*few_tests, *compiled_tests),),
            environment=(("TRITON_INTERPRET", "1" if DRY else "0"),),
            alone=False,
        ),
        doctor(small, "qlora"),
        doctor(middle, "lora"),
        *([] if DRY else [doctor(large, "qlora")]),
        Step("recipes", 180, recipes, models=(middle,), alone=False),
        Step("step_matrix", 150, (matrix,), models=(large,)),
        Step("loss_kernels", 90, (loss_kernels,)),
        Step("srpo", 240, (srpo_peers,), models=(large,)),
        Step("attention", 60, (python("benchmarks/gpu/attention_speed.py", results("attention")),)),
        Step(
            "lora_linear",
            60,
            (python("benchmarks/lora_linear.py", *rows, "--json_file", results("lora_linear")),),
        ),
        Step("step_matrix_srpo", 130, (pair_matrix,), models=(large,)),
        Step("loss_kernels_cut", 90, (cut,)),
        *([] if DRY else [Step("step_matrix_without_liger", 60, (without_liger,), models=(large,))]),
        Step("all_tests", 150, (pytest(*all_tests),)),
    ]


class Suite:
    """Runs steps, and writes what is known after each of them."""

    def __init__(self, folders: Folders, total: float) -> None:
        self._folders = folders
        self._end = time.monotonic() + total
        self._ends: dict[str, dict] = {}
        self._written: set[str] = set()  # names of models
        self._writing = threading.Lock()

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._end - time.monotonic()

    def run(self, step: Step) -> None:
        """Run a step within its limit and what is left of the total; its results of an earlier call are deleted."""
        begin = time.monotonic()
        limit = min(step.limit * SLOWNESS, self.left() - 5)
        if limit > 0:
            with self._writing:
                for file in self._folders.results.glob(f"{step.name}.*"):
                    file.unlink()
        missing = [m for m in step.models if m not in self._written]
        models = [[sys.executable, str(HERE / "random_model.py"), m, str(self._folders.models / m)] for m in missing]
        code: int | str = "no time left"
        with open(self._folders.logs / f"{step.name}.log", "w") as log:
            for command in (*models, *step.commands):
                left = begin + limit - time.monotonic()
                code = run_command(command, log, dict(step.environment), left, self.write)
                if code != 0:
                    break
            else:
                self._written.update(missing)
        self._ends[step.name] = {"code": code, "seconds": time.monotonic() - begin}
        print(f"{step.name}: {code}, {time.monotonic() - begin:.0f} s", flush=True)
        if code != 0:
            lines = (self._folders.logs / f"{step.name}.log").read_text(errors="replace").splitlines()
            print("\n".join(f"    {line[:200]}" for line in lines[-6:]), flush=True)
        self.write()

    def write(self) -> str:
        """Write all that is known to the folder that is sent back, and return the summary."""
        with self._writing:
            return self._write()

    def _write(self) -> str:
        found: dict = {"steps": dict(self._ends)}
        for file in sorted(self._folders.results.glob("*.json")):
            found[file.stem] = json.loads(file.read_text())
        summary = summarize(found)
        out = self._folders.out
        # The whole call may be killed at any moment: each file is the new one or the one before.
        for name, text in (("results.json", json.dumps(found, indent=1) + "\n"), ("summary.md", summary)):
            with atomic_write(out / name) as file:
                file.write(text)
        with atomic_write(out / "logs.tar.gz", "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            archive.add(self._folders.logs, "logs")
        for trace in self._folders.results.glob("*.trace.json.gz"):
            shutil.copy(trace, out)
        return summary


def run_command(
    command: Sequence[str], log: IO[str], environment: dict[str, str], limit: float, meanwhile: Callable[[], object]
) -> int | str:
    """Run a command in a process group of its own, and call ``meanwhile`` every few seconds.

    Not in a session of its own: what ends the suite by its session then ends the command too, and no step goes on beside the
    steps of a later call.

    Returns:
        Its exit code, or why it has none.
    """
    if limit <= 0:
        return "no time left"
    print("$", *command, file=log, flush=True)
    end = time.monotonic() + limit
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ | environment, process_group=0
    )
    while (left := end - time.monotonic()) > 0:
        try:
            return process.wait(min(left, WRITE_EVERY))
        except subprocess.TimeoutExpired:
            meanwhile()
    os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)  # a process that hangs in the driver of the GPU does not end
    return f"stopped after {limit:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("steps", nargs="*", help="Names of steps, run in this order; default all.")
    parser.add_argument("--work", type=Path, required=True, help="Folder for models, runs and logs.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the results.")
    parser.add_argument("--total", type=float, default=480, help="Seconds for all steps.")
    options = parser.parse_args()
    if DRY:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    folders = Folders.make(options.work, options.out)
    steps = list_steps(folders)
    unknown = set(options.steps) - {step.name for step in steps}
    if unknown:
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in steps)}")
    by_name = {step.name: step for step in steps}
    wanted = [by_name[name] for name in options.steps] if options.steps else steps
    suite = Suite(folders, options.total)
    for group in group_steps(wanted):
        with ThreadPoolExecutor(1 if DRY else len(group)) as pool:
            list(pool.map(suite.run, group))
    print(suite.write())
    return 0


def group_steps(steps: Sequence[Step]) -> list[list[Step]]:
    """Split steps into groups, in order: those that do not measure time and follow each other run side by side."""
    groups: list[list[Step]] = []
    for step in steps:
        if groups and not step.alone and not groups[-1][-1].alone:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


if __name__ == "__main__":
    sys.exit(main())
