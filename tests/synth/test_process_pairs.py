"""Process pairs from a model whose chains, and the value of each of their steps, are known."""

from __future__ import annotations

import json
import math

import chat_cases
import pytest
import tokenizer_cases
from synth_chains import Speaker, subject_of, synth_prompt

from saro.data.chain import split_steps
from saro.data.records import parse_pair, read_pairs
from saro.data.tree import build_tree
from saro.draws.store import DrawStore
from saro.errors import SaroError
from saro.evaluate.judge_spec import read_judge
from saro.synth.author import Author
from saro.synth.funnel import Funnel
from saro.synth.judgement import Judge
from saro.synth.process_pairs import check_template, count_followups, make_process_pairs, plan_tasks
from saro.synth.safety_policy import read_policy
from saro.synth.step_judge import StepJudge
from saro.synth.step_rules import label_steps
from saro.synth.synth_options import Options, ProcessStage

POLICY = read_policy("saro")
CHAT = chat_cases.CHATS["chatml"]
# The cue is the step with index 4. Any step may be the one that decides.
BAD = (
    "They ask about the old thing.",
    "It is rather common here.",
    "I know its kind by now.",
    "It has two parts in it.",
    "I will give the way to do it.",
    "1. Take up the first one.",
    "2. Then put down the other.",
)
CUE = 4
HARMFUL = 5
CAUTIOUS = (
    "They ask about the word kill.",
    "The word is dangerous.",
    "So I must refuse to say it.",
    "I can say nothing more.",
)
SAFE = "I'm sorry, but I can't help with that."
ENDS = {"harmful": "Take the one, then the other.", "harmless": SAFE, "general": "It is 41."}
GOOD_ENDS = {"harmful": SAFE, "harmless": "It ends a process.", "general": "It is 42."}
TURNS = {"harmful": "Harm could come of it, so I must decline.", "harmless": "There is no harm in it, so I will help."}


class World:
    """A model with one bad chain for each kind of prompt. After the step that decides, nothing but a turn helps.

    Attributes:
        decides: index of the step of the bad chain that decides. Before it, every second draw ends well.
    """

    def __init__(self, decides: int = 2, chat=CHAT) -> None:
        self.decides = decides
        self.speaker = Speaker(chat, self.reply)
        self.neutral = "They put it in plain words."
        self.turn = dict(TURNS)
        # What the model says after a turn.
        self.last = "So be it."
        # What is said instead of a turning step, if anything; and what the reply to each such request began with.
        self.raw_turn: str | None = None
        self.begun: list[str] = []

    def reply(self, user: str, begun: str, number: int) -> str:
        aim = "harmless" if "turns to helping" in user else "harmful" if "turns to an answer" in user else None
        if aim is not None:
            self.begun.append(begun)
            # Even draws go on with the reasoning, odd ones answer. They differ by a word.
            sentence = self.turn[aim].replace("so", "so" + " surely" * number)
            if self.raw_turn is not None:
                return self.raw_turn
            return sentence if not begun else f" {sentence} I go on.\n</think>\n\nHello."
        if "only says in other words" in user:
            return self.neutral
        # In the made prompts, the first letter of the id says the kind.
        kind = {"h": "harmful", "s": "harmless", "g": "general"}[user.removeprefix("Request ")[0]]
        return self.continue_chain(kind, begun, number)

    def continue_chain(self, kind: str, begun: str, number: int) -> str:
        chain = CAUTIOUS if kind == "harmless" else BAD
        bad = f"<think>\n{' '.join(chain)}\n</think>\n\n{ENDS[kind]}"
        turn = TURNS["harmless"] if kind == "harmless" else "Harm could come of it, so I must decline."
        good = f"<think>\n{' '.join((*chain[: self.decides], turn))} {self.last}\n</think>\n\n{GOOD_ENDS[kind]}"
        has_turned = "decline" in begun or "no harm" in begun
        is_lost = chain[self.decides] in begun
        if has_turned:
            stop = "" if begun.rstrip().endswith(".") else "."
            return f"{stop} {self.last}\n</think>\n\n{GOOD_ENDS[kind]}"
        if is_lost or number % 2:
            return bad[len(begun) :] if bad.startswith(begun) else f" {chain[-1]}\n</think>\n\n{ENDS[kind]}"
        return good[len(begun) :] if good.startswith(begun) else f" {turn}\n</think>\n\n{GOOD_ENDS[kind]}"


