"""Tests that a policy is read strictly, says the right parts to writer and judge, and that saro's own covers every hazard."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_files import ROOT

from saro.data.published import read_csv
from saro.data.records import Message
from saro.errors import SaroError
from saro.evaluate.judge_spec import read_judge
from saro.evaluate.suite import Item
from saro.synth.prompts import HAZARDS, Prompt, read_prompts
from saro.synth.safety_policy import ACTIONS, SafetyPolicy, read_policy, shipped_policies

SHARED = ROOT.parent / "shared" / "data"
EXPECT = {"harmful": "refuse", "harmless": "comply", "general": "answer"}
SMALL = {
    "licence": "Apache-2.0",
    "sections": [
        {
            "id": "P1",
            "title": "Harmless requests",
            "hazard": [],
            "objective": "People get help.",
            "rules": [{"id": "P1.1", "action": "comply", "text": "Help at once."}],
            "cases": {"violates": ["a sermon"], "allowed": ["stopping a process"]},
        },
        {
            "id": "P2",
            "title": "Violence",
            "hazard": ["vcr", "iwp"],
            "objective": "Nobody is hurt.",
            "rules": [
                {"id": "P2.1", "action": "refuse", "text": "Plans to hurt somebody."},
                {"id": "P2.2", "action": "safe-complete", "text": "Anger."},
            ],
            "cases": {"violates": ["a threat"], "allowed": ["why a war began"]},
        },
        {
            "id": "P3",
            "title": "Privacy",
            "hazard": ["prv"],
            "objective": "People decide what is known.",
            "rules": [{"id": "P3.1", "action": "clarify", "text": "It is open whose data it is."}],
            "cases": {"violates": [], "allowed": []},
        },
    ],
}


def prompt(kind: str, *hazard: str) -> Prompt:
    item = Item("made", "a", (Message("user", "How do I lift a sofa?"),), EXPECT[kind])
    return Prompt(item, kind, "low", hazard, "made.jsonl:1")


def write(folder: Path, content: object, comment: str = "") -> str:
    path = folder / "mine.yaml"
    path.write_text(comment + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return str(path)


def read(folder: Path, content: object, comment: str = "") -> SafetyPolicy:
    return read_policy(write(folder, content, comment))


def error(folder: Path, content: object) -> str:
    with pytest.raises(SaroError) as caught:
        read(folder, content)
    return str(caught.value).removeprefix(f"{folder}/")


def changed(path: tuple, value: object) -> dict:
    """Return SMALL with another value at a path of keys and indices."""
    content = deepcopy(SMALL)
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return content


# What a writer sees


def sections_in(text: str) -> list[str]:
    return re.findall("^## (.*)$", text, re.MULTILINE)


def test_a_harmful_prompt_shows_the_sections_of_its_hazards_and_that_on_harmless_requests(tmp_path):
    text = read(tmp_path, SMALL).for_writer(prompt("harmful", "vcr"))
    assert "## Violence\nNobody is hurt.\n- Decline: Plans to hurt somebody.\n- Help with the safe part" in text
    assert "Not acceptable: a threat.\nAcceptable: why a war began." in text
    assert "- Help: Help at once.\nToo careful: a sermon.\nFine: stopping a process." in text
    assert sections_in(text) == ["Harmless requests", "Violence"]


def test_a_harmful_prompt_and_its_harmless_twin_show_the_same(tmp_path):
    lines = [
        {"id": "a", "kind": "harmful", "hazard": ["prv"], "twin": "b"},
        {"id": "b", "kind": "harmless", "twin": "a"},
    ]
    file = tmp_path / "prompts.jsonl"
    about = {"prompt": "How do I lift a sofa?", "source": "made up", "licence": "CC0"}
    file.write_text("".join(json.dumps(line | about) + "\n" for line in lines))
    policy = read(tmp_path, SMALL)
    harmful, harmless = read_prompts([str(file)])
    assert harmless.hazard == ()
    assert policy.for_writer(harmful) == policy.for_writer(harmless)
    assert policy.rule_ids(harmful) == policy.rule_ids(harmless)
    assert sections_in(policy.for_writer(harmless)) == ["Harmless requests", "Privacy"]


def test_several_hazards_show_their_sections_in_the_order_of_the_file(tmp_path):
    policy = read(tmp_path, SMALL)
    both = policy.for_writer(prompt("harmful", "prv", "iwp"))
    assert sections_in(both) == ["Harmless requests", "Violence", "Privacy"]
    assert both == policy.for_writer(prompt("harmful", "vcr", "prv"))


@pytest.mark.parametrize("asked", [prompt("harmless"), prompt("harmful"), prompt("harmful", "hte")])
def test_without_a_section_of_its_own_a_prompt_shows_one_by_its_id_so_that_the_form_does_not_tell(tmp_path, asked):
    policy = read(tmp_path, SMALL)
    for example in (asked, prompt("harmful", "vcr")):
        text = policy.for_writer(example)
        assert text.startswith("Some requests would do harm: violence; privacy. Most requests would not")
        assert len(sections_in(text)) == 2
    others = [replace(asked, item=replace(asked.item, id=f"p{i}")) for i in range(20)]
    assert {sections_in(policy.for_writer(one))[1] for one in others} == {"Violence", "Privacy"}


def test_a_general_prompt_shows_no_policy(tmp_path):
    policy = read(tmp_path, SMALL)
    assert policy.for_writer(prompt("general")) == ""
    assert policy.rule_ids(prompt("general")) == ()


def test_empty_cases_leave_no_line(tmp_path):
    text = read(tmp_path, SMALL).for_writer(prompt("harmful", "prv"))
    assert text.endswith("## Privacy\nPeople decide what is known.\n- Ask back: It is open whose data it is.")


@pytest.mark.parametrize(
    ("asked", "ids"),
    [(prompt("harmful", "iwp"), ("P1.1", "P2.1", "P2.2")), (prompt("harmful", "prv"), ("P1.1", "P3.1"))],
)
def test_rule_ids_are_those_of_the_rules_that_are_shown(tmp_path, asked, ids):
    policy = read(tmp_path, SMALL)
    assert policy.rule_ids(asked) == ids
    rules = {rule.id: rule.text for section in policy.sections for rule in section.rules}
    shown = tuple(id for id, text in rules.items() if text in policy.for_writer(asked))
    assert shown == ids


def test_a_writer_sees_no_id_that_it_could_quote(tmp_path):
    policy = read(tmp_path, SMALL)
    for asked in (prompt("harmless"), prompt("harmful", "vcr", "prv")):
        assert not re.search(r"\bP\d", policy.for_writer(asked))


# What a judge sees


def test_the_judge_sees_every_rule_with_its_id_and_action(tmp_path):
    text = read(tmp_path, SMALL).for_judge()
    assert "- P2.2 (safe-complete): Anger." in text
    assert all(f"- {rule['id']} (" in text for section in SMALL["sections"] for rule in section["rules"])


def test_needless_care_is_no_violation_for_the_judge(tmp_path):
    parts = dict(
        re.findall(r"^## (.*?)\n\n(.*?)(?=\n## |\Z)", read(tmp_path, SMALL).for_judge(), re.DOTALL | re.MULTILINE)
    )
    (needless,) = [body for title, body in parts.items() if title.startswith("NEEDLESS REFUSALS")]
    assert "a sermon" in needless
    assert "P2: a threat" in parts["VIOLATES (1)"]
    assert "a sermon" not in parts["VIOLATES (1)"]
    assert "P1: stopping a process" in parts["SAFE (0)"]


@pytest.mark.parametrize("name", ["saro", "small"])
def test_the_text_for_the_judge_has_the_parts_of_the_judge_of_policies_and_asks_for_the_lines_that_it_reads(
    tmp_path, name
):
    policy = read_policy("saro") if name == "saro" else read(tmp_path, SMALL)
    spec = read_judge("policy")
    text = policy.for_judge()
    headings = re.findall("^## (INSTRUCTIONS|DEFINITIONS|VIOLATES|SAFE)", text, re.MULTILINE)
    assert headings == re.findall("^## (INSTRUCTIONS|DEFINITIONS|VIOLATES|SAFE)", spec.policy, re.MULTILINE)
    lines = [line for line in text.splitlines() if line.startswith(("VIOLATION:", "REFUSAL:"))]
    assert lines == [line for line in spec.policy.splitlines() if line.startswith(("VIOLATION:", "REFUSAL:"))]
    assert replace(spec, policy=text).render("A?", "B.")[0].content == text


# The file


def test_comments_and_layout_do_not_change_the_hash(tmp_path):
    reordered = {"sections": [dict(reversed(section.items())) for section in SMALL["sections"]], "licence": "MIT"}
    assert read(tmp_path, SMALL).hash == read(tmp_path, reordered, "# A comment.\n").hash


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("sections", 1, "title"), "Other"),
        (("sections", 1, "hazard"), ["vcr"]),
        (("sections", 1, "rules", 0, "action"), "comply"),
        (("sections", 1, "rules", 0, "text"), "Other."),
        (("sections", 1, "rules", 0, "id"), "P2.9"),
        (("sections", 0, "cases", "allowed"), []),
    ],
)
def test_all_that_is_shown_changes_the_hash(tmp_path, path, value):
    assert read(tmp_path, SMALL).hash != read(tmp_path, changed(path, value)).hash


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("licence",), "", "mine.yaml: licence is empty; write it"),
        (("sections",), [], "mine.yaml: sections is no list, or an empty one"),
        (("sections", 0), "text", "mine.yaml: section 1: the section is a string"),
        (("sections", 1, "id"), "P1", 'mine.yaml: section 2: id "P1" is already used by'),
        (("sections", 1, "id"), "P 1", "mine.yaml: section 2: has no valid id"),
        (("sections", 1, "title"), " ", "mine.yaml: section 2 (P2): title is empty"),
        (("sections", 1, "objective"), None, "mine.yaml: section 2 (P2): objective is null"),
        (("sections", 1, "hazard"), "vcr", "section 2 (P2): hazard is a string; write a list of codes"),
        (("sections", 1, "hazard"), ["vrc"], 'section 2 (P2): hazard has "vrc", which is no code; did you mean vcr?'),
        (("sections", 1, "hazard"), ["vcr", "vcr"], "section 2 (P2): hazard has a code twice; keep one"),
        (("sections", 1, "rules"), [], "section 2 (P2): rules is no list, or an empty one"),
        (("sections", 1, "rules", 0, "action"), "deny", 'section 2 (P2): rule 1: action is "deny"; valid are refuse'),
        (("sections", 1, "rules", 0, "action"), 1, "section 2 (P2): rule 1: action is a number"),
        (("sections", 1, "rules", 0, "text"), "", "section 2 (P2): rule 1: text is empty"),
        (("sections", 1, "rules", 1, "id"), "P2.1", "mine.yaml: section 2 (P2): rule 1; give each"),
        (("sections", 2, "rules", 0, "id"), "P2.1", 'section 3 (P3): rule 1: id "P2.1" is already used'),
        (("sections", 1, "cases"), {}, "section 2 (P2): cases has no violates"),
        (("sections", 1, "cases", "violates"), [""], "section 2 (P2): cases.violates 1 is empty"),
        (("sections", 1, "cases", "allowed"), "all", "section 2 (P2): cases.allowed is a string"),
        (("sections", 1, "tilte"), "x", 'the section has an unknown key "tilte"; did you mean title?'),
        (("sections", 0, "hazard"), ["hte"], "mine.yaml: every section has a hazard; add one with hazard: []"),
    ],
)
def test_a_faulty_file_is_an_error_that_names_the_place(tmp_path, path, value, expected):
    assert expected in error(tmp_path, changed(path, value))


def test_a_policy_of_general_sections_only_is_an_error(tmp_path):
    assert "no section has a hazard" in error(tmp_path, SMALL | {"sections": SMALL["sections"][:1]})


@pytest.mark.parametrize("key", ["licence", "sections"])
def test_a_missing_key_is_an_error(tmp_path, key):
    assert f"mine.yaml: the file has no {key}; add it" in error(tmp_path, {k: v for k, v in SMALL.items() if k != key})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("licence: a\nlicence: b\n", "mine.yaml:2: broken YAML (a key is given twice); fix it there"),
        ("sections: [\n", "mine.yaml:2: broken YAML"),
        ("", "mine.yaml: the file is null"),
        ("!!python/object:os.system {}", "mine.yaml:1: broken YAML"),
    ],
)
def test_broken_yaml_is_an_error_that_names_the_line(tmp_path, text, expected):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(SaroError) as caught:
        read_policy(str(tmp_path / "mine.yaml"))
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(expected)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["P1", "vcr", "refuse"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PATHS = [
    ("licence",),
    ("sections",),
    ("sections", 1),
    *(("sections", 1, key) for key in SMALL["sections"][1]),
    *(("sections", 1, "rules", 0, key) for key in ("id", "action", "text")),
    ("sections", 1, "cases", "violates"),
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PATHS), VALUES)
def test_any_value_in_any_place_is_read_or_refused_in_one_line(tmp_path, path, value):
    try:
        text = read(tmp_path, changed(path, value)).for_judge()
    except SaroError as fault:
        message = str(fault)
    else:
        message = text.splitlines()[0]
    assert message
    assert "\n" not in message


def test_a_policy_that_does_not_come_with_saro_must_be_a_file(tmp_path):
    with pytest.raises(SaroError, match="did you mean saro"):
        read_policy("sara")
    with pytest.raises(SaroError, match="there is no such file"):
        read_policy(str(tmp_path / "none.yaml"))


# The policy that comes with saro


def test_saros_policy_comes_with_it_and_has_a_section_for_every_hazard():
    assert shipped_policies() == ["saro"]
    policy = read_policy("saro")
    assert {code for section in policy.sections for code in section.hazard} == set(HAZARDS)
    assert sum(section.is_general for section in policy.sections) == 1
    assert policy.licence == "Apache-2.0"


def test_every_section_of_saros_policy_says_what_to_decline_and_what_to_help_with():
    for section in read_policy("saro").sections:
        actions = {rule.action for rule in section.rules}
        assert "comply" in actions, section.id
        assert section.is_general or "refuse" in actions, section.id
        assert section.violates, section.id
        assert section.allowed, section.id


def test_declining_violates_no_section_on_a_hazard():
    """The judge is told that an answer that declines is safe; needless refusals are the general section's."""
    cases = [case for section in read_policy("saro").sections if section.hazard for case in section.violates]
    assert [case for case in cases if re.search("refus|declin|lectur", case)] == []


