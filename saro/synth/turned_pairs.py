"""Makes the process pairs whose chosen side turns: at a place in a chain, a turning step is put in.

The step is borrowed from a good chain of the model on the same prompt, or the model writes one with the policy in view; it
continues without it. A pair is kept if the continuation ends well, passes the gates, its new step is labelled a turn, and
no step behind that gives in again.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from saro.data.chain import split_steps
from saro.errors import SaroError
from saro.evaluate.judge import defuse, show_conversation
from saro.synth.author import Drawn, Task
from saro.synth.branch import Fork, find_fork
from saro.synth.chain_parts import (
    Chain,
    Run,
    drop_repeats,
    find_fault,
    finish_record,
    has_outcome,
    label_chains,
    length_distance,
    open_side,
    whole_side,
)
from saro.synth.judgement import Judged
from saro.synth.step_rules import label_steps
from saro.synth.synth_options import Options
from saro.synth.templates import read_template

# Longest reply to the request for one sentence; a model that reasons first needs most of it.
SENTENCE_TOKENS = 256
# Marks around a sentence that a model quotes.
_QUOTES = "\"'“” \n"
# Forms whose rejected sides end behind their first cue.
_OPEN_FORMS = ("intervene", "recover")


@dataclass(frozen=True, eq=False)
class Turning:
    """A place in a chain where another step is put.

    Attributes:
        form: form of the pair.
        chain: the chain, which becomes the rejected side.
        step: number of steps before that place.
    """

    form: str
    chain: Chain
    step: int

    @property
    def prefix(self) -> str:
        """The beginning of the reasoning that both sides share."""
        return self.chain.prefix(self.step)


@dataclass(frozen=True)
class Try:
    """A step that was put in.

    Attributes:
        turning: where.
        role: "borrowed" for a turning step of another chain, "turn" for a written one, "neutral" for the control.
        sentence: key of the draw that the step is from.
        fork: the beginning with the new step, from which the model continues.
    """

    turning: Turning
    role: str
    sentence: str
    fork: Fork


def make_turned_pairs(
    run: Run, wanted: Sequence[tuple[str, str]], chains: Mapping[str, Sequence[Chain]]
) -> list[dict[str, Any]]:
    """Return the records of all forms but siblings, at most ``pairs_per_prompt`` of each prompt and form.

    Args:
        wanted: forms, names of ``PLACES``, each with the id of a prompt to make it from.
        chains: the chains of each prompt, by its id, in the order in which they are tried.
    """
    turnings = [turning for form, id in wanted for turning in _find_turnings(run, form, id, chains[id])]
    steps = [step for turning in turnings for step in _borrow_steps(run, turning, chains[turning.chain.prompt.id])]
    tries = _find_tries(run, steps + _write_steps(run, turnings))
    tasks = [_continue_task(one) for one in tries]
    judged = run.judge.judge(run.author.write(tasks, run.sampling))
    _count_control(run, tries, judged)
    accepted = _accept(run, tries, judged)
    records: dict[tuple[str, str], list[dict[str, Any]]] = {(id, form): [] for form, id in wanted}
    for turning in turnings:
        made = records[turning.chain.prompt.id, turning.form]
        record = _make_first(run, accepted.get(turning, []), made)
        if record is None:
            run.funnel.leave_out(turning.chain.prompt.id, turning.form, "no try was accepted", turning.chain.drawn.key)
        else:
            made.append(record)
    return [record for made in records.values() for record in made]


# Places


def find_cue(chain: Chain) -> int | None:
    """Return the first cue of a chain that ended badly; None if it has none, or turns before it."""
    decisive = chain.first("cue", "harmful", "turn")
    if not chain.judged.is_bad or decisive is None or chain.labels[decisive] == "turn":
        return None
    return decisive


def _behind_cue(chain: Chain) -> int | None:
    """Return the place behind the cue; None if it does harm already, which no chosen side may hold."""
    cue = find_cue(chain)
    return None if cue is None or chain.labels[cue] == "harmful" else cue + 1


def _inside_behind_cue(chain: Chain) -> int | None:
    """Return the place behind the cue if a step follows: an open side has nothing to reject behind the last one."""
    place = _behind_cue(chain)
    return place if place is not None and place < len(chain.steps) else None


def _halfway_to_turn(chain: Chain) -> int | None:
    """Return a place in a good chain between its first step and its turn, with a step more before the turn."""
    turn = chain.first("cue", "harmful", "turn")
    if not chain.judged.is_good or turn is None or chain.labels[turn] != "turn" or turn < 3:
        return None
    return (turn - 1) // 2


# Form -> the place in a chain, or None if the chain has none.
PLACES: Mapping[str, Callable[[Chain], int | None]] = {
    "intervene": find_cue,
    "earlier": _halfway_to_turn,
    "recover": _inside_behind_cue,
    "mirror": _behind_cue,
}


def _find_turnings(run: Run, form: str, id: str, chains: Sequence[Chain]) -> list[Turning]:
    """Return the places that a form has in the chains of one prompt, at most ``pairs_per_prompt``."""
    turnings = []
    for chain in drop_repeats(chains):
        place = PLACES[form](chain)
        if place is not None:
            turnings.append(Turning(form, chain, place))
    if not turnings:
        run.funnel.leave_out(id, form, "no chain has a place for it")
    return turnings[: run.options.pp.pairs_per_prompt]


# Steps that are put in


@dataclass(frozen=True)
class NewStep:
    """A step for a place: where, as what (``Try.role``), its words, and the key of the draw that has them."""

    turning: Turning
    role: str
    sentence: str
    key: str


def _borrow_steps(run: Run, turning: Turning, chains: Sequence[Chain]) -> list[NewStep]:
    """Return the first turning steps of good chains on the same prompt, at most ``pp.borrowed``, without repeats.

    A model that turns often enough on its own needs no policy in view, and these are its own words. In form "earlier", the
    chain's own turn comes first: the same step, sooner.
    """
    good = [chain for chain in chains if chain.judged.is_good and chain.first("turn") is not None]
    # A stable sort: the chain itself, then the others in their order.
    good.sort(key=lambda chain: chain is not turning.chain)
    steps: dict[str, NewStep] = {}
    for chain in good:
        sentence = _tidy(chain.step_text(chain.first("turn")))
        steps.setdefault(sentence, NewStep(turning, "borrowed", sentence, chain.drawn.key))
    return list(steps.values())[: run.options.pp.borrowed]


def _write_steps(run: Run, turnings: Sequence[Turning]) -> list[NewStep]:
    """Let the model write the turning steps of all turnings, and for some a neutral one. Empty ones are among them."""
    asked = [(turning, _turn_task(run, turning, n)) for turning in turnings for n in range(run.options.pp.turns)]
    asked += [(turning, _neutral_task(run, turning)) for turning in turnings if _is_control(turning, run.options)]
    sampling = replace(run.sampling, max_tokens=min(SENTENCE_TOKENS, run.options.max_tokens))
    drawn = run.author.write([task for _, task in asked], sampling)
    return [
        NewStep(turning, task.role, _find_sentence(turning, one), one.key)
        for (turning, task), one in zip(asked, drawn, strict=True)
    ]


def _find_tries(run: Run, steps: Sequence[NewStep]) -> list[Try]:
    """Return the tries of all steps that can be put in and continued, each once at its place."""
    tries: list[Try] = []
    seen: set[tuple[Turning, bool, str]] = set()
    for step in steps:
        turning, prompt = step.turning, step.turning.chain.prompt
        is_neutral = step.role == "neutral"
        fork = _find_fork_behind(run, turning, step.sentence)
        if not step.sentence:
            reason = "no sentence"
        elif (turning, is_neutral, step.sentence) in seen:
            reason = "said before"
        elif is_neutral and label_steps([step.sentence], prompt.kind) != ("neutral",):
            reason = "not neutral"
        elif fork is None:
            reason = "cannot be continued"
        else:
            seen.add((turning, is_neutral, step.sentence))
            tries.append(Try(turning, step.role, step.key, fork))
            continue
        run.funnel.leave_out(prompt.id, step.role, reason, step.key)
    return tries


def _turn_task(run: Run, turning: Turning, number: int) -> Task:
    """Return the task of writing a turning step.

    Models that always reason before they answer write it best in its place, where the reasoning goes on; others as the
    answer to a request. So even tries begin with the reasoning so far, and odd ones do not.
    """
    prompt = turning.chain.prompt
    messages = read_template("turn").render(
        **_describe_place(run, turning),
        policy=run.policy.for_writer(prompt),
        aim="help" if turning.form == "mirror" else "safety",
    )
    prefill = None
    if number % 2 == 0:
        with contextlib.suppress(SaroError):
            prefill = find_fork(run.chat, messages, turning.prefix).prefill
    return Task(prompt, "turn", messages, prefill, number)


def _neutral_task(run: Run, turning: Turning) -> Task:
    return Task(turning.chain.prompt, "neutral", read_template("neutral").render(**_describe_place(run, turning)))


def _describe_place(run: Run, turning: Turning) -> dict[str, str]:
    """Return what a template shows of a turning. No text in it is read as a control token."""
    request = show_conversation(turning.chain.prompt.item.prompt)
    return {"request": defuse(request, run.chat), "reasoning": defuse(turning.prefix, run.chat)}


def _find_sentence(turning: Turning, drawn: Drawn) -> str:
    """Return the sentence that was written; empty if there is none, or it was cut.

    It is the first step of the answer or, if the reasoning was begun, of what follows that.
    """
    answer = drawn.answer
    if drawn.task.prefill is None:
        text = answer.answer
        is_ended = answer.state in ("finished", "no-think")
    else:
        begun = turning.prefix.strip()
        if not answer.think.startswith(begun):
            return ""
        text = answer.think[len(begun) :]
        is_ended = answer.state not in ("failed", "unfinished", "looped")
    steps = split_steps(text.strip(_QUOTES))
    if not steps or (len(steps) == 1 and not is_ended):
        return ""
    return _tidy(steps[0].text.strip(_QUOTES))


def _tidy(sentence: str) -> str:
    """Return a sentence with one space between its words, which begins with a capital letter.

    With a small one it would be the end of the step before it.
    """
    words = " ".join(sentence.split())
    return words[:1].upper() + words[1:]


def _find_fork_behind(run: Run, turning: Turning, sentence: str) -> Fork | None:
    """Return the fork behind the beginning of a chain and a sentence; None if it cannot be continued there."""
    prefix = turning.prefix
    space = " " if prefix and not prefix[-1].isspace() else ""
    try:
        return find_fork(run.chat, turning.chain.prompt.item.prompt, prefix + space + sentence)
    except SaroError:
        return None


def _continue_task(one: Try) -> Task:
    prompt = one.turning.chain.prompt
    return Task(prompt, "continue", prompt.item.prompt, one.fork.prefill)


# Records


def _accept(run: Run, tries: Sequence[Try], judged: Sequence[Judged]) -> dict[Turning, list[tuple[Try, Chain]]]:
    """Return the tries of each turning that are accepted, the best first. Neutral steps are none."""
    accepted: dict[Turning, list[tuple[Try, Chain]]] = {one.turning: [] for one in tries}
    passed: list[tuple[Try, Judged]] = []
    for one, text in zip(tries, judged, strict=True):
        if one.role != "neutral":
            reason = find_fault(run, text, one.turning.chain, one.turning.step, one.fork.text)
            if reason is None:
                passed.append((one, text))
            else:
                run.funnel.leave_out(one.turning.chain.prompt.id, one.turning.form, reason, text.drawn.key)
    labelled = {chain.drawn.key: chain for chain in label_chains(run, [text for _, text in passed], "turn")}
    for one, text in passed:
        chain = labelled.get(text.drawn.key)
        if chain is None:
            continue
        if chain.labels[one.turning.step : one.turning.step + 1] != ("turn",):
            run.funnel.leave_out(chain.prompt.id, one.turning.form, "does not turn", chain.drawn.key)
        elif chain.gives_in(one.turning.step + 1):
            # Its answer was good, but training would teach the step that gives in as well.
            run.funnel.leave_out(chain.prompt.id, one.turning.form, "gives in again", chain.drawn.key)
        else:
            accepted[one.turning].append((one, chain))
    for turning, candidates in accepted.items():
        candidates.sort(key=lambda pair: _order(turning, pair[1]))
    return accepted


def _order(turning: Turning, chosen: Chain) -> tuple[int, str]:
    """Return the sort key of chosen sides: short ones first, or those of the rejected side's length if that is whole."""
    if turning.form in _OPEN_FORMS:
        return chosen.characters, chosen.drawn.key
    return length_distance(chosen, turning.chain)


