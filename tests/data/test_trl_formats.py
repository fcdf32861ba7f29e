"""Tests that every format has the token ids that TRL's trainers give it, by published chat templates."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_tokenizer

from saro.config import DataConfig
from saro.data.chat_format import ChatFormat
from saro.data.encode_files import encode_files, encode_pair_files
from saro.synth.public_sets import convert

pytestmark = pytest.mark.trl
trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -c constraints.txt -e '.[bench]'")
datasets = pytest.importorskip("datasets")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
LAST = DataConfig(pack_tokens=2048)

SYSTEM = {"role": "system", "content": "Be brief."}
WHY, AND = {"role": "user", "content": "Why?"}, {"role": "user", "content": "And?"}
SO, NO = {"role": "assistant", "content": "So."}, {"role": "assistant", "content": "No."}
SO_THINK, NO_THINK = SO | {"reasoning_content": "Because."}, NO | {"reasoning_content": "Hm.\n\nNo."}

# Template and record. Qwen3's template writes the reasoning of the last turn and drops that of earlier ones. Without
# reasoning it writes an empty one, on which saro does not train: such records are by Llama 3's template.
EXAMPLES = {
    "messages": ("llama3", {"messages": [SYSTEM, WHY, SO, AND, NO]}),
    "messages and other fields": ("llama3", {"messages": [WHY, SO], "source": "x", "score": 1.5}),
    "prompt and completion": ("llama3", {"prompt": [SYSTEM, WHY], "completion": [SO]}),
    "strings": ("llama3", {"prompt": "Why?", "completion": " So."}),
    "messages with reasoning": ("qwen3", {"messages": [SYSTEM, WHY, NO_THINK, AND, SO_THINK]}),
    "completion with reasoning": ("qwen3", {"prompt": [WHY], "completion": [SO_THINK]}),
    "tags in the content": ("qwen3", {"messages": [WHY, SO | {"content": "<think>\nBecause.\n</think>\n\nSo."}]}),
    "tool turns": ("qwen3", {"messages": [WHY, SO, {"role": "tool", "content": "4"}, SO_THINK]}),
}
PLUS = {
    "type": "function",
    "function": {"name": "plus", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "plus", "arguments": {"a": 1}}}],
}
RESULT = {"role": "tool", "name": "plus", "content": "2"}
EXAMPLES |= {
    "tools": ("qwen2_5", {"messages": [SYSTEM, WHY, SO], "tools": [PLUS]}),
    "tools as JSON text": ("qwen2_5", {"messages": [WHY, SO], "tools": json.dumps([PLUS, PLUS])}),
    "a last call": ("qwen2_5", {"messages": [WHY, CALL], "tools": [PLUS]}),
    "a call beside text": ("qwen3_instruct_2507", {"messages": [WHY, CALL | {"content": "Hm."}], "tools": [PLUS]}),
    "an earlier call": ("qwen2_5", {"messages": [WHY, CALL, RESULT, SO], "tools": [PLUS]}),
    "an earlier call beside text": (
        "qwen3_instruct_2507",
        {"messages": [WHY, CALL | {"content": "Hm."}, RESULT, SO], "tools": [PLUS]},
    ),
    "a call as completion": ("qwen2_5", {"prompt": [WHY], "completion": [CALL], "tools": [PLUS]}),
    # saro's own tags are not gpt-oss' channel of reasoning, and Nemotron's template writes one line end fewer after them.
    "channels": ("gptoss", {"messages": [SYSTEM, WHY, SO, AND, NO]}),
    "channels of a completion": ("gptoss", {"prompt": [WHY], "completion": [SO]}),
    "an answer in its channel after a call": ("gptoss", {"messages": [WHY, CALL, RESULT, SO], "tools": [PLUS]}),
    "a call in its channel": ("gptoss", {"messages": [WHY, CALL], "tools": [PLUS]}),
    "tags in the content after an open tag": (
        "nemotron_3_nano",
        {"messages": [SYSTEM, WHY, NO, AND, SO | {"content": "<think>\nBecause.\n</think>\nSo."}]},
    ),
    "a call after tags in the content": (
        "nemotron_3_nano",
        {"messages": [WHY, CALL | {"content": "<think>\nHm.\n</think>\nSo."}], "tools": [PLUS]},
    ),
    "a call after reasoning": ("qwen3", {"messages": [WHY, CALL | {"reasoning_content": "Hm."}], "tools": [PLUS]}),
}
PAIRS = {
    "implicit prompt": ("llama3", {"chosen": [SYSTEM, WHY, SO], "rejected": [SYSTEM, WHY, NO]}),
    "implicit prompt of several turns": ("llama3", {"chosen": [WHY, SO, AND, SO], "rejected": [WHY, SO, AND, NO]}),
    "implicit prompt and scores": ("llama3", {"chosen": [WHY, SO], "rejected": [WHY, NO], "score_chosen": 8.0}),
    "explicit prompt": ("llama3", {"prompt": [SYSTEM, WHY], "chosen": [SO], "rejected": [NO]}),
    "strings": ("llama3", {"prompt": "Why?", "chosen": " So.", "rejected": " No."}),
    "channels": ("gptoss", {"prompt": [SYSTEM, WHY], "chosen": [SO], "rejected": [NO]}),
    "calls": ("qwen2_5", {"prompt": [WHY], "chosen": [CALL], "rejected": [CALL | {"content": "Hm."}], "tools": [PLUS]}),
    "calls in conversations": (
        "qwen2_5",
        {"chosen": [WHY, CALL, RESULT, SO], "rejected": [WHY, CALL, RESULT, NO], "tools": [PLUS]},
    ),
    "reasoning": ("qwen3", {"chosen": [WHY, NO_THINK, AND, SO_THINK], "rejected": [WHY, NO_THINK, AND, NO_THINK]}),
}


def chat_of(template: str) -> ChatFormat:
    """Return the format of a published template, on a tokenizer of bytes."""
    extra = ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    extra += ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
    tokenizer = tiny_tokenizer((TEMPLATES / f"{template}.jinja").read_text(), extra)
    stops = {"llama3": ["<|eot_id|>"], "llama3_1": ["<|eot_id|>"], "gptoss": ["<|return|>", "<|call|>"]}
    names = stops.get(template, ["<|im_end|>"])
    tokenizer.eos_token = names[0]
    stop_ids = frozenset(map(tokenizer.convert_tokens_to_ids, names))
    # TRL cannot be told a date, and gpt-oss' template writes today's.
    return ChatFormat(tokenizer, stop_ids, date.today() if template == "gptoss" else date(2024, 7, 26))


def prepare(trainer: type, chat: ChatFormat, record: dict, *arguments: object, all_turns: bool = False) -> dict:
    """Return the row that a trainer of TRL makes of a record, without making the trainer and its model."""
    template = None
    if all_turns:
        template = trl.chat_template_utils.get_training_chat_template(chat.tokenizer)
    trainer_self = SimpleNamespace(_tokenizer=chat.tokenizer, chat_template=template, completion_only_loss=True)
    options = SimpleNamespace(
        dataset_num_proc=None,
        max_length=None,
        dataset_text_field="text",
        assistant_only_loss=all_turns,
        shuffle_dataset=False,
    )
    rows = datasets.Dataset.from_list([record])
    return trainer._prepare_dataset(trainer_self, rows, chat.tokenizer, options, *arguments, "train")[0]


def until_stop(chat: ChatFormat, ids: list[int]) -> list[int]:
    """Return TRL's ids up to the end token: it also trains on the line end that a template may write after it."""
    stop = max(i for i, token in enumerate(ids) if token in chat.stop_ids)
    assert not chat.tokenizer.decode(ids[stop + 1 :]).strip()
    return ids[: stop + 1]


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_have_the_ids_of_trls_dpo_trainer(name, records_file):
    template, record = PAIRS[name]
    chat = chat_of(template)
    row = prepare(trl.DPOTrainer, chat, record)
    sides = encode_pair_files([records_file([record])], chat, LAST).sequences(0)
    for side, ours in zip(("chosen", "rejected"), sides, strict=True):
        assert ours.tokens.tolist() == until_stop(chat, row["prompt_ids"] + row[f"{side}_ids"])
        assert ours.scored_from == len(row["prompt_ids"])


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_have_the_ids_of_trls_sft_trainer(name, records_file):
    template, record = EXAMPLES[name]
    chat = chat_of(template)
    row = prepare(trl.SFTTrainer, chat, record, False, None)
    ours = encode_files([records_file([record])], chat, LAST).sequence(0)
    assert ours.tokens.tolist() == until_stop(chat, row["input_ids"])
    if "completion" in record:
        assert ours.scored_from == row["labels"].count(-100)


