"""Tests `saro plan`: it needs no weights, counts what the recipes would do, and its rates are those that were measured."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from command import run_saro
from run_files import ROOT
from tiny import CHATML, tiny_config, tiny_tokenizer

from saro.config import ModelConfig
from saro.tools.plan_run.cards import CARDS, GPU_SHARE, Card
from saro.tools.plan_run.layouts import Records, _pack_seconds, _step_seconds
from saro.tools.plan_run.plan_tool import Options
from saro.train import predict_memory
from saro.train.predict_memory import Ranks, Setting, StepCost, Workload

H100 = ROOT / "benchmarks/results/gpu/h100-2026-11-27/results.json"


@pytest.fixture
def saro(monkeypatch, capsys):
    """Runs `saro plan` with arguments; returns exit code, stdout and stderr. The tiny models have two layers: run these."""
    monkeypatch.setattr(predict_memory, "_FEW", 2)
    return partial(run_saro, monkeypatch, capsys, "plan")


@pytest.fixture
def config_only(tmp_path) -> str:
    """A folder that holds nothing but a model's config."""
    tiny_config().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def plan(saro, *arguments: str) -> dict:
    code, out, err = saro(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_a_config_is_enough_to_plan_one_card_ddp_and_sharding(saro, config_only):
    known = ["--tokens", "100", "--records", "64", "--data.pack_tokens", "256"]
    found = plan(saro, "--model.name", config_only, "--gpus", "4", "--per_machine", "2", *known)
    assert [p.name for p in Path(config_only).iterdir()] == ["config.json"]
    alone, ddp, full, hybrid = found["layouts"]
    assert [layout["name"] for layout in found["layouts"]] == ["alone", "DDP", "FSDP2 full", "FSDP2 hybrid"]
    for layout in found["layouts"]:
        cost = layout["cost"]
        held = sum(cost[part] for part in ("weights", "adapters", "gradients", "optimizer"))
        assert layout["peak"] == held + max(cost["phases"])
        assert layout["fits"]
        assert layout["largest_pack"] > 256
    assert ddp["cost"] == alone["cost"]
    assert full["cost"]["weights"] < hybrid["cost"]["weights"] < alone["cost"]["weights"]
    # Embedding, which is the head too, and the last norm, whole in bfloat16 during the step.
    assert [layout["cost"]["gathered"] for layout in found["layouts"]] == [0, 0, *[(264 + 1) * 32 * 2] * 2]
    assert found["total_steps"] == 4
    assert found["step_tokens"] == 1600
    assert ddp["run_seconds"] == 4 * ddp["step_seconds"]
    # Adapters of rank 16 on all linear layers, their moments, in two kept checkpoints and one that is written.
    adapters = 2 * 16 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3) * 4
    assert found["checkpoint_bytes"] == 3 * 3 * adapters


def test_the_tokens_of_all_steps_are_those_of_the_records(saro, config_only):
    code, out, err = saro("--model.name", config_only, "--tokens", "1000", "--records", "17", "--train.epochs", "2")
    assert code == 0, err
    assert "; 34,000 in all" in out


def test_checkpoints_of_a_paged_optimizer_hold_its_state(saro, tmp_path):
    # Tensors of fewer than 4,096 entries keep moments of 32 bits.
    tiny_config(hidden_size=128, intermediate_size=256).save_pretrained(tmp_path / "model")
    known = ["--model.name", str(tmp_path / "model"), "--tokens", "64", "--model.method", "full", "--train.optimizer"]
    plain, paged = (plan(saro, *known, name)["checkpoint_bytes"] for name in ("adamw8bit", "paged_adamw8bit"))
    assert paged == pytest.approx(plain, rel=0.05)


def test_files_of_records_are_counted_as_the_recipe_counts_them(saro, rw_arguments, tmp_path):
    config = tmp_path / "my.yaml"
    arguments = rw_arguments(train_max_steps=None, train_epochs=2)
    options: dict = {}
    for name, value in zip(arguments[::2], arguments[1::2], strict=True):
        group, option = name.lstrip("-").split(".")
        options.setdefault(group, {})[option] = yaml.safe_load(value)
    config.write_text(yaml.safe_dump(options))
    found = plan(saro, "--config", str(config))
    assert (found["records"], found["total_steps"]) == (24, 12)
    assert found["step_tokens"] == pytest.approx(
        4 * (found["record_tokens"] - 1), rel=0.01
    )  # the last token is not read
    code, out, err = saro("--config", str(config), "--gpus", "2", "--card", "l4")
    assert code == 0, err
    assert "RW of " in out
    assert "24 records, 12 steps" in out
    assert "NVIDIA's data sheet of the L4" in out


