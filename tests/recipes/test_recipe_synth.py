"""recipes/synth.py with a real model, whose random texts pass no gate: what it draws, stores and says."""

from __future__ import annotations

import json

import pytest
from synth_cases import make_prompts, write_lines

from saro.draws.store import DrawStore


@pytest.fixture
def arguments(tiny_model, tmp_path):
    prompts = write_lines(tmp_path / "made.jsonl", make_prompts(2, 2))

    def get(stage: str, *flags: str, **changes: object) -> list[str]:
        options: dict[str, object] = {
            "prompts": prompts,
            "generator": tiny_model(),
            "store": tmp_path / "draws.sqlite3",
            "output": tmp_path / "out" / "op.jsonl",
            "max_tokens": 8,
            "op.draws": 3,
            "op.guided": 0,
            "load.batch": 2,
            "data.template_date": "2024-07-26",
        }
        return [stage, *flags, *(part for k, v in (options | changes).items() for part in (f"--{k}", str(v)))]

    return get


@pytest.fixture
def synth(recipes, cache):
    def run(*arguments: object, ranks: int = 1):
        variables = {"SARO_CACHE": str(cache)}
        if ranks == 1:
            return [recipes.run(*arguments, recipe="synth", environment=variables)]
        variables["LOCAL_WORLD_SIZE"] = str(ranks)
        return recipes.run_ranks(ranks, *arguments, recipe="synth", variables=variables)

    return run


def test_a_model_draws_what_the_plan_says_and_no_record_left_is_one_line(synth, arguments, tmp_path):
    (plan,) = synth(*arguments("op", "--plan"))
    assert plan.code == 0, plan.err
    assert "18 texts in the first round, 0 of them in the store" in plan.err
    (done,) = synth(*arguments("op"))
    assert done.code == 2
    warning, fault = done.err.splitlines()
    assert warning.startswith("--judge rules: on 2 harmful prompts")
    assert "no record is left" in fault
    with DrawStore.open(tmp_path / "draws.sqlite3") as store:
        (model,) = store.read_models()
    assert model.texts == 18
    (again,) = synth(*arguments("op", "--plan"))
    assert "18 texts in the first round, 18 of them in the store" in again.err
    counts = json.loads((tmp_path / "out" / "op.manifest.json").read_text())["result"]["funnel"]["counts"]
    assert counts["draws"]["written"] == 18


def test_two_ranks_leave_out_what_one_leaves_out(synth, arguments, tmp_path):
    synth(*arguments("op"))
    two = {"output": tmp_path / "two" / "op.jsonl", "store": tmp_path / "two.sqlite3"}
    for process in synth(*arguments("op", **two), ranks=2):
        assert process.code == 2
    for name in ("op.left_out.jsonl", "op.manifest.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_budget_of_a_local_model_ends_after_whole_groups(synth, arguments, tmp_path):
    (done,) = synth(*arguments("op", **{"budget.calls": 5}))
    assert done.code == 2
    assert "--budget.calls 5 (8 drawn), and this round lacks 10 texts more" in done.err
    with DrawStore.open(tmp_path / "draws.sqlite3") as store:
        assert store.read_models()[0].texts == 8
