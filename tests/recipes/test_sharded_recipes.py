"""Tests whole runs whose ranks share the weights: they are those of one process, and can be resumed by other ranks."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from run_files import metrics_of, steps_logged, wait_for, weights_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from saro.distributed.states import read_tensors
from saro.train.part_files import has_parts

# How often a rank of a run is killed.
KILLS = int(os.environ.get("SARO_KILLS", "3"))
LORA = {"model_method": "lora"}
QLORA = {"model_method": "qlora"}
FULL = {"model_method": "full", "train_lr": 1e-3}


def run_all(recipes, ranks: int, arguments: list[str], **options: object) -> str:
    """Run a recipe on some ranks, and return what rank 0 printed."""
    done = recipes.run_ranks(ranks, *arguments, **options)
    assert [p.code for p in done] == [0] * ranks, "\n".join(p.err for p in done)
    assert all(p.out + p.err == "" for p in done[1:])
    return done[0].err


def assert_near(one: Path, other: Path) -> None:
    """Check that two runs are equal up to the order in which gradients are added."""
    for a, b in zip(metrics_of(one), metrics_of(other), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            # The share of changed weights depends on momenta that pass through zero.
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=2e-2 if name == "changed_parameters" else 1e-5)
    for name in ("before", "after"):
        a, b = (json.loads((folder / f"{name}.json").read_text()) for folder in (one, other))
        assert b["metrics"] == pytest.approx(a["metrics"], abs=1e-6 if name == "before" else 1e-4)
        assert b["answers"] == a["answers"] or name == "after"
    assert_near_weights(weights_of(one), weights_of(other))


def assert_near_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= 1e-2 * a[name].norm(), name


@pytest.mark.parametrize("options", [LORA, QLORA, FULL], ids=["lora", "qlora", "full"])
def test_a_sharded_run_is_that_of_one_process(recipes, rw_arguments, tmp_path, options):
    """With evaluations and answers, and in steps in which the ranks have unequal numbers of packs."""
    options = {"train_eval_every": 2, "train_samples": 2, "train_sample_tokens": 6, "data_pack_tokens": 110} | options
    run_all(recipes, 2, rw_arguments(train_shard="full", **options))
    assert recipes.run(*rw_arguments(train_output=tmp_path / "one", **options)).code == 0
    assert_near(tmp_path / "one", tmp_path / "run")
    for name in ("one", "run"):
        assert_loads_elsewhere(tmp_path / name / "final")


def assert_loads_elsewhere(final: Path) -> None:
    """Check that PEFT or transformers load what was written, without a weight that is missing or of no use."""
    if (final / "adapter_config.json").is_file():
        base = json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"]
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(final))
        loaded = {name: p for name, p in model.named_parameters() if "lora_" in name}
        assert len(loaded) == len(weights_of(final.parent))
        assert any(p.any() for name, p in loaded.items() if "lora_B" in name)
        return
    model, loading = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    stored = weights_of(final.parent)
    assert all(torch.equal(p, stored[name]) for name, p in model.named_parameters())


def assert_same(a: Path, b: Path) -> None:
    one, other = weights_of(a), weights_of(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert metrics_of(a) == metrics_of(b)


@pytest.mark.parametrize("options", [LORA | {"model_lora_dropout": 0.3}, FULL], ids=["lora", "full"])
def test_a_sharded_run_is_resumed_bit_for_bit_and_by_other_ranks_too(recipes, rw_arguments, tmp_path, options):
    sharded = {"train_shard": "full", "train_keep_checkpoints": 9} | options
    run_all(recipes, 2, rw_arguments(**sharded))
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    run.rename(unbroken)
    folders = sorted((unbroken / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == [f"step_{step:06d}" for step in range(1, 5)]
    assert all(has_parts(folder) for folder in folders)

    def resume(ranks: int, **changes: object) -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(
            unbroken, run, ignore=shutil.ignore_patterns("final", "after.json", "step_000003", "step_000004")
        )
        assert "resuming after step 2 of 4" in run_all(recipes, ranks, rw_arguments("--resume", **(sharded | changes)))

    resume(2)
    assert_same(unbroken, run)
    if "model_lora_dropout" in options:  # ranks draw their own dropout
        return
    for ranks, shard in ((3, "full"), (2, "none"), (1, "none")):
        resume(ranks, train_shard=shard)
        assert_near_weights(weights_of(unbroken), weights_of(run))


def test_a_run_of_whole_weights_goes_on_with_shared_ones(recipes, rw_arguments, tmp_path):
    assert recipes.run(*rw_arguments(train_keep_checkpoints=9, **LORA)).code == 0
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    run.rename(unbroken)
    shutil.copytree(unbroken, run, ignore=shutil.ignore_patterns("final", "after.json", "step_000003", "step_000004"))
    said = run_all(recipes, 2, rw_arguments("--resume", train_keep_checkpoints=9, train_shard="full", **LORA))
    assert "resuming after step 2 of 4" in said
    assert "train.shard none -> full" in said
    assert_near_weights(weights_of(unbroken), weights_of(run))


def test_a_damaged_part_is_found_and_an_older_checkpoint_used(recipes, rw_arguments, tmp_path):
    options = {"train_shard": "full", "train_max_steps": 2} | LORA
    run_all(recipes, 2, rw_arguments(**options))
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    shutil.copytree(run, unbroken)
    part = run / "checkpoints" / "step_000002" / "parts" / "__1_0.distcp"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    shutil.rmtree(run / "final")
    said = run_all(recipes, 2, rw_arguments("--resume", **options))
    assert "step_000002: the checkpoint is damaged (parts/__1_0.distcp is not what was written)" in said
    assert_same(unbroken, run)


@pytest.mark.parametrize("shard", ["none", "full"])
@pytest.mark.parametrize("options", [LORA, FULL], ids=["lora", "full"])
def test_ranks_end_with_the_weights_of_the_best_evaluation(recipes, rw_arguments, tmp_path, options, shard):
    """The learning rate is so high that training makes the model worse."""
    options = {**options, "train_shard": shard, "train_keep_best": "eval/loss", "train_eval_every": 1}
    options |= {"train_lr": 1, "train_schedule": "constant", "train_max_steps": 2}
    run_all(recipes, 2, rw_arguments(**options))
    run = tmp_path / "run"
    losses = {line["step"]: line["eval/loss"] for line in metrics_of(run) if "eval/loss" in line}
    best = min(losses, key=losses.get)
    assert best == 1, losses
    assert json.loads((run / "after.json").read_text())["metrics"]["eval/loss"] == losses[best]
    kept, final = load_file(run / "best" / f"step_{best:06d}.safetensors"), weights_of(run)
    stored = stored_weights(run / "checkpoints" / f"step_{best:06d}", kept)
    for name, weight in kept.items():
        (exported,) = (w for n, w in final.items() if n.endswith(name.replace(".default", "")))
        assert torch.equal(weight, exported), name
        assert torch.equal(weight, stored[name]), name


def test_best_weights_of_ranks_that_share_them_stay_no_longer_than_the_checkpoints(recipes, rw_arguments, tmp_path):
    options = {**FULL, "train_shard": "full", "train_keep_best": "eval/loss", "train_eval_every": 1}
    options |= {"train_save_every": 1, "train_keep_checkpoints": 1, "train_max_steps": 4, "train_schedule": "constant"}
    run_all(recipes, 2, rw_arguments(**options))
    losses = [line["eval/loss"] for line in metrics_of(tmp_path / "run") if "eval/loss" in line]
    assert losses == sorted(losses, reverse=True), "each evaluation is the best so far"
    # The last evaluation comes after the last checkpoint.
    assert sorted(file.name for file in (tmp_path / "run" / "best").iterdir()) == [
        "step_000003.safetensors",
        "step_000004.safetensors",
    ]


def stored_weights(checkpoint: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint, which one rank or several wrote."""
    if not has_parts(checkpoint):
        return load_file(checkpoint / "trainable.safetensors")
    weights = {f"weight/{name}": torch.empty_like(tensor) for name, tensor in like.items()}
    read_tensors(checkpoint / "parts", weights, is_alone=True)
    return {name.removeprefix("weight/"): weight for name, weight in weights.items()}


