"""Tests runs whose ranks see different folders, files or days: each works as if they did not, or ends in one line."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
from run_files import ROOT, assert_same_run, metrics_of
from safetensors.torch import load_file, save_file

import saro.runs.folder
from saro.distributed.run_ranks import run_ranks

SAME_FILES = "give every rank the same files"


@pytest.fixture
def machines(tmp_path, rw_arguments, srpo_arguments) -> list[Path]:
    """Make the folders of two machines without a common file system, with the same data."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        rw_arguments()
        srpo_arguments()
        for file in tmp_path.glob("*.jsonl"):
            shutil.copy(file, folder)
    return folders


@pytest.fixture
def start_apart(recipes, machines) -> Callable:
    """Return a function that runs one rank on each machine, with its own arguments, cache and folder."""

    def run(*arguments: list[str], call: str = "", recipe: str = "rw") -> list:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        ranks = []
        for rank, own in enumerate(arguments):
            variables = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(len(arguments))}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SARO_CACHE": str(machines[rank] / "cache")}
            ranks.append(
                recipes.start(*own, recipe=recipe, call=call, environment=variables, folder=str(machines[rank]))
            )
        return [process.wait() for process in ranks]

    return run


@pytest.fixture
def relative(rw_arguments) -> Callable[..., list[str]]:
    """Command line of a short RW run whose files are relative to the machine's folder."""

    def get(*flags: str, **changes: object) -> list[str]:
        files = {"data_train": '["train.jsonl"]', "data_heldout": '["heldout.jsonl"]', "train_output": "run"}
        return rw_arguments(*flags, **(files | changes))

    return get


def rewrite(file: Path, change: Callable[[dict], dict]) -> None:
    records = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(change(record)) + "\n" for record in records))


def assert_refused(ranks: list, message: str, machines: list[Path]) -> None:
    assert [p.code for p in ranks] == [2, 2], ranks[0].err + ranks[1].err
    for rank, process in enumerate(ranks):
        where = f"[rank {rank}] " if rank else ""
        assert process.err.splitlines()[-1] == f"{where}error: {message}"
        assert "Traceback" not in process.err
    assert not [m for m in machines if (m / "run").exists()]


# Ranks that were given different things are refused.


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_ranks_with_other_records_are_refused(start_apart, relative, machines, name):
    rewrite(machines[1] / f"{name}.jsonl", lambda record: record | {"answer": record["answer"] + "!"})
    ranks = start_apart(relative(), relative())
    assert_refused(ranks, f"rank 1 differs from rank 0 in the token ids of {name}; {SAME_FILES}", machines)


def test_ranks_with_fewer_records_are_refused(start_apart, relative, machines):
    file = machines[1] / "train.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    ranks = start_apart(relative(), relative())
    assert_refused(ranks, f"rank 1 differs from rank 0 in the token ids of train; {SAME_FILES}", machines)


def swap_sides(pair: dict) -> dict:
    return pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}


def name_form(pair: dict) -> dict:
    """Give the pair a form: metrics are added up over ranks by form."""
    return pair | {"meta": {"synth": {"form": "mirror"}}}


@pytest.mark.parametrize("change", [swap_sides, name_form])
def test_ranks_with_other_pairs_are_refused(start_apart, srpo_arguments, machines, change):
    rewrite(machines[1] / "pairs.jsonl", change)
    files = {"data_train": '["pairs.jsonl"]', "data_heldout": '["heldout-pairs.jsonl"]', "train_output": "run"}
    ranks = start_apart(srpo_arguments(**files), srpo_arguments(**files), recipe="srpo")
    assert_refused(ranks, f"rank 1 differs from rank 0 in the token ids of train; {SAME_FILES}", machines)


def test_ranks_with_other_weights_are_refused(start_apart, relative, machines, tiny_model):
    for folder in machines:
        shutil.copytree(tiny_model(), folder / "model")
    file = machines[1] / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    ranks = start_apart(relative(model_name="model"), relative(model_name="model"))
    assert_refused(ranks, f"rank 1 differs from rank 0 in the files of the model; {SAME_FILES}", machines)


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"train_output": "elsewhere"}, "--train.output"),
        ({"train_lr": 1e-3}, "--train.lr"),
        ({"train_max_steps": 3}, "--train.max_steps"),
    ],
)
def test_ranks_with_other_options_are_refused(start_apart, relative, machines, change, option):
    ranks = start_apart(relative(), relative(**change))
    fix = "start every rank with the same options"
    assert_refused(ranks, f"rank 1 differs from rank 0 in {option}; {fix}", machines)
    assert not (machines[1] / "elsewhere").exists()


def test_ranks_with_other_flags_are_refused(start_apart, relative, machines):
    ranks = start_apart(relative(), relative("--resume"))
    assert_refused(ranks, "rank 1 differs from rank 0 in --resume; start every rank with the same options", machines)


