"""Tests recipes/rw.py from end to end, in processes: its files, its output, and how it stops and resumes."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from run_files import ROOT, TIMING, assert_same_run, metrics_of, steps_logged, wait_for, weights_of
from safetensors.torch import load_file
from sets import with_other_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

from saro.config import DataConfig
from saro.data.chat_format import ChatFormat
from saro.data.encode_files import encode_files

BORDERS = "┏━┳┓┃┡╇┩│└─┴┘├┼┤"


# The files and output of a run.


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_model, recipes, examples):
    """Return a function that gives (folder, process) of a finished run by method. Each is made once."""
    made: dict[str, tuple[Path, object]] = {}

    def get(method: str) -> tuple[Path, object]:
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            for name, records in (("train", examples), ("heldout", with_other_prompts(examples[:5]))):
                (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
            options = {
                "model.name": tiny_model(),
                "model.method": method,
                "data.train": json.dumps([str(folder / "train.jsonl")]),
                "data.heldout": json.dumps([str(folder / "heldout.jsonl")]),
                "data.pack_tokens": 256,
                "train.output": folder / "run",
                "train.records_per_step": 8,
                "train.lr": 1e-2,
                "train.epochs": 2,
                "train.eval_every": 2,
                "train.save_every": 2,
                "train.samples": 3,
                "train.sample_tokens": 6,
                "train.trackers": '["tensorboard"]',
                "train.track_samples": "true",
            }
            done = recipes.run(*(part for k, v in options.items() for part in (f"--{k}", v)))
            assert done.code == 0, done.err
            made[method] = folder / "run", done
        return made[method]

    return get


def test_the_output_folder_holds_the_documented_files(finished):
    run, _ = finished("lora")
    names = {p.name for p in run.iterdir()}
    assert {"config.yaml", "manifest.json", "metrics.jsonl", "checkpoints", "final"} <= names
    assert [n for n in names if n.startswith(".")] == [".lock"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000004", "step_000006"]


def test_config_yaml_holds_every_option_and_starts_the_same_run(finished, recipes, tmp_path):
    run, _ = finished("lora")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["train"]["lr"] == 1e-2
    assert config["model"]["gradient_checkpointing"] is False
    done = recipes.run("--config", run / "config.yaml", "--train.output", tmp_path / "again")
    assert done.code == 0, done.err
    assert_same_run(run, tmp_path / "again")


def test_the_manifest_names_the_inputs_of_the_run(finished):
    run, _ = finished("lora")
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["machine"]["processes"] == 1
    assert len(manifest["data"]) == 2
    for digest in (*manifest["data"].values(), *manifest["model"]["files"].values(), manifest["code"]):
        assert re.fullmatch("[0-9a-f]{64}", digest)
    assert manifest["records"]["train"]["records"] == {"general": 16, "safety": 8}
    assert manifest["versions"]["torch"]
    assert manifest["config"]["train"]["records_per_step"] == 8


def test_metrics_have_their_documented_names(finished):
    run, _ = finished("lora")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    kinds = {f"loss/{n}" for n in ("general", "safety", "think", "answer", "stop")}
    names = {"step", "loss", "grad_norm", "lr", "epoch", "changed_parameters", *TIMING} | kinds
    assert all(line.keys() == names for line in steps)
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [2, 4]
    of_loss = {"loss"} | kinds
    of_tokens = {n.replace("loss", other) for n in of_loss for other in ("loss", "entropy", "mean_token_accuracy")}
    assert all(line.keys() == {"step"} | {f"eval/{n}" for n in of_tokens} for line in evaluations)
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert steps[-1]["epoch"] == 2


def test_weights_of_tokens_change_the_loss_of_training_and_no_other_figure(recipes, rw_arguments, tmp_path):
    weights = {"data_row_weights": "{think: 0, stop: 0, safety/stop: 1}", "train_max_steps": 1, "train_eval_every": 0}
    done = recipes.run(*rw_arguments(**weights, train_output=tmp_path / "weighted"))
    assert done.code == 0, done.err
    assert recipes.run(*rw_arguments(train_output=tmp_path / "plain", train_max_steps=1, train_eval_every=0)).code == 0
    (weighted,), (plain,) = (metrics_of(tmp_path / name) for name in ("weighted", "plain"))
    assert weighted["loss/unweighted"] == pytest.approx(plain["loss"])
    assert weighted["loss"] != pytest.approx(plain["loss"], rel=1e-4)
    for part in ("think", "answer", "stop", "general", "safety"):
        assert weighted[f"loss/{part}"] == pytest.approx(plain[f"loss/{part}"])
    before = [json.loads((tmp_path / name / "before.json").read_text())["metrics"] for name in ("weighted", "plain")]
    assert before[0] == pytest.approx(before[1])


def test_the_final_table_shows_the_two_evaluations(finished):
    run, done = finished("lora")
    before, after = (json.loads((run / f"{n}.json").read_text())["metrics"] for n in ("before", "after"))
    shown = [line.strip("│ ").split("│") for line in done.err.splitlines() if "→" in line and "│" in line]
    assert {row[0].strip() for row in shown} == {"all", "general", "safety", "think", "answer", "stop"}
    (everything,) = (row for row in shown if row[0].strip() == "all")
    for cell, name, form in zip(
        everything[1:], ("loss", "entropy", "mean_token_accuracy"), (".3f", ".3f", ".1%"), strict=True
    ):
        assert cell.strip() == f"{before[f'eval/{name}']:{form}} → {after[f'eval/{name}']:{form}}"


def test_the_tensorboard_tracker_writes_events(finished):
    run, _ = finished("lora")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = [EventAccumulator(str(file)).Reload() for file in run.rglob("events.out.tfevents*")]
    (events,) = (e for e in found if "loss" in e.Tags()["scalars"])
    samples = [tag for tag in events.Tags()["tensors"] if tag.startswith("samples/")]
    assert len(samples) == 3
    assert [event.step for event in events.Tensors(samples[0])] == [0, 6], "before training and after"
    assert {"loss", "grad_norm", "lr", "eval/loss", "eval/loss/safety"} <= set(events.Tags()["scalars"])
    expected = [line["loss"] for line in metrics_of(run) if "loss" in line]
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(expected, rel=1e-6)


def test_the_terminal_shows_only_our_own_lines(finished, tiny_model):
    for method in ("full", "lora", "qlora"):
        run, done = finished(method)
        assert done.out == ""
        assert "step 6/6" in done.err
        assert "Held-out tokens of" in done.err
        own = done.err.replace(str(run), "").replace(tiny_model(), "").replace("head tiled-torch", "")
        assert "attention sdpa, head tiled-torch; checking" in done.err
        for word in ("warn", "Warning", "deprecat", "torch", "transformers", "accelerate", "peft", "bitsandbytes"):
            assert word.lower() not in own.lower(), word
        assert "Traceback" not in own
        assert "it/s" not in own
        last = [line for line in own.splitlines() if line.strip()][-1]
        assert last.startswith("6 steps, ")


def test_records_are_named_by_id_and_not_shown(finished):
    """Safety data is harmful text, which must not appear in a log."""
    _, done = finished("lora")
    assert "r0" in done.err
    assert "Count to" not in done.err


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_final_model_loads_elsewhere_and_gives_the_log_probs_of_the_run(finished, method, tiny_model):
    """Compares the held-out loss of transformers' own forward, in fp32, with that in after.json."""
    run, _ = finished(method)
    after = json.loads((run / "after.json").read_text())["metrics"]
    options = {} if method != "qlora" else {"quantization_config": quantization()}
    kind = AutoModelForCausalLM if method == "full" else AutoPeftModelForCausalLM
    model = kind.from_pretrained(run / "final", dtype=torch.float32, **options).eval()
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    chat = ChatFormat(tokenizer, frozenset([tokenizer.eos_token_id]), __import__("datetime").date(2024, 1, 1))
    data = encode_files([str(run.parent / "heldout.jsonl")], chat, DataConfig(pack_tokens=256))
    total = scored = 0.0
    with torch.no_grad():
        for i in range(len(data)):
            s = data.sequence(i)
            ids = torch.tensor(s.tokens.astype("int64"))
            logps = model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
            logps = logps.gather(1, ids[1:, None])[s.scored_from - 1 :, 0]
            total, scored = total - logps.sum().item(), scored + len(logps)
    assert total / scored == pytest.approx(after["eval/loss"], abs=2e-6)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    ids = torch.tensor([prompt["input_ids"]])
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def quantization():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head"],
    )


