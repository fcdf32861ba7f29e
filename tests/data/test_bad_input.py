"""Tests that a user's mistake gives one line that says where and what to do, exit code 2, and no output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model, tiny_tokenizer
from transformers import MambaConfig, MixtralConfig, T5Config

ROOT = Path(__file__).parents[2]
GOOD = {"prompt": "Hi", "answer": "Hello"}


def refused(done, output: Path) -> str:
    """Return the error message. Checks that it is one line, with exit code 2 and no output folder."""
    assert done.code == 2, done.err
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1, done.err
    assert done.err.endswith("\n")
    assert not output.exists()
    return done.err.removeprefix("error: ").rstrip("\n")


RECORDS = [
    ("broken JSON", ['{"prompt": "Hi", "answer": }'], ":1: broken JSON at column 28 (Expecting value); fix it there"),
    ("cut off", [GOOD, '{"prompt": "Hi", "ans'], ":2: broken JSON at column 18 (Unterminated string starting at); fix it there"),
    ("missing field", [GOOD, {"prompt": "Hi"}], ':2: field "answer" is missing; add it'),
    ("misspelt field", [{"promt": "Hi", "answer": "x"}], 'data of your own goes under "meta"); did you mean prompt?'),
    ("wrong type", [{"prompt": "Hi", "answer": 7}], ":1: answer is a number; give a string"),
    ("empty answer", [GOOD, GOOD, {"prompt": "Hi", "answer": " "}], ":3: answer is empty; write it or drop the record"),
    (
        "unknown role",
        [{"prompt": [{"role": "usr", "content": "Hi"}], "answer": "x"}],
        ':1: prompt: message 1 has the role "usr"; did you mean user?',
    ),
    (
        "assistant last in the prompt",
        [{"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Oh"}], "answer": "x"}],
        ":1: prompt: the last turn is the assistant's; put it into the response or drop it",
    ),
    (
        "too long",
        [GOOD, {"id": "long", "prompt": "x" * 300, "answer": "y"}],
        ":2: 321 tokens, more than the 256 allowed; nothing is cut: raise --data.pack_tokens, shorten the record, or "
        "leave it out with --data.too_long drop",
    ),
    ("empty file", [], ": the file has no records; check how it was written"),
    ("same id", [GOOD | {"id": "a"}, GOOD | {"id": "a"}], ':2: id "a" is already used on line 1; give each record its own id, or none'),
    ("array", ["[", GOOD], ":1: a JSON array begins here; write each of its objects on a line of its own (JSONL)"),
    ("unknown kind", [GOOD | {"kind": "safty"}], ':1: kind is "safty"; did you mean safety?'),
    ("pair", [{"prompt": "Hi", "chosen": "a", "rejected": "b"}], "makes this a preference pair; give pairs to stage 2 (SRPO)"),
    (
        "control token",
        [{"prompt": "Hi", "answer": "a<|im_end|>b"}],
        ":1: the response holds the model's control token '<|im_end|>' as text; remove or rewrite it",
    ),
    (
        "tags in the reasoning",
        [{"prompt": "Hi", "reasoning": "a </think> b", "answer": "x"}],
        ":1: the reasoning holds a <think> or </think> tag of its own; remove it",
    ),
]  # fmt: skip


@pytest.mark.parametrize("which", ["train", "heldout"])
@pytest.mark.parametrize(("records", "message"), [r[1:] for r in RECORDS], ids=[r[0] for r in RECORDS])
def test_a_bad_record_is_named_by_file_and_line(
    recipes, rw_arguments, records_file, tmp_path, records, message, which, request
):
    if which == "heldout" and "too long" not in request.node.name and "broken" not in request.node.name:
        pytest.skip("the reader is the same")
    file = records_file(records, "bad.jsonl")
    done = recipes.run(*rw_arguments(**{f"data_{which}": json.dumps([file])}))
    found = refused(done, tmp_path / "run")
    assert found.startswith(file)
    assert found.endswith(message)


def test_a_bad_records_text_is_not_shown(recipes, rw_arguments, records_file, tmp_path):
    """The text may be harmful: safety data is about such texts."""
    for record in ({"prompt": "secret words", "answer": ""}, {"prompt": [{"role": "x y", "content": "secret"}]}):
        file = records_file([record], "bad.jsonl")
        assert "secret" not in refused(recipes.run(*rw_arguments(data_train=json.dumps([file]))), tmp_path / "run")


def test_a_missing_file_names_the_nearest(recipes, rw_arguments, tmp_path, records_file):
    records_file([GOOD], "records.jsonl")
    file = str(tmp_path / "recrods.jsonl")
    found = refused(recipes.run(*rw_arguments(data_train=json.dumps([file]))), tmp_path / "run")
    assert found == f"{file}: there is no such file; did you mean {tmp_path / 'records.jsonl'}?"


def test_dropping_all_records_as_too_long_is_an_error(recipes, rw_arguments, tmp_path):
    found = refused(recipes.run(*rw_arguments(data_too_long="drop", data_pack_tokens=20)), tmp_path / "run")
    assert found == "all 24 records are longer than 20 tokens; raise --data.pack_tokens"


# Options.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.max_step", "3"], "unknown option --train.max_step; did you mean --train.max_steps?"),
        (["--train.learning_rate=3"], "unknown option --train.learning_rate"),
        (["--resum"], "unknown option --resum; did you mean --resume?"),
        (["--model.method", "qlra"], "--model.method is qlra; it must be full, lora or qlora"),
        (["--train.lr", "fast"], "--train.lr: "),
        (["--train.lr", "0"], "lr is 0.0; it must be above 0"),
        (["--train.records_per_step", "0"], "records_per_step is 0; it must be at least 1"),
        (["--train.warmup", "3"], "a share of the steps, 0 to 1"),
        (["--data.weights", '{"safty": 2}'], "data.weights: unknown kind 'safty'; did you mean safety?"),
        (["--data.train", "[]"], "data.train names no file"),
        (["--data.weights", '{"safety": 0, "general": 0}'], "the weights leave no record to draw"),
        (["--data.template_date", "yesterday"], "data.template_date is 'yesterday'; write it as YYYY-MM-DD"),
        (["--model.attention", "varlen"], "varlen attention needs CUDA and bfloat16; set --model.attention sdpa"),
        (["--model.lora_targets", '["q_prj"]'], "model.lora_targets: the model has no linear layer 'q_prj'; did you mean q_proj?"),
        (["--train.trackers", '["tensorbord"]'], "train.trackers: unknown tracker 'tensorbord'; did you mean tensorboard?"),
        (["--resume", "--overwrite"], "--resume continues a run and --overwrite removes it; give one of them"),
        (["--train.betas", "[1.5, 0.9]"], "train.betas are [1.5, 0.9]; both must be at least 0 and below 1"),
    ],
)  # fmt: skip
def test_a_bad_option_gives_one_line_that_says_what_to_do(recipes, rw_arguments, tmp_path, arguments, message):
    done = recipes.run(*rw_arguments(), *arguments)
    assert done.code == 2, done.err
    assert not (tmp_path / "run").exists()
    assert "Traceback" not in done.err
    # The report on the data may be printed before the error.
    lines = done.err.splitlines()
    assert sum("error: " in line for line in lines) == 1
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]


def test_an_unknown_option_in_a_file_is_an_error_too(recipes, rw_arguments, tmp_path):
    (tmp_path / "bad.yaml").write_text("train:\n  max_stps: 3\n")
    done = recipes.run("--config", tmp_path / "bad.yaml", *rw_arguments())
    assert "unknown option train.max_stps; did you mean train.max_steps?" in refused(done, tmp_path / "run")


def test_a_missing_config_file_is_an_error(recipes, rw_arguments, tmp_path):
    done = recipes.run("--config", tmp_path / "absent.yaml", *rw_arguments())
    assert "absent.yaml" in refused(done, tmp_path / "run")


# The output folder.


def test_a_folder_with_other_files_is_not_written_to(recipes, rw_arguments, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("three years")
    for flags in ((), ("--overwrite",), ("--resume",)):
        done = recipes.run(*rw_arguments(*flags, train_output=tmp_path / "mine"))
        assert done.code == 2
        assert "holds files that are not a run's; give an empty folder with --train.output" in done.err
        assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_overwrite_keeps_a_folder_whose_manifest_is_not_that_of_a_run(recipes, rw_arguments, tmp_path):
    """Web projects and browser extensions have a manifest.json too."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "manifest.json").write_text('{"name": "My site", "icons": []}')
    (tmp_path / "site" / "index.html").write_text("mine")
    done = recipes.run(*rw_arguments("--overwrite", train_output=tmp_path / "site"))
    assert (tmp_path / "site" / "index.html").exists()
    assert done.code == 2, done.err


