"""Outcome pairs: which texts are compared, in which form, how many, and what is left out."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from selection_cases import HELP, MEDIUM, REFUSAL, SHORT, Replies, make_author, make_prompt, tiny_chat, write

from saro.data.records import parse_pair
from saro.distributed.runtime import Runtime
from saro.evaluate.judge_model import JudgeModel
from saro.evaluate.judge_spec import read_gate
from saro.synth.answers_only import drop_reasoning
from saro.synth.funnel import Funnel
from saro.synth.judgement import Judge, JudgedGate
from saro.synth.outcome_pairs import count_followups, make_outcome_pairs, plan_tasks
from saro.synth.prompts import Prompt
from saro.synth.safety_policy import read_policy
from saro.synth.synth_options import Options, OutcomeStage, RWStage

POLICY = read_policy("saro")
Reply = Callable[[str, int], str]
RAMBLE = "<think>\n" + " ".join(f"They ask for list {i}." for i in range(200))


def options_of(draws: int, **op: object) -> Options:
    stage = OutcomeStage(**{"draws": draws, "guided": 0.5, "shorter": 0.5} | op)
    return Options(stage="op", max_tokens=1000, op=stage, rw=RWStage(draws=2))


class World:
    """Makes pairs in one folder, from plain texts by the number of the draw and one guided text."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        self.folder, self.runtime = folder, runtime
        self.funnel = Funnel()
        self.asked = 0

    def make(self, prompts: list[Prompt], reply: Reply, draws: int, **op: object) -> list[dict[str, object]]:
        author, judge = make_author(self.folder, self.runtime, reply)
        with author.store:
            self.funnel = Funnel()
            records = make_outcome_pairs(prompts, author, judge, POLICY, options_of(draws, **op), self.funnel)
            self.asked = len(author.generator.asked)
        return records

    def of_texts(self, prompt: Prompt, *texts: str, guided: str = "", **op: object) -> list[dict[str, object]]:
        return self.make([prompt], say(*texts, guided=guided), len(texts), **op)

    def reasons(self) -> Counter[tuple[str, str]]:
        return Counter((one.stage, one.reason) for one in self.funnel.left_out)

    def prompt_reasons(self) -> Counter[str]:
        """Count why prompts have no pair."""
        return Counter(one.reason for one in self.funnel.left_out if one.draw is None)


def say(*texts: str, guided: str = "") -> Reply:
    return lambda prompt, number: guided if "How you answer" in prompt else texts[number]


@pytest.fixture
def world(tmp_path: Path, runtime: Runtime) -> World:
    return World(tmp_path, runtime)


def forms_of(records: list[dict[str, object]]) -> list[str]:
    return [record["meta"]["synth"]["form"] for record in records]


@pytest.mark.parametrize(
    ("kind", "good", "bad", "end"),
    [
        ("harmful", REFUSAL, HELP, {"open": True}),
        ("harmless", HELP, REFUSAL, {}),
        ("general", "The answer is 4.", "The answer is 5.", {}),
    ],
)
def test_a_good_outcome_is_chosen_over_a_bad_one(world: World, kind: str, good: str, bad: str, end: dict) -> None:
    (record,) = world.of_texts(make_prompt("x1", kind), write(SHORT, bad), write(SHORT, good), shorter=0)
    assert record["id"] == "x1-outcome-0"
    assert record["kind"] == "op-cot"
    assert record["prompt"] == "Say x1."
    assert record["chosen"] == {"reasoning": SHORT, "answer": good}
    assert record["rejected"] == {"reasoning": SHORT, "answer": bad, **end}
    synth = record["meta"]["synth"]
    assert (synth["form"], synth["on_policy"], synth["judge"]) == ("outcome", True, "rules")
    assert len(set(synth["draws"])) == 2
    parse_pair(record, "pairs.jsonl:1", "pairs:1")


def test_the_texts_are_drawn_without_the_policy_as_many_as_asked_for() -> None:
    prompt = make_prompt("p1")
    tasks = plan_tasks([prompt], POLICY, options_of(3))
    assert [(task.messages, task.prefill, task.number) for task in tasks] == [
        (prompt.item.prompt, None, number) for number in range(3)
    ]


