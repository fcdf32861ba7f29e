"""RW examples: guided draws, gates, judge, the shortest of each prompt, fill and balance."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from chat_cases import QWEN3, chat_of
from hypothesis import given
from hypothesis import strategies as st
from selection_cases import HELP, MEDIUM, REFUSAL, SHORT, make_author, make_prompt, write

from saro.data.records import Message, Response, read_examples
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.synth.funnel import Funnel
from saro.synth.prompts import Prompt
from saro.synth.rw_examples import check_template, count_followups, make_examples, plan_tasks, share_out
from saro.synth.safety_policy import read_policy
from saro.synth.synth_options import Options, RWStage

POLICY = read_policy("saro")
LONGER = f"{MEDIUM} That is what I do."
Reply = Callable[[str, int], str]


def options_of(**rw: object) -> Options:
    return Options(stage="rw", max_tokens=2000, rw=RWStage(**{"draws": 3, "general": 0.5} | rw))


class World:
    """Makes examples in one folder; ``replies`` are the texts by the number of the draw, of which the last goes on."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        self.folder, self.runtime = folder, runtime
        self.funnel = Funnel()
        self.asked = 0

    def make(self, prompts: list[Prompt], reply: Reply, **rw: object) -> list[dict[str, object]]:
        author, judge = make_author(self.folder, self.runtime, reply)
        with author.store:
            self.funnel = Funnel()
            records = make_examples(prompts, author, judge, POLICY, options_of(**rw), self.funnel)
            self.asked = len(author.generator.asked)
        return records

    def fill_file(self, *records: dict[str, object]) -> str:
        path = self.folder / "fill.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    def reasons(self) -> Counter[tuple[str, str]]:
        return Counter((one.stage, one.reason) for one in self.funnel.left_out)


@pytest.fixture
def world(tmp_path: Path, runtime: Runtime) -> World:
    return World(tmp_path, runtime)


def say(*texts: str) -> Reply:
    return lambda prompt, number: texts[min(number, len(texts) - 1)]


def good_for_all(prompt: str, number: int) -> str:
    """Refuse p..., help q..., and say 4 to g...; later draws are longer."""
    more = " So be it." * number
    if "Say p" in prompt:
        return write(MEDIUM + more, REFUSAL)
    return write(SHORT + more, "The answer is 4." if "Say g" in prompt else HELP)


def test_the_record_holds_the_bare_prompt_and_the_shortest_accepted_text(world: World) -> None:
    replies = say(write(LONGER, REFUSAL), write(MEDIUM, REFUSAL), write(MEDIUM, HELP))
    (record,) = world.make([make_prompt("p1")], replies)
    assert record["prompt"] == "Say p1."
    assert (record["reasoning"], record["answer"]) == (MEDIUM, REFUSAL)
    assert (record["id"], record["kind"]) == ("p1", "safety")
    synth = record["meta"]["synth"]
    assert (synth["form"], synth["on_policy"], synth["judge"]) == ("guided", True, "rules")
    assert synth["policy"] == list(POLICY.rule_ids(make_prompt("p1")))
    assert len(synth["draws"]) == 1
    assert world.reasons() == {("judge", "harmful"): 1, ("draws", "not the shortest"): 1}


def test_the_model_is_asked_with_the_policy_the_length_of_the_level_and_the_tags_in_view() -> None:
    tasks = plan_tasks([make_prompt("p1")], POLICY, options_of())
    assert [task.number for task in tasks] == [0, 1, 2]
    (message,) = tasks[0].messages
    assert POLICY.for_writer(make_prompt("p1")) in message.content
    assert "4 to 6" in message.content
    assert "<think>" in message.content
    assert message.content.endswith("Say p1.")
    assert "[r]" in plan_tasks([make_prompt("p1")], POLICY, options_of(), ("[r]", "[/r]"))[0].messages[0].content


def test_a_conversation_keeps_its_turns_and_its_first_user_turn_gets_the_policy() -> None:
    turns = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hi!"), Message("user", "Go."))
    messages = plan_tasks([make_prompt("p1", prompt=turns)], POLICY, options_of())[0].messages
    assert [message.role for message in messages] == ["system", "user", "assistant", "user"]
    assert (messages[0], *messages[2:]) == (turns[0], *turns[2:])
    assert POLICY.for_writer(make_prompt("p1")) in messages[1].content
    assert messages[1].content.endswith("Hi")


def test_nothing_is_written_after_the_planned_texts(world: World) -> None:
    prompts = [make_prompt("p1"), make_prompt("q1", "harmless")]
    world.make(prompts, say(write(MEDIUM, HELP)))
    assert world.asked == len(plan_tasks(prompts, POLICY, options_of())) == 6
    assert count_followups(prompts, options_of()) == 0


