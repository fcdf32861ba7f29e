"""`saro score`: rewards are differences of the two models' own log-probs, over responses, their parts and their steps."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from prefill_cases import CHATS, beginnings
from rich.console import Console
from tiny import save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from saro.config import DataConfig, ModelConfig
from saro.data.chain import split_steps
from saro.data.encode_files import encode_files, encode_pair_files
from saro.data.records import Example, Message, Response
from saro.errors import SaroError
from saro.evaluate.options import LoadOptions
from saro.model.source import find_model
from saro.program import parse_tool
from saro.tools.score_steps import Options, _sum_steps, run

pytestmark = pytest.mark.usefixtures("one_thread")

CHAIN = "Is it safe? It is not.\nI turn it down."
STEPS = ["Is it safe? ", "It is not.\n", "I turn it down."]
PAIR = {
    "id": "p",
    "kind": "pp-cot",
    "prompt": "Hi",
    "chosen": {"reasoning": CHAIN, "answer": "No."},
    "rejected": {"reasoning": "Is it safe? Yes, and", "answer": "", "open": True},
}
EXAMPLE = {"id": "e", "kind": "safety", "prompt": "Hi", "reasoning": CHAIN, "answer": "No."}


@pytest.fixture
def models(tiny_model, tmp_path) -> list[str]:
    return [tiny_model(), str(save_tiny_model(tmp_path / "reference", intermediate_size=32))]


@pytest.fixture
def score(models, records_file, tmp_path):
    """Return a function that scores records, and gives (lines of the output, what the tool prints)."""

    def get(*records: dict[str, object], **options) -> tuple[list[dict], str]:
        file = records_file(records, "records.jsonl")
        console = Console(width=200)
        arguments = {"models": models, "output": str(tmp_path / "out.jsonl"), "overwrite": True} | options
        with console.capture() as captured:
            assert run(Options(records=file, **arguments), console) == 0
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()], captured.get()

    return get


def native(folder: str, sequence) -> np.ndarray:
    """Return the log-probs of a sequence's scored tokens by the model's own forward."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.from_numpy(sequence.tokens.astype(np.int64))
    with torch.no_grad():
        logps = model(input_ids=tokens[None]).logits[0, :-1].double().log_softmax(-1)
    return logps.gather(1, tokens[1:, None])[sequence.scored_from - 1 :, 0].numpy()


def chat_of(folder: str):
    return find_model(ModelConfig(name=folder, method="lora")).chat_format(DataConfig(), date(2025, 1, 1))


def refusal(**options) -> str:
    with pytest.raises(SaroError) as caught:
        run(Options(**options), Console(quiet=True))
    return str(caught.value)


def test_the_reward_of_a_side_is_that_of_both_models_own_forwards(score, models, records_file):
    lines, _ = score(PAIR, beta=0.5)
    pairs = encode_pair_files([records_file([PAIR])], chat_of(models[0]), DataConfig())
    assert [(line["id"], line["kind"], line["side"], line["open"]) for line in lines] == [
        ("p", "pp-cot", "chosen", False),
        ("p", "pp-cot", "rejected", True),
    ]
    for line, side in zip(lines, pairs.sequences(0), strict=True):
        policy, reference = (native(folder, side) for folder in models)
        assert line["reward"] == pytest.approx(0.5 * (policy - reference).sum(), abs=1e-4)
        assert line["logp"] == pytest.approx(policy.sum(), abs=1e-4)
        assert line["reference_logp"] == pytest.approx(reference.sum(), abs=1e-4)
        assert line["tokens"] == len(side.row_kinds)


def test_the_reward_of_a_step_is_that_of_its_tokens(score, models, records_file):
    lines, _ = score(EXAMPLE, steps=True)
    data = encode_files([records_file([EXAMPLE])], chat_of(models[0]), DataConfig())
    moved = 0.1 * np.subtract(*(native(folder, data.sequence(0)) for folder in models))
    steps = lines[0]["steps"]
    assert [CHAIN[step["start"] : step["stop"]] for step in steps] == STEPS
    # One token a byte. The line ends after the opening and before the closing tag go to the first and the last step.
    sizes = [len("\n" + STEPS[0]), len(STEPS[1]), len(STEPS[2] + "\n")]
    assert [step["tokens"] for step in steps] == sizes
    at = len("<think>")
    for step, size in zip(steps, sizes, strict=True):
        assert step["first"] == at
        assert step["reward"] == pytest.approx(moved[at : at + size].sum(), abs=1e-4)
        at += size


def test_parts_and_steps_add_up(score):
    for line in score(PAIR, PAIR | {"id": "q", "rejected": {"answer": "Yes."}}, steps=True)[0]:
        assert line["think"]["tokens"] + line["answer"]["tokens"] == line["tokens"]
        assert line["think"]["reward"] + line["answer"]["reward"] == pytest.approx(line["reward"], abs=1e-5)
        tags = line["think"]["tokens"] - sum(step["tokens"] for step in line["steps"])
        closing = 0 if line["open"] else len("</think>")
        assert tags == (0 if not line["steps"] else len("<think>") + closing)


def test_a_model_that_is_its_own_reference_gives_no_reward(score, models):
    lines, _ = score(PAIR, models=[models[0], models[0]], steps=True)
    assert all(abs(step["reward"]) < 1e-5 for line in lines for step in line["steps"])
    assert max(abs(line["reward"]) for line in lines) < 1e-5


def test_the_dtype_is_that_of_the_models(score):
    exact, rounded = (score(PAIR, load=LoadOptions(dtype=dtype))[0][0]["reward"] for dtype in ("float32", "bfloat16"))
    assert 0 < abs(exact - rounded) < 1


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_run_is_scored_against_the_model_that_it_began_with(score, finished_run, tiny_model, examples, method):
    """Training on these examples has made them likelier. A QLoRA run and its base are both in 4 bits."""
    lines, _ = score(*examples[:4], models=[str(finished_run(method)), tiny_model()])
    assert all(line["reward"] > 0 for line in lines)


