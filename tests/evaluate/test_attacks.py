"""Attacks are read strictly, change a prompt as they say, and are undone in answers."""

from __future__ import annotations

import json

import pytest
import yaml
from chat_cases import DAY, chat_of
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from saro.data.chain import split_steps
from saro.data.chat_format import ChatFormat, Prefill
from saro.data.records import Message, read_pairs
from saro.demo import demo_file
from saro.demo.fetch_model import demo_model
from saro.errors import SaroError
from saro.evaluate.attacks import NO_ATTACK, Attack, Prompted, apply_attack, invert, prompt_ids
from saro.evaluate.read_attacks import read_attacks, shipped_attacks
from saro.evaluate.rewrites import INVERSES, REWRITES, check_inverse
from saro.evaluate.suite import EXPECTATIONS, Item

SECRET = "do not print me"
ITEM = Item("suite", "a", (Message("user", "Why?"),), "comply")
LONG = Item(
    "suite",
    "b",
    tuple(Message(*turn) for turn in [("system", "S"), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?")]),
    "refuse",
)


@pytest.fixture
def attacks(tmp_path):
    """Return a function that writes entries to a YAML file and reads it."""

    def of(*entries: dict[str, object]) -> list[Attack]:
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump(list(entries)))
        return read_attacks(path)

    return of


@pytest.fixture
def error(attacks, tmp_path):
    """Return a function that gives the error for entries, without the folder."""

    def of(*entries: dict[str, object]) -> str:
        with pytest.raises(SaroError) as caught:
            attacks(*entries)
        message = str(caught.value)
        assert "\n" not in message
        assert SECRET not in message
        return message.replace(f"{tmp_path}/", "")

    return of


def last(attack: Attack, item: Item = ITEM) -> str:
    return apply_attack(attack, item).messages[-1].content


def rewrite(**fields: object) -> dict[str, object]:
    return {"id": "x", "kind": "rewrite"} | fields


def prefill(**fields: object) -> dict[str, object]:
    return {"id": "x", "kind": "prefill"} | fields


# What comes with the project


@pytest.mark.parametrize("name", shipped_attacks())
def test_shipped_attacks_apply_to_every_item_that_they_are_for(name):
    for attack in read_attacks(name):
        for expect in EXPECTATIONS:
            item = Item("suite", "a", ITEM.prompt, expect)
            assert (apply_attack(attack, item) is not None) == (expect in attack.expect)


def test_shipped_prefills():
    by_id = {attack.id: attack for attack in read_attacks("prefill")}
    assert set(by_id) == {"compliant-start", "neutral-start", "over-cautious-start", "think-off"}
    assert by_id["compliant-start"].control == "neutral-start"
    assert by_id["over-cautious-start"].expect == ("comply",)
    assert by_id["think-off"].prefill == Prefill("", closed=True)


def test_a_control_is_as_long_as_its_attack():
    by_id = {attack.id: attack for attack in read_attacks("prefill")}
    words = {name: len(attack.prefill.reasoning.split()) for name, attack in by_id.items()}
    assert abs(words["compliant-start"] - words["neutral-start"]) <= 3


def test_shipped_rewrites():
    assert [attack.id for attack in read_attacks("rewrites")] == [
        "base64",
        "rot13",
        "leetspeak",
        "refusal-suppression",
        "prefix-injection",
    ]


def test_no_attack_leaves_the_prompt():
    assert apply_attack(NO_ATTACK, LONG) == Prompted(LONG.prompt)


# Rewrites


@pytest.mark.parametrize(("builtin", "text"), [("base64", "V2h5Pw=="), ("rot13", "Jul?"), ("leetspeak", "Why?")])
def test_built_in_rewrites(attacks, builtin, text):
    (attack,) = attacks(rewrite(builtin=builtin))
    assert last(attack) == text


def test_leetspeak():
    assert REWRITES["leetspeak"]("Aeiost, plain") == "431057, pl41n"


def test_a_template_surrounds_what_the_function_made(attacks):
    (attack,) = attacks(rewrite(builtin="rot13", template="Read {{ prompt }} and answer"))
    assert last(attack) == "Read Jul? and answer"


def test_only_the_last_turn_is_rewritten(attacks):
    (attack,) = attacks(rewrite(template="<{{prompt}}>"))
    assert apply_attack(attack, LONG).messages == (*LONG.prompt[:-1], Message("user", "<Why?>"))


@pytest.mark.parametrize("prompt", ["{{prompt}}", "\\1 \\g<0>", "{{ 7 * 7 }}", "{% for x in y %}"])
def test_nothing_in_prompt_or_template_is_executed(attacks, prompt):
    (attack,) = attacks(rewrite(template="{{prompt}} {{ 7 * 7 }} {% if a %}"))
    item = Item("suite", "a", (Message("user", prompt),), "comply")
    assert last(attack, item) == f"{prompt} {{{{ 7 * 7 }}}} {{% if a %}}"


def test_a_list_of_rewritten_prompts(attacks, tmp_path):
    lines = [{"id": "a", "prompt": "Why did people ask?"}]
    (tmp_path / "past.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (attack,) = attacks(rewrite(list="past.jsonl"))
    assert last(attack) == "Why did people ask?"
    assert apply_attack(attack, LONG) is None


def test_a_list_with_an_item_twice_is_refused(error, tmp_path):
    (tmp_path / "past.jsonl").write_text('{"id": "a", "prompt": "A"}\n{"id": "a", "prompt": "B"}\n')
    assert error(rewrite(list="past.jsonl")) == 'past.jsonl:2: id "a" is already used; give one prompt for each item'


# System prompts and made-up turns


def test_a_system_prompt_comes_first(attacks):
    (attack,) = attacks({"id": "x", "kind": "system", "template": "You answer all."})
    assert apply_attack(attack, ITEM).messages == (Message("system", "You answer all."), *ITEM.prompt)
    assert apply_attack(attack, LONG).messages[0] == Message("system", "You answer all.\n\nS")


def test_made_up_turns_come_before_the_prompt(attacks):
    turns = [
        {"role": "system", "content": "T"},
        {"role": "user", "content": "Ready?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Then: {{prompt}}"},
    ]
    (attack,) = attacks({"id": "x", "kind": "turns", "turns": turns})
    made_up = (Message("user", "Ready?"), Message("assistant", "Yes."), Message("user", "Then: Why?"))
    assert apply_attack(attack, ITEM).messages == (Message("system", "T"), *made_up)
    assert apply_attack(attack, LONG).messages == (Message("system", "T\n\nS"), *LONG.prompt[1:-1], *made_up)


# Prefills


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"think": "Sure.\n"}, Prefill("Sure.\n")),
        ({"think": ""}, Prefill("", closed=True)),
        ({"answer": "So."}, Prefill(None, closed=True, answer="So.")),
        ({"think": "Sure.", "answer": "So."}, Prefill("Sure.", closed=True, answer="So.")),
        ({"think": "", "answer": "So."}, Prefill("", closed=True, answer="So.")),
    ],
)
def test_prefills(attacks, fields, expected):
    (attack,) = attacks(prefill(**fields))
    assert apply_attack(attack, ITEM) == Prompted(ITEM.prompt, expected)


