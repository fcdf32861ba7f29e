"""Tests the report on a data set and the check of its masks."""

import json
from dataclasses import replace
from datetime import date
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from tiny import IM_END, tiny_tokenizer

from saro.checks.check_masks import check_masks
from saro.data.chat_format import ChatFormat
from saro.data.dataset import ExampleSet, PairSet, encode_files, encode_pair_files
from saro.data.lengths import LengthReport, Lengths, Sharing
from saro.data.records import read_examples, read_pairs
from saro.data.tree import build_tree
from saro.errors import SaroError
from saro.report.tables import print_lengths

CHAT = ChatFormat(tiny_tokenizer(), frozenset({IM_END}), date(1999, 7, 4))
PAIRS = [
    {"id": "p", "prompt": "Why?", "chosen": {"reasoning": ["a", "b"], "answer": "c"}, "rejected": {"answer": "d"}},
    {
        "id": "q",
        "prompt": "How?",
        "chosen": {"reasoning": ["a", "b"], "answer": "c"},
        "rejected": {"reasoning": ["a", "x"], "answer": "c"},
    },
]


@pytest.fixture
def path(records_file, examples) -> str:
    return records_file(examples)


@pytest.fixture
def data(path) -> ExampleSet:
    return encode_files([path], CHAT, max_tokens=512)


def by_hand(**changes) -> ExampleSet:
    """Make five records of 5, 6, 7, 12 and 8 tokens."""
    parts = {
        "tokens": np.zeros(38, np.int32),
        "offsets": np.array([0, 5, 11, 18, 30, 38]),
        "prompt_tokens": np.array([1, 2, 3, 4, 2], np.int32),
        "think_tokens": np.array([0, 2, 2, 5, 3], np.int32),
        "kinds": np.array([0, 1, 0, 0, 0], np.uint8),
        "ids": ("a", "b", "c", "d", "e"),
    }
    return ExampleSet(**parts | changes)


def printed(report: LengthReport, title: str = "train") -> str:
    console = Console(file=StringIO(), width=90)
    print_lengths(console, title, report.as_dict())
    return console.file.getvalue()


# The report


def test_the_spread_of_a_length_by_hand():
    # In 0..20 the median is the 11th value and the 95th percentile the 20th.
    assert Lengths.of(np.random.default_rng(0).permutation(21)) == Lengths(0, 10, 19, 20, 210)


def test_the_spread_of_one_length_is_that_length():
    assert Lengths.of(np.array([7], np.int32)) == Lengths(7, 7, 7, 7, 7)


def test_a_median_is_a_length_that_occurs():
    assert Lengths.of(np.array([1, 2, 100, 200])).median in (2, 100)


def test_the_report_counts_records_by_kind():
    assert LengthReport.of(by_hand()).records == {"general": 4, "safety": 1}


def test_the_report_leaves_out_a_kind_that_does_not_occur():
    assert LengthReport.of(by_hand(kinds=np.ones(5, np.uint8))).records == {"safety": 5}


def test_the_report_measures_whole_records_and_their_parts():
    lengths = LengthReport.of(by_hand()).lengths
    spans = {label: (spread.least, spread.most, spread.total) for label, spread in lengths.items()}
    assert spans == {"whole record": (5, 12, 38), "prompt": (1, 4, 12), "reasoning": (0, 5, 12), "scored": (4, 8, 26)}


def test_prompt_and_scored_tokens_add_up_to_all_tokens(data):
    lengths = LengthReport.of(data).lengths
    assert lengths["prompt"].total + lengths["scored"].total == lengths["whole record"].total == len(data.tokens)


def test_the_report_names_dropped_records():
    assert LengthReport.of(by_hand(dropped=("x", "y"))).dropped == ("x", "y")


def test_the_report_is_plain_data_for_the_manifest():
    as_dict = json.loads(json.dumps(LengthReport.of(by_hand(dropped=("x",))).as_dict()))
    assert as_dict["records"] == {"general": 4, "safety": 1}
    assert as_dict["lengths"]["whole record"] == {"least": 5, "median": 7, "p95": 12, "most": 12, "total": 38}
    assert (as_dict["dropped"], as_dict["sharing"]) == (["x"], None)