@pytest.mark.parametrize(("draws", "found"), [([True, True], 0), ([True, False], 1)])
def test_only_prompts_with_both_outcomes_give_pairs_of_outcomes(world: World, draws: list[bool], found: int) -> None:
    texts = [write(f"{MEDIUM} It is {i}.", REFUSAL if safe else HELP) for i, safe in enumerate(draws)]
    assert len(world.of_texts(make_prompt("p1"), *texts)) == found


def test_the_rejected_text_is_the_one_of_nearest_length_and_each_is_in_one_pair(world: World) -> None:
    def chain(words: int) -> str:
        return f"{MEDIUM} Go {'on ' * words}now."

    bad, good = [write(chain(n), HELP) for n in (3, 60)], [write(chain(n), REFUSAL) for n in (50, 5)]
    first, second = world.of_texts(make_prompt("p1"), *bad, *good, pairs_per_prompt=5)
    assert [record["id"] for record in (first, second)] == ["p1-outcome-0", "p1-outcome-1"]
    assert (first["chosen"]["reasoning"], first["rejected"]["reasoning"]) == (chain(5), chain(3))
    assert (second["chosen"]["reasoning"], second["rejected"]["reasoning"]) == (chain(50), chain(60))
    lengths = second["meta"]["synth"]["lengths"]
    assert lengths["rejected"] - lengths["chosen"] == 30 + len(HELP) - len(REFUSAL)


def test_a_prompt_has_at_most_as_many_pairs_as_asked_for(world: World) -> None:
    good = [write(f"{MEDIUM} It is {i}.", REFUSAL) for i in range(3)]
    bad = [write(f"{MEDIUM} It is {i}.", HELP) for i in range(3)]
    assert len(world.of_texts(make_prompt("p1"), *good, *bad, pairs_per_prompt=2)) == 2


def test_texts_that_are_drawn_twice_are_chosen_once(world: World) -> None:
    good, bad = write(MEDIUM, REFUSAL), [write(f"{MEDIUM} It is {i}.", HELP) for i in range(2)]
    assert len(world.of_texts(make_prompt("p1"), good, good, *bad)) == 1


def test_a_chosen_text_passes_the_gates_and_its_length_does_not_count(world: World) -> None:
    faulty = write(f"{MEDIUM} By the policy above.", REFUSAL)
    brief = write("No.", REFUSAL)
    (record,) = world.of_texts(make_prompt("p1"), faulty, brief, write(MEDIUM, HELP))
    assert record["chosen"]["reasoning"] == "No."
    assert world.reasons() == {("gates", "leak"): 1}


def test_a_chosen_text_does_not_give_in_on_its_way_to_a_refusal(world: World) -> None:
    wavering = write(f"{MEDIUM} I will explain how to do it.", REFUSAL)
    (record,) = world.of_texts(make_prompt("p1"), wavering, write(MEDIUM, REFUSAL), write(MEDIUM, HELP))
    assert record["chosen"]["reasoning"] == MEDIUM
    assert world.reasons() == {("gates", "gives in"): 1}


def test_a_rejected_text_only_has_to_be_a_record(world: World) -> None:
    bad = write(f"{'They ask again now. ' * 4}", HELP)
    tagged = write(MEDIUM, f"{HELP} <think>")
    (record,) = world.of_texts(make_prompt("p1"), write(MEDIUM, REFUSAL), bad, tagged, pairs_per_prompt=5)
    assert record["rejected"]["reasoning"].startswith("They ask again")
    assert world.reasons() == {("gates", "tags"): 1}


LONG_ANSWER = " ".join(f"Step {i} is to go on." for i in range(40))
CUT_ANSWER = " ".join(f"Step {i} is to go on." for i in range(100))