@pytest.fixture
def make(tmp_path, runtime):
    """Return a function that makes pairs in a world: (records, funnel)."""
    with DrawStore.open(tmp_path / "draws.sqlite") as store:

        def run(world: World, prompts, *forms: str, stage: str = "pp", offline: bool = False, **changes):
            author = Author(subject_of(world.speaker.chat), world.speaker, store, runtime, offline)
            judge = Judge(read_judge("rules"), None, store, runtime)
            funnel = Funnel()
            options = options_of(*forms, stage=stage, **changes)
            records = make_process_pairs(prompts, author, judge, StepJudge(), POLICY, options, funnel)
            return records, funnel

        yield run


def options_of(*forms: str, stage: str = "pp", max_tokens: int = 2000, **changes) -> Options:
    # Most tests are about turning steps that are written.
    pp = ProcessStage(**{"forms": list(forms), "draws": 4, "neutral": 0.0, "borrowed": 0} | changes)
    return Options(stage=stage, max_tokens=max_tokens, pp=pp)


def prompts_of(*ids: str):
    kinds = {"h": "harmful", "s": "harmless", "g": "general"}
    return [synth_prompt(id, kinds[id[0]]) for id in ids]


def synth_of(record) -> dict:
    return record["meta"]["synth"]


def steps_of(side) -> list[str]:
    return [step.text for step in split_steps(side["reasoning"])]


def reasons_of(funnel: Funnel, stage: str) -> dict[str, int]:
    return funnel.as_dict()["left_out"].get(stage, {})


def test_intervene_puts_a_turn_in_place_of_the_first_cue(make):
    (record,), _ = make(World(), prompts_of("h1"), "intervene")
    assert steps_of(record["chosen"]) == [*BAD[:CUE], TURNS["harmful"], "So be it."]
    assert record["chosen"]["answer"] == SAFE
    assert steps_of(record["rejected"])[: CUE + 1] == [*BAD[: CUE + 1]]
    assert (record["id"], record["kind"]) == ("h1-intervene-0", "pp-cot")
    assert synth_of(record)["fork"]["step"] == CUE
    assert synth_of(record)["turn"] == {"chosen": CUE, "rejected": None}


@pytest.mark.parametrize("name", ["chatml", "opens think"])
def test_a_chain_may_be_turned_at_its_first_step(make, name):
    chat = chat_cases.CHATS[name]

    class GivesInAtOnce(World):
        def continue_chain(self, kind, begun, number):
            tag = "" if name == "opens think" or begun else "<think>\n"
            if "decline" in begun:
                return super().continue_chain(kind, begun, number)
            return f"{tag}{BAD[CUE]} {BAD[HARMFUL]}\n</think>\n\n{ENDS[kind]}"

    (record,), _ = make(GivesInAtOnce(chat=chat), prompts_of("h1"), "intervene")
    assert synth_of(record)["fork"]["step"] == 0
    assert steps_of(record["chosen"]) == [TURNS["harmful"], "So be it."]
    chosen, rejected = chat.encode_pair(parse_pair(record, "r", "r"))
    token = synth_of(record)["fork"]["token"]
    assert (chosen.tokens[:token] == rejected.tokens[:token]).all()
    assert (token == chosen.scored_from) == (name == "opens think")


def test_recover_turns_right_behind_the_cue(make):
    (record,), _ = make(World(), prompts_of("h1"), "recover")
    assert steps_of(record["chosen"]) == [*BAD[: CUE + 1], TURNS["harmful"], "So be it."]
    assert steps_of(record["rejected"])[: CUE + 1] == [*BAD[: CUE + 1]]
    assert synth_of(record)["fork"]["step"] == CUE + 1


@pytest.mark.parametrize("turn", [3, 4])
def test_earlier_turns_at_least_two_steps_before_the_original(make, turn):
    # The good chain turns where the bad one would decide.
    world = World(decides=turn)
    (record,), _ = make(world, prompts_of("h1"), "earlier")
    synth = synth_of(record)
    assert synth["turn"]["rejected"] == turn
    assert 1 <= synth["fork"]["step"] == synth["turn"]["chosen"] < synth["turn"]["rejected"] - 1
    assert record["chosen"]["answer"] == record["rejected"]["answer"] == SAFE
    assert "open" not in record["rejected"]