def test_a_record_that_only_one_rank_refuses_ends_both(start_apart, relative, machines):
    rewrite(machines[1] / "train.jsonl", lambda record: record | {"answer": ""})
    ranks = start_apart(relative(), relative())
    assert [p.code for p in ranks] == [2, 2]
    message = "train.jsonl:1: answer is empty; write it or drop the record"
    assert ranks[1].err == f"[rank 1] error: {message}\n"
    assert ranks[0].err.splitlines()[-1] == f"error: rank 1 failed: {message}"
    assert not (machines[0] / "run").exists()


def test_an_option_that_only_one_rank_refuses_ends_both(start_apart, relative):
    """It ends before it could join a process group."""
    ranks = start_apart(relative(), relative(train_lr=-1))
    assert [p.code for p in ranks] == [2, 2]
    assert ranks[0].err == "error: rank 1 failed: " + ranks[1].err.removeprefix("[rank 1] error: ")


# Ranks that see different folders or days do as rank 0 does.


def test_only_rank_0_needs_the_output_folder(start_apart, relative, machines, recipes, rw_arguments, tmp_path):
    ranks = start_apart(relative(), relative())
    assert [p.code for p in ranks] == [0, 0], ranks[0].err + ranks[1].err
    together = recipes.run_ranks(2, *rw_arguments(train_output=tmp_path / "together"))
    assert [p.code for p in together] == [0, 0]
    assert_same_run(tmp_path / "together", machines[0] / "run")
    assert not (machines[1] / "run").exists()


def test_a_folder_that_only_rank_1_sees_filled_is_not_looked_at(start_apart, relative, machines):
    (machines[1] / "run").mkdir()
    (machines[1] / "run" / "notes.txt").write_text("mine")
    ranks = start_apart(relative(), relative())
    assert [p.code for p in ranks] == [0, 0], ranks[0].err + ranks[1].err


def test_a_folder_that_rank_0_refuses_is_refused_by_all(start_apart, relative, machines):
    (machines[0] / "run").mkdir()
    (machines[0] / "run" / "notes.txt").write_text("mine")
    ranks = start_apart(relative(), relative())
    message = "run: holds files that are not a run's; give an empty folder with --train.output"
    assert [p.err for p in ranks] == [f"error: {message}\n", f"[rank 1] error: {message}\n"]


@pytest.mark.parametrize(
    "options",
    [
        {"model_method": "lora", "model_lora_dropout": 0.3},
        {"model_method": "full", "train_optimizer": "adamw8bit"},
        {"model_method": "qlora", "train_optimizer": "paged_adamw8bit"},
    ],
    ids=["lora", "full, 8 bit", "qlora, paged"],
)
def test_a_resumed_run_does_not_depend_on_what_other_ranks_see(start_apart, relative, machines, options):
    """Both ranks continue after step 4, which only rank 0 sees, and end with the bits of an unbroken run.

    Rank 1 sees nothing, an older step, a newer step, or a broken run.
    """
    options = {"train_max_steps": 6, "train_save_every": 1, "train_keep_checkpoints": 6} | options
    ranks = start_apart(relative(**options), relative(**options))
    assert [p.code for p in ranks] == [0, 0], ranks[0].err + ranks[1].err
    unbroken = machines[0] / "unbroken"
    (machines[0] / "run").rename(unbroken)
    seen = machines[1] / "run"
    for sees, step in (("nothing", None), ("an older step", 2), ("a newer step", 6), ("a broken run", 4)):
        for folder in (machines[0] / "run", seen):
            shutil.rmtree(folder, ignore_errors=True)
        keep_until(unbroken, machines[0] / "run", step=4)
        if step is not None:
            keep_until(unbroken, seen, step)
        if sees == "a broken run":
            (seen / "manifest.json").write_text("{")
            (seen / "checkpoints" / "step_000004" / "trainable.safetensors").unlink()
        before = {p: p.stat().st_mtime_ns for p in seen.rglob("*")}

        ranks = start_apart(relative("--resume", **options), relative("--resume", **options))
        assert [p.code for p in ranks] == [0, 0], f"{sees}: {ranks[0].err}{ranks[1].err}"
        assert "resuming after step 4 of 6" in ranks[0].err, sees
        assert_same_run(unbroken, machines[0] / "run")
        assert {p: p.stat().st_mtime_ns for p in seen.rglob("*")} == before, sees


