"""A held-out prompt that is trained on is refused, with the ids and places of both records and without its text."""

from __future__ import annotations

from datetime import date

import pytest
from tiny import IM_END, tiny_tokenizer

from saro.checks.check_overlap import check_overlap
from saro.config import DataConfig
from saro.data.chat_format import ChatFormat
from saro.data.encode_files import encode_files, encode_pair_files
from saro.errors import SaroError

CHAT = ChatFormat(tiny_tokenizer(), frozenset({IM_END}), date(1999, 7, 4))


@pytest.fixture
def encode(records_file):
    """Return a function that encodes a file of records for each argument, and gives the set and the files."""

    def make(name: str, *files: list[dict]):
        paths = [records_file(records, f"{name}{i}.jsonl") for i, records in enumerate(files)]
        read = encode_pair_files if "chosen" in files[0][0] else encode_files
        return read(paths, CHAT, DataConfig(pack_tokens=512)), paths

    return make


def ask(prompt: str, **fields: object) -> dict:
    return {"prompt": prompt, "reasoning": ["Because."], "answer": "So."} | fields


def refusal(heldout, train) -> str:
    with pytest.raises(SaroError) as caught:
        check_overlap(heldout, train)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sets_without_a_common_prompt_pass(encode):
    check_overlap(encode("held", [ask("a"), ask("b")])[0], encode("train", [ask("c")], [ask("d")])[0])


def test_records_are_named_by_id_and_place_in_every_file(encode):
    train, (first, second) = encode("train", [ask("a", id="t1"), ask("b")], [ask("c"), ask("secret", id="t4")])
    heldout, (one, two) = encode("held", [ask("secret", id="h1")], [ask("d"), ask("b", answer="Other.")])
    message = refusal(heldout, train)
    assert message == (
        "2 of 3 held-out records have the prompt of a training record: "
        f'"h1" ({one}:1) that of "t4" ({second}:2), "held1:2" ({two}:2) that of "train0:2" ({first}:2); '
        "remove them from one of the two, or set --data.allow_overlap true"
    )


def test_an_id_that_may_be_text_is_not_shown(encode):
    train, heldout = (encode(name, [ask("a", id="How can I do that?")])[0] for name in ("train", "held"))
    assert "How can" not in refusal(heldout, train)


def test_a_file_that_is_given_twice_is_counted_and_not_listed_to_the_end(encode):
    records = [ask(str(i), id=f"r{i}") for i in range(1200)]
    (train, _), (heldout, _) = encode("train", records), encode("held", records)
    message = refusal(heldout, train)
    assert message.startswith("1,200 of 1,200 held-out records have ")
    assert message.count(" that of ") == 10
    assert ", and 1,190 more; remove" in message


def test_pairs_are_checked_like_examples(encode):
    pair = {"chosen": {"answer": "So."}, "rejected": {"answer": "No."}}
    train, (file,) = encode("train", [pair | {"prompt": "a"}])
    heldout, (held,) = encode("held", [pair | {"prompt": "b"}, pair | {"prompt": "a", "chosen": {"answer": "Yes."}}])
    assert f'"held0:2" ({held}:2) that of "train0:1" ({file}:1)' in refusal(heldout, train)


def test_a_record_that_was_dropped_is_not_trained_on(records_file):
    options = DataConfig(pack_tokens=100, too_long="drop")
    train = encode_files([records_file([ask("a", answer="x" * 200), ask("b")], "t.jsonl")], CHAT, options)
    heldout = encode_files([records_file([ask("a")], "h.jsonl")], CHAT, options)
    assert train.dropped == ("t:1",)
    check_overlap(heldout, train)