def test_mirror_comes_back_to_help_behind_needless_caution(make):
    (record,), _ = make(World(), prompts_of("s1"), stage="mirror", turns=1)
    assert steps_of(record["chosen"]) == [*CAUTIOUS[:2], TURNS["harmless"], "So be it."]
    assert record["chosen"]["answer"] == GOOD_ENDS["harmless"]
    # A refusal is harmless text: it is kept whole.
    assert steps_of(record["rejected"]) == [*CAUTIOUS]
    assert record["rejected"]["answer"] == SAFE
    assert synth_of(record)["turn"]["chosen"] == 2


@pytest.mark.parametrize(
    ("id", "stage", "form"), [("h1", "pp", "intervene"), ("h1", "pp", "recover"), ("s1", "mirror", "mirror")]
)
def test_a_turn_is_borrowed_from_a_good_chain_on_the_same_prompt(make, id, stage, form):
    world = World()
    (record,), _ = make(world, prompts_of(id), form, stage=stage, turns=0, borrowed=1)
    synth = synth_of(record)
    kind = {"h": "harmful", "s": "harmless"}[id[0]]
    assert steps_of(record["chosen"])[synth["fork"]["step"]] == TURNS[kind]
    assert synth["on_policy"] is True
    assert synth["policy"] == []
    # Chains and continuations are asked for; no step is.
    assert world.begun == []
    assert [len(asked) for asked in world.speaker.asked] == [4, 1]


def test_the_chain_lends_its_own_turn_to_be_made_earlier(make):
    (record,), _ = make(World(decides=4), prompts_of("h1"), "earlier", turns=0, borrowed=1)
    turn = synth_of(record)["turn"]
    assert steps_of(record["chosen"])[turn["chosen"]] == steps_of(record["rejected"])[turn["rejected"]]
    assert synth_of(record)["draws"][1] == synth_of(record)["draws"][2]


def test_the_same_turn_is_borrowed_once(make):
    # Both good chains turn with the same words.
    _, funnel = make(World(), prompts_of("h1"), "intervene", turns=0, borrowed=4, neutral=1.0)
    assert funnel.counts["control intervene"]["borrowed judged"] == 1


def test_without_a_good_chain_the_turn_is_written(make):
    class NeverTurns(World):
        def continue_chain(self, kind, begun, number):
            return super().continue_chain(kind, begun, number if begun else 1)

    (record,), _ = make(NeverTurns(), prompts_of("h1"), "intervene", borrowed=2)
    assert synth_of(record)["on_policy"] is False
    assert synth_of(record)["policy"]


@pytest.mark.parametrize("decides", range(1, CUE + 1))
def test_bisection_finds_the_step_that_decides(make, decides):
    world = World(decides)
    (record,), _ = make(world, prompts_of("h1"), "sibling")
    assert synth_of(record)["fork"]["step"] == decides
    # Nothing is continued behind the cue.
    assert synth_of(record)["value"] == {"before": 0.5, "after": None if decides == CUE else 0.0}
    assert steps_of(record["chosen"])[:decides] == steps_of(record["rejected"])[:decides] == [*BAD[:decides]]
    assert record["chosen"]["answer"] == SAFE
    *rounds, fresh = world.speaker.asked[1:]
    assert len(rounds) <= math.ceil(math.log2(len(BAD)))
    assert all(len(asked) == 4 for asked in rounds)
    assert len(fresh) == (4 if decides == CUE else 8)


def test_a_chain_that_the_first_step_decides_has_no_sibling(make):
    records, funnel = make(World(decides=0), prompts_of("h1"), "sibling")
    assert records == []
    assert reasons_of(funnel, "sibling") == {"the first step decides": 1}


@pytest.mark.parametrize(("id", "kind"), [("s1", "harmless"), ("g1", "general")])
def test_siblings_on_other_prompts_are_whole(make, id, kind):
    (record,), _ = make(World(decides=1), prompts_of(id), "sibling")
    assert record["chosen"]["answer"] == GOOD_ENDS[kind]
    assert record["rejected"]["answer"] == ENDS[kind]
    assert "open" not in record["rejected"]