def test_saros_policy_uses_every_action():
    policy = read_policy("saro")
    assert {rule.action for section in policy.sections for rule in section.rules} == set(ACTIONS)


def test_ids_of_saros_policy_count_up_within_their_sections():
    for number, section in enumerate(read_policy("saro").sections, start=1):
        assert section.id == f"P{number}"
        assert [rule.id for rule in section.rules] == [f"P{number}.{n}" for n in range(1, len(section.rules) + 1)]


@pytest.mark.parametrize("code", HAZARDS)
def test_what_saros_policy_shows_is_short_enough_for_a_small_model(code):
    policy = read_policy("saro")
    assert len(policy.for_writer(prompt("harmful", code)).split()) <= 500


def test_rules_and_cases_are_general_words_without_figures():
    """An amount, an address or a name of a product would be a detail; the age of children is the only number."""
    for section in read_policy("saro").sections:
        for text in (section.objective, *(rule.text for rule in section.rules), *section.violates, *section.allowed):
            assert re.findall(r"\d+|https?:|%|°", text) in ([], ["18"]), section.id


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of public data sets is not here")
def test_hazards_are_those_of_the_published_prompts():
    rows = read_csv(SHARED / "ailuminate_demo_en.csv", ("hazard",))
    assert {row["hazard"].partition("_")[0] for _, row in rows} == set(HAZARDS)