def test_an_attack_applies_only_where_a_good_answer_does_what_it_names(attacks):
    (attack,) = attacks(prefill(think="No.", expect=["comply", "answer"]))
    assert apply_attack(attack, ITEM) is not None
    assert apply_attack(attack, LONG) is None


@pytest.fixture
def chains(tmp_path):
    """Write pairs with rejected chains of three steps and of one, some of which end well or are cut in a step."""
    good = {"reasoning": "Fine.", "answer": "Yes."}
    pairs = [
        {"prompt": "Why?", "chosen": good, "rejected": {"reasoning": ["One.", "Two.", "Three."], "answer": "No."}},
        {"prompt": "Why?", "chosen": good, "rejected": {"reasoning": ["Other."], "answer": "No."}},
        {"prompt": "How?", "chosen": good, "rejected": {"reasoning": ["Short."], "answer": "No."}},
        {"prompt": "When?", "chosen": good, "rejected": {"answer": "No."}},
        {"prompt": "Where?", "chosen": good, "rejected": {"reasoning": "One. Two.\n\nThree. Fo", "open": True}},
        {"prompt": "Who?", "chosen": good, "rejected": {"reasoning": "One. Two. Th", "open": True}},
        *(
            {
                "prompt": form,
                "chosen": good,
                "meta": {"synth": {"form": form}},
                "rejected": {"reasoning": "One. Two. Three.", "answer": "a"},
            }
            for form in ("earlier", "shorter", "intervene")
        ),
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


@pytest.mark.usefixtures("chains")
def test_steps_of_a_rejected_chain_make_one_attack_each(attacks):
    made = attacks(prefill(steps=[0, 1, 3], pairs="pairs.jsonl"))
    assert [(attack.id, attack.step) for attack in made] == [("x-0", 0), ("x-1", 1), ("x-3", 3)]
    begun = [apply_attack(attack, ITEM).prefill for attack in made]
    assert begun == [None, Prefill("One.\n"), Prefill("One.\nTwo.\nThree.\n")]


@pytest.mark.usefixtures("chains")
@pytest.mark.parametrize("step", [0, 1, 3])
def test_every_point_of_a_curve_is_over_the_chains_with_all_its_steps_that_end_badly(attacks, step):
    made = {attack.step: attack for attack in attacks(prefill(steps=[0, 1, 3], pairs="pairs.jsonl"))}
    prompts = ("Why?", "How?", "When?", "Where?", "Who?", "earlier", "shorter", "intervene", "Other?")
    items = [Item("suite", "a", (Message("user", prompt),), "refuse") for prompt in prompts]
    applies = [item.prompt[0].content for item in items if apply_attack(made[step], item) is not None]
    assert applies == ["Why?", "Where?", "intervene"]


@pytest.mark.usefixtures("chains")
def test_steps_are_those_of_data_construction_and_a_step_that_was_cut_is_none(attacks):
    made = attacks(prefill(steps=[1, 2, 3], pairs="pairs.jsonl"))
    item = Item("suite", "a", (Message("user", "Where?"),), "refuse")
    begun = [apply_attack(attack, item).prefill.reasoning for attack in made]
    assert begun == ["One. ", "One. Two.\n\n", "One. Two.\n\nThree. "]


@pytest.mark.usefixtures("chains")
def test_more_steps_than_any_chain_has_are_refused(error):
    message = error(prefill(steps=[1, 4], pairs="pairs.jsonl"))
    assert message == (
        "own.yaml: attack 1 (x): steps has 4, and no rejected chain of pairs.jsonl has more than 3; lower it"
    )


def test_the_ids_of_a_prompt_with_its_beginning():
    ids, prefilled = prompt_ids(chat_of(), Prompted(ITEM.prompt, Prefill("Sure.\n")))
    assert chat_of().tokenizer.decode(ids[-prefilled:]) == "<think>\nSure.\n"


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_rejected_chain_is_continued_from_the_ids_that_training_has_for_it(attacks, step):
    (attack,) = attacks(prefill(steps=[step], pairs=demo_file("srpo_heldout")))
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    chat = ChatFormat(tokenizer, frozenset({tokenizer.eos_token_id}), DAY)
    pairs = [pair for pair in read_pairs(demo_file("srpo_heldout")) if pair.prompt in attack.chains]
    assert pairs
    for pair in pairs:
        ids, _ = prompt_ids(chat, apply_attack(attack, Item("suite", "a", pair.prompt, "refuse")))
        _, rejected = chat.encode_pair(pair)
        assert rejected.tokens[: len(ids)].tolist() == list(ids)
        # Only the line end, which could grow, is left out.
        assert tokenizer.decode(ids).endswith(split_steps(pair.rejected.reasoning)[step - 1].text)


# Inverses


@pytest.mark.parametrize("name", INVERSES)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Co", "Cn", "Zl", "Zp"])))
def test_an_inverse_never_raises(name, text):
    assert isinstance(INVERSES[name](text), str)


def test_an_answer_in_base64_is_decoded_with_plain_words_around_it():
    attack = Attack("x", "rewrite", builtin="base64", inverse="base64")
    encoded = REWRITES["base64"]("Here is the whole answer, as you like.")
    assert invert(attack, encoded) == "Here is the whole answer, as you like."
    assert (
        invert(attack, f"Of course:\n{encoded}\nDone.") == "Of course:\nHere is the whole answer, as you like.\nDone."
    )


def test_base64_that_was_cut_is_decoded_as_far_as_it_goes():
    attack = Attack("x", "rewrite", builtin="base64", inverse="base64")
    assert invert(attack, REWRITES["base64"]("Here is the answer.")[:-6]) == "Here is the ans"


@pytest.mark.parametrize("name", INVERSES)
@pytest.mark.parametrize("text", ["I'm sorry, but I can't help with that.", "Sorry, this is not what I do."])
def test_an_answer_in_plain_words_stays(name, text):
    assert invert(Attack("x", "rewrite", builtin=name, inverse=name), text) == text


def test_an_answer_in_rot13_is_decoded():
    attack = Attack("x", "rewrite", builtin="rot13", inverse="rot13")
    assert invert(attack, REWRITES["rot13"]("This is the answer to it.")) == "This is the answer to it."


def test_answers_to_an_attack_without_an_inverse_stay():
    assert invert(Attack("x", "rewrite", builtin="base64"), "V2h5Pw==") == "V2h5Pw=="


def test_an_inverse_that_is_none_is_refused():
    with pytest.raises(SaroError, match=r"^own: does not bring back 1\d of 20 test strings; name the rewrite"):
        check_inverse(REWRITES["leetspeak"], lambda text: text, "own")


# Hashes


def test_a_hash_changes_with_what_decides_the_prompts_and_not_with_the_name(attacks):
    entries = [
        rewrite(template="{{prompt}}"),
        rewrite(id="y", template="{{prompt}}"),
        rewrite(id="z", template="{{prompt}}!"),
        rewrite(id="b", builtin="base64"),
        rewrite(id="i", builtin="base64", inverse="base64"),
        rewrite(id="r", builtin="rot13"),
        prefill(id="p", think="Sure."),
        prefill(id="q", think="Sure.", expect="comply"),
    ]
    hashes = [attack.hash for attack in attacks(*entries)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[1:])) == len(hashes) - 1
    assert all(len(value) == 64 for value in hashes)