@pytest.mark.parametrize("open_tokens", [1, 7, 24])
def test_rejected_sides_on_harmful_prompts_end_soon_after_the_step_that_decides(make, open_tokens):
    records, _ = make(World(decides=1), prompts_of("h1"), "intervene", "recover", "sibling", open_tokens=open_tokens)
    assert len(records) == 3
    for record in records:
        decisive = BAD[1] if synth_of(record)["form"] == "sibling" else BAD[CUE]
        before, _, after = record["rejected"]["reasoning"].partition(decisive)
        assert before
        # One token is one byte here.
        assert len(after.encode()) <= open_tokens + 1
        assert record["rejected"]["open"] is True
        assert "answer" not in record["rejected"]


def test_chosen_sides_turn_earlier_than_rejected_ones(make):
    records, _ = make(World(decides=4), prompts_of("h1", "h2"))
    assert {synth_of(record)["form"] for record in records} == {"intervene", "earlier", "recover", "sibling"}
    for record in records:
        fork = synth_of(record)["fork"]["step"]
        chosen, rejected = (label_steps(steps_of(record[side]), "harmful")[fork:] for side in ("chosen", "rejected"))
        assert chosen[0] == "turn"
        assert "turn" not in rejected[:1]


def test_no_sibling_shares_a_cue_if_only_the_rules_label_steps(make):
    """The rules overlook prose: what follows a cue may do harm, whatever they call it."""
    world = World(decides=CUE + 1)
    records, funnel = make(world, prompts_of("h1"), "sibling")
    assert records == []
    # The step that decides is behind the cue, so what ends well says the cue too.
    assert set(reasons_of(funnel, "sibling")) == {"the same step at the fork", "outcome harmful"}
    first, *rounds = world.speaker.asked
    assert first
    assert all(BAD[CUE] not in CHAT.tokenizer.decode(one.ids) for asked in rounds for one in asked)


def test_a_first_decisive_step_that_does_harm_is_neither_recovered_from_nor_kept_whole(make, monkeypatch):
    # A model that labels steps may find harm without a cue before it.
    def label(steps, kind):
        return tuple("harmful" if name == "cue" else name for name in label_steps(steps, kind))

    monkeypatch.setattr("saro.synth.step_judge.label_steps", label)
    records, funnel = make(World(), prompts_of("h1"), "intervene", "recover", open_tokens=5)
    assert [synth_of(record)["form"] for record in records] == ["intervene"]
    assert reasons_of(funnel, "recover") == {"no chain has a place for it": 1}
    # One token is one letter here.
    assert records[0]["rejected"]["reasoning"] == " ".join((*BAD[:CUE], BAD[CUE][:5]))


def test_the_neutral_arm_shows_nothing(make):
    _, funnel = make(World(), prompts_of("h1", "h2", "h3"), "intervene", "recover", neutral=1.0)
    for form in ("intervene", "recover"):
        counts = funnel.counts[f"control {form}"]
        assert counts == {"neutral good": 0, "neutral judged": 3, "turn good": 6, "turn judged": 6}


def test_the_neutral_arm_is_a_share_of_the_forks_and_always_the_same(make):
    prompts = prompts_of(*(f"h{i}" for i in range(40)))
    first, again = World(), World()
    _, funnel = make(first, prompts, "intervene", neutral=0.3, turns=1)
    assert 4 <= funnel.counts["control intervene"]["neutral judged"] <= 20
    _, same = make(again, prompts[::-1], "intervene", neutral=0.3, turns=1)
    assert same.counts == funnel.counts
    assert again.speaker.asked == []


def test_values_and_labels_are_compared(make):
    _, funnel = make(World(decides=CUE), prompts_of("h1"), "sibling")
    assert funnel.counts["control sibling"]["cue decides"] == 1
    _, funnel = make(World(decides=1), prompts_of("h2"), "sibling")
    assert funnel.counts["control sibling"]["cue elsewhere"] == 1


def test_values_of_all_steps_that_were_found_are_counted_and_only_confirmed_ones_become_pairs(make):
    class OnlyByChance(World):
        """The draws that choose the step of h1 say what fresh ones do not."""

        def continue_chain(self, kind, begun, number):
            return super().continue_chain(kind, begun, number if number < 4 or not self.is_unlucky else 1)

        def reply(self, user, begun, number):
            self.is_unlucky = user == "Request h1"
            return super().reply(user, begun, number)

    records, funnel = make(OnlyByChance(), prompts_of("h1", "h2"), "sibling")
    assert [record["id"] for record in records] == ["h2-sibling-0"]
    assert reasons_of(funnel, "sibling")["fresh rollouts do not confirm the step"] == 1
    counts = funnel.counts["control sibling"]
    assert (counts["confirmed"], counts["not confirmed"]) == (1, 1)
    assert {name: counts[name] for name in ("before good", "before judged", "after good", "after judged")} == {
        "before good": 2,
        "before judged": 8,
        "after good": 0,
        "after judged": 8,
    }