def test_the_printed_report_has_the_numbers():
    text = printed(LengthReport.of(by_hand(dropped=("x",))))
    assert "train: 5 records (4 general, 1 safety); 1 dropped as too long" in text
    row = next(line for line in text.splitlines() if "whole record" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == ["whole record", "5", "7", "12", "12", "38"]
    assert all(name in text for name in ("prompt", "reasoning", "scored"))


def test_the_printed_report_does_not_mention_dropped_records_if_there_are_none():
    assert "dropped" not in printed(LengthReport.of(by_hand()))


def test_a_file_name_that_looks_like_markup_is_printed_unchanged():
    assert "[bold]a.jsonl: 5 records" in printed(LengthReport.of(by_hand()), "[bold]a.jsonl")


# The report on pairs


def a_side(*sequences: list[int], prompts: tuple[int, ...], **changes) -> ExampleSet:
    """Make a side from these sequences. All scored tokens but the last count as reasoning."""
    lengths = np.array([len(tokens) for tokens in sequences])
    parts = {
        "tokens": np.concatenate([np.array(tokens, np.int32) for tokens in sequences]),
        "offsets": np.cumsum([0, *lengths]),
        "prompt_tokens": np.array(prompts, np.int32),
        "think_tokens": (lengths - prompts - 1).astype(np.int32),
        "kinds": np.array([0, 1, 1], np.uint8),
        "ids": ("a", "b", "c"),
    }
    return ExampleSet(**parts | changes)


def pairs_by_hand(**changes) -> PairSet:
    """Make three pairs. The first and last have the prompt 7 8 and share one response token; the second shares none."""
    chosen = a_side([7, 8, 1, 2, 3], [5, 1, 1], [7, 8, 1, 4, 4, 4], prompts=(2, 1, 2), **changes)
    rejected = a_side([7, 8, 1, 9], [5, 2, 2, 2], [7, 8, 1, 9, 9], prompts=(2, 1, 2), **changes)
    return PairSet(chosen, rejected, np.array([0, 1, 0], np.int32))


def test_the_report_on_pairs_counts_them_by_kind():
    assert LengthReport.of(pairs_by_hand()).records == {"op-cot": 1, "pp-cot": 2}


def test_the_report_measures_both_sides_of_pairs_and_their_shared_part():
    totals = {label: spread.total for label, spread in LengthReport.of(pairs_by_hand()).lengths.items()}
    assert totals == {
        "chosen": 5 + 3 + 6,
        "rejected": 4 + 4 + 5,
        "prompt": 2 + 1 + 2,
        "shared reasoning": 1 + 0 + 1,
        "pair, shared part once": 6 + 6 + 8,
    }


def test_the_shared_tokens_of_a_pair_are_its_common_prefix():
    assert pairs_by_hand().shared_tokens.tolist() == [3, 1, 3]


def test_sharing_by_hand():
    # One tree holds 7 8 1, then 2 3, 9 9 (one rejected response ends at the first 9) and 4 4 4. The other has 6 tokens.
    assert Sharing.of(pairs_by_hand()) == Sharing(apart=27, by_pair=20, by_prompt=3 + 2 + 2 + 3 + 6)


def test_pairs_that_are_apart_in_the_file_are_grouped_by_prompt():
    data = pairs_by_hand()
    assert Sharing.of(replace(data, prompts=np.array([4, 2, 4], np.int32))) == Sharing.of(data)
    one_each = Sharing.of(replace(data, prompts=np.array([2, 0, 1], np.int32)))
    assert one_each.by_prompt == one_each.by_pair == Sharing.of(data).by_pair


def test_the_length_of_a_pair_is_the_number_of_tokens_in_its_tree(records_file):
    data = encode_pair_files([records_file(PAIRS)], CHAT, max_tokens=512)
    trees = [build_tree(data.sequences(i)) for i in range(len(data))]
    assert data.lengths.tolist() == [sum(len(node.tokens) for node in tree.nodes) for tree in trees]


def test_the_report_on_pairs_is_plain_data_for_the_manifest():
    as_dict = json.loads(json.dumps(LengthReport.of(pairs_by_hand(dropped=("x",))).as_dict()))
    assert as_dict["sharing"] == {"apart": 27, "by_pair": 20, "by_prompt": 16}
    assert as_dict["lengths"]["shared reasoning"]["total"] == 2
    assert as_dict["dropped"] == ["x"]


def test_the_printed_report_on_pairs_says_how_much_sharing_saves():
    text = printed(LengthReport.of(pairs_by_hand()))
    assert "train: 3 pairs (1 op-cot, 2 pp-cot)" in text
    assert "pair, shared part once" in text
    # Sharing saves 7 of 27 tokens within pairs, and 11 if pairs on one prompt share a tree.
    assert "Sharing saves 25.9 % of 27 tokens, and up to 40.7 % if pairs on one prompt come into one step" in text


def test_the_printed_report_does_not_mention_prompts_if_each_has_one_pair():
    text = printed(LengthReport.of(replace(pairs_by_hand(), prompts=np.arange(3, dtype=np.int32))))
    assert "Sharing saves 25.9 % of 27 tokens\n" in text


# The check of the masks


def tampered(data: ExampleSet, record: int, position: int, token: int) -> ExampleSet:
    """Return the data with one token changed. A negative position counts from the record's end."""
    tokens = data.tokens.copy()
    tokens[data.offsets[record + (position < 0)] + position] = token
    return replace(data, tokens=tokens)


def refusal(data: ExampleSet, examples) -> str:
    with pytest.raises(SaroError) as caught:
        check_masks(data, CHAT, examples, 1000)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_good_data_passes(data, path):
    check_masks(data, CHAT, read_examples(path), 1000)


@pytest.mark.parametrize("record", [0, 11, 23])
def test_another_last_token_is_refused(data, record):
    message = refusal(tampered(data, record, -1, 77), [])
    assert message == f"record r{record}: the scored tokens do not end with their only stop token"


def test_a_second_stop_token_is_refused(data):
    assert "record r5: the scored tokens do not end with their only" in refusal(tampered(data, 5, -3, IM_END), [])


def test_a_stop_token_in_the_prompt_is_allowed(data, path):
    assert IM_END in data.sequence(0).tokens[: data.prompt_tokens[0]]
    check_masks(data, CHAT, [next(read_examples(path))], 1000)


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
    data = encode_files([path], one, max_tokens=512)
    with pytest.raises(SaroError, match="differ from those that the model reads at inference"):
        check_masks(data, two, read_examples(path), 1000)


def test_only_the_examples_given_have_their_prompts_compared(data, path):
    first, *_ = read_examples(path)
    check_masks(tampered(data, 3, 2, 77), CHAT, [first], 1000)


def test_dropped_records_are_not_compared(path):
    data = encode_files([path], CHAT, max_tokens=80, too_long="drop")
    assert data.dropped
    check_masks(data, CHAT, read_examples(path), 1000)


def test_raw_text_has_no_template_to_compare_with(records_file):
    path = records_file([{"prompt": "Q: Why?\nA:", "completion": " So."}])
    check_masks(encode_files([path], CHAT, max_tokens=512), CHAT, read_examples(path), 1000)


def test_any_of_several_stop_tokens_is_accepted(data):
    both = ChatFormat(CHAT.tokenizer, frozenset({IM_END, 77}), CHAT.template_date)
    check_masks(tampered(data, 5, -1, 77), both, [], 1000)


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused(records_file, examples):
    data = encode_files([records_file(examples)], CHAT, max_tokens=512)
    most = int(data.tokens.max())
    check_masks(data, CHAT, [], most + 1)
    with pytest.raises(SaroError, match=f"the tokenizer gives id {most} and the model embeds {most} tokens"):
        check_masks(data, CHAT, [], most)


# The check of the masks of pairs


@pytest.fixture
def pairs_path(records_file) -> str:
    return records_file(PAIRS, "pairs.jsonl")


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_good_pairs_pass_on_both_sides(pairs_path, side):
    data = encode_pair_files([pairs_path], CHAT, max_tokens=512)
    check_masks(getattr(data, side), CHAT, read_pairs(pairs_path), 1000)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_shifted_mask_of_a_pair_is_refused_with_its_place(pairs_path, side):
    data = getattr(encode_pair_files([pairs_path], CHAT, max_tokens=512), side)
    shifted = replace(data, prompt_tokens=data.prompt_tokens + np.array([0, 1], np.int32))
    assert refusal(shifted, read_pairs(pairs_path)).startswith(f"{pairs_path}:2: the prompt's tokens differ from those")
