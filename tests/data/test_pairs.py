"""Tests preference pairs, from JSONL to token ids."""

from __future__ import annotations

import json
from collections import Counter
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from tiny import IM_END, tiny_tokenizer

from saro.config import DataConfig
from saro.data.chat_format import ChatFormat
from saro.data.encode_files import encode_pair_files
from saro.data.lengths import LengthReport
from saro.data.records import Message, Response, read_examples, read_pairs
from saro.demo import demo_file
from saro.errors import SaroError

CHAT = ChatFormat(tiny_tokenizer(), frozenset([IM_END]), date(2024, 7, 26))
USER = [{"role": "user", "content": "Hi"}]
NATIVE = {
    "id": "p",
    "kind": "pp-cot",
    "prompt": "Hi",
    "chosen": {"reasoning": ["a", "b"], "answer": "c"},
    "rejected": {"answer": "d"},
}


def _turn(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def _only(pairs):
    (pair,) = pairs
    return pair


def _refusal(file: str) -> str:
    with pytest.raises(SaroError) as caught:
        list(read_pairs(file))
    return str(caught.value)


def test_a_native_pair_is_read(records_file):
    pair = _only(read_pairs(records_file([NATIVE])))
    assert (pair.id, pair.kind, pair.prompt) == ("p", "pp-cot", (Message("user", "Hi"),))
    assert (pair.chosen, pair.rejected) == (Response("a\nb", "c"), Response(None, "d"))


def test_trls_string_preference_format_is_raw_text(records_file):
    pair = _only(read_pairs(records_file([{"prompt": "Hi", "chosen": " yes", "rejected": " no"}])))
    assert (pair.prompt, pair.kind) == ("Hi", "op-cot")
    assert (pair.chosen.answer, pair.rejected.answer) == (" yes", " no")


def test_trls_conversational_preference_format_is_read(records_file):
    pair = _only(read_pairs(records_file([{"prompt": USER, "chosen": _turn("yes"), "rejected": _turn("no")}])))
    assert pair.prompt == (Message("user", "Hi"),)
    assert (pair.chosen.answer, pair.rejected.answer) == ("yes", "no")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rejected": NATIVE["chosen"]},
            "chosen equals rejected; drop this pair; --data.equal_sides drop does so in training",
        ),
        ({"rejected": {"answer": " "}}, "rejected: answer is empty; write it or drop the record"),
        ({"rejected": {"reasoning": "x"}}, "rejected has no answer; add it"),
        ({"rejected": "d"}, "chosen is an object; give both sides in one form"),
        ({"rejected": {"answr": "d", "answer": "e"}}, 'rejected has the field "answr"; did you mean answer?'),
        ({"kind": "pp-cott"}, 'kind is "pp-cott"; did you mean pp-cot?'),
        ({"messages": USER}, 'field "messages" makes this an example, not a pair; give examples to stage 1 (RW)'),
        (
            {"prompt": "Ho", "chosen": USER + _turn("a"), "rejected": USER + _turn("b")},
            "prompt is not that of the conversation beside it; fix it, or remove it",
        ),
        (
            {"prompt": USER + USER, "chosen": USER + _turn("a"), "rejected": USER + _turn("b")},
            "prompt is not that of the conversation beside it; fix it, or remove it",
        ),
        (
            {"chosen": USER + _turn("a"), "rejected": USER + _turn("b") + USER + _turn("c")},
            "chosen and rejected are not one conversation with two last assistant turns; give both the same messages "
            "before the last one",
        ),
        (
            {"prompt": USER, "chosen": _turn("a"), "rejected": USER + _turn("b")},
            "chosen and rejected are not one conversation with two last assistant turns; give both the same messages "
            "before the last one",
        ),
        (
            {"chosen": USER + _turn("a"), "rejected": USER + USER},
            "chosen and rejected are not one conversation with two last assistant turns; give both the same messages "
            "before the last one",
        ),
        (
            {"chosen": "a", "rejected": _turn("b")},
            "one side is a string and the other a list; give both sides in one form",
        ),
        (
            {"label": True},
            'field "label" makes this a labelled response, which may be undesirable; give it to stage 2 (SRPO) with '
            "--preference.loss kto, or remove the field",
        ),
        ({"open": True}, 'only a side of a pair may be "open"; finish the response and leave the field out'),
    ],
)
def test_a_faulty_pair_is_an_error_with_its_line_and_what_to_do(records_file, change, message):
    file = records_file([NATIVE | {"id": "good"}, NATIVE | change])
    assert _refusal(file) == f"{file}:2: {message}"


@pytest.mark.parametrize("meta", [{}, {"meta": None}, {"meta": {"synth": "x"}}, {"meta": {"form": "mine"}}])
def test_a_pair_that_names_no_form_has_none(records_file, meta):
    """Meta is data of the user's own."""
    assert _only(read_pairs(records_file([NATIVE | meta]))).form is None