def test_steps_are_written_only_if_asked_for(score):
    assert "steps" not in score(EXAMPLE)[0][0]


def test_a_response_without_reasoning_has_no_steps(score):
    (line,), _ = score({"prompt": "Hi", "answer": "No. It is not safe."}, steps=True)
    assert (line["steps"], line["think"]["tokens"]) == ([], 0)


def test_reasoning_inside_a_completion_has_its_steps_too(score):
    message = {"role": "assistant", "content": f"<think>\n{CHAIN}\n</think>\n\nNo."}
    lines, _ = score(
        EXAMPLE, {"id": "t", "prompt": [{"role": "user", "content": "Hi"}], "completion": [message]}, steps=True
    )
    assert lines[0]["steps"] == lines[1]["steps"]


def test_no_text_is_written_or_printed(score, tmp_path):
    _, printed = score(PAIR, steps=True)
    for text in ((tmp_path / "out.jsonl").read_text(), printed):
        assert "safe" not in text
        assert "Hi" not in text


def test_the_terminal_shows_means_and_how_often_the_chosen_response_is_ahead(score):
    lines, printed = score(PAIR, PAIR | {"id": "q"})
    rewards = {side: [line["reward"] for line in lines if line["side"] == side] for side in ("chosen", "rejected")}
    for side, values in rewards.items():
        assert f"2 {side}: mean reward {np.mean(values):.4f}" in printed
    share = "100.0%" if rewards["chosen"][0] > rewards["rejected"][0] else "0.0%"
    assert f"the chosen response has the higher reward in {share} of the pairs" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "gone/scores.jsonl"}, "gone/scores.jsonl: there is no folder gone; make it first"),
        ({"records": "hf://org/name"}, "hf://org/name: is a data set of the hub; name the file of the scores with --output FILE"),
    ],
)  # fmt: skip
def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_found(records_file, changes, message):
    assert refusal(**{"records": records_file([EXAMPLE]), "models": ["./gone", "./gone"]} | changes) == message


def test_the_default_output_lies_beside_the_records_and_is_not_replaced(models, records_file):
    file = records_file([EXAMPLE], "mine.jsonl")
    assert run(Options(records=file, models=models), Console(quiet=True)) == 0
    target = f"{file.removesuffix('.jsonl')}.scores.jsonl"
    before = Path(target).read_text()
    assert refusal(records=file, models=models) == (
        f"{target}: exists already; name another --output, or replace it with --overwrite"
    )
    assert run(Options(records=file, models=models, overwrite=True), Console(quiet=True)) == 0
    assert Path(target).read_text() == before


@pytest.mark.parametrize("names", [["one"], ["one", "two", "three"]])
def test_two_models_are_needed(names):
    assert refusal(records="x.jsonl", models=names).startswith(f"--models names {len(names)} models; name two")


@pytest.mark.parametrize("beta", [0.0, float("nan")])
def test_beta_must_be_above_zero(beta):
    assert refusal(records="x.jsonl", models=["a", "b"], beta=beta) == f"--beta is {beta}; it must be above 0"


def test_a_server_is_refused(models, records_file):
    message = refusal(records=records_file([EXAMPLE]), models=[models[0], "http://127.0.0.1:1/v1#org/model"])
    assert message.startswith("--models: http://127.0.0.1:1/v1#org/model is a server, which scores no given text")


def test_a_reference_with_another_vocabulary_is_refused(models, records_file):
    tiny_tokenizer(extra=("<|more|>",)).save_pretrained(models[1])
    message = refusal(records=records_file([EXAMPLE]), models=models)
    assert f"{models[1]} has another vocabulary than {models[0]}" in message


def test_a_record_that_is_too_long_is_an_error_with_its_line(models, records_file):
    file = records_file([EXAMPLE])
    message = refusal(records=file, models=models, data=DataConfig(pack_tokens=20))
    assert message.startswith(f"{file}:1: ")


def test_the_command_line_gives_these_options():
    args = [
        "my.jsonl",
        "--models",
        "[output/srpo, output/rw]",
        "--steps",
        "--load.method",
        "qlora",
        "--load.dtype",
        "bfloat16",
    ]
    options = parse_tool(Options, "saro score", run.__doc__, args)
    assert (options.records, options.models, options.steps) == ("my.jsonl", ["output/srpo", "output/rw"], True)
    assert (options.load.method, options.load.dtype) == ("qlora", "bfloat16")


@pytest.mark.parametrize("name", CHATS)
@settings(max_examples=10, deadline=None)
@given(beginnings)
def test_every_token_between_the_tags_belongs_to_one_step(name, chain):
    """Steps take the tokens between the tags in order, each of them once."""
    chat, record = CHATS[name], Example("a", "general", (Message("user", "Why?"),), Response(chain, "So."), "f:1")
    try:
        text, starts = chat.locate_tokens(record.prompt, record.response)
    except SaroError:
        assume(False)
    steps = _sum_steps(np.arange(len(starts)), record, record.response, chat)
    assert [chain[step["start"] : step["stop"]] for step in steps] == [
        chain[step.start : step.stop] for step in split_steps(chain)
    ]
    begin = text.find("<think>") + len("<think>") if "<think>" in text else 0
    between = [i for i, start in enumerate(starts) if begin <= start < text.index("</think>")]
    for step in steps:
        own, between = between[: step["tokens"]], between[step["tokens"] :]
        assert step["reward"] == sum(own)
    assert between == []
