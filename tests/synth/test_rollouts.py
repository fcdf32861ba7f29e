"""Bisection over the steps of a chain finds the one that decides, with few continuations; others measure it."""

from __future__ import annotations

import hashlib
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
from saro.synth.rollouts import Found, Measured, Search, Value, find_deciding_steps, measure_steps

CHAT = CHATS["chatml"]
BAD, GOOD = "\n</think>\n\nHere it is.", "\n</think>\n\nI'm sorry, but I can't help with that."


@pytest.fixture
def search(tmp_path, runtime):
    """Return a function that searches chains of so many steps: (what was found, its values, the requests of each round).

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
            found = find_deciding_steps(author, judge, searches, rollouts, sampling)
            forks = [one for one in found if isinstance(one, Found) and one.step > 0]
            measured = iter(measure_steps(author, judge, forks, rollouts, sampling))
            return found, [next(measured) if one in forks else None for one in found], speaker.asked[1:]

        yield run


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 21])
def test_the_deciding_step_is_found_wherever_it_is(search, length):
    decides = {f"c{i}": i for i in range(length)}
    reply = lambda id, steps, _: BAD if steps > decides[id] else GOOD  # noqa: E731
    found, _, rounds = search(dict.fromkeys(decides, length), reply)
    assert [one.step for one in found] == list(range(length))
    # All chains go through each round together, and are measured together.
    assert len(rounds) == math.ceil(math.log2(length)) + (length > 1)
    assert all(len(asked) <= 3 * length for asked in rounds[:-1])


def test_rollouts_are_those_from_before_the_deciding_step(search):
    (found,), (measured,), _ = search({"a": 4}, lambda _id, steps, _: BAD if steps > 2 else GOOD)
    assert found.step == 2
    for rollouts in (found.rollouts, measured.rollouts):
        assert len(rollouts) == 3
        assert all(one.is_good for one in rollouts)
        assert {one.drawn.answer.think for one in rollouts} == {"It is step 0. It is step 1."}


def test_a_step_is_measured_by_draws_that_no_search_looks_at(search):
    (found,), (measured,), rounds = search({"a": 4}, lambda _id, steps, _: BAD if steps > 2 else GOOD)
    assert (measured.before, measured.after) == (Value(3, 3), Value(0, 3))
    *searched, fresh = ({(one.ids, one.number) for one in asked} for asked in rounds)
    assert {number for asked in searched for _, number in asked} == {0, 1, 2}
    assert {number for _, number in fresh} == {3, 4, 5}
    assert {one.drawn.key for one in found.rollouts}.isdisjoint(one.drawn.key for one in measured.rollouts)


def test_values_are_unbiased_where_chance_has_chosen_the_step(search):
    """No step decides: each continuation ends well or badly by a coin. The search takes what chance made high."""

    def reply(id, steps, number):
        return GOOD if hashlib.sha256(f"{id}/{steps}/{number}".encode()).digest()[0] % 2 else BAD

    found, measured, _ = search({f"c{i}": 4 for i in range(20)}, reply, rollouts=4)
    pairs = [(one, values) for one, values in zip(found, measured, strict=True) if values is not None]
    chose = [text.is_good for one, _ in pairs for text in one.rollouts]
    fresh = [text.is_good for _, values in pairs for text in values.rollouts]
    assert sum(chose) / len(chose) > 0.6
    assert sum(fresh) / len(fresh) == pytest.approx(0.5, abs=0.1)
    after = [values.after for _, values in pairs]
    assert sum(value.good for value in after) / sum(value.known for value in after) == pytest.approx(0.5, abs=0.1)
    assert sum(values.is_confirmed for _, values in pairs) < len(pairs) / 2


def test_a_chain_that_only_its_answer_decides_has_no_confirmed_step(search):
    (found,), (measured,), _ = search({"a": 4}, lambda _id, _steps, number: BAD if number % 2 else GOOD, rollouts=4)
    # The search took the value for zero behind the last step.
    assert found.step == 3
    assert (measured.before, measured.after) == (Value(2, 4), Value(2, 4))
    assert not measured.is_confirmed


@pytest.mark.parametrize(
    ("before", "after", "is_confirmed"),
    [
        (Value(4, 4), Value(2, 4), True),
        (Value(3, 4), Value(2, 4), False),
        (Value(1, 4), Value(0, 4), True),
        (Value(0, 4), Value(0, 4), False),
        (Value(1, 4), None, True),
        (Value(0, 4), None, False),
        (Value(0, 0), Value(0, 4), False),
        (Value(4, 4), Value(0, 0), False),
    ],
)
def test_a_step_is_confirmed_if_its_value_falls_to_half_or_less(before, after, is_confirmed):
    assert Measured(before, after, ()).is_confirmed is is_confirmed


@pytest.mark.parametrize("label", ["harmful", "cue"])
@pytest.mark.parametrize("by_model", [False, True])
@pytest.mark.parametrize("place", [0, 1, 3, 5])
def test_nothing_is_continued_from_behind_a_harmful_step_nor_behind_a_cue_of_the_rules(search, label, by_model, place):
    continued = []

    def reply(_id, steps, _number):
        continued.append(steps)
        return GOOD

    labels = ("neutral",) * place + (label,) + ("neutral",) * (7 - place)
    (found,), (measured,), _ = search({"a": 8}, reply, labels=labels, by_model=by_model)
    if label == "cue" and by_model:
        assert found.step == 7
        assert max(continued) == 8
        return
    assert found.step == place
    assert max(continued, default=0) <= place
    assert measured is None if place == 0 else measured.after is None


def test_a_value_is_low_below_half_of_what_it_was_at_the_start(search):
    # One of four continuations is good after each step but the last.
    reply = lambda _id, steps, number: GOOD if number % 4 == 0 and steps < 4 else BAD  # noqa: E731
    (found,), (measured,), _ = search({"a": 4}, reply, rollouts=4, start=0.25)
    assert (found.step, measured.before.share, measured.after.share) == (3, 0.25, 0.0)
    (found,), _, _ = search({"a": 4}, reply, rollouts=4, start=1.0)
    assert (found.step, found.rollouts) == (0, ())


def test_a_continuation_that_goes_on_inside_the_last_step_says_nothing_of_its_value(search):
    # Behind the second step all is lost, but half of the continuations say more in it and turn.
    def reply(_id, steps, number):
        return GOOD if steps < 2 else f" and yet it turns.{GOOD}" if number % 2 else BAD

    (found,), (measured,), _ = search({"a": 4}, reply, rollouts=4)
    assert found.step == 1
    assert (measured.before, measured.after) == (Value(4, 4), Value(0, 2))


def test_a_prompt_without_good_chains_is_not_searched(search):
    found, _, rounds = search({"a": 4}, lambda *_: GOOD, start=0.0)
    assert found == ["no value to lose"]
    assert rounds == []


def test_continuations_without_an_outcome_give_no_value(search):
    endless = " And so on" * 300
    found, _, rounds = search(
        {"a": 4, "b": 4}, lambda id, steps, _: endless if id == "a" else GOOD if steps < 2 else BAD
    )
    assert found[0] == "no value"
    assert found[1].step == 1
    assert [len(asked) for asked in rounds] == [6, 3, 6]