@pytest.mark.parametrize(
    ("text", "stage", "reason"),
    [
        (write(MEDIUM, HELP), "judge", "harmful"),
        (write("No.", REFUSAL), "gates", "band"),
        (f"{REFUSAL}", "gates", "no-think"),
        (f"<think>\n{MEDIUM}", "gates", "empty"),
        (write(MEDIUM, "x" * 3000), "gates", "looped"),
        (write(f"{MEDIUM} By the policy above.", REFUSAL), "gates", "leak"),
        (write(f"{MEDIUM} I will explain how to do it.", REFUSAL), "gates", "gives in"),
    ],
)
def test_a_prompt_without_an_accepted_text_has_no_record(world: World, text: str, stage: str, reason: str) -> None:
    assert world.make([make_prompt("p1")], say(text)) == []
    assert world.reasons() == {(stage, reason): 3, ("select", "no accepted text"): 1}


def test_a_template_that_closes_the_reasoning_is_refused() -> None:
    closed = chat_of(QWEN3, template_variables={"enable_thinking": False})
    with pytest.raises(SaroError, match="closes the reasoning"):
        check_template([make_prompt("p1")], closed)
    check_template([make_prompt("p1")], chat_of(QWEN3))
    check_template([make_prompt("p1")], None)


def test_each_kind_of_prompt_has_its_own_good_outcome(world: World) -> None:
    prompts = [make_prompt("p1"), make_prompt("q1", "harmless"), make_prompt("g1", "general")]
    answers = [record["answer"] for record in world.make(prompts, good_for_all)]
    assert answers == ["The answer is 4.", REFUSAL, HELP]
    prompts = [make_prompt("p2"), make_prompt("q2", "harmless"), make_prompt("g2", "general")]
    assert [record["id"] for record in world.make(prompts, say(write(SHORT, "It is 5.")))] == ["q2"]
    assert {("judge", "harmful"): 3, ("judge", "wrong"): 3}.items() <= world.reasons().items()


def test_the_records_are_read_back_by_training(world: World, tmp_path: Path) -> None:
    prompts = [make_prompt("p1"), make_prompt("q1", "harmless")]
    path = tmp_path / "rw.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in world.make(prompts, good_for_all)))
    assert [example.response for example in read_examples(path)] == [Response(MEDIUM, REFUSAL), Response(SHORT, HELP)]


def test_a_second_time_nothing_is_drawn_and_the_records_are_the_same_in_any_order_of_prompts(world: World) -> None:
    prompts = [
        make_prompt(f"{kind}{i}", name) for i in range(4) for kind, name in (("p", "harmful"), ("q", "harmless"))
    ]
    first = json.dumps(world.make(prompts, good_for_all, records=5))
    left_out = world.funnel.as_dict()
    assert world.asked == 24
    for seed in range(3):
        shuffled = random.Random(seed).sample(prompts, len(prompts))
        assert json.dumps(world.make(shuffled, good_for_all, records=5)) == first
        assert world.asked == 0
        assert world.funnel.as_dict() == left_out


def test_a_published_text_fills_a_prompt_that_the_model_could_not_answer(world: World) -> None:
    published = {"prompt": "say  P1.", "reasoning": [MEDIUM], "answer": REFUSAL}
    elsewhere = {"prompt": "Say p9.", "reasoning": MEDIUM, "answer": REFUSAL}
    prompts = [make_prompt("p1"), make_prompt("q1", "harmless")]
    records = world.make(prompts, say(write(SHORT, HELP)), fill=world.fill_file(published, elsewhere))
    assert [(record["id"], record["answer"]) for record in records] == [("p1", REFUSAL), ("q1", HELP)]
    synth = records[0]["meta"]["synth"]
    assert (synth["form"], synth["on_policy"]) == ("fill", False)
    assert records[0]["prompt"] == "Say p1."
    assert records[0]["meta"]["licence"] == "CC0"
    assert world.funnel.counts["fill"] == {"on no prompt that lacks a text": 1, "filled": 1}
    assert world.funnel.counts["records"]["not on-policy"] == 1


def test_a_published_text_that_calls_a_tool_fills_no_prompt(world: World) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    called = {
        "messages": [
            {"role": "user", "content": "Say p1."},
            {"role": "assistant", "content": REFUSAL, "tool_calls": [call]},
        ]
    }
    given = {"prompt": "Say p1.", "reasoning": MEDIUM, "answer": REFUSAL, "tools": [{"function": {"name": "add"}}]}
    records = world.make(
        [make_prompt("p1"), make_prompt("q1", "harmless")], say(write(SHORT, HELP)), fill=world.fill_file(called, given)
    )
    assert [record["id"] for record in records] == ["q1"]
    assert world.funnel.counts["fill"]["with tools"] == 2


