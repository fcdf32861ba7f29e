"""`saro compare`: the figures of each model are those that its own forward gives, in one table."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import save_tiny_model

from saro.config import DataConfig, ModelConfig
from saro.data.dataset import encode_files, encode_pair_files
from saro.errors import SaroError
from saro.evaluate.answers import choose_prompts
from saro.model.source import find_model
from saro.tool_config import CompareConfig
from saro.tools.compare import _reasoning_tokens, _Setting, compare

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def files(records_file, examples, pairs) -> tuple[list[str], list[str]]:
    return [records_file(examples[:4], "examples.jsonl")], [records_file(pairs[:5], "pairs.jsonl")]


@pytest.fixture
def options(tiny_model, tmp_path) -> CompareConfig:
    other = save_tiny_model(tmp_path / "other", intermediate_size=32)
    return CompareConfig([tiny_model(), str(other)], ["base", "new"], "lora", show=["p1"], prompts=3, max_tokens=4)


def native(folder: str, sequence) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.from_numpy(sequence.tokens.astype(np.int64))
    with torch.no_grad():
        logps = model(input_ids=tokens[None]).logits[0, :-1].double().log_softmax(-1)
    return logps.gather(1, tokens[1:, None])[sequence.scored_from - 1 :].sum().item()


def test_figures_are_the_models_own(options, files):
    figures = compare(options, *files, Console(quiet=True))
    for folder, found in zip(options.models, figures, strict=True):
        chat = find_model(ModelConfig(name=folder)).chat_format(DataConfig(), date.today())
        data = encode_files(files[0], chat, max_tokens=2048)
        total = sum(native(folder, data.sequence(i)) for i in range(len(data)))
        assert found.loss == pytest.approx(-total / data.scored_tokens.sum(), rel=1e-5)
        pairs = encode_pair_files(files[1], chat, max_tokens=2048)
        margins = [np.subtract(*(native(folder, side) for side in pairs.sequences(i))) for i in range(len(pairs))]
        assert found.margin == pytest.approx(np.mean(margins), rel=1e-4)
        assert found.likelier == np.mean(np.array(margins) > 0)
        assert len(found.answers) == 3


def test_the_table_has_a_column_for_each_model_and_shows_the_answers_asked_for(options, files):
    console = Console(record=True, width=120, quiet=True)
    console.quiet = False
    with console.capture() as captured:
        compare(options, *files, console)
    text = captured.get()
    for part in ("base", "new", "loss, nats per token", "chosen response is likelier", "margin", "p1", "Count to 0."):
        assert part in text
    assert "p0" not in text


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("<think>\nabc\n</think>\n\nx", 5), ("<think>abcd", 4), ("abc", 0), ("<think></think>x", 0), ("abc</think>x", 3)],
)
def test_reasoning_is_what_stands_between_the_tags(tiny_model, text, tokens):
    chat = find_model(ModelConfig(name=tiny_model())).chat_format(DataConfig(), date.today())
    assert _reasoning_tokens(text, chat) == tokens


def test_models_are_read_as_the_first_run_among_them_was_trained(finished_run, files, tmp_path):
    run = finished_run("qlora")
    manifest = json.loads((run / "manifest.json").read_text())
    setting = _Setting.of(CompareConfig(["./base", str(run / "final")]))
    assert (setting.method, setting.day.isoformat()) == ("qlora", manifest["template_date"])
    assert setting.data.think_tags == ("<think>", "</think>")
    assert _Setting.of(CompareConfig(["./base"])).method == "lora"


def test_several_pairs_on_one_prompt_are_answered_once(pairs):
    records = [SimpleNamespace(prompt=r["prompt"], kind=r["kind"], id=r["id"]) for r in pairs[:8]]
    assert [r.id for r in choose_prompts(records, 4)] == ["p0", "p2", "p6", "p4"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["one"]}, "--names names 1 models, and --models 2"),
        ({"show": ["p11"]}, "--show: no record has the id 'p11'; did you mean p1?"),
        ({"models": ["./gone", "./gone"]}, r"\./gone: no such folder"),
    ],
)
def test_what_is_not_there_is_one_line(options, files, changes, message):
    with pytest.raises(SaroError, match=message):
        compare(replace(options, **changes), *files, Console(quiet=True))


def test_there_must_be_something_to_compare_on(options):
    with pytest.raises(SaroError, match="there is nothing to compare on"):
        compare(options, [], [], Console(quiet=True))
