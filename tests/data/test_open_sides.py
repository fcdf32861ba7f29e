"""A side of a pair may be open: the beginning of a response, scored to its last stable token and without a stop token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from chat_cases import OPENS_THINK, QWEN3, chat_of
from hypothesis import assume, given, settings
from prefill_cases import CHATS, beginnings, continuations
from tiny import IM_END

from saro.checks.check_masks import check_masks
from saro.config import DataConfig
from saro.data.chat_format import Prefill
from saro.data.dataset import PairSet
from saro.data.encode_files import encode_files, encode_pair_files
from saro.data.lengths import LengthReport
from saro.data.packs import lay_out
from saro.data.records import Example, Message, Pair, Response, read_examples, read_pairs
from saro.data.repeats import count_duplicates
from saro.data.tree import RowKind, ScoredSequence, build_tree
from saro.errors import SaroError
from saro.model.architectures import TokenLimits
from saro.train.reference_cache import sequence_key

USER = (Message("user", "Hi"),)
CHAT = chat_of()
T, A, S = RowKind.THINK, RowKind.ANSWER, RowKind.STOP
CLOSED = {"reasoning": ["Hm.", "No harm."], "answer": "No."}
OPEN = {"reasoning": ["Hm.", "Sure, first"], "answer": "", "open": True}


def record(chosen=CLOSED, rejected=OPEN, **fields) -> dict[str, object]:
    return {"id": "p", "kind": "pp-cot", "prompt": "Hi", "chosen": chosen, "rejected": rejected} | fields


def read(records_file, **fields) -> Pair:
    (pair,) = read_pairs(records_file([record(**fields)]))
    return pair


def refusal(call, *arguments) -> str:
    with pytest.raises(SaroError) as caught:
        call(*arguments)
    return str(caught.value)


def encode(chosen: Response, rejected: Response, chat=CHAT) -> tuple[ScoredSequence, ScoredSequence]:
    return chat.encode_pair(Pair("p", "pp-cot", USER, chosen, rejected, "pairs.jsonl:7"))


def text_of(chat, sequence: ScoredSequence) -> str:
    return chat.tokenizer.decode(sequence.tokens[sequence.scored_from :])


# Records


def test_an_open_side_may_end_inside_its_reasoning(records_file):
    for answer in ({"answer": ""}, {}):
        side = {"reasoning": ["Hm.", "Sure, first"], "open": True} | answer
        assert read(records_file, rejected=side).rejected == Response("Hm.\nSure, first", "", open=True)


def test_an_open_side_may_end_inside_its_answer(records_file):
    side = {"reasoning": "Hm.", "answer": "Sure, first", "open": True}
    assert read(records_file, chosen=side).chosen == Response("Hm.", "Sure, first", open=True)
    side = {"answer": "Sure, first", "open": True}
    assert read(records_file, chosen=side).chosen == Response(None, "Sure, first", open=True)


def test_open_false_is_a_whole_side(records_file):
    assert read(records_file, chosen=CLOSED | {"open": False}) == read(records_file)


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ({"reasoning": "Hm.", "open": "yes"}, "rejected: open is a string; give true or false, or leave the field out"),
        ({"reasoning": "Hm.", "open": False}, "rejected has no answer; add it"),
        ({"reasoning": "Hm.", "answer": "", "open": False}, "rejected: answer is empty; write it or drop the record"),
        ({"reasoning": "Hm.", "answer": None, "open": True}, "rejected: answer is null; give a string"),
        ({"reasoning": [], "open": True}, "rejected: reasoning has no steps; add one, or leave the field out"),
        ({"reasoning": " ", "open": True}, "rejected: reasoning is empty; write it, or leave the field out"),
        ({"open": True}, "rejected has no answer; add it"),
        ({"answer": "", "open": True}, "rejected: answer is empty; write it or drop the record"),
    ],
)
def test_a_faulty_open_side_is_an_error_with_its_line(records_file, side, message):
    file = records_file([record(id="good"), record(rejected=side)])
    assert refusal(lambda: list(read_pairs(file))) == f"{file}:2: {message}"


def test_an_example_may_not_be_open(records_file):
    file = records_file([{"prompt": "Hi", "reasoning": "Hm.", "answer": "", "open": True}])
    message = f'{file}:1: only a side of a pair may be "open"; finish the response and leave the field out'
    assert refusal(lambda: list(read_examples(file))) == message
    example = Example("a", "general", USER, Response("Hm.", "", open=True), "made.jsonl:3")
    assert refusal(CHAT.encode, example).startswith("made.jsonl:3: the response has no end")


# Token ids


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "drops think", "qwen3"])
def test_open_reasoning_has_no_closing_tag_and_no_stop_token(name):
    chat = CHATS[f"bytes, {name}"]
    chosen, rejected = encode(Response("Hm.", "No."), Response("Hm.\nSure", "", open=True), chat)
    assert text_of(chat, rejected).lstrip() == "<think>\nHm.\nSure"
    assert rejected.is_open
    assert set(rejected.row_kinds.tolist()) == {T}
    assert not chosen.is_open


def test_a_template_that_opens_the_reasoning_opens_it_once():
    _, rejected = encode(Response("Hm.", "No."), Response("Hm.\nSure", "", open=True), chat_of(OPENS_THINK))
    assert text_of(chat_of(OPENS_THINK), rejected) == "Hm.\nSure"
    assert set(rejected.row_kinds.tolist()) == {T}


def test_a_template_that_has_closed_the_reasoning_is_an_error():
    chat = chat_of(QWEN3, template_variables={"enable_thinking": False})
    message = refusal(encode, Response(None, "No."), Response("Hm.", "", open=True), chat)
    assert message.startswith("pairs.jsonl:7: the chat template closes the reasoning")


def test_an_open_answer_has_its_reasoning_and_no_stop_token():
    _, rejected = encode(Response("Hm.", "No."), Response("Hm.", "Sure", open=True))
    assert text_of(CHAT, rejected) == "<think>\nHm.\n</think>\n\nSure"
    think = len("<think>\nHm.\n</think>")
    assert rejected.row_kinds.tolist() == [T] * think + [A] * len("\n\nSure")


@pytest.mark.parametrize("name", CHATS)
@settings(max_examples=15, deadline=None)
@given(beginnings, continuations)
def test_an_open_side_has_the_ids_of_a_prefill_and_of_every_response_that_continues_it(name, beginning, continuation):
    chat = CHATS[name]
    whole = Response(beginning + continuation, "So.")
    try:
        _, side = encode(Response("\u2603 Another chain.", "No."), Response(beginning, "", open=True), chat)
        response = chat.encode(Example("a", "general", USER, whole, "f:1"))
    except SaroError:
        assume(False)
    begun = chat.prefill_ids(USER, Prefill(beginning))
    assert side.tokens.tolist() == list(begun.ids)
    assert response.tokens[: len(side.tokens)].tolist() == side.tokens.tolist()
    shared_kinds = response.row_kinds[: len(side.row_kinds)]
    assert shared_kinds.tolist() == side.row_kinds.tolist()


def test_a_control_token_in_an_open_side_is_an_error():
    message = refusal(encode, Response("Hm.", "No."), Response("Hm. <|im_end|> So", "", open=True))
    assert message.startswith("pairs.jsonl:7: the response holds the model's control token")


def test_a_think_tag_in_an_open_side_is_an_error():
    message = refusal(encode, Response("Hm.", "No."), Response("Hm.</think>So", "", open=True))
    assert message.startswith("pairs.jsonl:7: the reasoning holds a <think> or </think> tag of its own")


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (
            Response("Hm.\nNo.", "No."),
            Response("Hm.", "", open=True),
            "the open rejected side is only the beginning of",
        ),
        (
            Response("Hm.", "", open=True),
            Response("Hm.\nSure.", "Yes"),
            "the open chosen side is only the beginning of",
        ),
        (Response("Hm.", "No.", open=True), Response("Hm.", "No."), "the open chosen side is only the beginning of"),
        (Response("Hm.", "", open=True), Response("Hm", "", open=True), "the open rejected side is only the beginning"),
        (Response("Hm", "", open=True), Response("Hm", "", open=True), "chosen and rejected are the same tokens"),
    ],
)
def test_a_side_that_is_only_the_beginning_of_the_other_is_refused(chosen, rejected, message):
    assert refusal(encode, chosen, rejected).startswith(f"pairs.jsonl:7: {message}")


# Sets


@pytest.fixture
def encoded(records_file):
    def encode(*records: dict[str, object]) -> PairSet:
        named = [record | {"id": f"p{i}"} for i, record in enumerate(records)]
        return encode_pair_files([records_file(named)], CHAT, DataConfig(pack_tokens=512))

    return encode


def test_a_set_keeps_which_sides_are_open(encoded):
    data = encoded(record(), record(rejected=CLOSED | {"answer": "Yes."}), record(chosen=OPEN, rejected=CLOSED))
    assert [[side.is_open for side in data.sequences(i)] for i in range(3)] == [
        [False, True],
        [False, False],
        [True, False],
    ]
    assert encoded(record(rejected=CLOSED | {"answer": "Yes."})).rejected.is_open is None


def test_sequences_of_a_set_are_those_that_were_encoded(encoded, records_file):
    data = encoded(record(), record(chosen={"reasoning": "Hm.", "answer": "No", "open": True}))
    pairs = read_pairs(
        records_file([record(), record(id="q", chosen={"answer": "No", "reasoning": "Hm.", "open": True})])
    )
    for i, pair in enumerate(pairs):
        for ours, theirs in zip(data.sequences(i), CHAT.encode_pair(pair), strict=True):
            assert ours.tokens.tolist() == theirs.tokens.tolist()
            assert ours.row_kinds.tolist() == theirs.row_kinds.tolist()


def test_divergent_rows_of_an_open_side_end_without_a_stop(encoded):
    data = encoded(record())
    chosen, rejected = data.divergent().sequences(0)
    assert rejected.row_kinds.tolist() == [T] * len("Sure, first")
    assert text_of(CHAT, rejected) == "Sure, first"
    assert chosen.row_kinds[-1] == S


def test_masks_of_open_sides_are_accepted(encoded, records_file):
    data = encoded(record())
    pairs = list(read_pairs(records_file([record(id="p0")])))
    check_masks(data, CHAT, pairs, TokenLimits(300))


def test_a_stop_token_in_an_open_side_is_refused(encoded):
    data = encoded(record())
    tokens = data.rejected.tokens.copy()
    tokens[-3] = IM_END
    changed = PairSet(data.chosen, replace(data.rejected, tokens=tokens), data.prompts)
    assert (
        refusal(check_masks, changed, CHAT, [], TokenLimits(300))
        == "record p0: the scored tokens of an open side hold a stop token"
    )


def test_a_side_that_lost_its_stop_token_is_refused(encoded):
    """A set whose flag is lost would train a cut response as if it were whole."""
    data = encoded(record())
    changed = PairSet(data.chosen, replace(data.rejected, is_open=None), data.prompts)
    message = "record p0: the scored tokens do not end with their only stop token"
    assert refusal(check_masks, changed, CHAT, [], TokenLimits(300)) == message


def test_an_open_side_and_a_whole_one_have_different_reference_keys(encoded):
    whole = {"answer": "Sure, first"}
    sides = encoded(record(rejected=whole), record(rejected=whole | {"open": True})).rejected
    assert sides.sequence(0).tokens[:-1].tolist() == sides.sequence(1).tokens.tolist()
    one, other = (sides.sequence(i) for i in range(2))
    assert sequence_key(one.tokens, one.scored_from) != sequence_key(other.tokens, other.scored_from)


def test_open_sides_that_repeat_are_duplicates(encoded):
    assert count_duplicates(encoded(record(), record())) == 1
    assert count_duplicates(encoded(record(), record(rejected=OPEN | {"reasoning": ["Hm.", "Sure, firstly"]}))) == 0


def test_an_open_side_may_begin_a_response_of_another_pair(encoded):
    """All pairs on one prompt share a tree, in which the open side ends inside a path."""
    data = encoded(record(), record(rejected={"reasoning": ["Hm.", "Sure, first one."], "answer": "Yes."}))
    (tree,) = data.trees([0, 1], 512)
    apart = sum(build_tree(data.sequences(i)).tokens for i in (0, 1))
    assert tree.tokens < apart
    pack = lay_out([tree])
    counts = np.bincount(pack.entry_sequence).tolist()
    assert counts == [len(side.row_kinds) for i in (0, 1) for side in data.sequences(i)]
    for i, sequence in enumerate(tree.sequences):
        rows = pack.entry_row[pack.entry_sequence == i]
        assert pack.row_target[rows].tolist() == sequence.tokens[sequence.scored_from :].tolist()
        assert pack.row_kind[rows].tolist() == sequence.row_kinds.tolist()


def test_the_report_counts_open_sides(encoded):
    both = record(chosen={"answer": "No", "open": True})
    assert LengthReport.of(encoded(record(), both)).open_sides == 3
    assert LengthReport.of(encoded(record(rejected={"answer": "Yes."}))).open_sides == 0


def test_examples_are_never_open(records_file):
    data = encode_files([records_file([{"prompt": "Hi", "answer": "No."}])], CHAT, DataConfig(pack_tokens=99))
    assert data.is_open is None
    assert not data.sequence(0).is_open
