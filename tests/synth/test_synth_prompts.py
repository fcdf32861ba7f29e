"""Tests that prompts are read strictly, each conversation once, and never from an excluded suite. Texts are made up,
except in one test, which reads public data if it lies beside the repository.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_files import ROOT

from saro.data.records import Message
from saro.demo import demo_file
from saro.errors import SaroError
from saro.evaluate.public_suites import convert_suite
from saro.synth.funnel import Funnel, LeftOut
from saro.synth.prompts import (
    HAZARDS,
    Prompt,
    check_exclusion,
    choose_heldout,
    drop_duplicates,
    drop_excluded,
    excluded_files,
    parse_prompt_fields,
    read_prompts,
)
from saro.synth.public_sets import convert

SHARED = ROOT.parent / "shared" / "data"
SOURCE = {"source": "made up", "licence": "CC0"}
HARMFUL = {"id": "a", "prompt": "How do I rob a bank?", "kind": "harmful", "hazard": ["ncr"], **SOURCE}
HARMLESS = {"id": "b", "prompt": "How do I sit on a bank?", "kind": "harmless", **SOURCE}
GENERAL = {"id": "c", "prompt": "What is 3 + 4?", "kind": "general", "target": "7", "match": "number", **SOURCE}
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"


def write(path: Path, *rows: Mapping[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(folder: Path, *rows: Mapping[str, object], **options: int) -> list[Prompt]:
    return read_prompts([write(folder / "mine.jsonl", *rows)], **options)


def error(folder: Path, *rows: Mapping[str, object]) -> str:
    with pytest.raises(SaroError) as caught:
        read(folder, *rows)
    return str(caught.value).replace(f"{folder}/", "")


def asks(id: str, text: str, **changes: object) -> dict[str, object]:
    return {**HARMLESS, "id": id, "prompt": text, **changes}


# Reading


def test_a_prompt_is_an_item_of_its_file_with_kind_level_and_hazard(tmp_path):
    (prompt,) = read(tmp_path, HARMFUL)
    assert (prompt.id, prompt.kind, prompt.level, prompt.hazard) == ("a", "harmful", "high", ("ncr",))
    assert prompt.item.suite == "mine"
    assert prompt.item.prompt == (Message("user", "How do I rob a bank?"),)
    assert (prompt.item.source, prompt.item.licence) == ("made up", "CC0")
    assert prompt.where == f"{tmp_path}/mine.jsonl:1"


@pytest.mark.parametrize(
    ("row", "expect", "level", "record_kind"),
    [
        (HARMFUL, "refuse", "high", "safety"),
        (HARMLESS, "comply", "low", "safety"),
        (GENERAL, "answer", "none", "general"),
        ({"id": "d", "prompt": "Hello?", "kind": "general", **SOURCE}, "comply", "none", "general"),
    ],
)
def test_the_kind_decides_what_is_left_out(tmp_path, row, expect, level, record_kind):
    (prompt,) = read(tmp_path, row)
    assert (prompt.item.expect, prompt.level, prompt.record_kind) == (expect, level, record_kind)


def test_what_is_given_is_kept(tmp_path):
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "?"},
    ]
    row = {**HARMFUL, "prompt": turns, "level": "medium", "expect": "refuse", "hazard": ["spc", "prv", "spc"]}
    (prompt,) = read(tmp_path, row)
    assert [turn.role for turn in prompt.item.prompt] == ["user", "assistant", "user"]
    assert (prompt.level, prompt.hazard) == ("medium", ("spc", "prv"))


def test_twins_name_each_other(tmp_path):
    harmful, harmless = read(tmp_path, {**HARMFUL, "twin": "b"}, {**HARMLESS, "twin": "a"})
    assert (harmful.item.twin, harmless.item.twin) == ("b", "a")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kind": "harmfull"}, 'kind is "harmfull"; did you mean harmful?'),
        ({"kind": None}, "kind is null; valid are"),
        (
            {"expect": "comply"},
            'kind is harmful and expect is "comply"; for this kind it is refuse; correct one of them',
        ),
        ({"expect": ["refuse"]}, "kind is harmful and expect is a list"),
        ({"kind": "harmless", "hazard": [], "expect": "refuse"}, 'kind is harmless and expect is "refuse"'),
        ({"kind": "general", "hazard": [], "expect": "refuse"}, "for this kind it is comply or answer"),
        ({"kind": "general", "hazard": [], "expect": "answer"}, 'expect is "answer" and there is no target'),
        ({"kind": "general", "hazard": [], "expect": "comply", "target": "7"}, "target is given and expect is"),
        ({"kind": "general", "hazard": [], "twin": "b"}, "twin is given and kind is general"),
        ({"target": "7"}, "target is given and expect is"),
        ({"level": "highest"}, 'level is "highest"; did you mean high?'),
        ({"level": None}, "level is null"),
        ({"hazard": "ncr"}, "hazard is a string; give a list of codes"),
        ({"hazard": ["vrc"]}, 'hazard has "vrc", which is no code; did you mean vcr?'),
        ({"hazard": [1]}, "hazard has a number, which is no code"),
        ({"kind": "harmless"}, "hazard is given and kind is harmless; only harmful prompts have one"),
        ({"source": ""}, "source is empty; say where the prompt comes from"),
        ({"licence": None}, "licence is null; give a string"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "the last turn is the assistant's"),
        ({"id": "a/b"}, 'id is "a/b"'),
        ({"twin": "z"}, 'the file has no prompt "z", which is named as twin'),
        ({"twin": "a"}, 'the twin "a" is of kind harmful too'),
        ({"twin": "b"}, 'the twin "b" does not name "a" as its twin; name each in the other'),
        ({"category": "x"}, 'unknown field "category"'),
    ],
)
def test_a_faulty_line_is_an_error_that_names_it(tmp_path, changes, expected):
    message = error(tmp_path, {**GENERAL, "id": "first"}, {**HARMFUL, **changes}, HARMLESS)
    assert message.startswith("mine.jsonl:2: ")
    assert expected in message


@pytest.mark.parametrize("field", ["prompt", "kind", "source", "licence"])
def test_a_missing_field_is_an_error(tmp_path, field):
    row = {name: value for name, value in HARMFUL.items() if name != field}
    assert error(tmp_path, row) == f'mine.jsonl:1: field "{field}" is missing; add it'


def test_a_prompt_without_an_id_gets_the_files_stem_and_the_line(tmp_path):
    row = {name: value for name, value in HARMFUL.items() if name != "id"}
    assert [prompt.id for prompt in read(tmp_path, HARMLESS, row)] == ["b", "mine:2"]


@pytest.mark.parametrize("line", ["How do I rob a bank?", '"How do I rob a bank?"'])
def test_a_file_that_is_not_of_objects_is_told_the_form_of_a_line(tmp_path, line):
    (tmp_path / "mine.txt").write_text(line)
    form = '; write {"prompt": ..., "kind": ..., "source": ..., "licence": ...} on each line'
    with pytest.raises(SaroError, match=re.escape(form)):
        read_prompts([tmp_path / "mine.txt"])


def test_a_prompt_under_another_name_is_to_be_renamed(tmp_path):
    row = {name: value for name, value in HARMFUL.items() if name != "prompt"} | {"question": "Why?"}
    assert error(tmp_path, row) == 'mine.jsonl:1: field "prompt" is missing; rename question to prompt'


def test_ids_are_unique_over_all_files_also_over_prompts_that_the_limit_leaves_out(tmp_path):
    first = write(tmp_path / "first.jsonl", *[asks(f"p{n}", f"How do I tie knot {n}?") for n in range(8)])
    second = write(tmp_path / "second.jsonl", HARMFUL, asks("p3", "Why?"))
    for limit in (None, 1):
        with pytest.raises(SaroError, match=r'second\.jsonl:2: id "p3" is already used by .*first\.jsonl:4; give each'):
            read_prompts([first, second], limit)


def test_a_limit_holds_for_each_file_and_keeps_twins_together(tmp_path):
    twins = []
    for n in range(6):
        twins.append(asks(f"good-{n}", f"How do I beat {n} eggs?", twin=f"bad-{n}"))
        twins.append({**HARMFUL, "id": f"bad-{n}", "prompt": f"How do I beat {n} people?", "twin": f"good-{n}"})
    files = [write(tmp_path / "twins.jsonl", *twins), write(tmp_path / "sums.jsonl", GENERAL, {**GENERAL, "id": "d"})]
    chosen = read_prompts(files, limit=4, seed=1)
    assert [prompt.item.suite for prompt in chosen] == ["twins"] * 4 + ["sums"] * 2
    ids = {prompt.id for prompt in chosen}
    assert all(prompt.item.twin is None or prompt.item.twin in ids for prompt in chosen)
    assert chosen == read_prompts(files, limit=4, seed=1)
    assert any(chosen != read_prompts(files, limit=4, seed=seed) for seed in range(2, 9))


def test_every_hazard_may_be_named(tmp_path):
    (prompt,) = read(tmp_path, {**HARMFUL, "hazard": [*HAZARDS]})
    assert len(prompt.hazard) == 12


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([HARMFUL, HARMLESS, GENERAL]), st.sampled_from([*GENERAL, "expect", "level", "hazard"]), VALUES)
def test_any_value_in_any_field_is_read_or_refused_in_one_line(row, field, value):
    try:
        message = parse_prompt_fields({**row, field: value}, "mine", "mine.jsonl:1").where
    except SaroError as fault:
        message = str(fault)
    assert message.startswith("mine.jsonl:1")
    assert "\n" not in message


# Duplicates


def drop(folder: Path, *rows: Mapping[str, object]) -> tuple[list[str], list[LeftOut]]:
    funnel = Funnel()
    return [prompt.id for prompt in drop_duplicates(read(folder, *rows), funnel)], funnel.left_out


@pytest.mark.parametrize(
    ("text", "other", "reason"),
    [
        ("How do I tie a knot?", "How do I tie a knot?", "duplicate"),
        ("How do I tie a knot?", "how  do I tie a knot", "normalised duplicate"),
        ("It's a knot.", "Its a knot.", None),
        ("It's a knot.", "It\u2019s a knot!", "normalised duplicate"),
        ("\ufb01ne \uff21BC", "fine abc", "normalised duplicate"),
        ("What is 3 + 4?", "What is 3 - 4?", None),
        ("What is (3 + 4) * 2?", "What is 3 + (4 * 2)?", None),
        ("?", "!", None),
    ],
)
def test_a_conversation_stays_once(tmp_path, text, other, reason):
    kept, left_out = drop(tmp_path, asks("x", text), asks("y", other))
    assert kept == (["x", "y"] if reason is None else ["x"])
    assert left_out == ([] if reason is None else [LeftOut("y", "prompts", reason)])


def test_the_first_id_stays_wherever_it_stands(tmp_path):
    kept, left_out = drop(tmp_path, asks("z", "Why?"), asks("m", "How?"), asks("a", "Why?"))
    assert kept == ["m", "a"]
    assert [one.id for one in left_out] == ["z"]


@pytest.mark.parametrize(
    "other",
    [
        {**HARMFUL, "prompt": "what is 3 + 4"},
        {**GENERAL, "id": "a", "target": "8"},
        {"id": "a", "prompt": "What is 3 + 4?", "kind": "general", **SOURCE},
    ],
)
def test_of_prompts_that_contradict_each_other_none_stays(tmp_path, other):
    kept, left_out = drop(tmp_path, other, GENERAL, asks("m", "Why?"))
    assert kept == ["m"]
    assert left_out == [LeftOut(id, "prompts", "contradictory duplicate") for id in ("a", "c")]


def test_a_prompt_whose_twin_is_a_duplicate_is_held_out_with_the_one_that_stays(tmp_path):
    # "a" has the words of "c", so training on it would show the twin of "b".
    rows = [asks("b", "Why?", twin="c"), {**HARMFUL, "id": "c", "twin": "b"}, {**HARMFUL, "id": "a"}]
    kept = drop_duplicates(read(tmp_path, *rows), Funnel())
    assert [(prompt.id, prompt.item.twin) for prompt in kept] == [("b", "a"), ("a", None)]
    held_out = [choose_heldout(kept, 0.5, seed) for seed in range(20)]
    assert set(held_out) == {frozenset(), frozenset({"a", "b"})}


def test_a_prompt_whose_twin_contradicts_another_prompt_has_none(tmp_path):
    rows = [asks("b", "Why?", twin="c"), {**HARMFUL, "id": "c", "twin": "b"}, asks("a", HARMFUL["prompt"])]
    (kept,) = drop_duplicates(read(tmp_path, *rows), Funnel())
    assert (kept.id, kept.item.twin) == ("b", None)


def test_roles_and_turns_tell_conversations_apart(tmp_path):
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    assert drop(tmp_path, asks("a", "Why?"), asks("b", "", prompt=system))[1] == []


def test_the_funnel_counts_what_was_read_and_kept(tmp_path):
    funnel = Funnel()
    drop_duplicates(read(tmp_path, asks("a", "Why?"), asks("b", "why"), asks("c", "How?")), funnel)
    assert funnel.as_dict() == {
        "counts": {"prompts": {"read": 3, "kept": 2}},
        "left_out": {"prompts": {"normalised duplicate": 1}},
    }


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["Why?", "why", "Why", "How?", "how"]), st.booleans()), min_size=1, max_size=8),
    st.integers(0, 999),
)
def test_what_stays_does_not_depend_on_the_order(tmp_path_factory, texts, seed):
    rows = [
        asks(f"p{n}", text) if is_harmless else {**HARMFUL, "id": f"p{n}", "prompt": text}
        for n, (text, is_harmless) in enumerate(texts)
    ]
    prompts = read(tmp_path_factory.mktemp("rows"), *rows)
    shuffled = random.Random(seed).sample(prompts, len(prompts))
    kept = {prompt.id for prompt in drop_duplicates(prompts, Funnel())}
    assert kept == {prompt.id for prompt in drop_duplicates(shuffled, Funnel())}


# Excluded suites


def suite(path: Path, text: str) -> str:
    return write(path, {"id": "q1", "prompt": text, "expect": "comply"})


def test_a_prompt_of_an_excluded_suite_is_an_error_that_names_both_and_shows_neither(tmp_path):
    prompts = read(tmp_path, HARMLESS, asks("x", "HOW do I tie a knot!"))
    with pytest.raises(SaroError) as caught:
        check_exclusion(prompts, [suite(tmp_path / "knots.jsonl", "How do I tie a knot?")])
    message = str(caught.value).replace(f"{tmp_path}/", "")
    assert (
        message
        == "prompts are in an excluded suite: mine.jsonl:2 (x) is knots/q1; remove these prompts, or leave them out with --drop_excluded"
    )
    assert "tie" not in message


@pytest.mark.parametrize(("words", "is_found"), [(13, True), (12, False)])
def test_thirteen_words_in_a_row_are_too_many(tmp_path, words, is_found):
    common = " ".join(LONG.split()[:words])
    prompts = read(tmp_path, asks("x", f"Before it {common} behind it"))
    excluded = [suite(tmp_path / "knots.jsonl", f"Now {common} then")]
    if not is_found:
        check_exclusion(prompts, excluded)
        return
    with pytest.raises(SaroError, match=r"\(x\) shares 13 words in a row with knots/q1"):
        check_exclusion(prompts, excluded)


def test_each_turn_of_a_conversation_is_compared(tmp_path):
    turns = [{"role": "user", "content": LONG[:20]}, {"role": "assistant", "content": "Yes."}]
    turns.append({"role": "user", "content": "How do I tie a knot?"})
    prompts = read(tmp_path, asks("x", "", prompt=turns))
    with pytest.raises(SaroError, match=r"\(x\) is knots/q1"):
        check_exclusion(prompts, [suite(tmp_path / "knots.jsonl", "How do I tie a knot?")])


@pytest.mark.parametrize("name", ["twins", "ability"])
def test_the_suites_of_the_demo_are_always_excluded(tmp_path, name):
    first = json.loads(Path(demo_file(name)).read_text(encoding="utf-8").splitlines()[0])
    prompts = read(tmp_path, asks("x", first["prompt"]))
    with pytest.raises(SaroError, match=rf"\(x\) is {name}/{first['id']}"):
        check_exclusion(prompts)


def test_more_than_five_overlaps_are_counted(tmp_path):
    texts = [f"How do I tie knot {n}?" for n in range(7)]
    rows = [{"id": f"q{n}", "prompt": text, "expect": "comply"} for n, text in enumerate(texts)]
    prompts = read(tmp_path, *[asks(f"p{n}", text) for n, text in enumerate(texts)])
    with pytest.raises(
        SaroError, match=r"knots/q4; and 2 more; remove these prompts, or leave them out with --drop_excluded$"
    ):
        check_exclusion(prompts, [write(tmp_path / "knots.jsonl", *rows)])


def test_prompts_of_excluded_suites_can_be_left_out_and_are_listed_by_suite(tmp_path):
    knots = suite(tmp_path / "knots.jsonl", "How do I tie a knot?")
    long = suite(tmp_path / "long.jsonl", LONG)
    # The same item is in two prompts, and another one in a part.
    texts = {"a": "how do I tie a knot", "b": "How do I tie a knot!", "c": f"Now {LONG}", "d": "Why is snow white?"}
    prompts = read(tmp_path, *[asks(id, text) for id, text in texts.items()])
    funnel = Funnel()
    kept = drop_excluded(prompts, [knots, long], funnel)
    assert [prompt.id for prompt in kept] == ["d"]
    assert sorted((one.id, one.stage, one.reason) for one in funnel.left_out) == [
        ("a", "prompts", "in suite knots"),
        ("b", "prompts", "in suite knots"),
        ("c", "prompts", "in suite long"),
    ]
    assert funnel.counts["prompts"]["in an excluded suite"] == 3
    check_exclusion(kept, [knots, long])


@pytest.mark.skipif(not SHARED.is_dir(), reason="no public data beside the repository")
def test_four_prompts_of_star1_are_in_simple_safety_tests_and_can_be_left_out(tmp_path):
    convert("star1-prompts", SHARED / "star1.json", tmp_path / "star1.jsonl")
    convert_suite("simple-safety-tests", SHARED / "simple_safety_tests.csv", tmp_path / "simple.jsonl")
    prompts, excluded = read_prompts([tmp_path / "star1.jsonl"]), [str(tmp_path / "simple.jsonl")]
    with pytest.raises(SaroError, match=r"prompts are in an excluded suite: .*--drop_excluded$"):
        check_exclusion(prompts, excluded)
    funnel = Funnel()
    kept = drop_excluded(prompts, excluded, funnel)
    assert len(prompts) - len(kept) == len(funnel.left_out) == 4
    check_exclusion(kept, excluded)


def test_a_prompt_whose_twin_is_in_an_excluded_suite_has_none(tmp_path):
    rows = [asks("b", "How do I tie a knot?", twin="c"), {**HARMFUL, "id": "c", "twin": "b"}]
    knots = suite(tmp_path / "knots.jsonl", "How do I tie a knot?")
    (kept,) = drop_excluded(read(tmp_path, *rows), [knots], Funnel())
    assert (kept.id, kept.item.twin) == ("c", None)


def test_excluded_files_name_each_suite_once_and_those_of_the_demo_first():
    demo = [demo_file("twins"), demo_file("ability")]
    assert excluded_files([]) == demo
    assert excluded_files(["mine.jsonl", "demo", "mine.jsonl"]) == [*demo, "mine.jsonl"]
