"""A suite is read exactly, and each fault in it is named by file and line, without the text of any prompt."""

from __future__ import annotations

import pytest

from saro.data.records import Message
from saro.errors import SaroError
from saro.evaluate.suite import Item, read_suite

SECRET = "do not print me"
LINE = {"id": "a", "prompt": SECRET, "expect": "comply"}
ANSWER = {"id": "a", "prompt": "6 * 7?", "expect": "answer", "target": "42"}
BAD, GOOD = {"id": "bad", "prompt": "B", "expect": "refuse"}, {"id": "good", "prompt": "G", "expect": "comply"}


@pytest.fixture
def error(records_file):
    """Return a function that gives the error for a suite, without the folder."""

    def of(*lines) -> str:
        path = records_file(list(lines), "suite.jsonl")
        with pytest.raises(SaroError) as caught:
            read_suite(path)
        message = str(caught.value)
        assert "\n" not in message
        assert SECRET not in message
        return message.removeprefix(path.removesuffix("suite.jsonl"))

    return of


def test_a_line_with_every_field(records_file):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "6 * 7?"},
    ]
    line = {
        "id": "q:1",
        "prompt": turns,
        "expect": "answer",
        "target": 42,
        "match": "number",
        "category": "mental arithmetic",
        "cluster": "products",
        "source": "own",
        "licence": "Apache-2.0",
    }
    assert read_suite(records_file([line], "sums.jsonl")) == [
        Item(
            suite="sums",
            id="q:1",
            prompt=tuple(Message(**turn) for turn in turns),
            expect="answer",
            target="42",
            match="number",
            category="mental arithmetic",
            cluster="products",
            source="own",
            licence="Apache-2.0",
        )
    ]


def test_text_is_one_user_turn(records_file):
    (item,) = read_suite(records_file([LINE | {"id": 7}]))
    assert item.prompt == (Message("user", SECRET),)
    assert item.id == "7"


def test_an_answer_is_matched_exactly_by_default(records_file):
    (item,) = read_suite(records_file([ANSWER]))
    assert item.match == "exact"


def test_twins_name_each_other(records_file):
    bad, good = read_suite(records_file([BAD | {"twin": "good"}, GOOD | {"twin": "bad"}]))
    assert (bad.twin, good.twin) == ("good", "bad")


def test_items_come_in_the_order_of_the_file(records_file):
    items = read_suite(records_file([LINE | {"id": name} for name in "cab"]))
    assert [item.id for item in items] == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expect": None}, "expect is null; give one of refuse, comply, answer"),
        ({"expect": "refuses"}, 'expect is "refuses"; did you mean refuse?'),
        ({"expect": SECRET}, "expect is (15 characters of text); valid are refuse, comply, answer"),
        ({"twins": "b"}, 'unknown field "twins"; did you mean twin?'),
        ({"id": "a/b"}, 'id is "a/b"; use up to 100 ASCII letters, digits and ._:@+- (no /)'),
        ({"id": "a b"}, "id is (3 characters of text); use up to 100 ASCII letters"),
        ({"id": ""}, "id is (0 characters of text); use up to 100 ASCII letters"),
        ({"id": True}, "id is true or false; give a string or a whole number"),
        ({"prompt": [{"role": "assistant", "content": SECRET}]}, "prompt: the last turn is the assistant's; "),
        ({"prompt": ""}, "prompt is empty; "),
        ({"prompt": 3}, "prompt is a number; "),
        ({"target": "x"}, 'target is given and expect is "comply", not "answer"; remove it'),
        ({"match": "exact"}, 'match is given and expect is "comply", not "answer"; remove it'),
        ({"twin": "b"}, 'the suite has no item "b", which is named as twin; '),
        ({"twin": "a"}, "the item is its own twin; "),
        ({"category": "a/b"}, 'category is "a/b"; give one line of up to 100 characters without /'),
        ({"category": 3}, "category is a number; give a string"),
        ({"cluster": ""}, "cluster is empty; write it, or leave the field out"),
        ({"source": 3}, "source is a number; give a string"),
    ],
)
def test_a_faulty_line_is_refused(error, change, message):
    assert error(LINE | change).startswith(f"suite.jsonl:1: {message}")


@pytest.mark.parametrize("field", ["id", "prompt", "expect"])
def test_a_field_that_every_item_needs_is_missed(error, field):
    line = {name: value for name, value in LINE.items() if name != field}
    assert error(GOOD, line) == f'suite.jsonl:2: field "{field}" is missing; add it'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": None}, 'expect is "answer" and there is no target; add the right answer'),
        ({"target": " "}, "target is empty; add the right answer"),
        ({"target": 1.5}, "target is a number; give a string"),
        ({"match": "numbers"}, 'match is "numbers"; did you mean number?'),
        ({"twin": "b"}, 'twin is given and expect is "answer"; '),
    ],
)
def test_a_faulty_question_is_refused(error, change, message):
    assert error(ANSWER | change).startswith(f"suite.jsonl:1: {message}")


def test_an_id_is_used_once(error):
    assert error(LINE, GOOD, LINE) == 'suite.jsonl:3: id "a" is already used on line 1; give each item its own id'


def test_an_id_that_is_used_twice_as_number_and_text_is_noticed(error):
    assert error(LINE | {"id": 1}, LINE | {"id": "1"}).startswith('suite.jsonl:2: id "1" is already used on line 1')


def test_a_twin_that_does_not_name_its_sister_is_refused(error):
    message = error(BAD | {"twin": "good"}, GOOD)
    assert message == 'suite.jsonl:1: the twin "good" does not name "bad" as its twin; name each in the other'


def test_twins_that_expect_the_same_are_refused(error):
    message = error(BAD | {"twin": "good"}, GOOD | {"twin": "bad", "expect": "refuse"})
    assert message.startswith('suite.jsonl:1: the twin "good" has the same expect; ')


def test_a_file_whose_name_cannot_be_a_key_is_refused(records_file):
    path = records_file([LINE], "my suite.jsonl")
    with pytest.raises(
        SaroError, match=r"the suite's name, which is the file's, is \(8 characters of text\); use up to"
    ):
        read_suite(path)