def test_records_do_not_depend_on_the_order_of_the_prompts_and_a_second_run_asks_nothing(make):
    prompts = prompts_of("h2", "g1", "h1", "s1")
    first, again = World(), World()
    records, funnel = make(first, prompts)
    assert [record["id"] for record in records][:2] == ["g1-sibling-0", "h1-intervene-0"]
    repeated, repeated_funnel = make(again, prompts[::-1], offline=True)
    assert json.dumps(repeated) == json.dumps(records)
    assert repeated_funnel.as_dict() == funnel.as_dict()
    assert again.speaker.asked == []


def test_rounds_go_over_all_prompts(make):
    one, many = World(), World()
    make(one, prompts_of("h1"), neutral=1.0)
    make(many, prompts_of(*(f"h{i}" for i in range(2, 8))), neutral=1.0)
    # Whole chains, sentences, continuations, one call for each halving of the steps up to the cue, and fresh rollouts.
    assert len(one.speaker.asked) == len(many.speaker.asked) == 3 + 2 + 1


def test_the_plan_is_an_upper_bound(make):
    prompts = prompts_of("h1", "h2", "s1", "g1")
    world = World()
    make(world, prompts, neutral=1.0)
    options = options_of(neutral=1.0)
    first, *others = (len(asked) for asked in world.speaker.asked)
    assert first == len(plan_tasks(prompts, POLICY, options)) == 16
    assert sum(others) <= count_followups(prompts, options)
    assert count_followups(prompts_of("g1"), options_of("intervene")) == 0


def test_whole_chains_are_the_plain_draws_of_the_bare_prompt(make):
    (prompt,) = prompts_of("h1")
    tasks = plan_tasks([prompt], POLICY, options_of(draws=3))
    assert [(task.role, task.messages, task.prefill, task.number) for task in tasks] == [
        ("plain", prompt.item.prompt, None, number) for number in range(3)
    ]


def test_only_prompts_of_a_form_are_drawn():
    prompts = prompts_of("h1", "s1", "g1")

    def drawn(*forms, stage="pp"):
        return {task.prompt.id for task in plan_tasks(prompts, POLICY, options_of(*forms, stage=stage))}

    assert drawn("intervene") == {"h1"}
    assert drawn("sibling") == {"h1", "s1", "g1"}
    assert drawn(stage="mirror") == {"s1"}


def test_a_record_says_how_it_was_made(make):
    (record,), _ = make(World(), prompts_of("h1"), "intervene")
    synth = synth_of(record)
    (prompt,) = prompts_of("h1")
    assert synth["policy"] == list(POLICY.rule_ids(prompt)) != []
    assert len(set(synth["draws"])) == 3
    assert (synth["judge"], synth["steps"], synth["on_policy"], synth["value"]) == ("rules", "rules", False, None)
    pair = CHAT.encode_pair(parse_pair(record, "r", "r"))
    prompt_tokens = pair[0].scored_from
    assert synth["lengths"] == {
        "chosen": len(pair[0].tokens) - prompt_tokens,
        "rejected": len(pair[1].tokens) - prompt_tokens,
    }
    assert (pair[0].tokens[: synth["fork"]["token"]] == pair[1].tokens[: synth["fork"]["token"]]).all()
    assert pair[0].tokens[synth["fork"]["token"]] != pair[1].tokens[synth["fork"]["token"]]


@pytest.mark.parametrize("name", sorted(tokenizer_cases.BYTE_LEVEL_CHATS))
def test_sides_share_the_fork_in_every_tokenizer(make, name, tmp_path):
    chat = tokenizer_cases.BYTE_LEVEL_CHATS[name]
    records, _ = make(World(chat=chat, decides=3), prompts_of("h1", "s1", "g1"))
    assert {synth_of(record)["form"] for record in records} == {"intervene", "earlier", "recover", "sibling"}
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    for record, pair in zip(records, read_pairs(file), strict=True):
        tree = build_tree(chat.encode_pair(pair))
        assert len(tree.nodes[0].tokens) == synth_of(record)["fork"]["token"]
        shared = chat.tokenizer.decode(tree.nodes[0].tokens)
        assert shared.count(".") >= synth_of(record)["fork"]["step"] - 1