def test_ultrafeedback_has_the_ids_that_trl_gives_it_without_its_prompt(records_file):
    """TRL takes the prompt out of the two conversations only if there is no field prompt."""
    chat, (_, sides) = chat_of("llama3"), PAIRS["implicit prompt and scores"]
    record = sides | {"prompt": "Why?", "prompt_id": "x", "messages": sides["chosen"]}
    row = prepare(trl.DPOTrainer, chat, sides)
    chosen, _ = encode_pair_files([records_file([record])], chat, LAST).sequences(0)
    assert chosen.tokens.tolist() == until_stop(chat, row["prompt_ids"] + row["chosen_ids"])


@pytest.mark.parametrize("calls", [[], [CALL, RESULT]], ids=["tools only", "calls"])
def test_llama_31_has_the_ids_of_its_template(records_file, calls):
    """TRL adds empty tool_calls to the other turns, with which this template ends in an error."""
    chat, record = chat_of("llama3_1"), {"messages": [WHY, *calls, SO], "tools": [PLUS]}
    ours = encode_files([records_file([record])], chat, LAST).sequence(0)
    theirs = chat.tokenizer.apply_chat_template(record["messages"], tools=[PLUS], return_dict=False)
    assert ours.tokens.tolist() == until_stop(chat, theirs)