@pytest.mark.parametrize("shard", ["none", "full"])
def test_ranks_train_on_all_turns_as_one_process_does(recipes, rw_arguments, records_file, tmp_path, shard):
    talks = [
        [
            {"role": ("user", "assistant")[turn % 2], "content": f"{number} " + "word " * (turn + number % 3)}
            for turn in range(6)
        ]
        for number in range(8)
    ]
    file = records_file([{"messages": talk} for talk in talks], "talks.jsonl")
    options = {"data_train": json.dumps([file]), "data_train_on": "all", "data_pack_tokens": 256} | LORA
    run_all(recipes, 2, rw_arguments(train_shard=shard, **options))
    assert recipes.run(*rw_arguments(train_output=tmp_path / "one", **options)).code == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert sum(manifest["records"]["train"]["records"].values()) == 24
    assert_near(tmp_path / "one", tmp_path / "run")


def test_ranks_that_share_weights_train_on_labelled_responses_as_one_process_does(
    recipes, srpo, srpo_arguments, cache, tmp_path
):
    options = {"train_eval_every": 2, "data_pack_tokens": 128, "preference_loss": "kto"} | LORA
    variables = {"SARO_CACHE": str(tmp_path / "shared cache")}
    run_all(recipes, 2, srpo_arguments(train_shard="full", **options), recipe="srpo", variables=variables)
    assert srpo(*srpo_arguments(train_output=tmp_path / "one", **options)).code == 0
    assert_near(tmp_path / "one", tmp_path / "run")