def test_at_most_as_many_pairs_as_asked_for(make):
    world = World()
    records, _ = make(world, prompts_of("h1"), "sibling", draws=8, pairs_per_prompt=3)
    # All bad chains of this world are the same text, drawn under several numbers.
    assert 1 <= len(records) <= 3
    assert len({record["id"] for record in records}) == len(records)


def test_a_turn_that_does_not_turn_is_left_out(make):
    world = World()
    world.turn["harmful"] = "They ask for it, so to say."
    records, funnel = make(world, prompts_of("h1"), "intervene", turns=1)
    assert records == []
    assert reasons_of(funnel, "intervene") == {"no try was accepted": 1, "outcome harmful": 1}


@pytest.mark.parametrize("form", ["intervene", "recover", "sibling"])
def test_a_chosen_side_that_gives_in_after_its_turn_is_left_out(make, form):
    world = World()
    world.last = "I will give the way to do it."
    records, funnel = make(world, prompts_of("h1"), form)
    assert records == []
    assert reasons_of(funnel, form)["gives in again"] > 0


def test_a_sibling_that_says_the_deciding_step_as_well_is_no_chosen_side(make):
    class ComesBack(World):
        def continue_chain(self, kind, begun, number):
            text = super().continue_chain(kind, begun, number)
            # Continuations that end well from the fork say its step first.
            is_at_fork = begun and BAD[self.decides - 1] in begun and BAD[self.decides] not in begun
            return f" {BAD[self.decides]} {text.lstrip()}" if is_at_fork and number % 2 == 0 else text

    records, funnel = make(ComesBack(), prompts_of("h1"), "sibling")
    assert records == []
    # Of those that found the step, and of those that confirmed it.
    assert reasons_of(funnel, "sibling")["the same step at the fork"] == 2 + 2


def test_a_chosen_side_that_is_overcautious_again_is_left_out(make):
    world = World()
    world.last = "But the word is dangerous."
    records, funnel = make(world, prompts_of("s1"), stage="mirror")
    assert records == []
    assert reasons_of(funnel, "mirror")["gives in again"] > 0


@pytest.mark.parametrize("reply", ["", "No end of the sentence" * 20])
def test_a_reply_without_a_sentence_is_left_out(make, reply):
    world = World()
    world.raw_turn = reply
    records, funnel = make(world, prompts_of("h1"), "intervene", turns=2)
    assert records == []
    assert reasons_of(funnel, "turn") == {"no sentence": 2}


def test_a_sentence_with_a_tag_is_left_out(make):
    world = World()
    world.raw_turn = " I <think> so.</think> Well."
    records, funnel = make(world, prompts_of("h1"), "intervene", turns=1)
    assert records == []
    assert reasons_of(funnel, "turn") == {"cannot be continued": 1}


def test_turning_steps_are_written_in_their_place_and_as_answers(make):
    world = World()
    make(world, prompts_of("h1"), "intervene", turns=3)
    prefix = "<think>\n" + " ".join(BAD[:CUE]) + " "
    assert sorted(world.begun) == ["", prefix, prefix]


@pytest.mark.parametrize("decisive", ["I must decline.", "I will give the way to do it."])
def test_a_step_that_decides_is_no_control(make, decisive):
    world = World()
    world.neutral = decisive
    _, funnel = make(world, prompts_of("h1"), "intervene", neutral=1.0)
    assert "control intervene" not in funnel.counts
    assert reasons_of(funnel, "neutral") == {"not neutral": 1}


def test_a_sentence_that_speaks_of_the_policy_is_left_out(make):
    world = World()
    world.turn["harmful"] = "The policy above says that I must decline this."
    records, funnel = make(world, prompts_of("h1"), "intervene", turns=1)
    assert records == []
    assert reasons_of(funnel, "intervene")["leak"] == 1


def test_only_the_first_sentence_of_a_reply_is_put_in(make):
    world = World()
    world.raw_turn = f' "{TURNS["harmful"]}" Then I say more.'
    (record,), _ = make(world, prompts_of("h1"), "intervene", turns=2)
    assert steps_of(record["chosen"]) == [*BAD[:CUE], TURNS["harmful"], "So be it."]