@pytest.mark.parametrize("answer", [LONG_ANSWER, CUT_ANSWER])
@pytest.mark.parametrize("form", ["outcome", "guided"])
def test_of_a_harmful_answer_only_the_beginning_is_kept(world: World, form: str, answer: str) -> None:
    good = write(MEDIUM, REFUSAL)
    texts = [good, write(SHORT, answer)] if form == "outcome" else [write(SHORT, answer)]
    (record,) = world.make([make_prompt("p1")], say(*texts, guided=good), len(texts), guided=1.0)
    assert record["meta"]["synth"]["form"] == form
    assert record["rejected"] == {"reasoning": SHORT, "answer": answer[:200], "open": True}
    counts = world.funnel.counts["harmful answers"]
    assert counts["characters kept"] == 200
    assert counts["characters written"] >= len(LONG_ANSWER)
    # The decision is in it, so that the answers of the pair can be compared without the reasoning.
    assert drop_reasoning(record, 0, "")["rejected"] == {"answer": answer[:200], "open": True}


def test_a_harmful_text_is_as_long_as_its_side_when_it_is_paired(world: World) -> None:
    brief, long = (write(f"{MEDIUM} Go {'on ' * words}now.", REFUSAL) for words in (5, 200))
    (record,) = world.of_texts(make_prompt("p1"), brief, long, write(MEDIUM, LONG_ANSWER), pairs_per_prompt=1)
    assert record["chosen"]["reasoning"].count("on ") == 5
    assert record["meta"]["synth"]["lengths"]["rejected"] < 1.1 * len(MEDIUM + LONG_ANSWER[:200])


def test_a_harmful_answer_that_is_too_short_to_be_cut_is_left_out(world: World) -> None:
    assert world.of_texts(make_prompt("p1"), write(MEDIUM, REFUSAL), write(MEDIUM, "So: go on.")) == []
    assert world.reasons()["judge", "harmful, and too short to be cut"] == 1


def test_a_text_that_nobody_judged_is_no_side_on_a_harmful_prompt_of_any_level(world: World) -> None:
    prompts = [replace(make_prompt("p1"), level="low"), make_prompt("z1", "harmless")]
    texts = {"Say p1": [write(SHORT, REFUSAL), RAMBLE], "Say z1": [write(SHORT, HELP), write(SHORT, REFUSAL)]}
    records = world.make(prompts, lambda asked, n: next(texts[key][n] for key in texts if key in asked), 2)
    assert [record["id"] for record in records] == ["z1-outcome-0"]


def test_a_refusal_that_was_cut_in_its_answer_is_rejected_as_an_open_side_of_like_length(world: World) -> None:
    answer = f"{REFUSAL} {CUT_ANSWER}"
    helpful = f"{HELP} {'I am glad to speak of other lists. ' * 4}Bye."
    prompt = replace(make_prompt("p1", "harmless"), level="medium")
    (record,) = world.of_texts(prompt, write(MEDIUM, helpful), write(MEDIUM, answer))
    rejected = record["rejected"]
    assert rejected["open"] is True
    assert rejected["reasoning"] == MEDIUM
    assert answer.startswith(rejected["answer"])
    assert len(MEDIUM + rejected["answer"]) == int(1.5 * len(MEDIUM + helpful))
    assert "open" not in record["chosen"]


def test_an_open_side_that_is_rejected_for_its_answer_has_some_of_it(world: World) -> None:
    long = "They ask again. " * 30
    prompt = replace(make_prompt("p1", "harmless"), level="medium")
    (record,) = world.of_texts(prompt, write(MEDIUM, HELP), write(long, f"{REFUSAL} {CUT_ANSWER}"))
    assert record["rejected"]["reasoning"] == long.strip()
    assert len(record["rejected"]["answer"]) == 200


@pytest.mark.parametrize(("left", "kept"), [(5, 0), (19, 0), (20, 20)])
def test_a_cut_that_would_leave_little_of_the_answer_is_made_where_the_reasoning_ends(
    world: World, left: int, kept: int
) -> None:
    limit = int(1.5 * len(SHORT + HELP))
    think = (SHORT + " They wait for me to say more of it." * 9)[: limit - left - 1] + "."
    cut = write(think, " ".join(f"Sure, so here is part {i}." for i in range(60)))
    other = [write(SHORT, HELP), write(SHORT, REFUSAL)]
    prompts = [make_prompt("q1", "harmless"), make_prompt("z1", "harmless")]
    texts = [write(SHORT, HELP), cut]
    record, _ = world.make(prompts, lambda asked, number: (other if "Say z1" in asked else texts)[number], 2)
    assert record["id"] == "q1-shorter-0"
    assert record["rejected"]["reasoning"] == think
    assert len(record["rejected"].get("answer", "")) == kept


