"""Tests recipes/srpo.py from end to end, in processes: its files, its output, and how it stops and resumes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from run_files import ROOT, TIMING, assert_same_run, metrics_of, scored_lines, steps_logged, wait_for, weights_of
from safetensors.torch import load_file
from sets import with_other_prompts

from saro.config import PAIR_KINDS
from saro.demo import find_start


def margins_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "margins.jsonl").read_text().splitlines()]


# The files and output of a run.


def test_a_run_from_the_base_model_writes_all_files(srpo, srpo_arguments, tmp_path):
    done = srpo(*srpo_arguments(train_eval_every=2, train_samples=2, train_sample_tokens=3, train_max_steps=6))
    assert done.code == 0, done.err
    assert done.out == ""
    run = tmp_path / "run"
    names = {p.name for p in run.iterdir() if not p.name.startswith(".")}
    written = {"config.yaml", "manifest.json", "metrics.jsonl", "margins.jsonl", "before.json", "after.json"}
    assert names == written | {"checkpoints", "final"}

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "grad_norm" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    own = {"loss", "chosen_fell"} | {f"rewards/{n}" for n in ("chosen", "rejected", "margins", "accuracies")}
    own |= {f"{n}/{side}" for n in ("logps", "delta_logps") for side in ("chosen", "rejected")}
    own |= {f"delta_logps/{side}/{part}" for side in ("chosen", "rejected") for part in ("think", "answer")}
    shared = {"step", "grad_norm", "lr", "epoch", "changed_parameters", *TIMING}
    assert set(steps[0]) >= shared | own
    assert set(steps[0]) - shared <= own | {f"{kind}/{name}" for kind in PAIR_KINDS for name in own}
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert steps[-1]["loss"] < 0.5
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [2, 4]

    rows = margins_of(run)
    assert [(row["step"], row["id"]) for row in rows] == [(s, f"p{i}") for s in (0, 2, 4, 6) for i in range(5)]
    assert all(abs(row["margin"]) < 1e-3 for row in rows[:5])
    after = json.loads((run / "after.json").read_text())["metrics"]
    assert sum(row["margin"] for row in rows[-5:]) / 5 == pytest.approx(after["eval/rewards/margins"] / 0.1, rel=1e-4)

    assert "loss 0.6931 at the start; log-probs differ from the reference by" in done.err
    assert "Held-out pairs" in done.err
    last = [line for line in done.err.splitlines() if line.strip()][-1]
    assert last.startswith("6 steps, ")
    # Records are named by id; their text must not appear in a log.
    assert "Count to" not in done.err
    own = done.err.replace(str(tmp_path), "").replace("head tiled-torch", "").lower()
    for word in ("warn", "deprecat", "torch", "transformers", "traceback"):
        assert word not in own, word


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_it_trains_the_adapter_of_stage_1_further_as_one_adapter_on_the_original_base(
    srpo, recipes, rw_arguments, srpo_arguments, tmp_path, tiny_model, method
):
    trained = rw_arguments(train_output=tmp_path / "rw", model_lora_rank=4, model_method=method)
    assert recipes.run(*trained).code == 0
    rw_final = tmp_path / "rw" / "final"
    done = srpo(*srpo_arguments(model_name=rw_final, model_method=method))
    assert done.code == 0, done.err
    final = tmp_path / "run" / "final"
    config = json.loads((final / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, tiny_model())
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (rw_final, final))
    assert before.keys() == after.keys()
    moved = max((before[name] - after[name]).abs().max() for name in before)
    assert 0 < moved < 0.2
    assert list(AutoPeftModelForCausalLM.from_pretrained(final).peft_config) == ["default"]


def test_a_method_other_than_that_of_stage_1_is_refused(srpo, srpo_arguments, rw_final):
    """A 4-bit base is not the base that the adapter was trained on."""
    done = srpo(*srpo_arguments(model_name=rw_final, model_method="qlora"))
    assert done.code == 2
    assert "was trained with --model.method lora, on another base than qlora gives it" in done.err


def test_full_fine_tuning_starts_from_a_full_model(srpo, recipes, rw_arguments, srpo_arguments, tmp_path):
    done = recipes.run(*rw_arguments(train_output=tmp_path / "rw", model_method="full", train_lr=1e-4))
    assert done.code == 0, done.err
    done = srpo(*srpo_arguments(model_name=tmp_path / "rw" / "final", model_method="full", train_lr=1e-3))
    assert done.code == 0, done.err
    assert metrics_of(tmp_path / "run")[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_without_arguments_it_starts_from_the_demo_run_of_stage_1_if_there_is_one(srpo, tmp_path, monkeypatch):
    """Stops before the model is loaded: the demo model is not available in every test run."""

    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    assert find_start("demo", said.append) == "demo"
    assert "starting from the base model" in said[0]
    for name, model in (("output/rw", "org/other"), ("output/demo-rw", "demo")):
        (tmp_path / name / "final").mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text(
            json.dumps({"saro": "0.1.0", "template_date": "2024-07-26", "config": {"model": {"name": model}}})
        )
    assert find_start("demo", said.append) == "output/demo-rw/final"
    assert "output/demo-rw/final" in said[1]
    assert find_start("org/own", said.append) == "org/own"
    assert len(said) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"preference_loss": "hinge"},
        {"preference_loss": "ipo", "preference_length_normalize": True},
        {"preference_loss": "robust", "preference_label_smoothing": 0.1},
        {"preference_nll": 0.5},
        {"preference_scored": "divergent"},
        {"preference_scored": "divergent", "preference_nll": 0.5},
        {"preference_loss": "simpo", "preference_beta": 2},
        {"preference_loss": "orpo"},
        {"preference_loss": "kto"},
        {"data_group_by_prompt": False},
        {"data_heldout": "[]"},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()),
)
def test_every_option_of_the_loss_trains(srpo, srpo_arguments, tmp_path, cache, options):
    done = srpo(*srpo_arguments(**options))
    assert done.code == 0, done.err
    lines = metrics_of(tmp_path / "run")
    assert len(lines) == 4
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"]
    # Only pairs have margins.
    has_margins = "data_heldout" not in options and options.get("preference_loss") != "kto"
    assert (tmp_path / "run" / "margins.jsonl").exists() == has_margins
    # Losses without a reference score none.
    assert (cache / "reference").exists() == (options.get("preference_loss") not in ("simpo", "orpo"))


@pytest.mark.parametrize("scored", ["all", "divergent"])
def test_open_sides_and_forms_train_from_file_to_table(srpo, srpo_arguments, records_file, pairs, tmp_path, scored):
    """Process pairs of data construction: rejected sides without an end, scored from the fork."""
    made = [
        pair
        | {"rejected": {"reasoning": pair["rejected"]["reasoning"], "answer": "", "open": True}}
        | {"meta": {"synth": {"form": ("intervene", "mirror")[i % 2]}}}
        for i, pair in enumerate(pairs)
    ]
    files = {"data_train": json.dumps([records_file(made, "open.jsonl")])}
    files["data_heldout"] = json.dumps([records_file(with_other_prompts(made[:5]), "open-held.jsonl")])
    # The shared beginning of "mirror" ends with a step that the NLL of whole responses would teach.
    done = srpo(*srpo_arguments(**files, preference_scored=scored, preference_nll=0.1 * (scored == "divergent")))
    assert done.code == 0, done.err
    lines = metrics_of(tmp_path / "run")
    assert lines[0]["loss/preference" if scored == "divergent" else "loss"] == pytest.approx(0.6931, abs=1e-4)
    assert lines[-1]["rewards/margins"] > 0
    assert {"intervene/rewards/margins", "mirror/rewards/accuracies"} <= lines[-1].keys()
    assert "intervene: reward margin" in done.err
    assert ("intervene/logps/chosen" in lines[-1]) == (scored == "all")


def test_the_nll_of_shared_wrong_steps_is_refused(srpo, srpo_arguments, records_file, pairs):
    made = [pair | {"meta": {"synth": {"form": "recover" if i == 3 else "intervene"}}} for i, pair in enumerate(pairs)]
    file = json.dumps([records_file(made, "made.jsonl")])
    done = srpo(*srpo_arguments(data_train=file, preference_nll=0.1))
    assert done.code == 2
    assert "would teach the wrong steps that recover pairs have before their fork; give --preference.scored" in done.err


def test_a_warning_is_printed_when_chosen_responses_lose_probability(srpo, srpo_arguments):
    done = srpo(*srpo_arguments(preference_warn_chosen_fell=0.0, train_lr=0.1, train_max_steps=8))
    assert done.code == 0, done.err
    warnings = [line for line in done.err.splitlines() if line.startswith("warning:")]
    assert 1 <= len(warnings) <= 2  # one for the training pairs, one for the held-out ones
    assert "the chosen response has lost probability in" in warnings[0]


DATED = (
    "{{ strftime_now('%d %b %Y') + '\\n' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_prompts_are_those_of_stage_1_on_every_day(srpo, recipes, rw_arguments, srpo_arguments, tmp_path, method):
    """Tags, date and template are those of the run that is continued, so a sweep on another day scores nothing again."""
    (tmp_path / "dated.jinja").write_text(DATED)
    rw = {"data_chat_template": tmp_path / "dated.jinja", "data_template_date": "2020-02-29"}
    rw |= {"data_think_tags": "[<r>, </r>]", "model_method": method, "train_lr": 1e-4, "train_max_steps": 1}
    assert recipes.run(*rw_arguments(train_output=tmp_path / "rw", **rw)).code == 0
    options = {"model_name": tmp_path / "rw" / "final", "model_method": method, "train_max_steps": 1}
    given = srpo(*srpo_arguments(train_output=tmp_path / "given", data_template_date="2020-02-29", **options))
    assert given.code == 0, given.err
    assert scored_lines(given.err) == ["reference: scoring 24 of 24 pairs", "reference: scoring 5 of 5 pairs"]
    done = srpo(*srpo_arguments(**options))
    assert done.code == 0, done.err
    assert scored_lines(done.err) == []
    first, second = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("rw", "run"))
    assert second["template_date"] == "2020-02-29"
    assert second["template"] == first["template"]
    assert second["config"]["data"]["think_tags"] == ["<r>", "</r>"]
    other = srpo(*srpo_arguments("--overwrite", data_template_date="2020-03-01", **options))
    assert (other.code, other.err.count("\n")) == (2, 1)
    assert "data.template_date is 2020-03-01, and the run that trained" in other.err


# The reference.


def test_a_sweep_scores_the_reference_once(srpo, srpo_arguments, tmp_path):
    """Other trainers recompute the reference even if only beta changes."""
    first = srpo(*srpo_arguments(train_output=tmp_path / "first"))
    assert scored_lines(first.err) == ["reference: scoring 24 of 24 pairs", "reference: scoring 5 of 5 pairs"]
    sweep = [{"preference_beta": 0.5}, {"train_lr": 1e-3}, {"preference_loss": "ipo"}, {"train_seed": 3}]
    sweep += [{"data_pack_tokens": 200}, {"train_records_per_step": 3}, {"model_lora_rank": 2}]
    for i, change in enumerate(sweep):
        done = srpo(*srpo_arguments(train_output=tmp_path / str(i), train_max_steps=1, **change))
        assert done.code == 0, done.err
        assert scored_lines(done.err) == [], change


def test_only_added_rows_are_scored(srpo, srpo_arguments, records_file, pairs, tmp_path):
    arguments = srpo_arguments(train_max_steps=1, data_heldout="[]")
    file = records_file(pairs[:10], "pairs.jsonl")
    assert scored_lines(srpo(*arguments).err) == ["reference: scoring 10 of 10 pairs"]
    assert file == records_file(pairs, "pairs.jsonl")
    assert scored_lines(srpo(*arguments, "--overwrite").err) == ["reference: scoring 14 of 24 pairs"]


def test_a_resumed_run_keeps_its_start_although_another_has_appeared(srpo, srpo_arguments, rw_final, tmp_path):
    """The demo starts from the model of stage 1, which may be trained only after this run began."""
    folder = tmp_path / "run"
    assert srpo(*srpo_arguments(model_name=rw_final, train_max_steps=1)).code == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["start"] == str(rw_final)
    manifest["config"]["model"]["name"] = "demo"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = srpo(*srpo_arguments("--resume", model_name="demo", train_max_steps=1))
    assert done.code == 0, done.err


def test_changed_data_is_an_error_before_the_reference_is_scored(srpo, srpo_arguments, records_file, pairs):
    arguments = srpo_arguments(train_max_steps=1)
    assert srpo(*arguments).code == 0
    records_file([*pairs, pairs[0] | {"id": "new", "prompt": "Another?"}], "pairs.jsonl")
    done = srpo(*arguments, "--resume")
    assert done.code == 2
    assert "the data is not what the run began with" in done.err
    assert scored_lines(done.err) == []


def test_the_logged_loss_is_the_minimised_one(srpo, srpo_arguments, tmp_path):
    assert srpo(*srpo_arguments(preference_nll=0.5, train_eval_every=1)).code == 0
    for line in metrics_of(tmp_path / "run"):
        prefix = "eval/" if "eval/loss" in line else ""
        whole = line[f"{prefix}loss/preference"] + 0.5 * line[f"{prefix}loss/nll"]
        assert line[f"{prefix}loss"] == pytest.approx(whole)


def test_another_model_may_be_the_reference(srpo, srpo_arguments, rw_final, tiny_model, tmp_path):
    done = srpo(*srpo_arguments(model_name=rw_final, preference_reference=tiny_model()))
    assert done.code == 0, done.err
    assert "at the start; margin" not in done.err  # the policy is not its reference, so the check does not apply
    before = json.loads((tmp_path / "run" / "before.json").read_text())["metrics"]
    assert abs(before["eval/delta_logps/chosen"]) > 1


# Bad input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": {"reasoning": ["x"], "answer": " "}}, "rejected: answer is empty; write it or drop the record"),
        ({"rejected": "text"}, "chosen is an object; give both sides in one form"),
        ({"chosen": {"answer": "x" * 300}}, "400 tokens, more than the 256 allowed; nothing is cut"),
    ],
)
def test_a_bad_pair_gives_one_line_and_writes_nothing(
    srpo, srpo_arguments, records_file, pairs, tmp_path, change, message
):
    file = records_file([pairs[0], pairs[1] | change], "bad.jsonl")
    done = srpo(*srpo_arguments(data_train=json.dumps([file])))
    assert done.code == 2
    assert done.err.startswith(f"error: {file}:2: ")
    assert message in done.err or ("tokens, more than the 256 allowed" in done.err and "tokens" in message)
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_pair_with_one_side_too_long_is_dropped_and_named(srpo, srpo_arguments, records_file, pairs, tmp_path):
    file = records_file([*pairs[:6], pairs[6] | {"rejected": {"answer": "x" * 300}}], "long.jsonl")
    done = srpo(*srpo_arguments(data_train=json.dumps([file]), data_too_long="drop", train_max_steps=1))
    assert done.code == 0, done.err
    assert "train: 6 pairs" in done.err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["records"]["train"]["dropped"] == ["p6"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preference.bta", "1"], "unknown option --preference.bta; did you mean --preference.beta?"),
        (["--preference.beta", "0"], "preference.beta is 0.0; it must be above 0"),
        (["--preference.label_smoothing", "0.5"], "it must be at least 0 and below 0.5"),
        (
            ["--preference.loss", "hinge", "--preference.label_smoothing", "0.1"],
            "is for sigmoid, robust and simpo, not for hinge",
        ),
        (["--preference.scored", "divergent", "--preference.length_normalize", "true"], "length_normalize needs"),
        (["--preference.loss", "orpo", "--preference.nll", "1"], "leave out --preference.nll, and change beta"),
        (["--preference.loss", "simpo", "--preference.reference", "org/m"], "simpo has no reference; leave out"),
        (["--preference.loss", "simpo", "--preference.scored", "divergent"], "skips rows that simpo needs"),
        (["--preference.loss", "kto", "--preference.nll", "1"], "preference.nll is for losses on pairs, not for kto"),
        (["--preference.gamma", "1"], "preference.gamma is for simpo, not for sigmoid"),
        (["--preference.desirable_weight", "2"], "preference.desirable_weight is for kto, not for sigmoid"),
        (["--preference.warn_chosen_fell", "2"], "a share of the pairs, 0 to 1"),
        (["--preference.reference", ""], "preference.reference is empty; give start, or the folder of a model"),
        (["--data.weights", "{general: 2}"], "unknown kind 'general'; valid are op-cot, pp-cot"),
        (["--data.row_weights", "{answer: 2}"], "data.row_weights is for RW"),
    ],
)
def test_a_wrong_option_gives_one_line(srpo, tmp_path, arguments, message):
    done = srpo(*arguments, "--train.output", tmp_path / "run")
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_examples_of_stage_1_are_refused(srpo, srpo_arguments, records_file, examples):
    file = records_file(examples, "examples.jsonl")
    done = srpo(*srpo_arguments(data_train=json.dumps([file])))
    assert done.code == 2
    assert "makes this an example, not a pair; give examples to stage 1 (RW)" in done.err


# Interruptions.


def test_kill_9_at_any_moment_loses_nothing_but_time(recipes, srpo, srpo_arguments, rw_final, cache, tmp_path):
    options = {"model_name": rw_final, "train_max_steps": 60, "train_epochs": 100, "train_eval_every": 7}
    options |= {"model_lora_dropout": 0.3}
    unbroken = srpo(*srpo_arguments(train_output=tmp_path / "unbroken", **options))
    assert unbroken.code == 0, unbroken.err
    for shard in cache.rglob("shards/*.safetensors"):
        shard.unlink()
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed of the moments: {seed}")
    moments = random.Random(seed)
    for _ in range(8):
        environment = {"SARO_CACHE": str(cache)}
        process = recipes.start(*srpo_arguments("--resume", **options), recipe="srpo", environment=environment)
        if moments.random() < 0.4:
            time.sleep(moments.uniform(0, 1.5))
        else:
            steps = moments.randrange(1, 6)
            wait_for(lambda p=process, n=steps: p.err.count("grad_norm") >= n or "model in" in p.err, process)
            time.sleep(moments.uniform(0, 0.02))
        process.send(signal.SIGKILL)
        assert process.wait().code in (-signal.SIGKILL, 0), process.err
    last = srpo(*srpo_arguments("--resume", **options))
    assert last.code == 0, last.err
    assert_same_run(tmp_path / "unbroken", tmp_path / "run")
    assert margins_of(tmp_path / "run") == margins_of(tmp_path / "unbroken")


def test_sigterm_writes_a_checkpoint_and_the_run_resumes_as_if_uninterrupted(
    recipes, srpo, srpo_arguments, cache, tmp_path
):
    options = {"train_max_steps": 30, "train_epochs": 100, "train_save_every": 0}
    assert srpo(*srpo_arguments(train_output=tmp_path / "unbroken", **options)).code == 0
    process = recipes.start(*srpo_arguments(**options), recipe="srpo", environment={"SARO_CACHE": str(cache)})
    wait_for(lambda: steps_logged(tmp_path / "run") >= 2, process)
    process.send(signal.SIGTERM)
    assert process.wait().code == 143, process.err
    resumed = srpo(*srpo_arguments("--resume", **options))
    assert resumed.code == 0, resumed.err
    assert_same_run(tmp_path / "unbroken", tmp_path / "run")


def test_a_resume_from_another_start_is_refused(srpo, recipes, rw_arguments, srpo_arguments, rw_final, tmp_path):
    assert srpo(*srpo_arguments(model_name=rw_final, train_max_steps=1)).code == 0
    again = rw_arguments("--overwrite", train_output=tmp_path / "rw", model_lora_rank=4, train_seed=5)
    assert recipes.run(*again).code == 0
    done = srpo(*srpo_arguments("--resume", model_name=rw_final, train_max_steps=1))
    assert done.code == 2
    assert "the model is not what the run began with; restore it, or start over with --overwrite" in done.err


# Several processes.


@pytest.mark.parametrize(
    ("loss", "records_per_step"), [("sigmoid", 1), ("sigmoid", 5), ("kto", 5), ("orpo", 5), ("simpo", 5)]
)
def test_two_processes_take_the_same_steps_as_one(
    recipes, srpo, srpo_arguments, cache, tmp_path, loss, records_per_step
):
    """Each scores its share of the reference, which may be empty. The margins of all pairs are written once."""
    options = {"train_max_steps": 3, "train_eval_every": 1, "train_records_per_step": records_per_step}
    options["preference_loss"] = loss
    assert srpo(*srpo_arguments(train_output=tmp_path / "one", **options)).code == 0
    for shard in cache.rglob("shards/*.safetensors"):
        shard.unlink()
    ranks = recipes.run_ranks(2, *srpo_arguments(**options), recipe="srpo")
    assert [p.code for p in ranks] == [0, 0], ranks[0].err + ranks[1].err
    assert ranks[1].out + ranks[1].err == ""
    one, two = (tmp_path / name for name in ("one", "run"))
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        for name in a:
            if name.endswith("rewards/accuracies") and abs(a[name.replace("accuracies", "margins")]) < 1e-3:
                # Before the first step, margins are zero up to rounding, which decides their sign.
                continue
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-2 if name == "changed_parameters" else 1e-3), name
    if loss == "kto":
        assert metrics_of(one)[-1]["kl"] > 0.1
        return
    for a, b in zip(margins_of(one), margins_of(two), strict=True):
        assert (a["step"], a["id"]) == (b["step"], b["id"])
        assert b["margin"] == pytest.approx(a["margin"], abs=1e-2)


def test_it_runs_under_accelerate_launch(srpo_arguments, environment, cache, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [*launcher, "recipes/srpo.py", *srpo_arguments(train_max_steps=2)],
        cwd=ROOT,
        env=environment | {"SARO_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(torch.isfinite(w).all() for w in weights_of(tmp_path / "run").values())