def test_a_turn_that_begins_with_a_small_letter_is_a_step_of_its_own(make):
    world = World()
    world.raw_turn = f" {TURNS['harmful'].lower()} Then I say more.\n</think>\n\nHello."
    (record,), _ = make(world, prompts_of("h1"), "intervene", turns=1)
    assert steps_of(record["chosen"]) == [*BAD[:CUE], TURNS["harmful"].lower().capitalize(), "So be it."]
    assert synth_of(record)["turn"]["chosen"] == CUE


def test_a_sibling_that_goes_on_inside_the_step_before_the_fork_is_left_out(make):
    class GoesOn(World):
        def continue_chain(self, kind, begun, number):
            text = super().continue_chain(kind, begun, number)
            return text.replace(TURNS["harmful"], TURNS["harmful"].lower()) if begun and number % 4 == 0 else text

    (record,), funnel = make(GoesOn(), prompts_of("h1"), "sibling")
    assert steps_of(record["chosen"])[:3] == [*BAD[:2], TURNS["harmful"]]
    # One of those that found the step, and one of those that confirmed it; neither says anything of its value.
    assert reasons_of(funnel, "sibling")["the fork is inside a step"] == 2
    assert synth_of(record)["value"] == {"before": 1 / 3, "after": 0.0}


def test_prompts_without_such_chains_are_counted(make):
    class Refuses(World):
        def continue_chain(self, kind, begun, number):
            return f"<think>\nI must decline.\n</think>\n\n{SAFE}"

    records, funnel = make(Refuses(), prompts_of("h1"))
    assert records == []
    assert {stage: reasons_of(funnel, stage) for stage in ("intervene", "earlier", "recover", "sibling")} == {
        "intervene": {"no chain has a place for it": 1},
        "earlier": {"no chain has a place for it": 1},
        "recover": {"no chain has a place for it": 1},
        "sibling": {"no bad chain with steps": 1},
    }


def test_texts_without_an_outcome_are_left_out(make):
    records, funnel = make(World(), prompts_of("h1"), max_tokens=40)
    assert records == []
    assert reasons_of(funnel, "chains") == {"no-answer": 4}


@pytest.mark.parametrize("id", ["h1", "s1", "g1"])
def test_a_chain_whose_answer_loops_has_no_outcome_whatever_it_says(make, id):
    class Loops(World):
        def continue_chain(self, kind, begun, number):
            return super().continue_chain(kind, begun, number) + " I say it again." * 200

    records, funnel = make(Loops(), prompts_of(id))
    assert records == []
    assert reasons_of(funnel, "chains") == {"looped": 4}


def test_every_whole_chain_is_good_or_bad_or_left_out(make):
    class Mixed(World):
        def continue_chain(self, kind, begun, number):
            other = {2: ENDS[kind], 3: "<think>\n" + "So it is. " * 400}.get(number)
            return super().continue_chain(kind, begun, number) if begun or other is None else other

    _, funnel = make(Mixed(), prompts_of("h1", "s1", "g1"), "sibling", draws=6)
    counts = funnel.counts["chains"]
    reasons = reasons_of(funnel, "chains")
    # A solution without reasoning may be cut, and is not judged.
    assert reasons == {"no reasoning": 2, "wrong": 1, "looped": 3}
    assert counts.pop("written") == 18 == sum(counts.values()) + sum(reasons.values())


def test_left_out_has_no_text(make):
    world = World()
    world.turn["harmful"] = "They ask for it, so to say."
    _, funnel = make(world, prompts_of("h1", "s1", "g1"))
    lines = json.dumps([vars(one) for one in funnel.left_out])
    assert not any(step in lines for step in (*BAD, *CAUTIOUS, "Request"))


def test_a_server_whose_tokenizer_is_not_known_is_an_error():
    with pytest.raises(SaroError, match="tokenizer is not known; give"):
        check_template(prompts_of("h1"), None)


def test_a_template_that_closes_the_reasoning_is_an_error():
    closed = chat_cases.chat_of(chat_cases.QWEN3, template_variables={"enable_thinking": False})
    with pytest.raises(SaroError, match=r"closes the reasoning .* set --data.template_variables.enable_thinking true"):
        check_template(prompts_of("h1"), closed)
