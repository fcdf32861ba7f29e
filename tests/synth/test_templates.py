"""Tests that templates fill their gaps and nothing else, and that saro's own ask for what their readers expect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from saro.data.records import Message
from saro.errors import SaroError
from saro.synth.templates import Template, parse_template, read_template, shipped_templates

TAGS = ("<think>", "</think>")
VARIABLES = {
    "guided": {"request": "How do I lift a sofa?", "policy": "Be kind.", "sentences": "2 to 3", "tags": TAGS},
    "turn": {"request": "How do I lift a sofa?", "reasoning": "A sofa.", "policy": "Be kind.", "aim": "safety"},
    "neutral": {"request": "How do I lift a sofa?", "reasoning": "A sofa."},
    "hazard": {"request": "How do I lift a sofa?", "sections": ["P1 Backs: Keep them.", "P2 Floors: Mind them."]},
    "steps": {"request": "How do I lift a sofa?", "steps": ["A sofa.", "So I help."], "policy": "Be kind."},
}
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


def render(name: str, **changes: object) -> str:
    (message,) = read_template(name).render(**(VARIABLES[name] | changes))
    assert message.role == "user"
    return message.content


def parse(folder: Path, content: object) -> Template:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return parse_template(path)


def one_turn(text: str, *variables: str) -> dict:
    return {"variables": list(variables), "turns": [{"role": "user", "content": text}]}


def test_there_is_a_template_for_each_task():
    assert shipped_templates() == sorted(VARIABLES)


@pytest.mark.parametrize("name", VARIABLES)
def test_every_variable_is_shown(name):
    text = render(name)
    for variable, value in VARIABLES[name].items():
        parts = [value] if isinstance(value, str) else value
        assert variable == "aim" or all(part in text for part in parts)


@pytest.mark.parametrize("name", VARIABLES)
def test_prompts_leave_no_gap_and_no_jinja(name):
    text = render(name)
    assert "{%" not in text
    assert "{{" not in text
    assert "\n\n\n" not in text
    assert text == text.strip()


@pytest.mark.parametrize("name", VARIABLES)
def test_the_same_variables_give_the_same_prompt(name):
    assert render(name) == render(name)
    assert render(name) != render(name, request="How do I lift a chair?")


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(VARIABLES)), TEXT)
def test_a_request_is_put_in_as_it_is_and_never_executed(name, text):
    request = f"a {{{{ policy }}}} {{% raw %}} {text} <b> & z"
    assert request in render(name, request=request)


@settings(max_examples=50, deadline=None)
@given(TEXT)
def test_no_text_can_close_the_fence_around_it(text):
    before = render("turn", reasoning=text)
    nonce = before.partition("<message ")[2][:16]
    after = render("turn", reasoning=f"{text}</reasoning {nonce}>")
    assert f"</reasoning {nonce}>\n\nThe next" not in after
    assert after.count(after.partition("<message ")[2][:16]) == 5


@pytest.mark.parametrize("name", ["turn", "steps"])
def test_what_does_not_change_with_the_request_comes_first(name):
    """Requests with the same policy share the policy's tokens in caches of prefixes."""
    shared = zip(render(name), render(name, request="Why?"), strict=False)
    common = "".join(a for a, b in shared if a == b)
    assert render(name).index("Be kind.") < len(common)
    first = render(name, request="Why?").partition("Only a line with")[0]
    assert render(name).startswith(first)
    assert "Be kind." in first


def test_a_guided_prompt_ends_with_the_request():
    assert render("guided").endswith("How do I lift a sofa?")


def test_without_a_policy_a_guided_prompt_asks_for_steps_and_speaks_of_no_harm():
    text = render("guided", policy="")
    assert "step by step" in text
    assert "harm" not in text
    assert all(tag in text for tag in TAGS)
    assert text.endswith("How do I lift a sofa?")


def test_the_aim_decides_where_a_turn_turns_to():
    assert "what harm could come" in render("turn", aim="safety")
    assert "too careful" not in render("turn", aim="safety")
    assert "turns to helping" in render("turn", aim="help")


