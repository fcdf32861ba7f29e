"""The folder final/ is complete or absent, and loads like any model."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tiny import Training, tiny_tokenizer
from train_state import State
from transformers import AutoModelForCausalLM, AutoTokenizer

from saro.runs.finish import save_final


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_final_folder_loads_like_any_model(tiny_model, records_file, examples, tmp_path, runtime, method):
    run = Training.on(tiny_model(), records_file(examples), tmp_path / "run", model={"method": method})
    run.fit(runtime, 2)
    save_final(tmp_path / "final", run.policy.model, tiny_tokenizer())
    kind = AutoModelForCausalLM if method == "full" else AutoPeftModelForCausalLM
    loaded = kind.from_pretrained(tmp_path / "final")
    assert AutoTokenizer.from_pretrained(tmp_path / "final").chat_template == tiny_tokenizer().chat_template
    parameters = dict(loaded.named_parameters())
    for name, weight in run.weights().items():
        assert torch.equal(parameters[name], weight), name


def test_the_final_folder_replaces_an_older_one_completely(tiny_model, records_file, examples, tmp_path):
    run = Training.on(tiny_model(), records_file(examples), tmp_path / "run")
    for name in ("final", ".final.0a1b2c3d.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old.txt").write_text("old")
    save_final(tmp_path / "final", run.policy.model, tiny_tokenizer())
    assert not (tmp_path / "final" / "old.txt").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_written_files_have_the_permissions_that_the_umask_gives(tiny_model, records_file, examples, tmp_path):
    """safetensors writes files as 0600, so nobody else in the group could read a model in a shared folder."""
    run = Training.on(tiny_model(), records_file(examples), tmp_path / "run")
    old = os.umask(0o022)
    try:
        save_final(tmp_path / "final", run.policy.model, tiny_tokenizer())
        folder = State().train(1).save(tmp_path / "checkpoints", 1)
    finally:
        os.umask(old)
    for file in [*(tmp_path / "final").iterdir(), *folder.iterdir()]:
        assert stat.S_IMODE(file.stat().st_mode) == 0o644, file.name