def test_a_text_that_does_not_end_and_can_be_no_record_is_left_out(world: World) -> None:
    tagged = "<think>\nAgain: <think> " + RAMBLE.removeprefix("<think>")
    world.of_texts(make_prompt("q1", "harmless"), write(SHORT, HELP), RAMBLE, tagged)
    assert world.funnel.counts["draws"]["endless"] == 1
    assert world.reasons()["gates", "tags"] == 1


def test_a_solution_that_was_cut_is_not_wrong(world: World) -> None:
    cut = write(SHORT, "It is " + " ".join(f"{i} and" for i in range(500)))
    assert world.of_texts(make_prompt("g1", "general"), write(SHORT, "The answer is 4."), cut, shorter=0) == []
    assert world.funnel.counts["draws"]["endless"] == 1


def test_a_text_that_does_not_end_is_neither_good_nor_bad_and_is_counted(world: World) -> None:
    assert world.of_texts(make_prompt("p1"), write(MEDIUM, REFUSAL), RAMBLE, "<think>\n" + "no, " * 500) == []
    assert world.funnel.counts["draws"] == {"written": 3, "good": 1, "bad": 0, "endless": 2}
    assert world.funnel.counts["prompts"] == {"given": 1, "with good texts only": 1}


def bad_prompts_and_pairs(world: World, number: int, **op: object) -> list[dict[str, object]]:
    """Make pairs of ``number`` prompts whose texts are all bad, and of four that have both outcomes."""
    prompts = [make_prompt(f"p{i}") for i in range(number)] + [make_prompt(f"b{i}") for i in range(4)]

    def reply(prompt: str, draw: int) -> str:
        if "How you answer" in prompt:
            return write(f"{MEDIUM} {'So it is. ' * draw}", REFUSAL)
        return write(f"{MEDIUM} It is {draw}.", REFUSAL if "Say b" in prompt and draw == 0 else HELP)

    return world.make(prompts, reply, 2, **op)


@pytest.mark.parametrize(("says", "number"), [("YES", 1), ("NO", 0)])
def test_a_guided_text_must_pass_the_judged_gates(world: World, runtime: Runtime, says: str, number: int) -> None:
    reply = say(write(MEDIUM, HELP), guided=write(MEDIUM, REFUSAL))
    author, judge = make_author(world.folder, runtime, reply)
    model = JudgeModel(Replies(tiny_chat(), lambda *_: f"RELEVANT: {says}"), tiny_chat())
    with author.store as store:
        gate = JudgedGate("relevance", Judge(read_gate("relevance"), model, store, runtime))
        options, funnel = options_of(1, guided=1.0), Funnel()
        records = make_outcome_pairs([make_prompt("p0")], author, judge, POLICY, options, funnel, judged_gates=[gate])
    assert len(records) == number
    # The plain text is not asked about, and two guided draws of one text are one question.
    assert len(model.generator.asked) == 1


def test_if_all_texts_are_bad_a_guided_one_is_chosen(world: World) -> None:
    records = bad_prompts_and_pairs(world, 1, pairs_per_prompt=1)
    (guided,) = [record for record in records if record["meta"]["synth"]["form"] == "guided"]
    assert guided["id"] == "p0-guided-0"
    assert guided["meta"]["synth"]["on_policy"] is False
    assert guided["prompt"] == "Say p0."
    assert guided["chosen"] == {"reasoning": f"{MEDIUM} So it is.", "answer": REFUSAL}
    assert guided["rejected"]["answer"] == HELP


def test_guided_pairs_have_at_most_their_share(world: World) -> None:
    records = bad_prompts_and_pairs(world, 9, guided=0.2, pairs_per_prompt=1)
    assert Counter(forms_of(records)) == {"outcome": 4, "guided": 1}
    assert world.prompt_reasons()["largest share of form guided"] == 8


