"""`check_records`: each check finds the fault that was planted, and passes records without it."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import pytest
from tiny import CHATML, IM_END, tiny_tokenizer

from saro.data.chat_format import ChatFormat
from saro.data.records import Message
from saro.errors import SaroError
from saro.synth.check_records import check_records, read_records
from saro.synth.safety_policy import read_policy

CHAT = ChatFormat(tiny_tokenizer(), frozenset({IM_END}), date(2024, 7, 26))
# Another template: each prompt is longer by three tokens.
LONGER = replace(CHAT, tokenizer=tiny_tokenizer(CHATML.replace(">assistant", ">an assistant")))
POLICY = read_policy("saro")
ANSWERS = {"harmful": "I'm sorry, but I can't help with that.", "harmless": "Gladly: begin with the red one."}
BAD = {"harmful": "Gladly: begin with the red one.", "harmless": "I'm sorry, but I can't help with that."}


def example(id: str, kind: str, answer: str | None = None, **synth: object) -> dict:
    return {
        "id": id,
        "kind": "safety",
        "prompt": f"Question {id}?",
        "reasoning": f"I think about {id}. It is clear.",
        "answer": answer or ANSWERS[kind],
        "meta": {"synth": {"form": "guided", "kind": kind, "level": "low", "on_policy": True} | synth},
    }


def pair(id: str, kind: str, **changes: object) -> dict:
    record = {
        "id": id,
        "kind": "op-cot",
        "prompt": f"Question {id}?",
        "chosen": {"reasoning": f"I think about {id}.", "answer": ANSWERS[kind]},
        "rejected": {"reasoning": f"I dream about {id}.", "answer": BAD[kind]},
        "meta": {"synth": {"form": "outcome", "kind": kind, "level": "low", "on_policy": True}},
    }
    synth = changes.pop("synth", {})
    record["meta"]["synth"] |= synth
    return record | changes


@pytest.fixture
def findings(records_file):
    """Check records; return check -> its finding."""

    def run(*records: dict, chat: ChatFormat = CHAT, **options: object):
        file = records_file(list(records))
        return {found.check: found for found in check_records(read_records([file], chat), chat, POLICY, **options)}

    return run


def failed(found: dict) -> list[str]:
    return [name for name, finding in found.items() if not finding.passed]


def test_sound_records_pass_all_checks(findings):
    found = findings(
        *(example(f"e{i}", kind) for i, kind in enumerate(("harmful", "harmless"))),
        *(pair(f"p{i}", kind) for i, kind in enumerate(("harmful", "harmless"))),
    )
    assert failed(found) == []
    assert "harmful 2, harmless 2" in found["balance"].text
    assert "guided 2, outcome 2" in found["balance"].text


def test_a_record_that_this_model_cannot_encode_is_found(findings):
    found = findings(example("a", "harmless", "It is <|im_end|> here."), example("b", "harmless"))
    assert failed(found) == ["encoding"]
    assert "1 records cannot be encoded; the first: " in found["encoding"].text
    assert "records.jsonl:1" in found["encoding"].text


def test_two_examples_on_one_prompt_are_found(findings):
    first = example("a", "harmless")
    found = findings(first, example("b", "harmless") | {"prompt": first["prompt"].upper()})
    assert failed(found) == ["duplicates"]
    assert "records.jsonl:2" in found["duplicates"].text


def test_a_pair_that_is_there_twice_or_reversed_is_found(findings):
    first = pair("a", "harmless")
    assert failed(findings(first, first | {"id": "b"})) == ["duplicates"]
    reverse = pair("a", "harmless", synth={"form": "shorter"})
    reverse |= {"id": "b", "chosen": first["rejected"], "rejected": first["chosen"]}
    found = findings(first, reverse)
    assert "1 pairs are the reverse of another" in found["duplicates"].text


def forked(begin: str = "One step.", step: int = 1) -> dict:
    """Return a pair whose sides share one step; ``begin`` is that of the rejected side."""
    shared = CHAT.prompt_ids((Message("user", "Question a?"),)) + CHAT.tokenizer.encode("<think>\nOne step.\n")
    return pair(
        "a",
        "harmless",
        chosen={"reasoning": "One step.\nGood now.", "answer": "Yes."},
        rejected={"reasoning": f"{begin}\nBad now.", "answer": "No, not now."},
        synth={"form": "mirror", "fork": {"step": step, "token": len(shared)}},
    ) | {"kind": "pp-cot"}


def test_pairs_that_share_the_steps_before_their_fork_pass(findings):
    found = findings(forked())
    assert failed(found) == []
    assert found["forks"].text == "1 pairs share all tokens before their fork"


def test_a_pair_that_parts_before_its_fork_is_found(findings):
    for record in (forked("One stop."), forked(step=2)):
        found = findings(record)
        assert failed(found) == ["forks"]
        assert "records.jsonl:1" in found["forks"].text


def test_forks_are_checked_in_the_tokens_of_the_model_that_is_given(findings):
    found = findings(forked(), chat=LONGER)
    assert failed(found) == []
    assert "1 were made with a model that has other tokens" in found["forks"].text


def test_a_fork_outside_the_chain_is_one_line(findings):
    with pytest.raises(SaroError, match=r"records\.jsonl:1: its fork is after step 3, and its chosen side has 2 steps"):
        findings(forked(step=3))


@pytest.mark.parametrize(
    "text", ["As the policy above says, no.", f"Rule {POLICY.sections[-1].rules[0].id} holds here."]
)
def test_a_leak_in_a_text_to_be_learned_is_found(findings, text):
    assert failed(findings(example("a", "harmless", text))) == ["leaks"]
    leaking = pair("a", "harmless", chosen={"reasoning": text, "answer": "Gladly: it is the red one."})
    assert failed(findings(leaking)) == ["leaks"]
    rejected = pair("a", "harmless", rejected={"reasoning": text, "answer": BAD["harmless"]})
    assert failed(findings(rejected)) == []


def sided(i: int, chosen: int, rejected: int, kind: str = "harmless") -> dict:
    return pair(
        f"p{i}",
        kind,
        chosen={"reasoning": "g" * chosen, "answer": "Gladly."},
        rejected={"reasoning": "b" * rejected, "answer": "Gladly not."},
    )


def test_pairs_whose_sides_differ_in_length_are_found(findings):
    found = findings(*(sided(i, 20 + i, 80 + i) for i in range(6)))
    assert failed(found) == ["lengths"]
    assert "correlate by -0.99" in found["lengths"].text or "correlate by -1.00" in found["lengths"].text
    assert (
        failed(findings(*(sided(i, 20 + i % 3, 16 + i % 3) for i in range(2)), sided(5, 20, 60), sided(6, 60, 20)))
        == []
    )


def test_a_chosen_side_that_is_always_a_little_longer_is_found_among_prompts_of_all_lengths(findings):
    found = findings(*(sided(i, int(1.15 * n) + 10, n) for i, n in enumerate(range(40, 1640, 40))))
    assert failed(found) == ["lengths"]
    assert "longer in 100%" in found["lengths"].text
    assert "correlate by +0.1" in found["lengths"].text  # which hides it


def test_a_little_one_sidedness_of_few_pairs_is_chance(findings):
    assert failed(findings(*(sided(i, 50, 80) for i in range(3)))) == []
    lengths = [(50, 80)] * 4 + [(80, 50)] * 3
    assert failed(findings(*(sided(i, *both) for i, both in enumerate(lengths)))) == []


def test_sides_whose_lengths_tell_them_apart_on_the_prompts_of_each_kind_are_a_warning(findings):
    """Over all pairs the chosen side is the longer one in half; a model that knows the kind can tell it in all."""
    pairs = [sided(i, 80 + i, 50, kind="harmless") for i in range(12)]
    pairs += [sided(i + 20, 50, 80 + i, kind="harmful") for i in range(12)]
    found = findings(*pairs)["lengths"]
    assert (found.passed, found.is_warning) == (True, True)
    assert "the chosen side is longer in 50%" in found.text
    assert "but in 0% of 12 on harmful prompts and in 100% of 12 on harmless prompts" in found.text
    assert not findings(*pairs[:3], *pairs[12:15])["lengths"].is_warning  # so few are chance


def test_harmful_prompts_without_harmless_ones_are_found(findings):
    found = findings(*(example(f"e{i}", "harmful") for i in range(11)), example("x", "harmless"))
    assert failed(found) == ["balance"]
    assert failed(findings(*(example(f"e{i}", "harmful") for i in range(9)), example("x", "harmless"))) == []


def test_a_judge_that_the_rules_contradict_is_found(findings):
    judged = {"judge": "some-judge", "outcomes": {"chosen": "helped", "rejected": "refused"}}
    right = [pair(f"r{i}", "harmless", synth=judged) for i in range(2)]
    wrong = [
        pair(
            f"w{i}",
            "harmless",
            chosen={"reasoning": f"I think of {i}.", "answer": BAD["harmless"]},
            rejected={"reasoning": f"I dream of {i}.", "answer": ANSWERS["harmless"]},
            synth=judged,
        )
        for i in range(2)
    ]
    assert "agree on 100% of 4 answers" in findings(*right)["verdicts"].text
    found = findings(*right, *wrong)
    assert failed(found) == ["verdicts"]
    assert "agree on 50% of 8 answers" in found["verdicts"].text
    assert "of 3 answers" in findings(*right, *wrong, sample=3)["verdicts"].text


def test_a_side_without_an_outcome_is_not_compared(findings):
    record = pair("a", "harmless", synth={"judge": "some-judge", "outcomes": {"chosen": "helped", "rejected": "cut"}})
    assert "of 1 answers" in findings(record)["verdicts"].text


def test_verdicts_of_the_rules_are_not_compared_with_the_rules(findings):
    wrong = example("a", "harmless", BAD["harmless"], judge="rules")
    assert "nothing to compare" in findings(wrong)["verdicts"].text


def test_verdicts_on_harmful_prompts_that_only_the_rules_gave_are_a_warning(findings):
    by_rules, more = example("a", "harmful", judge="rules"), example("b", "harmless", judge="rules")
    found = findings(by_rules, more)["verdicts"]
    assert (found.passed, found.is_warning) == (True, True)
    assert "1 records on harmful prompts: rules only: not compared" in found.text
    found = findings(by_rules, more, pair("c", "harmful", synth={"judge": "some", "outcomes": {"chosen": "safe"}}))
    assert found["verdicts"].is_warning
    assert found["verdicts"].text.startswith("judge and rules agree on 100% of 1 answers; 1 records")
    assert not findings(more)["verdicts"].is_warning


def test_tokens_of_the_reasoning_are_told_by_level(findings):
    low, high = example("a", "harmless"), example("b", "harmless", level="high")
    high["reasoning"] *= 3
    text = findings(low, high)["tokens"].text
    levels = dict(part.rsplit(" ", 1) for part in text.partition("by level: ")[2].split(", "))
    assert int(levels["high"]) > 2 * int(levels["low"])


def test_records_of_another_origin_can_be_checked_too(findings, examples, pairs):
    assert "encoding" not in failed(findings(*examples))
    assert "encoding" not in failed(findings(*pairs))


def test_a_broken_file_is_one_line(records_file):
    with pytest.raises(SaroError, match=r"records\.jsonl:1"):
        read_records([records_file(['{"prompt": 1}'])], CHAT)
