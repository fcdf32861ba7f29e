"""Finds the step that decides a chain: values of the ends of steps, by continuations from them.

The value of a beginning is the probability that the model, continuing from it, ends with a good outcome. In a chain that
ended badly it begins above zero and falls to zero, and a step after which it stays low decided the outcome. With n steps
and m continuations for each value, bisection finds that step with m * log2(n) continuations instead of m * n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from saro.data.chat_format import ChatFormat
from saro.draws.request import Sampling
from saro.errors import SaroError
from saro.synth.author import Author, Task
from saro.synth.branch import find_fork
from saro.synth.chain_parts import Chain, has_outcome
from saro.synth.judgement import Judge, Judged

# A step decides if the value falls below this share of what it was at the beginning of the chain.
_LOW = 0.5


@dataclass(frozen=True)
class Search:
    """A chain that ended badly, in which the deciding step is searched.

    What has done harm is lost, and nothing is continued from there. So the search ends with the first harmful step. The
    rules call only items of lists harmful, and overlook prose: without a model that labels steps, it ends with the first
    cue on a harmful prompt, and no rollout begins behind one.

    Attributes:
        chain: the chain.
        start: value of the prompt, before any step: share of good ones among whole chains.
        labelled_by_model: True if a model labelled the steps.
    """

    chain: Chain
    start: float
    labelled_by_model: bool = False

    @property
    def stop(self) -> int:
        """Number of steps after which the value is taken for zero: up to the one that ends the search, or all."""
        by_rules = self.chain.prompt.kind == "harmful" and not self.labelled_by_model
        last = self.chain.first("harmful", "cue") if by_rules else self.chain.first("harmful")
        return len(self.chain.steps) if last is None else last + 1


@dataclass(frozen=True)
class Found:
    """The deciding step of a chain.

    Attributes:
        search: the chain.
        step: index of the deciding step: this many steps come before it.
        before, after: values before and after that step.
        rollouts: the continuations from before it; none if it is the first step, since these are the whole chains.
    """

    search: Search
    step: int
    before: float
    after: float
    rollouts: tuple[Judged, ...]


@dataclass
class _State:
    """How far one bisection is: the value is high after ``low`` steps, and low after ``high``."""

    search: Search
    low: int
    high: int
    values: dict[int, float]
    rollouts: dict[int, tuple[Judged, ...]] = field(default_factory=dict)


def find_deciding_steps(
    author: Author, judge: Judge, searches: Sequence[Search], rollouts: int, sampling: Sampling
) -> list[Found | str]:
    """Return the deciding step of each chain, in order, or the reason why there is none.

    In each round, all chains are continued from the middle of what is left of them, in one call of the author.

    Args:
        rollouts: continuations from each place.

    Raises SaroError like ``Author.write`` and ``Judge.judge``.
    """
    results: list[Found | str | None] = []
    states: list[_State] = []
    for search in searches:
        states.append(_State(search, 0, search.stop, {0: search.start, search.stop: 0.0}))
        results.append(None if search.start > 0 else "no value to lose")
    while open_ones := [i for i, state in enumerate(states) if results[i] is None and state.high - state.low > 1]:
        places = {i: (states[i].low + states[i].high) // 2 for i in open_ones}
        tasks, owners = _make_tasks(author.subject.chat, states, places, rollouts)
        judged = judge.judge(author.write(tasks, sampling))
        by_owner: dict[int, list[Judged]] = {i: [] for i in open_ones}
        for owner, one in zip(owners, judged, strict=True):
            by_owner[owner].append(one)
        for i, ones in by_owner.items():
            results[i] = _narrow(states[i], places[i], ones)
    return [result or _finish(state) for result, state in zip(results, states, strict=True)]


def _make_tasks(
    chat: ChatFormat, states: Sequence[_State], places: Mapping[int, int], rollouts: int
) -> tuple[list[Task], list[int]]:
    """Return the tasks of one round, and which bisection each belongs to."""
    tasks: list[Task] = []
    owners: list[int] = []
    for i, place in places.items():
        prompt = states[i].search.chain.prompt
        try:
            fork = find_fork(chat, prompt.item.prompt, states[i].search.chain.prefix(place))
        except SaroError:
            # The text cannot be continued there. Without rollouts there is no value, which ends this bisection.
            continue
        for number in range(rollouts):
            tasks.append(Task(prompt, "rollout", prompt.item.prompt, fork.prefill, number))
            owners.append(i)
    return tasks, owners


def _narrow(state: _State, place: int, rollouts: Sequence[Judged]) -> str | None:
    """Move one end of a bisection to a place, by the outcomes of the rollouts from it. Return why it cannot go on, or None."""
    known = [one for one in rollouts if has_outcome(one)]
    if not known:
        return "no value"
    value = sum(one.is_good for one in known) / len(known)
    state.values[place] = value
    state.rollouts[place] = tuple(rollouts)
    if value > _LOW * state.search.start:
        state.low = place
    else:
        state.high = place
    return None


def _finish(state: _State) -> Found:
    return Found(
        search=state.search,
        step=state.low,
        before=state.values[state.low],
        after=state.values[state.high],
        rollouts=state.rollouts.get(state.low, ()),
    )
