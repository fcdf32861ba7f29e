"""Bisection over the steps of a chain finds the one that decides, with few continuations."""

from __future__ import annotations

import math

import pytest
from chat_cases import CHATS
from synth_chains import SAMPLING, Speaker, subject_of, synth_prompt

from saro.data.chain import split_steps
from saro.draws.store import DrawStore
from saro.evaluate.judge_spec import read_judge
from saro.synth.author import Author, Task
from saro.synth.chain_parts import Chain
from saro.synth.judgement import Judge
from saro.synth.rollouts import Search, find_deciding_steps

CHAT = CHATS["chatml"]
BAD, GOOD = "\n</think>\n\nHere it is.", "\n</think>\n\nI'm sorry, but I can't help with that."


@pytest.fixture
def search(tmp_path, runtime):
    """Return a function that searches chains of so many steps: (what was found, the requests of each round).

    ``reply`` says how the model continues after a number of steps: its outcome by prompt id, steps and draw.
    """
    with DrawStore.open(tmp_path / "draws.sqlite") as store:

        def run(
            lengths: dict[str, int],
            reply,
            rollouts: int = 3,
            start: float = 0.5,
            sampling=SAMPLING,
            labels=None,
            by_model=False,
        ):
            def speak(user: str, begun: str, number: int) -> str:
                id = user.removeprefix("Request ")
                if not begun:
                    return f"<think>\n{' '.join(f'It is step {i}.' for i in range(lengths[id]))}{BAD}"
                # The last full stop may be left to the model.
                return ("" if begun.rstrip().endswith(".") else ".") + reply(id, begun.count("step"), number)

            speaker = Speaker(CHAT, speak)
            author = Author(subject_of(CHAT), speaker, store, runtime)
            judge = Judge(read_judge("rules"), None, store, runtime)
            prompts = [synth_prompt(id) for id in lengths]
            drawn = author.write([Task(prompt, "plain", prompt.item.prompt) for prompt in prompts], SAMPLING)
            searches = []
            for one in judge.judge(drawn):
                steps = split_steps(one.drawn.answer.think)
                searches.append(Search(Chain(one, steps, labels or ("neutral",) * len(steps)), start, by_model))
            return find_deciding_steps(author, judge, searches, rollouts, sampling), speaker.asked[1:]

        yield run


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 21])
def test_the_deciding_step_is_found_wherever_it_is(search, length):
    decides = {f"c{i}": i for i in range(length)}
    reply = lambda id, steps, _: BAD if steps > decides[id] else GOOD  # noqa: E731
    found, rounds = search(dict.fromkeys(decides, length), reply)
    assert [one.step for one in found] == list(range(length))
    assert all(one.after == 0.0 and one.before >= 0.5 for one in found)
    # All chains go through each round together.
    assert len(rounds) == math.ceil(math.log2(length))
    assert all(len(asked) <= 3 * length for asked in rounds)


def test_rollouts_are_those_from_before_the_deciding_step(search):
    (found,), _ = search({"a": 4}, lambda _id, steps, _: BAD if steps > 2 else GOOD)
    assert found.step == 2
    assert len(found.rollouts) == 3
    assert all(one.is_good for one in found.rollouts)
    assert {one.drawn.answer.think for one in found.rollouts} == {"It is step 0. It is step 1."}


@pytest.mark.parametrize("label", ["harmful", "cue"])
@pytest.mark.parametrize("by_model", [False, True])
@pytest.mark.parametrize("place", [0, 1, 3, 5])
def test_nothing_is_continued_from_behind_a_harmful_step_nor_behind_a_cue_of_the_rules(search, label, by_model, place):
    continued = []

    def reply(_id, steps, _number):
        continued.append(steps)
        return GOOD

    labels = ("neutral",) * place + (label,) + ("neutral",) * (7 - place)
    (found,), _ = search({"a": 8}, reply, labels=labels, by_model=by_model)
    last = 7 if label == "cue" and by_model else place
    assert (found.step, found.after) == (last, 0.0)
    assert max(continued, default=0) <= last


def test_a_value_is_low_below_half_of_what_it_was_at_the_start(search):
    # One of four continuations is good after each step but the last.
    reply = lambda _id, steps, number: GOOD if number == 0 and steps < 4 else BAD  # noqa: E731
    (found,), _ = search({"a": 4}, reply, rollouts=4, start=0.25)
    assert (found.step, found.before) == (3, 0.25)
    (found,), _ = search({"a": 4}, reply, rollouts=4, start=1.0)
    assert (found.step, found.before, found.after) == (0, 1.0, 0.25)
    assert found.rollouts == ()


def test_a_prompt_without_good_chains_is_not_searched(search):
    found, rounds = search({"a": 4}, lambda *_: GOOD, start=0.0)
    assert found == ["no value to lose"]
    assert rounds == []


def test_continuations_without_an_outcome_give_no_value(search):
    endless = " And so on" * 300
    found, rounds = search({"a": 4, "b": 4}, lambda id, steps, _: endless if id == "a" else GOOD if steps < 2 else BAD)
    assert found[0] == "no value"
    assert found[1].step == 1
    assert [len(asked) for asked in rounds] == [6, 3]