@pytest.mark.parametrize("name", ["turn", "neutral"])
def test_a_turn_and_its_control_ask_for_one_sentence_of_the_same_length(name):
    assert "Write one sentence of at most 30 words, in the first person" in render(name)


def test_a_neutral_sentence_has_no_policy_in_view():
    assert "policy" not in render("neutral")
    assert "doing no harm" not in render("neutral")


def test_steps_are_numbered_and_the_form_of_a_label_is_strict_json():
    text = render("steps")
    assert "\n1. A sofa.\n2. So I help.\n" in text
    assert "one line for each of the 2 steps" in text
    (example,) = [line for line in text.splitlines() if line.startswith("{")]
    assert json.loads(example) == {"step": 1, "label": "neutral"}
    assert all(f"- {label}: " in text for label in ("neutral", "turn", "cue", "harmful"))


@pytest.mark.parametrize("name", ["turn", "steps"])
def test_an_empty_policy_leaves_no_heading(name):
    assert render(name, policy="").count("#") == render(name).count("#") - 1


def test_a_missing_or_unknown_variable_is_the_callers_fault():
    template = read_template("neutral")
    with pytest.raises(TypeError, match="takes reasoning, request; it was given request"):
        template.render(request="a")
    with pytest.raises(TypeError, match="it was given other, reasoning, request"):
        template.render(request="a", reasoning="b", other="c")


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(SaroError, match='there is none named "guide"; did you mean guided'):
        read_template("guide")


def test_turns_keep_their_roles_and_order(tmp_path):
    turns = [{"role": "system", "content": "Be {{ a }}."}, {"role": "user", "content": "{{ b }}"}]
    template = parse(tmp_path, {"variables": ["a", "b"], "turns": turns})
    assert template.render(a="kind", b="Why?") == (Message("system", "Be kind."), Message("user", "Why?"))


def test_the_hash_changes_with_every_turn_and_role(tmp_path):
    hashes = {parse(tmp_path, one_turn(text, "a")).hash for text in ("{{ a }}", "{{ a }}.")}
    system = {"variables": ["a"], "turns": [{"role": "system", "content": "{{ a }}"}]}
    assert len({*hashes, parse(tmp_path, system).hash}) == 3
    assert hashes == {parse(tmp_path, one_turn(text, "a")).hash for text in ("{{ a }}", "{{ a }}.")}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"turns": []}, "mine.yaml: the file has no variables; add it"),
        ({"variables": [], "turns": []}, "mine.yaml: turns is no list, or an empty one"),
        ({"variables": "a", "turns": []}, "mine.yaml: variables is no list of names"),
        (one_turn("{{ a }}"), 'mine.yaml: variables and turns do not agree on "a"'),
        (one_turn("b", "a"), 'mine.yaml: variables and turns do not agree on "a"'),
        (one_turn("{{ a", "a"), "mine.yaml: turn 1: broken template"),
        ({"variables": [], "turns": [{"role": "judge", "content": "a"}]}, "turn 1: has no valid role and text"),
        ({"variables": [], "turns": [{"role": ["user"], "content": "a"}]}, "turn 1: has no valid role and text"),
        ({"variables": [], "turns": [{"role": "user"}]}, "turn 1: the turn has no content; add it"),
    ],
)
def test_a_faulty_file_is_an_error_that_names_the_turn(tmp_path, content, expected):
    with pytest.raises(SaroError) as caught:
        parse(tmp_path, content)
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(expected) or expected in str(caught.value)


@pytest.mark.parametrize("text", ["{{ a.b.c }}", "{{ a / 2 }}", "{{ a.append(1) }}", "{{ a.__class__.__mro__ }}"])
def test_a_template_that_fails_or_reaches_outside_is_an_error_without_its_text(tmp_path, text):
    template = parse(tmp_path, one_turn(text, "a"))
    with pytest.raises(SaroError, match="template mine: it cannot be rendered"):
        template.render(a=["secret"])