def test_the_form_of_a_pair_is_read_from_meta_synth(records_file):
    record = NATIVE | {"meta": {"synth": {"form": "intervene", "value": 0.5}, "source": "x"}}
    assert _only(read_pairs(records_file([record]))).form == "intervene"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (7, "meta.synth.form is a number"),
        ("", "meta.synth.form is (0 characters of text), not 1 to 32 of the characters a-z 0-9 _ -"),
        ("in/tervene", 'meta.synth.form is "in/tervene", not 1 to 32 of the characters a-z 0-9 _ -'),
        ("x" * 33, f'meta.synth.form is "{"x" * 33}", not 1 to 32 of the characters a-z 0-9 _ -'),
        ("pp-cot", 'meta.synth.form is "pp-cot", the name of a kind of pair; give the form another name'),
    ],
)
def test_a_form_that_is_no_short_name_is_an_error(records_file, form, message):
    """It becomes a part of the names of metrics."""
    file = records_file([NATIVE | {"meta": {"synth": {"form": form}}}])
    assert _refusal(file).startswith(f"{file}:1: {message}")


def test_a_set_keeps_the_form_of_each_pair_that_is_not_dropped(records_file):
    made = {"meta": {"synth": {"form": "mirror"}}}
    long = made | {"rejected": {"answer": "x" * 300}}
    records = [NATIVE | made, NATIVE | long | {"id": "long"}, NATIVE | {"id": "q"}]
    pairs = encode_pair_files([records_file(records)], CHAT, DataConfig(pack_tokens=200, too_long="drop"))
    assert (pairs.ids, pairs.forms) == (("p", "q"), ("mirror", None))
    assert pairs.divergent().forms == pairs.forms
    assert encode_pair_files([records_file([NATIVE])], CHAT, DataConfig(pack_tokens=200)).forms == ()


def test_a_pair_without_a_prompt_is_refused_and_the_prompt_is_not_guessed(records_file):
    """huggingface/trl#6472: the prompt was guessed from the text that both answers begin with."""
    for sides in (("Yes, a", "Yes, b"), (_turn("Yes, a"), _turn("Yes, b")), ({"answer": "a"}, {"answer": "b"})):
        file = records_file([dict(zip(("chosen", "rejected"), sides, strict=True))])
        assert _refusal(file) == (
            f'{file}:1: field "prompt" is missing; add it; it is never guessed from the text of the two sides'
        )


