"""Tests that encoding JSONL files into compact arrays equals encoding each record by itself."""

import json
from datetime import date
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import IM_END, tiny_tokenizer

from saro.checks.check_masks import check_masks
from saro.config import KINDS, DataConfig
from saro.data.chat_format import ChatFormat
from saro.data.dataset import ExampleSet
from saro.data.encode_files import encode_files
from saro.data.records import read_example_files, read_examples
from saro.data.tree import RowKind
from saro.errors import SaroError
from saro.model.architectures import TokenLimits

CHAT = ChatFormat(tiny_tokenizer(), frozenset({IM_END}), date(1999, 7, 4))
SECRET = "do not print me"


def record(name: str, answer: str = "So.", **fields) -> dict:
    return {"id": name, "prompt": "Why?", "reasoning": "Because.", "answer": answer, **fields}


def tokens_of(*records: dict, records_file) -> list[int]:
    return encode_files([records_file(list(records))], CHAT, DataConfig(pack_tokens=512)).lengths.tolist()


def refusal(paths, **options) -> str:
    with pytest.raises(SaroError) as caught:
        encode_files(paths, CHAT, DataConfig(**{"pack_tokens": 512} | options))
    message = str(caught.value)
    assert "\n" not in message
    assert SECRET not in message
    return message


# The arrays


def test_a_set_is_its_records_encoded_one_by_one(records_file, examples):
    path = records_file(examples)
    data = encode_files([path], CHAT, DataConfig(pack_tokens=512))
    for i, example in enumerate(read_examples(path)):
        expected, got = CHAT.encode(example, i), data.sequence(i)
        assert got.tokens.tolist() == expected.tokens.tolist()
        assert got.scored_from == expected.scored_from
        assert got.row_kinds.tolist() == expected.row_kinds.tolist()
        assert got.record == i
    assert len(data) == i + 1


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "Why?", "answer": "No reasoning."},
        {"prompt": "Q: Why?\nA:", "completion": " <think>x</think> So."},
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}], "answer": "So."},
        {"prompt": "Why?", "reasoning": "\u00e9\U0001f600", "answer": "\u00fc"},
    ],
    ids=["no reasoning", "raw text", "conversation", "several bytes"],
)
def test_a_record_of_any_format_is_kept_as_it_was_encoded(records_file, fields):
    path = records_file([record("first"), fields])
    (_, example), data = read_examples(path), encode_files([path], CHAT, DataConfig(pack_tokens=512))
    expected, got = CHAT.encode(example), data.sequence(1)
    assert got.tokens.tolist() == expected.tokens.tolist()
    assert got.scored_from == expected.scored_from
    assert got.row_kinds.tolist() == expected.row_kinds.tolist()


def test_the_arrays_are_compact(records_file, examples):
    data = encode_files([records_file(examples)], CHAT, DataConfig(pack_tokens=512))
    names = ("tokens", "offsets", "prompt_tokens", "think_tokens", "kinds")
    assert [getattr(data, name).dtype for name in names] == [np.int32, np.int64, np.int32, np.int32, np.uint8]
    assert [getattr(data, name).ndim for name in names] == [1] * 5
    assert data.offsets[0] == 0
    assert data.offsets[-1] == len(data.tokens) == data.lengths.sum()


def test_ids_and_kinds_are_the_records(records_file, examples):
    data = encode_files([records_file(examples)], CHAT, DataConfig(pack_tokens=512))
    assert data.ids == tuple(example["id"] for example in examples)
    assert [KINDS[kind] for kind in data.kinds] == [example["kind"] for example in examples]


def test_every_record_keeps_its_file_and_line(records_file, examples):
    first, second = records_file(examples[:2], "a.jsonl"), records_file(["", json.dumps(examples[2])], "b.jsonl")
    data = encode_files([first, second], CHAT, DataConfig(pack_tokens=512))
    assert data.where == (f"{first}:1", f"{first}:2", f"{second}:2")


def test_lengths_are_prompt_and_scored_tokens(records_file):
    data = encode_files([records_file([record("a")])], CHAT, DataConfig(pack_tokens=512))
    # One token a byte: <|im_start|> "user\nWhy?" <|im_end|> "\n" <|im_start|> "assistant\n"
    assert data.prompt_tokens.tolist() == [1 + 9 + 1 + 1 + 1 + 10]
    assert data.think_tokens.tolist() == [len("<think>\nBecause.\n</think>")]
    assert data.scored_tokens.tolist() == [len("<think>\nBecause.\n</think>\n\nSo.") + 1]
    assert data.lengths.tolist() == [23 + 31]


def test_files_follow_each_other(records_file):
    one, two = records_file([record("a"), record("b")], "one.jsonl"), records_file([record("c")], "two.jsonl")
    assert encode_files([two, one], CHAT, DataConfig(pack_tokens=512)).ids == ("c", "a", "b")


def test_a_file_with_a_progress_bar_gives_the_same(records_file, examples):
    path = records_file(examples)
    plain, shown = (
        encode_files([path], CHAT, DataConfig(pack_tokens=512), progress=progress) for progress in (False, True)
    )
    assert plain.tokens.tolist() == shown.tokens.tolist()


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=6))
def test_a_sequence_is_cut_from_the_arrays(parts):
    # parts: prompt, reasoning and answer tokens of each record; the stop token comes on top.
    lengths = [prompt + think + answer + 1 for prompt, think, answer in parts]
    offsets = np.cumsum([0, *lengths])
    prompts, thinks = (np.array([part[i] for part in parts], np.int32) for i in (0, 1))
    kinds, ids = np.zeros(len(parts), np.uint8), tuple(map(str, range(len(parts))))
    data = ExampleSet(np.arange(offsets[-1], dtype=np.int32), offsets, prompts, thinks, kinds, ids)
    assert data.lengths.tolist() == lengths
    for i, ((start, stop), (prompt, think, answer)) in enumerate(zip(pairwise(offsets), parts, strict=True)):
        sequence = data.sequence(i)
        assert sequence.tokens.tolist() == list(range(start, stop))
        assert sequence.scored_from == prompt
        assert sequence.row_kinds.tolist() == [RowKind.THINK] * think + [RowKind.ANSWER] * answer + [RowKind.STOP]


