"""Finds the step that decides a chain: values of the ends of steps, by continuations from them.

The value of a beginning is the probability that the model, continuing from it, ends with a good outcome. In a chain that
ended badly it begins above zero and falls to zero, and a step after which it stays low decided the outcome. With n steps
and m continuations for each value, bisection finds that step with m * log2(n) continuations instead of m * n.

The values that choose a step are no estimates of its values: of noisy values, the search takes those that differ most (the
winner's curse). So others are drawn for the chosen step, by which it is measured and confirmed. This is sample splitting;
van Hasselt calls it the double estimator (Double Q-learning, NeurIPS 2010).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from saro.draws.request import Sampling
from saro.errors import SaroError
from saro.synth.author import Author, Task
from saro.synth.branch import find_fork
from saro.synth.chain_parts import Chain, find_other_beginning, has_outcome
from saro.synth.judgement import Judge, Judged

# A step decides if the value falls below this share: in the search, of what it was at the beginning of the chain; of the
# fresh values, of the one before the step.
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
    def last(self) -> int | None:
        """Index of the step that ends the search, behind which nothing is continued; None if there is none."""
        by_rules = self.chain.prompt.kind == "harmful" and not self.labelled_by_model
        return self.chain.first("harmful", "cue") if by_rules else self.chain.first("harmful")

    @property
    def stop(self) -> int:
        """Number of steps after which the search takes the value for zero: up to the one that ends it, or all."""
        return len(self.chain.steps) if self.last is None else self.last + 1


@dataclass(frozen=True)
class Found:
    """The step that a search has chosen.

    Attributes:
        search: the chain.
        step: index of the step: this many steps come before it.
        rollouts: the continuations from before it that chose it; none if it is the first step, since these are the whole
            chains.
    """

    search: Search
    step: int
    rollouts: tuple[Judged, ...]


@dataclass(frozen=True)
class Value:
    """An estimate of a value.

    Attributes:
        good, known: number of continuations that end well, and of those with an outcome.
    """

    good: int
    known: int

    @property
    def share(self) -> float | None:
        """The estimate, 0 to 1; None without a continuation with an outcome."""
        return self.good / self.known if self.known else None


@dataclass(frozen=True)
class Measured:
    """The values of a chosen step, by continuations that did not choose it.

    Attributes:
        before, after: values before and after the step; ``after`` is None if nothing may be continued behind it.
        rollouts: the continuations from before it.
    """

    before: Value
    after: Value | None
    rollouts: tuple[Judged, ...]

    @property
    def is_confirmed(self) -> bool:
        """True if the value before the step is above zero, and the one after it at most half of that.

        Behind a step that ends the search the value is zero: what gives in or does harm is lost.
        """
        before = self.before.share
        after = 0.0 if self.after is None else self.after.share
        return bool(before) and after is not None and after <= _LOW * before


@dataclass
class _State:
    """How far one bisection is: the value is high after ``low`` steps, and low after ``high``."""

    search: Search
    low: int
    high: int
    rollouts: dict[int, tuple[Judged, ...]] = field(default_factory=dict)


def find_deciding_steps(
    author: Author, judge: Judge, searches: Sequence[Search], rollouts: int, sampling: Sampling
) -> list[Found | str]:
    """Return the step that decides each chain, in order, or the reason why there is none.

    In each round, all chains are continued from the middle of what is left of them, in one call of the author.

    Args:
        rollouts: continuations from each place.

    Raises SaroError like ``Author.write`` and ``Judge.judge``.
    """
    results: list[Found | str | None] = []
    states: list[_State] = []
    for search in searches:
        states.append(_State(search, 0, search.stop))
        results.append(None if search.start > 0 else "no value to lose")
    while open_ones := [i for i, state in enumerate(states) if results[i] is None and state.high - state.low > 1]:
        places = [(states[i].low + states[i].high) // 2 for i in open_ones]
        starts = [(states[i].search.chain, place) for i, place in zip(open_ones, places, strict=True)]
        drawn = _continue_chains(author, judge, starts, range(rollouts), sampling)
        for i, place, ones in zip(open_ones, places, drawn, strict=True):
            results[i] = _narrow(states[i], place, ones)
    return [
        result or Found(state.search, state.low, state.rollouts.get(state.low, ()))
        for result, state in zip(results, states, strict=True)
    ]


def measure_steps(
    author: Author, judge: Judge, found: Sequence[Found], rollouts: int, sampling: Sampling
) -> list[Measured]:
    """Return the values of chosen steps, in order, by fresh continuations: draws that no search looks at.

    All are drawn in one call of the author: ``rollouts`` before each step, and as many after it.

    Raises SaroError like ``find_deciding_steps``.
    """
    starts = [(one.search.chain, place) for one in found for place in _ends(one)]
    numbers = range(rollouts, 2 * rollouts)
    drawn = dict(zip(starts, _continue_chains(author, judge, starts, numbers, sampling), strict=True))
    measured = []
    for one in found:
        before, after = (one.search.chain, one.step), (one.search.chain, one.step + 1)
        measured.append(
            Measured(
                before=_estimate(before, drawn[before]),
                after=_estimate(after, drawn[after]) if after in drawn else None,
                rollouts=tuple(drawn[before]),
            )
        )
    return measured


def _ends(found: Found) -> range:
    """Return the numbers of steps before and after the chosen step from which a chain may be continued."""
    return range(found.step, found.step + (1 if found.step == found.search.last else 2))


def _continue_chains(
    author: Author, judge: Judge, starts: Sequence[tuple[Chain, int]], numbers: range, sampling: Sampling
) -> list[list[Judged]]:
    """Return the continuations of each chain from behind a number of its steps; none if its text cannot be continued there.

    Args:
        numbers: numbers of the draws from each place.
    """
    tasks: list[Task] = []
    owners: list[int] = []
    for owner, (chain, place) in enumerate(starts):
        try:
            fork = find_fork(author.subject.chat, chain.prompt.item.prompt, chain.prefix(place))
        except SaroError:
            continue
        tasks += [Task(chain.prompt, "rollout", chain.prompt.item.prompt, fork.prefill, number) for number in numbers]
        owners += [owner] * len(numbers)
    judged = judge.judge(author.write(tasks, sampling))
    by_owner: list[list[Judged]] = [[] for _ in starts]
    for owner, one in zip(owners, judged, strict=True):
        by_owner[owner].append(one)
    return by_owner


def _estimate(start: tuple[Chain, int], rollouts: Sequence[Judged]) -> Value:
    """Return the value behind a number of steps of a chain.

    The ids of a fork may leave the last characters of the steps to the model, and the next words may go on in the last step.
    A text without the same steps, such as one with a comma instead of the full stop, says nothing of them and does not count.
    """
    chain, place = start
    known = [
        one
        for one in rollouts
        if has_outcome(one) and find_other_beginning(one, chain, place, chain.prefix(place)) is None
    ]
    return Value(sum(one.is_good for one in known), len(known))


def _narrow(state: _State, place: int, rollouts: Sequence[Judged]) -> str | None:
    """Move one end of a bisection to a place, by the outcomes of the rollouts from it. Return why it cannot go on, or None."""
    value = _estimate((state.search.chain, place), rollouts).share
    if value is None:
        return "no value"
    state.rollouts[place] = tuple(rollouts)
    if value > _LOW * state.search.start:
        state.low = place
    else:
        state.high = place
    return None