TALK = [{"role": "system", "content": "Be brief."}, *USER, *_turn("Yes?"), {"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    "beside",
    [{}, {"prompt": TALK}, {"prompt": "Why?"}, {"prompt": "Hi", "score_chosen": 8.5, "prompt_id": "x", "source": None}],
)
def test_the_prompt_of_two_whole_conversations_is_the_messages_before_the_last(records_file, beside):
    """As in UltraFeedback, whose prompt repeats the user's turn."""
    sides = {"chosen": TALK + _turn("Yes, a"), "rejected": TALK + _turn("Yes, b")}
    pair = _only(read_pairs(records_file([sides | beside])))
    assert [(turn.role, turn.content) for turn in pair.prompt] == [(turn["role"], turn["content"]) for turn in TALK]
    assert (pair.chosen, pair.rejected) == (Response(None, "Yes, a"), Response(None, "Yes, b"))


def test_a_text_prompt_before_message_sides_is_the_users_turn(records_file):
    pair = _only(read_pairs(records_file([{"prompt": "Hi", "chosen": _turn("yes"), "rejected": _turn("no")}])))
    assert (pair.prompt, pair.chosen.answer) == ((Message("user", "Hi"),), "yes")


def test_a_record_of_ultrafeedback_is_a_pair_and_its_messages_are_an_example(records_file):
    chosen = USER + _turn("yes")
    file = records_file([{"prompt": "Hi", "messages": chosen, "chosen": chosen, "rejected": USER + _turn("no")}])
    pair, example = _only(read_pairs(file)), _only(read_examples(file))
    assert (pair.prompt, pair.chosen) == (example.prompt, example.response)
    assert example.ignored == ("chosen", "rejected")


def test_messages_beside_a_pair_that_are_not_the_chosen_conversation_are_refused(records_file):
    file = records_file([{"messages": USER + _turn("x"), "chosen": USER + _turn("a"), "rejected": USER + _turn("b")}])
    assert 'field "messages" makes this an example' in _refusal(file)
    with pytest.raises(SaroError, match='field "chosen" makes this a preference pair'):
        list(read_examples(file))


def test_the_reasoning_of_the_last_messages_is_the_reasoning_of_the_sides(records_file):
    sides = {name: [{**_turn(name)[0], "reasoning_content": f"to {name}"}] for name in ("chosen", "rejected")}
    pair = _only(read_pairs(records_file([{"prompt": USER} | sides])))
    assert (pair.chosen, pair.rejected) == (Response("to chosen", "chosen"), Response("to rejected", "rejected"))


def test_both_sides_are_encoded_on_the_same_prompt(records_file):
    pairs = encode_pair_files([records_file([NATIVE])], CHAT, DataConfig(pack_tokens=512))
    chosen, rejected = pairs.sequences(0)
    assert chosen.scored_from == rejected.scored_from
    assert np.array_equal(chosen.tokens[: chosen.scored_from], rejected.tokens[: rejected.scored_from])
    text = CHAT.tokenizer.decode
    assert text(chosen.tokens[chosen.scored_from :]) == "<think>\na\nb\n</think>\n\nc<|im_end|>"
    assert text(rejected.tokens[rejected.scored_from :]) == "d<|im_end|>"
    assert (pairs.ids, pairs.kinds.tolist(), len(pairs)) == (("p",), [1], 1)


@pytest.mark.parametrize("long_side", ["chosen", "rejected"])
def test_a_pair_with_one_side_too_long_is_an_error_or_dropped_with_both_sides(records_file, long_side):
    file = records_file([NATIVE, NATIVE | {"id": "long", long_side: {"answer": "x" * 300}}])
    with pytest.raises(SaroError, match=r":2: \d+ tokens, more than the 200 allowed; nothing is cut"):
        encode_pair_files([file], CHAT, DataConfig(pack_tokens=200))
    pairs = encode_pair_files([file], CHAT, DataConfig(pack_tokens=200, too_long="drop"))
    assert (pairs.ids, pairs.chosen.dropped) == (("p",), ("long",))


def test_sides_that_are_the_same_tokens_are_refused(records_file):
    same = {"chosen": {"reasoning": "a", "answer": "b"}, "rejected": {"answer": "<think>\na\n</think>\n\nb"}}
    with pytest.raises(SaroError, match="chosen and rejected are the same tokens; drop this pair"):
        encode_pair_files([records_file([NATIVE | same])], CHAT, DataConfig(pack_tokens=200))


@pytest.mark.parametrize(
    "same",
    [
        pytest.param({"chosen": {"answer": "d"}}, id="texts"),
        pytest.param(
            {"chosen": {"reasoning": "a", "answer": "b"}, "rejected": {"answer": "<think>\na\n</think>\n\nb"}},
            id="tokens",
        ),
    ],
)
def test_pairs_whose_sides_are_the_same_are_left_out_if_asked_and_counted(records_file, same):
    file = records_file([NATIVE | {"id": "same"} | same, NATIVE])
    pairs = encode_pair_files([file], CHAT, DataConfig(pack_tokens=200, equal_sides="drop"))
    assert (pairs.ids, pairs.chosen.equal, pairs.chosen.dropped) == (("p",), ("same",), ())
    assert LengthReport.of(pairs).equal == ("same",)


def test_pairs_that_are_all_the_same_on_both_sides_are_an_error(records_file):
    file = records_file([NATIVE | {"chosen": NATIVE["rejected"]}])
    with pytest.raises(SaroError, match="no record is left: 1 pairs have the same two sides"):
        encode_pair_files([file], CHAT, DataConfig(pack_tokens=200, equal_sides="drop"))


def _demo(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(demo_file(name)).read_text(encoding="utf-8").splitlines()]


def _shared_steps(record: dict) -> int:
    sides = zip(record["chosen"]["reasoning"], record["rejected"]["reasoning"], strict=False)
    return next((i for i, (a, b) in enumerate(sides) if a != b), -1)


def test_there_are_enough_demo_pairs_and_all_can_be_read():
    assert len(list(read_pairs(demo_file("srpo_train")))) >= 64
    assert len(list(read_pairs(demo_file("srpo_heldout")))) >= 16
    assert Counter(r["kind"] for r in _demo("srpo_train"))["pp-cot"] >= 40


@pytest.mark.parametrize("name", ["srpo_train", "srpo_heldout"])
def test_process_pairs_of_the_demo_share_one_to_five_first_steps_and_outcome_pairs_none(name):
    for record in _demo(name):
        assert _shared_steps(record) in (range(1, 6) if record["kind"] == "pp-cot" else [0])


def test_no_demo_prompt_is_used_twice_in_either_stage():
    names = ("srpo_train", "srpo_heldout", "rw_train", "rw_heldout")
    prompts = Counter(json.dumps(r["prompt"]) for name in names for r in _demo(name))
    assert prompts.most_common(1)[0][1] == 1


SHARED = Path(__file__).parents[3] / "shared" / "data" / "coconot_pref.jsonl"


@pytest.mark.skipif(not SHARED.is_file(), reason="the folder of public data sets is not here")
def test_a_published_set_of_pairs_is_read_and_its_other_fields_are_named():
    pairs = list(read_pairs(SHARED))
    assert len(pairs) == 927
    assert {pair.ignored for pair in pairs} == {("category", "chosen_model", "rejected_model", "subcategory")}