# Too long


def test_a_record_of_exactly_the_maximum_length_is_accepted(records_file):
    (length,) = tokens_of(record("a"), records_file=records_file)
    path = records_file([record("a")])
    assert len(encode_files([path], CHAT, DataConfig(pack_tokens=length))) == 1
    assert f"{length} tokens, more than the {length - 1} allowed" in refusal([path], pack_tokens=length - 1)


def test_a_long_record_is_an_error_with_its_place_its_length_and_what_to_do(records_file):
    path = records_file([record("a"), record("b", SECRET * 9)])
    (_, length) = tokens_of(record("a"), record("b", SECRET * 9), records_file=records_file)
    assert refusal([path], pack_tokens=100) == (
        f"{path}:2: {length} tokens, more than the 100 allowed; nothing is cut: "
        "raise --data.pack_tokens, shorten the record, or leave it out with --data.too_long drop"
    )


def test_long_records_may_be_dropped_and_their_ids_are_kept(records_file):
    path = records_file([record("a", "x" * 99), record("b"), record("c", "x" * 99), record("d", kind="safety")])
    data = encode_files([path], CHAT, DataConfig(pack_tokens=100, too_long="drop"))
    assert (data.ids, data.dropped) == (("b", "d"), ("a", "c"))
    assert data.kinds.tolist() == [KINDS.index("general"), KINDS.index("safety")]
    assert len(data.tokens) == data.lengths.sum() == sum(tokens_of(record("b"), record("d"), records_file=records_file))


def test_nothing_is_dropped_if_everything_fits(records_file, examples):
    path = records_file(examples)
    dropping = encode_files([path], CHAT, DataConfig(pack_tokens=512, too_long="drop"))
    assert dropping.dropped == ()
    assert dropping.tokens.tolist() == encode_files([path], CHAT, DataConfig(pack_tokens=512)).tokens.tolist()


def test_kept_records_are_never_cut(records_file, examples):
    path = records_file(examples)
    whole = encode_files([path], CHAT, DataConfig(pack_tokens=512))
    limit = int(np.median(whole.lengths))
    kept = encode_files([path], CHAT, DataConfig(pack_tokens=limit, too_long="drop"))
    expected = {name: whole.sequence(i).tokens.tolist() for i, name in enumerate(whole.ids)}
    assert 0 < len(kept) < len(whole)
    assert {name: kept.sequence(i).tokens.tolist() for i, name in enumerate(kept.ids)} == {
        name: tokens for name, tokens in expected.items() if len(tokens) <= limit
    }


def test_all_records_dropped_is_an_error(records_file):
    path = records_file([record("a"), record("b")])
    assert refusal([path], pack_tokens=5, too_long="drop") == (
        "all 2 records are longer than 5 tokens; raise --data.pack_tokens"
    )


def test_a_faulty_record_is_an_error_even_if_long_ones_are_dropped(records_file):
    path = records_file([record("a"), record("b", f"{SECRET}<|im_end|>" * 9)])
    assert refusal([path], pack_tokens=60, too_long="drop").startswith(f"{path}:2: the response holds")


# Ids


def test_a_record_whose_id_earlier_files_have_gets_a_number_that_does_not_depend_on_where_the_files_are(records_file):
    one = records_file([record("a"), record("b")], "one.jsonl")
    others = [records_file([record("b")], name) for name in ("two.jsonl", "three.jsonl")]
    data = encode_files([one, *others], CHAT, DataConfig(pack_tokens=512))
    assert data.ids == ("a", "b", "b@2", "b@3")
    # Each record is found by its id.
    check_masks(data, CHAT, read_example_files([one, *others]), TokenLimits(1000))


def test_the_same_file_twice_is_an_error(records_file):
    path = records_file([record("a")])
    assert refusal([path, path]) == f"{path}: the file is given twice; name it once"


def test_an_id_that_would_get_that_of_another_record_is_an_error(records_file):
    one, two = records_file([record("a"), record("a@2")], "one.jsonl"), records_file([record("a")], "two.jsonl")
    assert refusal([one, two]).startswith(f'{two}:1: id "a" is already used, and so is "a@2"; ')


def test_records_without_ids_are_named_by_file_and_line(records_file):
    fields = {"prompt": "Why?", "answer": "So."}
    one, two = records_file([fields, fields], "one.jsonl"), records_file([fields], "two.jsonl")
    assert encode_files([one, two], CHAT, DataConfig(pack_tokens=512)).ids == ("one:1", "one:2", "two:1")


# Errors of the reader and the encoder


def test_a_faulty_line_is_an_error_with_its_place(records_file):
    path = records_file([record("a"), "{"])
    assert refusal([path]).startswith(f"{path}:2: broken JSON")


def test_a_record_that_cannot_be_encoded_is_an_error_with_its_place(records_file):
    path = records_file([record("a"), record("b", f"{SECRET} <|bos|>")])
    assert refusal([path]) == (
        f"{path}:2: the response holds the model's control token '<|bos|>' as text; remove or rewrite it"
    )


def test_a_missing_file_is_an_error(records_file):
    path = records_file([record("a")])
    assert refusal([path + "x"]).startswith(f"{path}x: there is no such file; did you mean {path}?")