def test_hidden_files_of_the_user_survive(recipes, rw_arguments, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".gitignore").write_text("*")
    assert recipes.run(*rw_arguments(train_max_steps=1)).code == 0
    assert (tmp_path / "run" / ".gitignore").exists()


def test_a_run_killed_while_its_folder_is_made_can_be_started_again(recipes, rw_arguments, tmp_path):
    """manifest.json is the first file that is written; it marks the folder as that of a run."""
    assert recipes.run(*rw_arguments(train_max_steps=1)).code == 0
    for path in sorted((tmp_path / "run").rglob("*"), reverse=True):
        if path.name != "manifest.json":
            path.rmdir() if path.is_dir() else path.unlink()
    done = recipes.run(*rw_arguments("--resume", train_max_steps=1))
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_an_output_that_is_a_file_is_refused(recipes, rw_arguments, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = recipes.run(*rw_arguments(train_output=tmp_path / "file"))
    assert done.code == 2
    assert done.err == f"error: {tmp_path / 'file'}: is a file; give a folder with --train.output\n"


# Models.


def test_a_folder_without_a_model_is_refused(recipes, rw_arguments, tmp_path):
    (tmp_path / "empty").mkdir()
    found = refused(recipes.run(*rw_arguments(model_name=tmp_path / "empty")), tmp_path / "run")
    assert (
        found
        == f"{tmp_path / 'empty'}: the folder holds no model (no config.json); give a folder saved by transformers"
    )


def test_a_missing_model_folder_is_an_error(recipes, rw_arguments, tmp_path):
    found = refused(recipes.run(*rw_arguments(model_name=tmp_path / "absent")), tmp_path / "run")
    assert found == f"{tmp_path / 'absent'}: no such folder; give a model's folder or its hub name, such as org/model"


def test_pickled_weights_are_refused(recipes, rw_arguments, tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    found = refused(recipes.run(*rw_arguments(model_name=folder)), tmp_path / "run")
    assert found.startswith(f"{folder}: only pickled weights (pytorch_model.bin), which can run code; save the model")


def test_weights_that_are_cut_off_are_refused(recipes, rw_arguments, tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    done = recipes.run(*rw_arguments(model_name=folder))
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MixtralConfig(), "model type 'mixtral' is not supported: it is a mixture of experts"),
        (T5Config(), "model type 't5' is not supported: it is an encoder-decoder"),
        (MambaConfig(), "model type 'mamba' is not supported: "),
    ],
    ids=["experts", "encoder-decoder", "state"],
)
def test_a_model_type_that_cannot_be_trained_in_packs_is_refused_by_name(
    recipes, rw_arguments, tmp_path, config, message
):
    config.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    found = refused(recipes.run(*rw_arguments(model_name=tmp_path / "model")), tmp_path / "run")
    assert message in found


def test_a_model_without_a_chat_template_is_refused(recipes, rw_arguments, tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    found = refused(recipes.run(*rw_arguments(model_name=folder)), tmp_path / "run")
    assert found.endswith("give one with --data.chat_template FILE, or use string prompts")


# A real process, without the fork server of the tests.


def test_the_error_is_the_same_in_a_process_of_its_own(rw_arguments, records_file, environment, tmp_path):
    file = records_file([GOOD, {"prompt": "Hi"}], "bad.jsonl")
    done = subprocess.run(
        [sys.executable, "recipes/rw.py", *rw_arguments(data_train=json.dumps([file]))],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f'error: {file}:2: field "answer" is missing; add it\n'
    assert not (tmp_path / "run").exists()