def test_end_tokens_are_those_of_the_generation_config_as_in_the_recipe(
    saro, tiny_model, records_file, examples, tmp_path
):
    model = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    change_json(model / "tokenizer_config.json", eos_token="<|bos|>")
    known = ["--model.name", str(model), "--data.train", records_file(examples)]
    assert plan(saro, *known)["records"] == 24
    change_json(model / "generation_config.json", eos_token_id=4)
    code, _, err = saro(*known)
    assert (code, err.count("\n")) == (2, 1)
    assert "end token" in err


@pytest.fixture
def trained_adapter(tiny_model, tmp_path) -> Path:
    """Make ``final/`` of a run with tags, and a template, of its own."""
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    (final / "adapter_model.safetensors").touch()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": tiny_model(), "r": 4, "target_modules": ["q_proj"]}
    (final / "adapter_config.json").write_text(json.dumps(adapter))
    tiny_tokenizer("x" * 50 + CHATML).save_pretrained(final)
    trained = {"data": {"think_tags": ["<a>", "</a>"]}, "model": {"method": "lora"}}
    manifest = {"saro": "0.1.0", "config": trained, "template_date": "1999-07-04"}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    return final


def test_records_of_a_continued_adapter_are_encoded_in_the_format_of_its_run(
    saro, tiny_model, trained_adapter, records_file, examples
):
    records = ["--data.train", records_file(examples), "--model.method", "lora"]
    base = plan(saro, *records, "--model.name", tiny_model(), "--data.think_tags", "[<a>, </a>]")
    found = plan(saro, *records, "--model.name", str(trained_adapter))
    assert found["record_tokens"] == base["record_tokens"] + 50
    code, _, err = saro(*records, "--model.name", str(trained_adapter), "--data.think_tags", "[<b>, </b>]")
    assert code == 2
    assert "data.think_tags is ('<b>', '</b>'), and the run that trained" in err


def change_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_pairs_share_their_beginning(saro, srpo_arguments):
    arguments = srpo_arguments(train_output=None, train_save_every=None)
    found = plan(saro, "--stage", "srpo", *arguments)
    # Two pairs on each prompt come in one step, as one tree.
    assert found["step_tokens"] < 4 * found["record_tokens"]
    assert found["records"] == 24


def test_labelled_responses_are_read_once_more_than_they_are_trained_on(saro, config_only):
    known = ["--model.name", config_only, "--stage", "srpo", "--tokens", "100", "--records", "64", "--rate", "1e-3"]
    pairs, labelled = (plan(saro, *known, "--preference.loss", loss) for loss in ("sigmoid", "kto"))
    rw = plan(saro, *known[:2], *known[4:])
    (kto,), (alone,) = labelled["layouts"], rw["layouts"]
    assert kto["cost"] == alone["cost"] != pairs["layouts"][0]["cost"]
    assert labelled["step_tokens"] == rw["step_tokens"]
    # Frozen weights: a forward is about half of forward and backward.
    assert kto["step_seconds"] == pytest.approx(1.5 * alone["step_seconds"], rel=0.05)


def test_files_of_pairs_are_labelled_responses_for_kto(saro, srpo_arguments):
    arguments = srpo_arguments(train_output=None, train_save_every=None, preference_loss="kto")
    found = plan(saro, "--stage", "srpo", *arguments, "--gpus", "2")
    assert found["records"] == 48
    assert [layout["name"] for layout in found["layouts"]] == ["alone", "DDP", "FSDP2 full"]
    code, out, err = saro("--stage", "srpo", *arguments)
    assert code == 0, err
    assert "SRPO of " in out
    assert "48 records, 4 steps" in out


@pytest.mark.parametrize(
    ("kind", "changes"), [("qwen3_moe", {"mlp_only_layers": []}), ("gpt_oss", {}), ("qwen3_vl", {})]
)
def test_mixtures_and_multimodal_models_are_planned(saro, tmp_path, kind, changes):
    tiny_config(kind, **changes).save_pretrained(tmp_path / "model")
    found = plan(saro, "--model.name", str(tmp_path / "model"), "--tokens", "100", "--gpus", "2")
    alone, _, full = found["layouts"]
    assert full["cost"]["weights"] == pytest.approx(alone["cost"]["weights"] / 2, rel=0.05)
    _, out, _ = saro("--model.name", str(tmp_path / "model"), "--tokens", "100")
    assert ("experts may reach less" in out) == (kind != "qwen3_vl")


