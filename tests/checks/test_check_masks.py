"""The check of masks passes right data and refuses each planted fault."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import numpy as np
import pytest
from sets import PAIR_RECORDS
from tiny import IM_END, tiny_tokenizer

from saro.checks.check_masks import check_masks
from saro.config import DataConfig
from saro.data.chat_format import ChatFormat
from saro.data.dataset import ExampleSet
from saro.data.encode_files import encode_files, encode_pair_files
from saro.data.records import read_examples, read_pairs
from saro.errors import SaroError
from saro.model.architectures import TokenLimits

CHAT = ChatFormat(tiny_tokenizer(), frozenset({IM_END}), date(1999, 7, 4))


@pytest.fixture
def path(records_file, examples) -> str:
    return records_file(examples)


@pytest.fixture
def data(path) -> ExampleSet:
    return encode_files([path], CHAT, DataConfig(pack_tokens=512))


def tampered(data: ExampleSet, record: int, position: int, token: int) -> ExampleSet:
    """Return the data with one token changed. A negative position counts from the record's end."""
    tokens = data.tokens.copy()
    tokens[data.offsets[record + (position < 0)] + position] = token
    return replace(data, tokens=tokens)


def refusal(data: ExampleSet, examples) -> str:
    with pytest.raises(SaroError) as caught:
        check_masks(data, CHAT, examples, TokenLimits(1000))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_good_data_passes(data, path):
    check_masks(data, CHAT, read_examples(path), TokenLimits(1000))


@pytest.mark.parametrize("record", [0, 11, 23])
def test_another_last_token_is_refused(data, record):
    message = refusal(tampered(data, record, -1, 77), [])
    assert message == f"record r{record}: the scored tokens do not end with their only stop token"


def test_a_second_stop_token_is_refused(data):
    assert "record r5: the scored tokens do not end with their only" in refusal(tampered(data, 5, -3, IM_END), [])


def test_a_stop_token_in_the_prompt_is_allowed(data, path):
    assert IM_END in data.sequence(0).tokens[: data.prompt_tokens[0]]
    check_masks(data, CHAT, [next(read_examples(path))], TokenLimits(1000))


@pytest.mark.parametrize("shift", [-1, 1, 4])
def test_a_shifted_mask_is_refused(data, path, shift):
    prompts = data.prompt_tokens.copy()
    prompts[3] += shift
    assert refusal(replace(data, prompt_tokens=prompts), read_examples(path)) == (
        f"{path}:4: the prompt's tokens differ from those that the model reads at inference"
    )


def test_another_token_in_the_prompt_is_refused(data, path):
    assert refusal(tampered(data, 3, 2, 77), read_examples(path)).startswith(f"{path}:4: the prompt's tokens differ")


def test_a_prompt_made_on_another_day_is_refused(path):
    dated = "{{ strftime_now('%Y') }}" + tiny_tokenizer().chat_template
    one, two = (ChatFormat(tiny_tokenizer(dated), CHAT.stop_ids, date(year, 1, 1)) for year in (1999, 2000))
    data = encode_files([path], one, DataConfig(pack_tokens=512))
    with pytest.raises(SaroError, match="differ from those that the model reads at inference"):
        check_masks(data, two, read_examples(path), TokenLimits(1000))


def test_only_the_examples_given_have_their_prompts_compared(data, path):
    first, *_ = read_examples(path)
    check_masks(tampered(data, 3, 2, 77), CHAT, [first], TokenLimits(1000))


def test_dropped_records_are_not_compared(path):
    data = encode_files([path], CHAT, DataConfig(pack_tokens=80, too_long="drop"))
    assert data.dropped
    check_masks(data, CHAT, read_examples(path), TokenLimits(1000))


def test_raw_text_has_no_template_to_compare_with(records_file):
    path = records_file([{"prompt": "Q: Why?\nA:", "completion": " So."}])
    check_masks(encode_files([path], CHAT, DataConfig(pack_tokens=512)), CHAT, read_examples(path), TokenLimits(1000))


def test_any_of_several_stop_tokens_is_accepted(data):
    both = ChatFormat(CHAT.tokenizer, frozenset({IM_END, 77}), CHAT.template_date)
    check_masks(tampered(data, 5, -1, 77), both, [], TokenLimits(1000))


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused(records_file, examples):
    data = encode_files([records_file(examples)], CHAT, DataConfig(pack_tokens=512))
    most = int(data.tokens.max())
    check_masks(data, CHAT, [], TokenLimits(most + 1))
    with pytest.raises(SaroError, match=f"the tokenizer gives id {most} and the model embeds {most} tokens"):
        check_masks(data, CHAT, [], TokenLimits(most))


@pytest.fixture
def pairs_path(records_file) -> str:
    return records_file(PAIR_RECORDS, "pairs.jsonl")


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_good_pairs_pass_on_both_sides(pairs_path, side):
    data = encode_pair_files([pairs_path], CHAT, DataConfig(pack_tokens=512))
    check_masks(getattr(data, side), CHAT, read_pairs(pairs_path), TokenLimits(1000))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_shifted_mask_of_a_pair_is_refused_with_its_place(pairs_path, side):
    data = getattr(encode_pair_files([pairs_path], CHAT, DataConfig(pack_tokens=512)), side)
    shifted = replace(data, prompt_tokens=data.prompt_tokens + np.array([0, 1], np.int32))
    assert refusal(shifted, read_pairs(pairs_path)).startswith(f"{pairs_path}:2: the prompt's tokens differ from those")