def test_the_final_adapter_names_its_base_model(finished, tiny_model):
    run, _ = finished("lora")
    assert json.loads((run / "final" / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny_model()


def test_training_lowers_the_held_out_loss_of_each_kind(finished):
    for method in ("full", "lora", "qlora"):
        run, _ = finished(method)
        measured = [json.loads((run / f"{n}.json").read_text()) for n in ("before", "after")]
        before, after = (m["metrics"] for m in measured)
        assert all(after[n] < before[n] for n in before if n.startswith("eval/loss"))
        assert after["eval/mean_token_accuracy"] > before["eval/mean_token_accuracy"]
        assert [len(m["answers"]) for m in measured] == [3, 3]


# Overwriting and resuming.


def test_a_folder_with_a_run_is_not_touched_without_a_flag(finished, recipes):
    run, _ = finished("full")
    files = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    done = recipes.run("--config", run / "config.yaml")
    assert done.code == 2
    assert done.err == f"error: {run}: holds a run already; add --resume to continue it, or --overwrite to start over\n"
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == files


def test_overwrite_starts_again(recipes, rw_arguments, tmp_path):
    assert recipes.run(*rw_arguments(train_max_steps=3)).code == 0
    done = recipes.run(*rw_arguments("--overwrite", train_max_steps=2))
    assert done.code == 0, done.err
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_000001", "step_000002"]


def test_resuming_a_finished_run_changes_nothing(recipes, rw_arguments, tmp_path):
    assert recipes.run(*rw_arguments(train_samples=2, train_sample_tokens=3)).code == 0
    weights, metrics = weights_of(tmp_path / "run"), metrics_of(tmp_path / "run")
    done = recipes.run(*rw_arguments("--resume", train_samples=2, train_sample_tokens=3))
    assert done.code == 0, done.err
    assert metrics_of(tmp_path / "run") == metrics
    assert all(torch.equal(w, weights[n]) for n, w in weights_of(tmp_path / "run").items())


def test_resume_without_a_run_starts_one(recipes, rw_arguments, tmp_path):
    """One command line can then be used in a loop, or by a cluster that restarts jobs."""
    assert recipes.run(*rw_arguments("--resume")).code == 0
    assert len(metrics_of(tmp_path / "run")) == 4


@pytest.mark.parametrize("samples", [0, 1, 4])
def test_a_resumed_run_may_use_a_different_number_of_samples(recipes, rw_arguments, samples):
    assert recipes.run(*rw_arguments(train_samples=2, train_sample_tokens=2, train_max_steps=1)).code == 0
    done = recipes.run(*rw_arguments("--resume", train_samples=samples, train_sample_tokens=2, train_max_steps=1))
    assert done.code == 0, done.err


def test_a_run_begun_in_bfloat16_is_resumed_in_it_without_being_told(recipes, rw_arguments, tmp_path):
    def of(folder: str, *flags: str, **options: object) -> list[str]:
        return rw_arguments(*flags, train_output=tmp_path / folder, **options)

    parts = [
        recipes.run(*of("parts", model_dtype="bfloat16", train_max_steps=2, train_schedule="constant")),
        recipes.run(*of("parts", "--resume", train_max_steps=4, train_schedule="constant")),
    ]
    straight = recipes.run(*of("straight", model_dtype="bfloat16", train_schedule="constant"))
    assert [p.code for p in (*parts, straight)] == [0, 0, 0], parts[1].err
    assert_same_run(tmp_path / "straight", tmp_path / "parts")
    manifest = json.loads((tmp_path / "parts" / "manifest.json").read_text())
    assert manifest["config"]["model"]["dtype"] == "bfloat16"


def test_a_resume_with_other_options_is_refused(recipes, rw_arguments, tmp_path):
    assert recipes.run(*rw_arguments(train_max_steps=1)).code == 0
    done = recipes.run(*rw_arguments("--resume", train_max_steps=1, train_lr=1e-3))
    assert done.code == 2
    assert (
        "the run began with train.lr 0.01, not 0.001; resume with the same, or start over with --overwrite" in done.err
    )


def test_a_run_continues_with_smaller_packs_from_files_that_have_moved_and_for_longer(
    recipes, rw_arguments, records_file, examples, tmp_path
):
    """After an out-of-memory, --resume accepts what the message advises. Results differ by rounding."""
    # On a constant schedule, the first steps are those of a longer run.
    options = {"train_schedule": "constant", "train_warmup": 0}
    unbroken = recipes.run(*rw_arguments(train_output=tmp_path / "unbroken", train_max_steps=6, **options))
    assert unbroken.code == 0, unbroken.err
    assert recipes.run(*rw_arguments(train_max_steps=3, **options)).code == 0
    stale = json.loads((tmp_path / "run" / "after.json").read_text())
    sets = {"train": examples, "heldout": with_other_prompts(examples[:5])}
    files = {name: records_file(records, f"moved-{name}.jsonl") for name, records in sets.items()}
    changed = {
        "train_max_steps": 6,
        "data_pack_tokens": 120,
        "model_gradient_checkpointing": True,
        "data_train": json.dumps([files["train"]]),
        "data_heldout": json.dumps([files["heldout"]]),
    }
    done = recipes.run(*rw_arguments("--resume", **options | changed))
    assert done.code == 0, done.err
    assert "resuming after step 3 of 6; learning rate 0.01, constant over 6 steps" in done.err
    assert "data.pack_tokens 256 -> 120" in done.err
    for one, two in zip(metrics_of(tmp_path / "unbroken"), metrics_of(tmp_path / "run"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
    after, expected = (json.loads((tmp_path / n / "after.json").read_text()) for n in ("run", "unbroken"))
    assert after["metrics"] == pytest.approx(expected["metrics"], abs=1e-4)
    assert after != stale
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["resumed"][0]["train.max_steps"] == [3, 6]
    assert manifest["config"]["data"]["pack_tokens"] == 120


def test_a_pack_smaller_than_the_longest_record_is_refused_on_resume_too(recipes, rw_arguments):
    assert recipes.run(*rw_arguments(train_max_steps=1)).code == 0
    done = recipes.run(*rw_arguments("--resume", train_max_steps=1, data_pack_tokens=100))
    assert done.code == 2
    assert "tokens, more than the 100 allowed; nothing is cut: raise --data.pack_tokens" in done.err
    done = recipes.run(*rw_arguments("--resume", train_max_steps=1, data_pack_tokens=100, data_too_long="drop"))
    assert done.code == 2
    assert "--data.pack_tokens and --data.too_long now leave out" in done.err


def test_a_resume_with_other_data_is_refused(recipes, rw_arguments, records_file, examples):
    assert recipes.run(*rw_arguments(train_max_steps=1)).code == 0
    arguments = rw_arguments("--resume", train_max_steps=1)
    records_file(examples[:-1], "train.jsonl")
    done = recipes.run(*arguments)
    assert done.code == 2
    assert "the data is not what the run began with; restore it, or start over with --overwrite" in done.err


# Interruptions.


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint_and_the_run_resumes_as_if_uninterrupted(
    recipes, rw_arguments, tmp_path, number, code
):
    options = {"train_max_steps": 40, "train_epochs": 100, "train_save_every": 0, "model_lora_dropout": 0.3}
    assert recipes.run(*rw_arguments(train_output=tmp_path / "unbroken", **options)).code == 0
    process = recipes.start(*rw_arguments(**options))
    wait_for(lambda: steps_logged(tmp_path / "run") >= 2, process)
    process.send(number)
    assert process.wait().code == code, process.err
    found = re.search(r"stopped after step (\d+) of 40; continue with --resume", process.err)
    assert found, process.err
    step = int(found[1])
    assert 2 <= step < 40
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step_{step:06d}"]
    assert not (tmp_path / "run" / "final").exists()
    assert "Traceback" not in process.err

    resumed = recipes.run(*rw_arguments("--resume", **options))
    assert resumed.code == 0, resumed.err
    assert f"resuming after step {step} of 40" in resumed.err
    assert_same_run(tmp_path / "unbroken", tmp_path / "run")


def test_ctrl_c_while_the_model_loads_ends_at_once_without_a_traceback(recipes, rw_arguments, tmp_path):
    process = recipes.start(*rw_arguments())
    wait_for(lambda: "train: 24 records" in process.err, process)
    process.send(signal.SIGINT)
    assert process.wait().code == 130
    assert "Traceback" not in process.err


@pytest.mark.parametrize(
    ("kills", "options"),
    [
        (10, {"model_method": "lora", "model_lora_dropout": 0.3}),
        (4, {"model_method": "full", "train_optimizer": "adamw8bit"}),
    ],
    ids=["lora", "full, 8 bit"],
)
def test_kill_9_at_any_moment_loses_nothing_but_time(recipes, rw_arguments, tmp_path, kills, options):
    # More steps than are made until the last kill, on a machine on which they are not much faster.
    steps = 12 * kills
    options = {"train_max_steps": steps, "train_epochs": 100, "train_eval_every": 7} | options
    unbroken = recipes.run(*rw_arguments(train_output=tmp_path / "unbroken", **options))
    assert unbroken.code == 0, unbroken.err
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed of the moments: {seed}")
    moments = random.Random(seed)
    killed = 0
    for _ in range(kills):
        process = recipes.start(*rw_arguments("--resume", **options))
        if moments.random() < 0.3:  # kill it while it starts, or soon after
            time.sleep(moments.uniform(0, 0.7))
        else:
            made = moments.randrange(1, 6)
            # On a fast machine the run may finish before all the kills.
            wait_for(lambda p=process, n=made: p.err.count("grad_norm") >= n or "model in" in p.err, process)
            time.sleep(moments.uniform(0, 0.02))
        process.send(signal.SIGKILL)
        assert process.wait().code in (-signal.SIGKILL, 0), process.err
        killed += process.code != 0
    assert killed >= min(kills, 5)
    last = recipes.run(*rw_arguments("--resume", **options))
    assert last.code == 0, last.err
    assert_same_run(tmp_path / "unbroken", tmp_path / "run")
    assert [line["step"] for line in metrics_of(tmp_path / "run") if "loss" in line] == list(range(1, steps + 1))
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [f"step_{steps - 1:06d}", f"step_{steps:06d}"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a child that its parent died")
def test_training_ends_with_a_checkpoint_when_the_launcher_is_killed(rw_arguments, tmp_path, environment):
    """`accelerate launch` of one process does not pass signals on, so its child would keep training unnoticed."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    arguments = rw_arguments(train_max_steps=5000, train_epochs=5000, train_save_every=0, train_samples=0)
    with open(tmp_path / "err", "w+") as err:
        process = subprocess.Popen([*launcher, "recipes/rw.py", *arguments], cwd=ROOT, env=environment, stderr=err)
        deadline = time.monotonic() + 120
        while "step 2/" not in (tmp_path / "err").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        (child,) = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        gone, _ = psutil.wait_procs([child], timeout=60)
        text = (tmp_path / "err").read_text()
    assert gone, text
    assert "continue with --resume" in text
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


# Several processes.


def test_two_processes_under_accelerate_launch(rw_arguments, tmp_path, environment, recipes):
    """Uses the real launcher, once. The numbers must equal those of one process."""
    options = {"train_max_steps": 3, "train_eval_every": 1, "train_records_per_step": 5, "train_samples": 1}
    options |= {"train_sample_tokens": 2}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*launcher, "recipes/rw.py", *rw_arguments(**options)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert json.loads((run / "manifest.json").read_text())["machine"]["processes"] == 2
    assert done.stderr.count("step 3/3") == 1
    assert "Warning" not in done.stderr.replace("FutureWarning", "")

    assert recipes.run(*rw_arguments(train_output=tmp_path / "one", **options)).code == 0
    for one, two in zip(metrics_of(tmp_path / "one"), metrics_of(run), strict=True):
        assert one.keys() == two.keys()
        for name in one:
            # The share of changed weights depends on momenta that pass through zero.
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-2 if name == "changed_parameters" else 1e-6)
    for name in ("before", "after"):
        one, two = (json.loads((folder / f"{name}.json").read_text())["metrics"] for folder in (tmp_path / "one", run))
        assert two == pytest.approx(one, abs=1e-6 if name == "before" else 1e-4)


def test_two_processes_resume_bit_for_bit_after_a_stop(recipes, rw_arguments, tmp_path):
    """One of them has no record in any step, and stops because the other was told to stop."""
    options = {"train_max_steps": 30, "train_records_per_step": 1, "train_save_every": 0, "train_epochs": 2}
    unbroken = recipes.run_ranks(2, *rw_arguments(train_output=tmp_path / "unbroken", **options))
    assert [p.code for p in unbroken] == [0, 0], unbroken[0].err + unbroken[1].err
    assert unbroken[1].out + unbroken[1].err == ""

    ranks = recipes.start_ranks(2, *rw_arguments(**options))
    wait_for(lambda: steps_logged(tmp_path / "run") >= 2, ranks[0])
    ranks[1].send(signal.SIGTERM)
    assert [p.wait().code for p in ranks] == [143, 143], ranks[0].err
    step = max((tmp_path / "run" / "checkpoints").iterdir()).name
    assert step < "step_000030"
    resumed = recipes.run_ranks(2, *rw_arguments("--resume", **options))
    assert [p.code for p in resumed] == [0, 0], resumed[0].err + resumed[1].err
    assert_same_run(tmp_path / "unbroken", tmp_path / "run")


def test_both_of_two_processes_print_an_error_and_write_nothing(recipes, rw_arguments, records_file, tmp_path):
    bad = records_file([{"prompt": "Hi", "answer": ""}], "bad.jsonl")
    ranks = recipes.run_ranks(2, *rw_arguments(data_train=json.dumps([bad])))
    assert [p.code for p in ranks] == [2, 2]
    assert ranks[0].err == f"error: {bad}:1: answer is empty; write it or drop the record\n"
    assert ranks[1].err == f"[rank 1] {ranks[0].err}"
    assert not (tmp_path / "run").exists()


# The best evaluation.


def test_final_is_the_model_of_the_best_evaluation(recipes, rw_arguments, tmp_path):
    options = {"train_keep_best": "eval/loss", "train_eval_every": 2, "train_max_steps": 5}
    done = recipes.run(*rw_arguments(**options))
    assert done.code == 0, done.err
    run = tmp_path / "run"
    losses = {line["step"]: line["eval/loss"] for line in metrics_of(run) if "eval/loss" in line}
    best = min(losses, key=losses.get)
    assert sorted(losses) == [2, 4, 5], "the last step is evaluated too"
    after = json.loads((run / "after.json").read_text())["metrics"]["eval/loss"]
    assert after == pytest.approx(losses[best], rel=1e-6)
    assert f"model of step {best}, the best, in" in done.err
    kept = load_file(run / "best" / f"step_{best:06d}.safetensors")
    final = load_file(run / "final" / "adapter_model.safetensors")
    for name, weight in kept.items():
        (found,) = (w for n, w in final.items() if n.endswith(name.replace(".default", "")))
        assert torch.equal(weight, found)


def test_keep_best_needs_held_out_records_and_a_metric_of_the_run(recipes, rw_arguments):
    options = {"train_keep_best": "eval/lss", "train_eval_every": 1}
    done = recipes.run(*rw_arguments(**options))
    assert (done.code, done.err.splitlines()[-1]) == (
        2,
        "error: train.keep_best: eval/lss is no metric of this run; did you mean eval/loss?",
    )
    done = recipes.run(*rw_arguments(**options, data_heldout="[]", train_output="elsewhere"))
    assert (done.code, done.err) == (
        2,
        "error: train.keep_best needs held-out records; name a file with --data.heldout\n",
    )
