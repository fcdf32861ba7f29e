"""The README's list "One batch, file by file" is the truth: these files run from the schedule to the gradient."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import pytest
import torch

import saro
from saro.config import DataConfig, ModelConfig, PreferenceConfig, TrainConfig
from saro.data.encode_files import encode_pair_files
from saro.data.steps import Schedule, Steps
from saro.model.load import load_policy
from saro.model.score import score_pairs
from saro.model.source import find_model
from saro.train import engine
from saro.train.engine import fit
from saro.train.srpo_objective import SRPOObjective

ROOT = Path(__file__).parents[2]
PACKAGE = Path(saro.__file__).parent


def listed() -> list[str]:
    """Return the files of the README's list."""
    section = (ROOT / "README.md").read_text().partition("### One batch, file by file")[2].partition("\n###")[0]
    return re.findall(r"^\d+\. `(saro/[\w/]+\.py)`", section, re.MULTILINE)


@contextmanager
def visited_files() -> Iterator[list[str]]:
    """Record the files of saro whose functions run, from the call of ``Steps.__getitem__`` to that of ``_clip``.

    A ``PackLog`` would see the sums of each pack after its backward; it is not part of the path. Neither are collectives, which
    do nothing in one process.
    """
    files: list[str] = []
    recording = False

    def profile(frame, event, _):
        nonlocal recording
        if event != "call":
            return
        if frame.f_code is Steps.__getitem__.__code__:
            recording = True
        elif frame.f_code is engine._clip.__code__:
            recording = False
        file = Path(frame.f_code.co_filename)
        if recording and PACKAGE in file.parents and PACKAGE / "distributed" not in file.parents:
            name = f"saro/{file.relative_to(PACKAGE).as_posix()}"
            if name not in files:
                files.append(name)

    sys.setprofile(profile)
    try:
        yield files
    finally:
        sys.setprofile(None)


@pytest.fixture
def run(tiny_model, records_file, pairs, runtime, tmp_path):
    """Run one step of SRPO with LoRA through ``fit``."""

    def step() -> None:
        options = ModelConfig(name=tiny_model(), method="lora")
        source = find_model(options)
        chat = source.chat_format(DataConfig(), date(2024, 7, 26))
        data = encode_pair_files([records_file(pairs, "pairs.jsonl")], chat, DataConfig(pack_tokens=512))
        policy = load_policy(source, options, torch.device("cpu"), seed=0)
        reference = score_pairs(policy, data, data.trees(range(len(data)), 512), 512)
        train = TrainConfig(output=str(tmp_path), records_per_step=4, save_every=0)
        fit(
            runtime,
            policy,
            SRPOObjective(data.kinds, reference, PreferenceConfig()),
            Steps(data, Schedule.of(data, DataConfig(), train), 512),
            1,
            train,
            ids=data.ids,
        )

    return step


def test_a_step_runs_exactly_the_listed_files(run):
    with visited_files() as files:
        run()
    # The engine calls the schedule, so it is running already when the recording begins.
    assert {"saro/train/engine.py", *files} == set(listed())
    # A step calls its objective before its first pack and after it; the other files keep their order.
    both = ("saro/train/engine.py", "saro/train/objective.py", "saro/train/srpo_objective.py")
    assert [f for f in files if f not in both] == [f for f in listed() if f not in both]


def test_the_list_has_at_most_twelve_files_and_each_exists():
    assert 0 < len(listed()) <= 12
    assert all((ROOT / file).is_file() for file in listed())
