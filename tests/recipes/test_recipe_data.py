"""Both recipes check all of their data before they train, and say which records their figures come from."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from run_files import ROOT, metrics_of
from sets import with_other_prompts

from saro.data.chat_format import ChatFormat
from saro.program import run_program


class Stage(NamedTuple):
    """One of the recipes: a function that runs it with options by keyword, and 24 records to train on."""

    run: Callable
    records: list[dict]


@pytest.fixture(params=["rw", "srpo"])
def stage(request, recipes, cache, rw_arguments, srpo_arguments, examples, pairs) -> Stage:
    arguments = {"rw": rw_arguments, "srpo": srpo_arguments}[request.param]

    def run(*flags: str, call: str = "", **options):
        recipe = [request.param] if call else []
        environment = {"SARO_CACHE": str(cache)}
        return recipes.run(
            *recipe, *arguments(*flags, **options), recipe=request.param, call=call, environment=environment
        )

    return Stage(run, {"rw": examples, "srpo": pairs}[request.param])


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def titles(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip().startswith(("Held-out", "Answers"))]


# Held-out prompts that are trained on


def test_a_held_out_prompt_that_is_trained_on_ends_the_run_before_it_writes(stage, records_file, tmp_path):
    train = records_file(stage.records[:4], "a.jsonl")
    second = records_file(with_other_prompts(stage.records[4:20]) + stage.records[20:22], "b.jsonl")
    held = records_file([*with_other_prompts(stage.records[:2]), stage.records[20]], "held.jsonl")
    done = stage.run(data_train=json.dumps([train, second]), data_heldout=json.dumps([held]))
    name = stage.records[20]["id"]
    assert done.code == 2
    assert done.err.splitlines()[-1] == (
        "error: 1 of 3 held-out records have the prompt of a training record: "
        f'"{name}" ({held}:3) that of "{name}" ({second}:17); '
        "remove them from one of the two, or set --data.allow_overlap true"
    )
    assert stage.records[20]["prompt"] not in done.err
    assert not (tmp_path / "run").exists()


def test_an_overlap_that_is_allowed_is_counted_at_the_start_and_in_the_manifest(stage, records_file, tmp_path):
    held = records_file(stage.records[:3], "held.jsonl")
    done = stage.run(data_heldout=held, data_allow_overlap=True, train_max_steps=1)
    assert done.code == 0, done.err
    assert "; 3 with the prompt of a training record" in done.err
    records = manifest_of(tmp_path / "run")["records"]
    assert [records[name]["trained_prompts"] for name in ("train", "heldout")] == [0, 3]


def test_duplicates_are_counted_at_the_start_and_in_the_manifest(stage, records_file, tmp_path):
    again = [record | {"id": f"again-{record['id']}"} for record in stage.records[:2]]
    done = stage.run(data_train=records_file(stage.records + again, "train.jsonl"), train_max_steps=1)
    assert done.code == 0, done.err
    assert "; 2 exact duplicates of another one" in done.err
    assert done.err.count("exact duplicates") == 1
    records = manifest_of(tmp_path / "run")["records"]
    assert [records[name]["duplicates"] for name in ("train", "heldout")] == [2, 0]


# Prompts and masks


def run_with_wrong_prompt(recipe: str, *arguments: str) -> None:
    """Run a recipe whose prompts that mention a fault have one token more at inference than in the records."""
    right = ChatFormat.inference_prompt_ids

    def wrong(self: ChatFormat, messages: list) -> list[int]:
        return right(self, messages) + [5] * ("fault" in messages[-1].content)

    ChatFormat.inference_prompt_ids = wrong
    sys.argv = [f"{recipe}.py", *arguments]
    run_program(runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"))["main"])


@pytest.mark.parametrize("faulty", ["first.jsonl", "second.jsonl", "held.jsonl"])
def test_the_prompts_of_every_record_of_every_file_are_compared_with_inference(stage, records_file, tmp_path, faulty):
    # More records before the fault than any sample of the first ones would reach.
    records = [record | {"id": str(i)} for i, record in enumerate(stage.records * 4)]
    files = {}
    for part, name in enumerate(("first.jsonl", "second.jsonl", "held.jsonl")):
        ours = [r | {"id": f"{part}-{r['id']}", "prompt": f"{part}: {r['prompt']}"} for r in records]
        if name == faulty:
            ours[-1]["prompt"] += " fault"
        files[name] = records_file(ours, name)
    first, second, held = files.values()
    done = stage.run(
        call=f"{__file__}:run_with_wrong_prompt", data_train=json.dumps([first, second]), data_heldout=held
    )
    assert done.code == 2, done.err
    assert done.err.splitlines()[-1] == (
        f"error: {files[faulty]}:96: the prompt's tokens differ from those that the model reads at inference"
    )
    assert not (tmp_path / "run").exists()


# The held-out records of a run


def test_the_tables_name_the_files_that_their_figures_come_from(stage, records_file):
    first, second = (
        records_file(with_other_prompts(stage.records[i : i + 3]), f"{name}.jsonl") for i, name in ((0, "a"), (3, "b"))
    )
    done = stage.run(
        data_heldout=json.dumps([first, second]), train_samples=1, train_sample_tokens=2, train_max_steps=1
    )
    assert done.code == 0, done.err
    shown = " ".join(done.err.split())
    for title in ("Answers to held-out prompts of ", "Held-out "):
        assert title in shown
    assert shown.replace(" ", "").count(f"{first},{second}".replace(" ", "")) == 2


def test_files_of_ones_own_are_not_measured_on_the_demo(stage, tmp_path):
    done = stage.run(train_samples=2, train_max_steps=2, data_heldout=None)
    assert done.code == 0, done.err
    said = [line for line in done.err.splitlines() if "held out" in line]
    assert said == ["no records are held out, so nothing is measured before and after; name a file with --data.heldout"]
    assert not titles(done.err)
    run = tmp_path / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["heldout"] == []
    assert manifest_of(run)["config"]["data"]["heldout"] == []
    assert list(manifest_of(run)["records"]) == ["train"]
    assert json.loads((run / "after.json").read_text()) == {"metrics": {}, "answers": []}
    assert not [name for line in metrics_of(run) for name in line if name.startswith("eval/")]


def test_a_run_without_held_out_records_resumes_with_the_same_command_line(stage):
    assert stage.run(train_max_steps=1, train_epochs=1, data_heldout=None).code == 0
    done = stage.run("--resume", train_max_steps=1, train_epochs=1, data_heldout=None)
    assert done.code == 0, done.err