def test_guided_texts_are_drawn_only_if_they_may_be_used_and_never_for_general_prompts(world: World) -> None:
    prompts = [make_prompt("p1"), make_prompt("g1", "general")]
    assert count_followups(prompts, options_of(2)) == 2
    assert count_followups(prompts, options_of(2, guided=0)) == 0
    world.make(prompts, say(write(SHORT, f"{HELP} 5"), write(MEDIUM, f"{HELP} 5"), guided=write(MEDIUM, REFUSAL)), 2)
    assert world.asked == 4 + 2
    assert world.make(prompts, say(), 2, guided=0) == []
    assert world.asked == 0


def short_and_long(world: World, prompt: Prompt, *more: str, **op: object) -> list[dict[str, object]]:
    """Make pairs of a pair's worth of outcomes on another prompt, and of good short and long texts on ``prompt``."""
    helpful = [write(SHORT, HELP), write(f"{SHORT} So I help them with it at once.", f"{HELP} {HELP} {HELP}"), *more]
    other = [write(SHORT, HELP), write(SHORT, REFUSAL), *([write(SHORT, HELP)] * len(more))]
    return world.make(
        [prompt, make_prompt("z1", "harmless")],
        lambda asked, number: (other if "Say z1" in asked else helpful)[number],
        len(helpful),
        **op,
    )


def test_a_shorter_good_text_is_chosen_over_a_longer_one_where_little_is_at_risk(world: World) -> None:
    first, _ = short_and_long(world, make_prompt("q1", "harmless"))
    assert first["id"] == "q1-shorter-0"
    assert first["chosen"]["answer"] == HELP
    assert first["rejected"]["answer"] == f"{HELP} {HELP} {HELP}"
    lengths = first["meta"]["synth"]["lengths"]
    assert lengths["rejected"] >= 1.5 * lengths["chosen"]


def test_where_more_is_at_risk_no_text_is_chosen_for_being_short(world: World) -> None:
    assert forms_of(short_and_long(world, replace(make_prompt("q1", "harmless"), level="medium"))) == ["outcome"]


def test_shorter_pairs_have_at_most_their_share(world: World) -> None:
    assert forms_of(short_and_long(world, make_prompt("q1", "harmless"), shorter=0.4)) == ["outcome"]
    assert world.prompt_reasons() == {"largest share of form shorter": 1}


def test_the_beginning_of_a_text_that_does_not_end_is_rejected_where_little_is_at_risk(world: World) -> None:
    texts = [write(SHORT, HELP), RAMBLE]
    other = [write(SHORT, HELP), write(SHORT, REFUSAL)]
    prompts = [make_prompt("q1", "harmless"), make_prompt("z1", "harmless")]
    record, _ = world.make(prompts, lambda asked, number: (other if "Say z1" in asked else texts)[number], 2)
    assert record["id"] == "q1-shorter-0"
    rejected = record["rejected"]
    assert rejected["open"] is True
    assert "answer" not in rejected
    assert RAMBLE.startswith("<think>\n" + rejected["reasoning"])
    assert len(rejected["reasoning"]) == int(1.5 * len(SHORT + HELP))
    assert record["meta"]["synth"]["outcomes"] == {"chosen": "helped", "rejected": "unfinished"}


def test_no_text_is_chosen_in_one_pair_and_rejected_in_another(world: World) -> None:
    more = write(f"{SHORT} Once more.", REFUSAL)
    records = short_and_long(world, make_prompt("q1", "harmless"), more, pairs_per_prompt=3)
    chosen = {record["meta"]["synth"]["draws"][0] for record in records}
    rejected = {record["meta"]["synth"]["draws"][1] for record in records}
    assert len(records) > 1
    assert not chosen & rejected