def keep_until(run: Path, copy: Path, step: int) -> None:
    """Copy a run as it was when it was killed after a step."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("final", "after.json"))
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)


def test_only_rank_0_needs_the_cache_of_references(start_apart, srpo_arguments, machines):
    """The second run finds all of them there, and none on the machine of rank 1."""
    files = {"data_train": '["pairs.jsonl"]', "data_heldout": '["heldout-pairs.jsonl"]', "train_output": "run"}
    arguments = srpo_arguments(**files)
    for attempt in ("none are known", "all are known"):
        ranks = start_apart(arguments, arguments, recipe="srpo")
        assert [p.code for p in ranks] == [0, 0], ranks[0].err + ranks[1].err
        assert ("reference: scoring" in ranks[0].err) == (attempt == "none are known")
        (machines[0] / "run").rename(machines[0] / f"run {attempt}")
        assert not (machines[1] / "cache" / "reference").exists()
    first, second = (metrics_of(folder) for folder in machines[0].glob("run *"))
    for one, other in zip(first, second, strict=True):
        assert other["loss" if "loss" in one else "eval/loss"] == pytest.approx(
            one["loss" if "loss" in one else "eval/loss"], abs=1e-5
        )


@pytest.fixture
def relative_pairs(srpo_arguments) -> Callable[..., list[str]]:
    """Command line of a short SRPO run whose files are relative to the machine's folder."""

    def get(*flags: str, **changes: object) -> list[str]:
        files = {"data_train": '["pairs.jsonl"]', "data_heldout": '["heldout-pairs.jsonl"]', "train_output": "run"}
        return srpo_arguments(*flags, **(files | changes))

    return get


@pytest.mark.parametrize("reference", ["start", "other"])
def test_a_resumed_stage_2_needs_neither_folder_nor_references_on_other_ranks(
    start_apart, relative_pairs, machines, tiny_model, reference
):
    other = {} if reference == "start" else {"preference_reference": tiny_model("qwen3")}
    options = {"train_keep_checkpoints": 6, **other}
    ranks = start_apart(relative_pairs(**options), relative_pairs(**options), recipe="srpo")
    assert [p.code for p in ranks] == [0, 0], ranks[0].err + ranks[1].err
    unbroken = machines[0] / "unbroken"
    (machines[0] / "run").rename(unbroken)
    keep_until(unbroken, machines[0] / "run", step=2)
    shutil.rmtree(machines[1] / "cache", ignore_errors=True)
    ranks = start_apart(relative_pairs("--resume", **options), relative_pairs("--resume", **options), recipe="srpo")
    assert [p.code for p in ranks] == [0, 0], ranks[0].err + ranks[1].err
    assert "resuming after step 2 of 4" in ranks[0].err
    for one, resumed in zip(metrics_of(unbroken), metrics_of(machines[0] / "run"), strict=True):
        assert resumed == pytest.approx(one, rel=1e-3, abs=1e-5)
    assert not (machines[1] / "run").exists()


def test_stage_2_says_which_rank_lacks_the_model_that_stage_1_wrote(start_apart, relative, relative_pairs, machines):
    ranks = start_apart(relative(train_output="rw"), relative(train_output="rw"))
    assert [p.code for p in ranks] == [0, 0], ranks[0].err + ranks[1].err
    arguments = relative_pairs(model_name="./rw/final")
    ranks = start_apart(arguments, arguments, recipe="srpo")
    assert [p.code for p in ranks] == [2, 2]
    message = "./rw/final: no such folder; give a model's folder or its hub name, such as org/model"
    assert ranks[1].err == f"[rank 1] error: {message}\n"
    assert ranks[0].err.splitlines()[-1] == f"error: rank 1 failed: {message}"

    shutil.copytree(machines[0] / "rw" / "final", machines[1] / "rw" / "final")
    ranks = start_apart(arguments, arguments, recipe="srpo")
    assert [p.code for p in ranks] == [0, 0], ranks[0].err + ranks[1].err


class OnItsDay(date):
    """The last second of a year on rank 1, the first of the next one on the others."""

    @classmethod
    def today(cls) -> date:
        return date(1999, 12, 31) if os.environ.get("RANK") == "1" else date(2000, 1, 1)


def run_at_midnight(*_: str) -> None:
    spec = importlib.util.spec_from_file_location("rw", ROOT / "recipes" / "rw.py")
    rw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rw)
    saro.runs.folder.date = OnItsDay
    run_ranks(rw.main)


def test_ranks_on_both_sides_of_midnight_see_the_day_of_rank_0(start_apart, relative, machines, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{{ strftime_now('%Y') }}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    arguments = relative(data_chat_template=template)
    ranks = start_apart(arguments, arguments, call=f"{__file__}:run_at_midnight")
    assert [p.code for p in ranks] == [0, 0], ranks[0].err + ranks[1].err
    two = metrics_of(machines[0] / "run")
    assert json.loads((machines[0] / "run" / "manifest.json").read_text())["template_date"] == "2000-01-01"

    (machines[0] / "run").rename(machines[0] / "two")
    (alone,) = start_apart(arguments, call=f"{__file__}:run_at_midnight")
    assert alone.code == 0, alone.err
    for one, both in zip(metrics_of(machines[0] / "run"), two, strict=True):
        assert both["loss"] == pytest.approx(one["loss"], rel=1e-4)
