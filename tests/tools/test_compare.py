"""`saro compare`: each model's figures are those of its own forward, and the table shows them."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import save_tiny_model

from saro.config import DataConfig, ModelConfig
from saro.data.encode_files import encode_files, encode_pair_files
from saro.errors import SaroError
from saro.model.source import find_model
from saro.tools.compare import Options, compare, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def options(records_file, examples, pairs, tiny_model, tmp_path) -> Options:
    other = save_tiny_model(tmp_path / "other", intermediate_size=32)
    return Options(
        models=[tiny_model(), str(other)],
        names=["base", "new"],
        examples=records_file(examples[:4], "examples.jsonl"),
        pairs=[records_file(pairs[:5], "pairs.jsonl")],
        show=["p1"],
        prompts=3,
        max_tokens=4,
    )


def native(folder: str, sequence) -> float:
    """Return the log-prob of a sequence's scored tokens by the model's own forward."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.from_numpy(sequence.tokens.astype(np.int64))
    with torch.no_grad():
        logps = model(input_ids=tokens[None]).logits[0, :-1].double().log_softmax(-1)
    return logps.gather(1, tokens[1:, None])[sequence.scored_from - 1 :].sum().item()


def test_figures_are_the_models_own(options):
    results = compare(options, Console(quiet=True))
    for folder, figures in zip(options.models, results, strict=True):
        chat = find_model(ModelConfig(name=folder)).chat_format(DataConfig(), date.today())
        data = encode_files([options.examples], chat, DataConfig(pack_tokens=2048))
        total = sum(native(folder, data.sequence(i)) for i in range(len(data)))
        assert figures.loss == pytest.approx(-total / data.scored_tokens.sum(), rel=1e-5)
        pairs = encode_pair_files(options.pairs, chat, DataConfig(pack_tokens=2048))
        margins = [np.subtract(*(native(folder, side) for side in pairs.sequences(i))) for i in range(len(pairs))]
        assert figures.margin == pytest.approx(np.mean(margins), rel=1e-4)
        assert figures.likelier == np.mean(np.array(margins) > 0)
        assert len(figures.answers) == 3


def test_the_table_has_a_column_for_each_model_and_shows_the_answers_of_show(options):
    console = Console(width=120)
    with console.capture() as captured:
        assert run(options, console) == 0
    text = captured.get()
    for part in ("base", "new", "loss, nats per token", "chosen response is likelier", "margin", "p1", "Count to 0."):
        assert part in text
    assert "p0" not in text


def test_a_run_is_named_by_its_folder_or_its_final_model(options, finished_run):
    run = finished_run()
    twice = replace(options, models=[str(run), str(run / "final")], names=["run", "final"])
    first, second = compare(twice, Console(quiet=True))
    assert first == second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["one"]}, "--names names 1 models, and --models 2"),
        ({"show": ["p11"]}, "--show: no record has the id 'p11'; did you mean p1?"),
        ({"models": ["./gone", "./gone"]}, r"\./gone: no such folder"),
    ],
)
def test_a_name_that_does_not_exist_is_one_line(options, changes, message):
    with pytest.raises(SaroError, match=message):
        compare(replace(options, **changes), Console(quiet=True))


def test_there_must_be_something_to_compare_on(options):
    with pytest.raises(SaroError, match="there is nothing to compare on; give --examples or --pairs"):
        compare(replace(options, examples=[], pairs=[]), Console(quiet=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": -1}, "--prompts is -1; it must be at least 0"),
        ({"max_tokens": 0}, "--max_tokens is 0; it must be at least 1"),
    ],
)
def test_a_number_that_is_too_small_is_refused(changes, message):
    with pytest.raises(SaroError, match=message):
        Options(**changes)