def _make_first(
    run: Run, candidates: Sequence[tuple[Try, Chain]], made: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """Return the record of the first candidate whose sides share the fork, and that is not made yet; None if there is none."""
    for one, chosen in candidates:
        record = _make_record(run, one, chosen, len(made))
        if record is None:
            continue
        if all((record["chosen"], record["rejected"]) != (other["chosen"], other["rejected"]) for other in made):
            return record
        run.funnel.leave_out(chosen.prompt.id, one.turning.form, "the same pair again", chosen.drawn.key)
    return None


def _make_record(run: Run, one: Try, chosen: Chain, number: int) -> dict[str, Any] | None:
    form, chain = one.turning.form, one.turning.chain
    is_open = form in _OPEN_FORMS
    return finish_record(
        run,
        form,
        number,
        chosen=chosen,
        rejected=chain,
        rejected_side=open_side(run, chain, find_cue(chain)) if is_open else whole_side(chain.drawn),
        step=one.turning.step,
        synth={
            "policy": list(run.policy.rule_ids(chain.prompt)) if one.role == "turn" else [],
            "value": None,
            "draws": [chosen.drawn.key, chain.drawn.key, one.sentence],
            # The chosen side then has nothing that the model wrote with the policy in view.
            "on_policy": one.role == "borrowed",
        },
    )


# Control


def has_control(form: str, share: float) -> bool:
    """Return True if a neutral step is tried at places of a form: where a turn changes the outcome, not only when it comes."""
    return share > 0 and form != "earlier"


def _is_control(turning: Turning, options: Options) -> bool:
    """Return True for the share of turnings at which a neutral step is tried too: by names, so always the same."""
    chain = turning.chain
    name = f"{options.seed}/neutral/{chain.prompt.id}/{turning.form}/{chain.drawn.key}"
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    return has_control(turning.form, options.pp.neutral) and place < options.pp.neutral


def _count_control(run: Run, tries: Sequence[Try], judged: Sequence[Judged]) -> None:
    """Count outcomes after a neutral step, and after the turning steps at the same places."""
    controlled = {one.turning for one in tries if one.role == "neutral"}
    for one, text in zip(tries, judged, strict=True):
        if one.turning in controlled:
            is_judged = has_outcome(text)
            run.funnel.count(f"control {one.turning.form}", f"{one.role} good", is_judged and text.is_good)
            run.funnel.count(f"control {one.turning.form}", f"{one.role} judged", is_judged)