@pytest.mark.parametrize(
    ("meta", "source", "licence"),
    [
        ({"meta": {"source": "Star", "licence": "MIT"}}, "Star", "MIT"),
        ({"meta": {"source": 7}}, "fill.jsonl", None),
        ({}, "fill.jsonl", None),
    ],
)
def test_a_published_text_says_where_it_is_from_and_its_own_licence(
    world: World, meta: dict[str, object], source: str, licence: str | None
) -> None:
    fill = world.fill_file({"prompt": "Say p1.", "reasoning": MEDIUM, "answer": REFUSAL} | meta)
    (record,) = world.make([make_prompt("p1")], say("Nothing"), fill=fill)
    digest = hashlib.sha256(Path(fill).read_bytes()).hexdigest()
    expected = {"file": "fill.jsonl", "sha256": digest, "source": source, "licence": licence}
    assert record["meta"]["synth"]["fill"] == expected
    assert (record["meta"]["source"], record["meta"]["licence"]) == ("made up", "CC0")


def test_a_text_of_the_model_comes_before_a_published_one(world: World) -> None:
    published = {"prompt": "Say p1.", "reasoning": MEDIUM, "answer": "No, sorry."}
    (record,) = world.make([make_prompt("p1")], good_for_all, fill=[world.fill_file(published)])
    assert record["answer"] == REFUSAL


@pytest.mark.parametrize(
    ("kind", "think", "answer", "reason"),
    [
        ("harmful", "No.", REFUSAL, "band"),
        ("harmful", f"{MEDIUM} P2.1 says so.", REFUSAL, "leak"),
        ("harmful", MEDIUM, f"{REFUSAL} </think>", "tags"),
        ("harmful", f"{MEDIUM} I will explain how to do it.", REFUSAL, "gives in"),
        ("general", SHORT, "The answer is 5.", "wrong"),
    ],
)
def test_published_texts_pass_the_same_gates(world: World, kind: str, think: str, answer: str, reason: str) -> None:
    published = {"prompt": "Say x1.", "reasoning": think, "answer": answer}
    fill = world.fill_file(published)
    assert world.make([make_prompt("x1", kind)], say("Nothing"), fill=fill) == []
    assert ("fill", reason) in world.reasons()


def test_of_several_published_texts_the_shortest_that_is_as_long_as_asked_for_is_taken(world: World) -> None:
    thinks = ["They ask. I say no.", LONGER, MEDIUM]
    fill = world.fill_file(*({"prompt": "Say p1.", "reasoning": think, "answer": REFUSAL} for think in thinks))
    (record,) = world.make([make_prompt("p1")], say("Nothing"), fill=fill)
    assert record["reasoning"] == MEDIUM


def test_a_faulty_fill_file_is_an_error_with_its_line(world: World) -> None:
    with pytest.raises(SaroError, match=r"fill.jsonl:1: .*preference pair"):
        world.make([make_prompt("p1")], say("Nothing"), fill=world.fill_file({"prompt": "a", "chosen": "b"}))


def test_fewer_records_are_balanced_over_outcomes_and_hazards(world: World) -> None:
    harmful = [make_prompt(f"p{i}", hazard=("vcr",) if i < 6 else ("ncr",)) for i in range(8)]
    harmless = [make_prompt(f"q{i}", "harmless") for i in range(4)]
    records = world.make([*harmful, *harmless], good_for_all, records=8)
    hazards = Counter(tuple(record["meta"]["synth"]["hazard"]) for record in records)
    assert hazards == {("vcr",): 2, ("ncr",): 2, (): 4}
    assert world.reasons()["select", "balance"] == world.reasons()["draws", "balance"] == 4
    assert world.funnel.counts["records"] == {"safety": 8, "general": 0, "not on-policy": 0}


def test_general_records_have_at_most_their_share(world: World) -> None:
    prompts = [make_prompt(f"p{i}") for i in range(3)] + [make_prompt(f"g{i}", "general") for i in range(6)]
    kinds = Counter(record["kind"] for record in world.make(prompts, good_for_all, general=0.4))
    assert kinds == {"safety": 3, "general": 2}


@given(st.integers(0, 60), st.integers(0, 60), st.none() | st.integers(1, 80), st.sampled_from([0, 0.25, 0.5, 1]))
def test_shares_never_exceed_what_there_is_or_was_asked_for(
    safety: int, general: int, records: int | None, share: float
) -> None:
    kept_safety, kept_general = share_out(safety, general, records, share)
    assert 0 <= kept_safety <= safety
    assert 0 <= kept_general <= general
    if records is not None:
        assert kept_safety + kept_general <= records
        if safety > 0:
            assert kept_general <= share * records + 0.5
        if general >= records and safety >= records:
            assert kept_safety + kept_general == records
    elif safety > 0 and share < 1:
        assert kept_safety == safety
        assert kept_general <= share * (kept_safety + kept_general) + 0.5


def test_without_safety_prompts_all_records_are_general() -> None:
    assert share_out(0, 7, None, 0.25) == (0, 7)
    assert share_out(0, 7, 5, 0.25) == (0, 5)


def test_levels_change_how_long_the_kept_reasoning_may_be(world: World) -> None:
    low = replace(make_prompt("p1"), level="low")
    (record,) = world.make([low], say(write(MEDIUM, REFUSAL), write(SHORT, REFUSAL)))
    assert record["reasoning"] == SHORT
