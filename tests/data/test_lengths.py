"""The report on a set counts its records, their lengths and what trees share."""

import json
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
from sets import PAIR_RECORDS, by_hand, pairs_by_hand
from tiny import IM_END, tiny_tokenizer

from saro.config import DataConfig
from saro.data.chat_format import ChatFormat
from saro.data.dataset import ExampleSet
from saro.data.encode_files import encode_files, encode_pair_files
from saro.data.lengths import LengthReport, Lengths, Sharing
from saro.data.tree import build_tree

CHAT = ChatFormat(tiny_tokenizer(), frozenset({IM_END}), date(1999, 7, 4))


@pytest.fixture
def data(records_file, examples) -> ExampleSet:
    return encode_files([records_file(examples)], CHAT, DataConfig(pack_tokens=512))


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


def test_the_report_counts_records_of_raw_text_if_the_model_has_a_template(records_file):
    raw = {"prompt": "Why? ", "completion": "So."}
    native = {"prompt": [{"role": "user", "content": "Why?"}], "answer": "So."}
    file = records_file([raw, native, raw | {"completion": "No."}])
    assert LengthReport.of(encode_files([file], CHAT, DataConfig(pack_tokens=512))).raw == 2
    base = tiny_tokenizer()
    base.chat_template = None
    without = replace(CHAT, tokenizer=base)
    file = records_file([raw])
    assert LengthReport.of(encode_files([file], without, DataConfig(pack_tokens=512))).raw == 0
    pair = {"prompt": "Why? ", "chosen": "So.", "rejected": "No."}
    assert LengthReport.of(encode_pair_files([records_file([pair])], CHAT, DataConfig(pack_tokens=512))).raw == 1


def test_the_report_counts_duplicates():
    twins = by_hand(offsets=np.array([0, 5, 10, 15, 20, 38]), prompt_tokens=np.array([1, 1, 2, 1, 2], np.int32))
    assert LengthReport.of(twins).duplicates == 2
    assert LengthReport.of(pairs_by_hand()).duplicates == 0


def test_the_report_counts_prompts_that_are_trained_on_but_not_in_the_training_set_itself():
    data = by_hand()
    assert LengthReport.of(data, train=data).trained_prompts == 0
    assert LengthReport.of(data, train=by_hand()).trained_prompts == 5
    assert LengthReport.of(data).trained_prompts == 0


def test_the_report_is_plain_data_for_the_manifest():
    as_dict = json.loads(json.dumps(LengthReport.of(by_hand(dropped=("x",))).as_dict()))
    assert as_dict["records"] == {"general": 4, "safety": 1}
    assert as_dict["lengths"]["whole record"] == {"least": 5, "median": 7, "p95": 12, "most": 12, "total": 38}
    assert (as_dict["dropped"], as_dict["sharing"]) == (["x"], None)


# The report on pairs


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
    data = encode_pair_files([records_file(PAIR_RECORDS)], CHAT, DataConfig(pack_tokens=512))
    trees = [build_tree(data.sequences(i)) for i in range(len(data))]
    assert data.lengths.tolist() == [sum(len(node.tokens) for node in tree.nodes) for tree in trees]


def test_the_report_on_pairs_is_plain_data_for_the_manifest():
    as_dict = json.loads(json.dumps(LengthReport.of(pairs_by_hand(dropped=("x",))).as_dict()))
    assert as_dict["sharing"] == {"apart": 27, "by_pair": 20, "by_prompt": 16}
    assert as_dict["lengths"]["shared reasoning"]["total"] == 2
    assert as_dict["dropped"] == ["x"]