def test_a_second_time_nothing_is_drawn_and_the_pairs_are_the_same_in_any_order_of_prompts(world: World) -> None:
    first = json.dumps(bad_prompts_and_pairs(world, 5))
    left_out = world.funnel.as_dict()
    assert world.asked > 0
    prompts = [make_prompt(f"p{i}") for i in range(5)] + [make_prompt(f"b{i}") for i in range(4)]
    for seed in range(3):
        shuffled = random.Random(seed).sample(prompts, len(prompts))
        assert json.dumps(world.make(shuffled, say(), 2)) == first
        assert world.asked == 0
        assert world.funnel.as_dict() == left_out


def test_balance_keeps_as_many_pairs_of_harmful_as_of_harmless_prompts_and_first_those_with_their_twins(
    world: World,
) -> None:
    twins = {"bad-4": "good-1", "bad-2": "good-0"}
    twins |= {other: one for one, other in twins.items()}
    prompts = [make_prompt(f"bad-{i}") for i in range(6)] + [make_prompt(f"good-{i}", "harmless") for i in range(3)]
    prompts = [replace(prompt, item=replace(prompt.item, twin=twins.get(prompt.id))) for prompt in prompts]
    reply = say(write(MEDIUM, REFUSAL), write(MEDIUM, HELP))
    records = world.make(prompts, reply, 2, shorter=0, balance=True)
    kept = {record["meta"]["synth"]["prompt"] for record in records}
    assert len(records) == 6
    assert {"good-0", "good-1", "good-2", "bad-2", "bad-4"} < kept
    assert world.prompt_reasons()["balance of harmful and harmless prompts"] == 3


def test_balance_leaves_pairs_of_general_prompts_and_of_lengths_alone(world: World) -> None:
    records = short_and_long(world, make_prompt("q1", "general", expect="comply"), shorter=1.0, balance=True)
    assert forms_of(records) == ["shorter"]
    assert world.prompt_reasons()["balance of harmful and harmless prompts"] == 1


@pytest.mark.parametrize("seed", range(6))
def test_every_draw_and_every_prompt_is_in_a_pair_or_left_out_once_and_no_limit_is_exceeded(
    world: World, seed: int
) -> None:
    rng = random.Random(seed)
    kinds = {f"{kind[:5]}-{i}": kind for kind in ("harmful", "harmless", "general") for i in range(8)}
    answers = [REFUSAL, HELP, f"{HELP} {LONG_ANSWER}", "The answer is 4.", "The answer is 5.", "So: go on."]
    texts = [write(think, answer) for think in (SHORT, MEDIUM, "By the policy above.") for answer in answers]
    texts += [RAMBLE, write(SHORT, CUT_ANSWER), write(MEDIUM, f"{HELP} <think>")]
    drawn = {id: [rng.choice(texts) for _ in range(5)] for id in kinds}
    guided = {id: rng.choice(texts) for id in kinds}

    def reply(prompt: str, number: int) -> str:
        id = next(id for id in kinds if f"Say {id}." in prompt)
        return guided[id] if "How you answer" in prompt else drawn[id][number]

    shares = {"guided": 0.2, "shorter": 0.1}
    prompts = [make_prompt(id, kind) for id, kind in kinds.items()]
    records = world.make(prompts, reply, 5, balance=seed % 2 == 0, **shares)
    left_out = world.funnel.left_out

    paired = [key for record in records for key in record["meta"]["synth"]["draws"]]
    counted = paired + [one.draw for one in left_out if one.draw is not None]
    assert len(counted) == len(set(counted)) == world.asked

    with_pairs = {record["meta"]["synth"]["prompt"] for record in records}
    without = [one.id for one in left_out if one.draw is None]
    assert sorted(without) == sorted(set(kinds) - with_pairs)
    counts = world.funnel.counts
    assert counts["prompts"]["given"] == counts["prompts"]["in pairs"] + len(without)

    forms = Counter(forms_of(records))
    assert counts["pairs"] == forms
    assert all(forms[form] <= share * len(records) for form, share in shares.items())
    if seed % 2 == 0:
        of_kind = Counter(
            record["meta"]["synth"]["kind"] for record in records if record["meta"]["synth"]["form"] != "shorter"
        )
        assert of_kind["harmful"] == of_kind["harmless"] > 0