def test_converted_sharegpt_has_the_ids_that_trl_gives_conversations(records_file, tmp_path):
    chat = chat_of("llama3")
    turns = [{"from": "user", "value": "Why?"}, {"from": "assistant", "value": "So."}]
    row = prepare(trl.SFTTrainer, chat, {"conversations": turns}, False, None)
    convert("sharegpt", records_file([{"conversations": turns}]), tmp_path / "out.jsonl")
    ours = encode_files([tmp_path / "out.jsonl"], chat, LAST).sequence(0)
    assert ours.tokens.tolist() == until_stop(chat, row["input_ids"])


@pytest.mark.parametrize("name", ["messages", "an earlier call beside text"])
def test_all_turns_have_the_labels_of_trls_assistant_only_loss(records_file, name):
    template, record = EXAMPLES[name]
    chat = chat_of(template)
    row = prepare(trl.SFTTrainer, chat, record, False, None, all_turns=True)
    data = encode_files([records_file([record])], chat, DataConfig(pack_tokens=2048, train_on="all"))
    labels = [-100] * len(row["input_ids"])
    for turn in range(len(data)):
        sequence = data.sequence(turn)
        labels[sequence.scored_from : len(sequence.tokens)] = sequence.tokens[sequence.scored_from :].tolist()
    ends = [i + 1 for i, token in enumerate(row["input_ids"]) if token in chat.stop_ids]
    # As in until_stop, TRL also trains on a line end after the end token.
    assert labels == [-100 if i in ends else label for i, label in enumerate(row["labels"])]
