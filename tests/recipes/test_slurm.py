"""Tests recipes/slurm.sh with stand-ins for SLURM's commands: what ranks get, and when the job goes back into the queue."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from run_files import ROOT

SCRIPT = ROOT / "recipes" / "slurm.sh"
# Starts two tasks on each of two nodes, and ends with the highest of their codes, as srun does.
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=0 ] && shift
cpus=${1#--cpus-per-task=}; [ "$cpus" = "$1" ] || shift
for rank in 0 1 2 3; do SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) SLURM_NTASKS=4 CPUS=$cpus "$@" & done
most=0
for task in $(jobs -p); do wait "$task" || { code=$?; [ $code -gt $most ] && most=$code; }; done
exit $most
"""
SCONTROL = """#!/bin/bash
case "$1" in
    # Longer than a pipe holds, as on a large cluster.
    show) for i in $(seq 7 20000); do echo "node$i"; done ;;
    *) echo "$@" >> scontrol.log ;;
esac
"""
# Stands for a recipe: it writes down what it was given.
RECIPE = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CPUS")
given = {name: os.environ[name] for name in names} | {"arguments": sys.argv[1:]}
open(f"rank{os.environ['RANK']}.json", "w").write(json.dumps(given))
sys.exit(int(os.environ["CODE"]) if os.environ["RANK"] == "2" else 0)
"""


@pytest.fixture
def submit(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs the script in a job of two nodes."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (commands / "python").symlink_to(sys.executable)
    (tmp_path / "recipe.py").write_text(RECIPE)

    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess:
        job = {
            "SLURM_JOB_ID": "70123",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "8",
        }
        environment = job | {"PATH": f"{commands}:{os.environ['PATH']}", "CODE": str(code)}
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def requeued(folder: Path) -> list[str]:
    log = folder / "scontrol.log"
    return log.read_text().splitlines() if log.exists() else []


def test_each_rank_knows_its_place_and_resumes(submit, tmp_path):
    done = submit("recipe.py", "--train.lr", "1e-4")
    assert (done.returncode, requeued(tmp_path)) == (0, []), done.stderr
    for rank in range(4):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % 2),
            "WORLD_SIZE": "4",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "node7",
            "MASTER_PORT": "20123",
            "CPUS": "8",
            "arguments": ["--train.lr", "1e-4", "--resume"],
        }


def test_a_job_that_was_stopped_with_a_checkpoint_goes_back_into_the_queue(submit, tmp_path):
    assert submit("recipe.py", code=143).returncode == 143
    assert requeued(tmp_path) == ["requeue 70123"]


def test_a_job_that_failed_does_not(submit, tmp_path):
    assert submit("recipe.py", code=2).returncode == 2
    assert requeued(tmp_path) == []


def test_a_job_without_a_recipe_ends_in_one_line(submit):
    done = submit()
    assert done.returncode == 2
    assert done.stderr == "error: no recipe is given; write sbatch recipes/slurm.sh recipes/rw.py and its options\n"
