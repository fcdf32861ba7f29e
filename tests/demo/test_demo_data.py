"""Tests that the demo data has enough of each group, and that no two records are alike."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from saro.data.records import read_examples
from saro.demo import demo_file, find_demo

FILES = ("rw_train", "rw_heldout")


def _records(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(demo_file(name)).read_text(encoding="utf-8").splitlines()]


def _group(record: dict) -> str:
    return record["id"].removeprefix("heldout-").rsplit("-", 1)[0]


@pytest.mark.parametrize(("name", "least"), [("rw_train", 96), ("rw_heldout", 24)])
def test_half_is_general_a_quarter_harmful_and_a_quarter_only_sounds_dangerous(name, least):
    groups = Counter(_group(r) for r in _records(name))
    total = sum(groups.values())
    assert total >= least
    assert groups == {"general": total // 2, "harmful": total // 4, "harmless": total // 4}


@pytest.mark.parametrize("name", FILES)
def test_every_record_can_be_read(name):
    kinds = {example.id: example.kind for example in read_examples(demo_file(name))}
    assert kinds == {r["id"]: "general" if _group(r) == "general" else "safety" for r in _records(name)}


def test_no_prompt_and_no_reasoning_step_is_used_twice():
    records = [r for name in FILES for r in _records(name)]
    prompts = Counter(json.dumps(r["prompt"]) for r in records)
    steps = Counter(step for r in records for step in r["reasoning"])
    assert prompts.most_common(1)[0][1] == 1
    assert steps.most_common(1)[0][1] == 1


def test_no_two_records_begin_their_reasoning_alike():
    openings = Counter(tuple(r["reasoning"][0].split()[:6]) for name in FILES for r in _records(name))
    assert openings.most_common(1)[0][1] == 1


@pytest.mark.parametrize("name", FILES)
def test_chains_have_four_to_eight_steps(name):
    assert all(4 <= len(r["reasoning"]) <= 8 for r in _records(name))


@pytest.mark.parametrize("name", FILES)
def test_refusals_reason_about_a_policy(name):
    harmful = [r for r in _records(name) if _group(r) == "harmful"]
    assert all("policy" in " ".join(r["reasoning"]) for r in harmful)


def test_only_the_demo_model_is_looked_up(monkeypatch):
    monkeypatch.setattr("saro.demo.demo_model", lambda: Path("/cache/demo"))
    assert [find_demo(name) for name in ("org/model", "start", "demo")] == ["org/model", "start", "/cache/demo"]