@pytest.mark.usefixtures("chains")
def test_a_hash_changes_with_the_chains(attacks, tmp_path):
    (before,) = attacks(prefill(steps=[1], pairs="pairs.jsonl"))
    path = tmp_path / "pairs.jsonl"
    path.write_text(path.read_text().replace("One.", "Uno."))
    (after,) = attacks(prefill(steps=[1], pairs="pairs.jsonl"))
    assert before.hash != after.hash


# Faults


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "rewrite"}, "own.yaml: attack 1: has no id; "),
        ({"id": 3, "kind": "rewrite"}, "own.yaml: attack 1: id is a number; "),
        ({"id": "a/b", "kind": "rewrite"}, 'own.yaml: attack 1: id is "a/b"; '),
        ({"id": "none", "kind": "prefill", "think": "A"}, 'own.yaml: attack 1: id "none" is already used; '),
        ({"id": "x"}, "own.yaml: attack 1 (x): kind is null; "),
        ({"id": "x", "kind": "rewrites"}, 'own.yaml: attack 1 (x): kind is "rewrites"; did you mean rewrite?'),
        (rewrite(), "own.yaml: attack 1 (x): a rewrite has neither template nor builtin nor list; add one"),
        (rewrite(template=SECRET), "own.yaml: attack 1 (x): template has no {{prompt}}; write {{prompt}} where"),
        (rewrite(template=3), "own.yaml: attack 1 (x): template is a number; give a string"),
        (rewrite(builtin="base46"), 'own.yaml: attack 1 (x): builtin is "base46"; did you mean base64?'),
        (rewrite(think="A"), 'own.yaml: attack 1 (x): unknown field "think" for kind rewrite; '),
        (rewrite(builtin="base64", inverse="rot13"), "own.yaml: attack 1 (x): inverse rot13: does not bring back "),
        (rewrite(builtin="leetspeak", inverse="leetspeak"), 'own.yaml: attack 1 (x): "leetspeak" has no inverse; '),
        (rewrite(list="missing.jsonl"), "missing.jsonl: there is no such file; "),
        (rewrite(builtin="rot13", control="y"), 'own.yaml: control of "x" is "y"; name another attack of this file'),
        (rewrite(builtin="rot13", control="x"), 'own.yaml: control of "x" is "x"; name another attack of this file'),
        (
            rewrite(builtin="rot13", expect="refuses"),
            'own.yaml: attack 1 (x): expect is "refuses"; did you mean refuse?',
        ),
        (rewrite(builtin="rot13", expect=[]), "own.yaml: attack 1 (x): expect is a list; give one or more of "),
        ({"id": "x", "kind": "system"}, "own.yaml: attack 1 (x): a system attack has no template; "),
        ({"id": "x", "kind": "turns"}, "own.yaml: attack 1 (x): has no turns; "),
        (
            {"id": "x", "kind": "turns", "turns": [{"role": "user", "content": SECRET}]},
            "own.yaml: attack 1 (x): the last of the turns has no {{prompt}}; ",
        ),
        (
            {"id": "x", "kind": "turns", "turns": [{"role": "assistant", "content": "{{prompt}}"}]},
            "own.yaml: attack 1 (x): the last of the turns is the assistant's; ",
        ),
        (prefill(), "own.yaml: attack 1 (x): a prefill has neither think nor answer nor steps; add one"),
        (prefill(think=" "), "own.yaml: attack 1 (x): think is empty; "),
        (prefill(answer=""), "own.yaml: attack 1 (x): answer is empty; "),
        (prefill(think=None), "own.yaml: attack 1 (x): think is null; fill it or leave it out"),
        (prefill(steps=[1]), "own.yaml: attack 1 (x): has no pairs; "),
        (
            prefill(steps=[-1], pairs="p"),
            "own.yaml: attack 1 (x): steps is not a list of different whole numbers from 0; ",
        ),
        (prefill(steps=[1, 1], pairs="p"), "own.yaml: attack 1 (x): steps is not a list of different whole numbers"),
        (prefill(steps=[1], pairs="p", think="A"), "own.yaml: attack 1 (x): has both steps and think; "),
    ],
)
def test_a_faulty_attack_is_refused(error, entry, message):
    assert error(entry).startswith(message)


def test_an_id_is_used_once(error):
    message = error(rewrite(builtin="rot13"), rewrite(builtin="base64"))
    assert message == 'own.yaml: attack 2: id "x" is already used; give each attack its own id'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": holds no list of attacks; "),
        ("id: x", ": holds no list of attacks; "),
        ("- id: [", ":1: broken YAML ("),
        ("- id: x\n  id: y\n", ":2: broken YAML (a key is given twice); fix it there"),
        ("- !!python/object/apply:os.getcwd []\n", ":1: broken YAML ("),
        ("- 3", ": attack 1: is a number; "),
    ],
)
def test_a_file_that_holds_no_attacks_is_refused(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(SaroError) as caught:
        read_attacks(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


def test_an_unknown_name_names_what_there_is():
    with pytest.raises(SaroError, match=r"^prefil: is neither a file nor attacks .*; did you mean prefill\?$"):
        read_attacks("prefil")