@pytest.mark.parametrize("options", [LORA, FULL], ids=["lora", "full"])
def test_machines_that_each_hold_all_weights_train_stage_2_as_one_process_does(
    recipes, srpo, srpo_arguments, cache, tmp_path, options
):
    """Two machines of two ranks, with the reference of the policy itself."""
    options = {"train_eval_every": 2, "data_pack_tokens": 128} | options
    variables = {"LOCAL_WORLD_SIZE": "2", "SARO_CACHE": str(tmp_path / "shared cache")}
    arguments = srpo_arguments(train_shard="hybrid", **options)
    run_all(recipes, 4, arguments, recipe="srpo", variables=variables)
    assert srpo(*srpo_arguments(train_output=tmp_path / "one", **options)).code == 0
    assert_near(tmp_path / "one", tmp_path / "run")


def test_only_rank_0_needs_the_cache_of_references(recipes, srpo_arguments, tmp_path):
    """Rank 1 never has any, and rank 0 all of them in the second run: yet all must score the same packs."""

    def run(output: str) -> None:
        arguments = srpo_arguments(train_shard="full", train_max_steps=1, train_output=tmp_path / output, **LORA)
        variables = [{"SARO_CACHE": str(tmp_path / f"cache{rank}")} for rank in range(2)]
        done = run_apart(recipes, arguments, variables, tmp_path, tmp_path, recipe="srpo")
        assert [p.code for p in done] == [0, 0], done[0].err + done[1].err

    run("first")
    run("again")
    assert not (tmp_path / "cache1" / "reference").exists()
    assert_same(tmp_path / "first", tmp_path / "again")


@pytest.mark.parametrize("options", [LORA, FULL], ids=["lora", "full"])
def test_a_run_of_which_a_rank_is_killed_again_and_again_loses_nothing(recipes, rw_arguments, tmp_path, options):
    """At moments of start-up, of steps and of their checkpoints. ``SARO_KILLS=20`` kills more often."""
    steps = KILLS + 9
    options = {"train_shard": "full", "train_epochs": 9, "train_max_steps": steps, "train_save_every": 1} | options
    run_all(recipes, 2, rw_arguments(train_output=tmp_path / "unbroken", **options))
    chance, run = random.Random(KILLS), tmp_path / "run"
    for stop in sorted(chance.choices(range(KILLS + 1), k=KILLS)):
        is_later = steps_logged(run) < stop
        ranks = recipes.start_ranks(2, *rw_arguments("--resume", **options))
        wait_for(lambda stop=stop: steps_logged(run) >= stop, ranks[0])
        # The run has made this step already if it is starting up, which takes longer than a step.
        time.sleep(chance.uniform(0, 0.1 if is_later else 1))
        ranks[chance.randrange(2)].send(signal.SIGKILL)
        assert all(process.wait().code != 0 for process in ranks), "the run ended before it was killed"
    run_all(recipes, 2, rw_arguments("--resume", **options))
    assert_same(tmp_path / "unbroken", run)


def run_apart(recipes, arguments: list[str], variables: list[dict[str, str]], *folders: Path, **options) -> list:
    """Run one rank in each folder, with its own variables, until all end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = []
    for rank, (own, folder) in enumerate(zip(variables, folders, strict=True)):
        environment = group | own | {"RANK": str(rank), "LOCAL_RANK": "0"}
        ranks.append(recipes.start(*arguments, environment=environment, folder=str(folder), **options))
    return [process.wait() for process in ranks]


def test_ranks_that_cannot_write_a_checkpoint_together_are_refused(recipes, rw_arguments, tmp_path):
    """Machines without a common file system see different folders of the same name."""
    apart = [tmp_path / name for name in ("a", "b")]
    for folder in apart:
        folder.mkdir()
    arguments = rw_arguments(train_shard="full", train_output="run")
    done = run_apart(recipes, arguments, [{}, {}], *apart)
    assert [p.code for p in done] == [2, 2], done[0].err + done[1].err
    assert "error: run: rank 1 does not see this folder of rank 0; ranks that share the weights" in done[0].err
    assert not (apart[0] / "run" / "checkpoints").exists()