def test_only_weights_that_are_trained_are_in_checkpoints(saro, tmp_path):
    """Of a multimodal model these are the text model's."""
    tiny_config("qwen3_vl").save_pretrained(tmp_path / "model")
    found = plan(saro, "--model.name", str(tmp_path / "model"), "--tokens", "100", "--model.method", "full")
    cost = found["layouts"][0]["cost"]
    assert cost["trained"] < cost["weights"]
    assert found["checkpoint_bytes"] == 3 * 3 * cost["trained"]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (
            "qwen3_moe",
            [],
            "some of its layers have no experts, and a plan needs layers that are alike; use saro doctor",
        ),
        ("gpt_oss", ["--model.method", "full"], "is a mixture of experts, whose router needs an auxiliary loss"),
    ],
)
def test_mixtures_that_cannot_be_planned_or_trained_are_refused(saro, tmp_path, kind, arguments, message):
    tiny_config(kind).save_pretrained(tmp_path / "model")
    code, out, err = saro("--model.name", str(tmp_path / "model"), "--tokens", "64", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--card", "h1000"], "--card: unknown card 'h1000'; known are b200, h200, h100, "),
        (["--card", "gtx"], " and cpu; for another card name the one most like it, and give --memory and --rate"),
        (["--records", "5"], "--records needs --tokens, the length of a record; or leave both out to read data.train"),
        (["--tokens", "5000"], "--tokens is 5000, and a pack holds 2048; raise --data.pack_tokens"),
        (["--gpus", "0"], "--gpus is 0; it must be at least 1"),
        (["--model.attention", "varlen", "--model.dtype", "float32"], "needs CUDA and bfloat16; set --model.attention"),
        (["--model.name", "./nothing"], "./nothing: "),
        (
            ["--preference.beta", "0.5"],
            "--preference is for pairs, and the plan for RW; add --stage srpo, or leave it out",
        ),
    ],
)
def test_a_plan_that_cannot_be_made_ends_in_one_line(saro, config_only, arguments, message):
    known = [] if {"--records", "--tokens"} & {*arguments} else ["--tokens", "64"]
    code, out, err = saro("--model.name", config_only, *known, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_without_records_and_a_tokenizer_the_user_is_asked_for_lengths(saro, config_only, records_file, examples):
    code, _, err = saro("--model.name", config_only, "--data.train", "gone.jsonl")
    assert (code, err) == (
        2,
        "error: data.train: gone.jsonl is not there; name another file, or give the average length of a record with --tokens\n",
    )
    code, _, err = saro("--model.name", config_only, "--data.train", records_file(examples))
    assert code == 2
    assert "its tokenizer is needed to read data.train" in err


def test_eight_bit_optimizers_are_planned_without_sharding(saro, config_only):
    arguments = ["--model.name", config_only, "--tokens", "64", "--gpus", "2", "--train.optimizer", "adamw8bit"]
    found = plan(saro, *arguments)
    assert [layout["name"] for layout in found["layouts"]] == ["alone", "DDP"]
    _, out, _ = saro(*arguments)
    assert "FSDP2 is left out: train.optimizer adamw8bit works on whole parameters" in out


def test_layers_are_recomputed_as_memory_needs_it(saro, config_only):
    arguments = ["--model.name", config_only, "--tokens", "64", "--model.gradient_checkpointing", "auto"]
    assert plan(saro, *arguments)["layouts"][0]["recomputed"] == 0
    (small,) = plan(saro, *arguments, "--memory", "0.001")["layouts"]
    assert (small["recomputed"], small["fits"]) == (2, False)


def test_the_name_of_a_card_may_be_in_capitals(saro, config_only):
    assert plan(saro, "--model.name", config_only, "--tokens", "64", "--card", "RTX4090")["card"]["name"] == "rtx4090"


def test_parts_that_need_no_memory_have_no_row(saro, config_only):
    _, out, _ = saro("--model.name", config_only, "--tokens", "64", "--model.method", "full")
    assert "weights, GiB" in out
    assert "adapters, GiB" not in out
    assert "gathered, GiB" not in out


def test_a_cpu_has_the_rate_that_is_measured_now(saro, config_only):
    found = plan(saro, "--model.name", config_only, "--tokens", "64", "--card", "cpu", "--model.method", "full")
    assert found["card"]["source"] == "measured on this machine"
    assert found["card"]["operations"] > 1e8
    (layout,) = found["layouts"]
    cost = layout["cost"]
    held = sum(cost[part] for part in ("weights", "adapters", "gradients", "optimizer"))
    # The C library keeps freed memory between the tensors.
    assert layout["peak"] == held + layout["working"] + cost["gaps"]
    assert 0.2 * layout["working"] < cost["gaps"] < 0.4 * layout["working"]


# Exchanges between cards

# Four cards on two machines. A card's link has 8 bytes per second, its network 2: the two of a machine have 4.
LINK = Card(memory=1, operations=1, bandwidth=1e9, link=8, source="dense rates")
NETWORK = 2
TRAINED = 12


def step_seconds(shard: str, steps: list[list[int]], *, processes=4, pack_seconds=0.0, adapters=0) -> float:
    """Return the seconds of a step in which packs of 100 tokens take these seconds, two thirds of them the backward.

    A rank holds 20 bytes of frozen weights beside those that are trained.
    """
    frozen = 20 if adapters else 0
    cost = StepCost(
        weights=frozen or TRAINED, adapters=adapters, trained=TRAINED, gradients=0, optimizer=0, gathered=0,
        layers=0, head=0, phases=(0,), tokens=100, operations=300, forward_operations=100,
    )  # fmt: skip
    records = Records(Workload("rw", 100), steps, None, None)
    ranks = Ranks(shard, processes, 2)

    def seconds(operations: float) -> float:
        return operations / 300 * pack_seconds

    return _step_seconds(records, ranks, 100, cost, seconds, seconds, LINK, NETWORK)[0]


@pytest.mark.parametrize(
    ("shard", "processes", "expected"),
    [
        # An all-reduce moves 2 (n - 1) / n of the gradients.
        ("none", 2, 2 * 1 / 2 * TRAINED / 8),
        # Across machines, by the network of both cards.
        ("none", 4, 2 * 3 / 4 * TRAINED / 4),
        # Two gathers of weights, and one sum of gradients, of n - 1 other parts.
        ("full", 2, 3 * 1 * TRAINED / 8),
        ("full", 4, 3 * 3 * TRAINED / 4),
        # The same within a machine, and an all-reduce of a part between two machines.
        ("hybrid", 4, 3 * 1 * TRAINED / 8 + 2 * 1 / 2 * TRAINED / 2),
    ],
)
def test_exchanges_take_the_bytes_and_the_links_of_rings(shard, processes, expected):
    assert step_seconds(shard, [[100] * processes], processes=processes) == pytest.approx(expected)


def test_full_fine_tuning_under_sharding_exchanges_gradients_in_every_pack_and_lora_in_the_last():
    packs = [[100] * 8]  # two on each rank
    assert step_seconds("full", packs) == pytest.approx(2 * 3 * 3 * TRAINED / 4)
    gather, gradients = 2 * 3 * (20 + TRAINED) / 4, 3 * TRAINED / 4
    assert step_seconds("full", packs, adapters=TRAINED) == pytest.approx(2 * gather + gradients)


def test_ddp_exchanges_while_the_last_pack_is_in_its_backward():
    packs = [[100] * 8]
    exchange = 2 * 3 / 4 * TRAINED / 4
    assert step_seconds("none", packs, pack_seconds=3.0) == pytest.approx(2 * 3.0 + exchange - 2.0)
    assert step_seconds("none", packs, pack_seconds=9.0) == pytest.approx(2 * 9.0)


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_figures_of_the_right_size_and_their_source(name):
    card = CARDS[name]
    assert 16e9 <= card.memory <= 300e9
    assert 40e12 <= card.operations <= 3e15
    assert 0.2e12 <= card.bandwidth <= 10e12
    assert 16e9 <= card.link <= 1e12
    assert card.is_gpu
    assert "dense rates" in card.source
    assert re.search(rf"\b{name}\b", Options.__doc__), "--help lists it"


def measured_steps() -> list[dict]:
    """Steps of this project's own layers on an H100, without recomputation."""
    cases = json.loads(H100.read_text())["step_matrix"]["cases"]
    return [case for case in cases if case["layers"] == "saro" and not case["attention"] and not case["checkpointing"]]


@pytest.mark.parametrize("case", measured_steps(), ids=lambda case: f"{case['pack_tokens']} tokens")
def test_the_time_of_a_pack_is_that_which_an_h100_measured(case):
    config = tiny_config(num_hidden_layers=32)
    setting = Setting(config, ModelConfig(gradient_checkpointing=0), torch.bfloat16, is_gpu=True)
    operations = sum(case["operations"].values())
    assert _pack_seconds(setting, CARDS["h100"], None)(operations) == pytest.approx(case["seconds"], rel=0.15)
    if case["pack_tokens"] >= 8192:
        assert operations / case["seconds"] / CARDS["h100"].operations == pytest.approx(GPU_SHARE, rel=0.02)
