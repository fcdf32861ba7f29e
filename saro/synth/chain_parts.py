"""Holds what process pairs are made from, chains with outcomes and labels, and makes their sides and records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saro.data.chain import ChainStep, split_steps
from saro.data.chat_format import ChatFormat
from saro.draws.request import Sampling
from saro.errors import SaroError
from saro.synth.author import Author, Drawn
from saro.synth.branch import PairLengths, cut_after, find_fork, measure_pair
from saro.synth.funnel import Funnel
from saro.synth.gates import Gates
from saro.synth.judgement import Judge, Judged
from saro.synth.prompts import Prompt
from saro.synth.safety_policy import SafetyPolicy
from saro.synth.step_judge import StepJudge
from saro.synth.synth_options import Options
from saro.synth.synth_records import Side, make_pair_record, make_side


@dataclass(frozen=True)
class Run:
    """Holds what every stage of one run needs.

    Attributes:
        author: writes texts.
        judge: says if their outcomes are good.
        step_judge: says where they turn.
        policy: what turning steps are written with.
        options: of the run.
        funnel: counts what is left out.
    """

    author: Author
    judge: Judge
    step_judge: StepJudge
    policy: SafetyPolicy
    options: Options
    funnel: Funnel

    @property
    def chat(self) -> ChatFormat:
        """Format of the model that writes."""
        return self.author.subject.chat

    @property
    def sampling(self) -> Sampling:
        """How whole texts are drawn."""
        return Sampling(self.options.max_tokens, self.options.pp.temperature)


@dataclass(frozen=True, eq=False)
class Chain:
    """A text of the model, with its outcome and the labels of its steps.

    Attributes:
        judged: the text and its outcome.
        steps: the steps of its reasoning, at least one.
        labels: one for each step.
    """

    judged: Judged
    steps: tuple[ChainStep, ...]
    labels: tuple[str, ...]

    @property
    def drawn(self) -> Drawn:
        """The text."""
        return self.judged.drawn

    @property
    def prompt(self) -> Prompt:
        """The prompt."""
        return self.drawn.task.prompt

    @property
    def characters(self) -> int:
        """Length of the text, with what was prefilled, of which ``answer.tokens`` has only the drawn tokens."""
        return len(self.drawn.answer.think) + len(self.drawn.answer.answer)

    def first(self, *labels: str, start: int = 0) -> int | None:
        """Return the index of the first step from ``start`` on that has one of the labels; None if there is none."""
        return next((i for i in range(start, len(self.labels)) if self.labels[i] in labels), None)

    def gives_in(self, start: int) -> bool:
        """Return True if a step from ``start`` on decides for the wrong answer or does harm, however the text ends."""
        return self.first("cue", "harmful", start=start) is not None

    def step_text(self, step: int) -> str | None:
        """Return the words of a step, one space between two; None if the reasoning ends before it."""
        return " ".join(self.steps[step].text.split()) if step < len(self.steps) else None

    def prefix(self, steps: int) -> str:
        """Return the first steps as text."""
        return self.drawn.answer.think[: self.steps[steps - 1].stop] if steps else ""


def label_chains(run: Run, texts: Sequence[Judged], stage: str) -> list[Chain]:
    """Return texts with the labels of their steps. Those without reasoning or labels are left out of the stage."""
    chains = []
    for one, labels in zip(texts, run.step_judge.label([one.drawn for one in texts]), strict=True):
        steps = split_steps(one.drawn.answer.think)
        if steps and labels:
            chains.append(Chain(one, steps, labels))
        else:
            reason = "no labels" if steps else "no reasoning"
            run.funnel.leave_out(one.drawn.task.prompt.id, stage, reason, one.drawn.key)
    return chains


def has_outcome(judged: Judged) -> bool:
    """Return True if a text is known to be good or bad.

    A wrong number in a solution that was cut may be a step on the way to the right one. A text that loops has no outcome, as
    in stage op: nobody wants it, whatever it says.
    """
    state = judged.drawn.answer.state
    is_on_its_way = judged.outcome == "wrong" and state != "finished"
    return state != "looped" and (judged.is_good or (judged.is_bad and not is_on_its_way))


def drop_repeats(chains: Sequence[Chain]) -> list[Chain]:
    """Return the chains without those whose text another one before them has."""
    texts = {(chain.drawn.answer.think, chain.drawn.answer.answer): chain for chain in reversed(chains)}
    return [chain for chain in chains if texts[chain.drawn.answer.think, chain.drawn.answer.answer] is chain]


def find_fault(run: Run, judged: Judged, chain: Chain, step: int, prefix: str) -> str | None:
    """Return why a continuation of the beginning of a chain cannot be a chosen side; None if it can.

    Args:
        judged: the continuation, with its beginning.
        chain: the chain that it shares a beginning with.
        step: number of shared steps.
        prefix: what was continued: the shared steps, perhaps with another one behind them.
    """
    if not judged.is_good:
        return f"outcome {judged.outcome}"
    other = find_other_beginning(judged, chain, step, prefix)
    return other or Gates(run.chat, run.policy, banded=False).find_fault(judged.drawn)


def find_other_beginning(judged: Judged, chain: Chain, step: int, prefix: str) -> str | None:
    """Return why a continuation does not have the text that was continued as steps of its own; None if it does.

    The arguments are those of ``find_fault``.
    """
    think = judged.drawn.answer.think
    if not think.startswith(prefix.strip()):
        # The ids of the fork leave its last characters to the model.
        return "another beginning"
    if [one.text for one in split_steps(think)[:step]] != [one.text for one in chain.steps[:step]]:
        # It goes on in the middle of a sentence, so that its steps and those of the chain have different numbers.
        return "the fork is inside a step"
    return None


def length_distance(chain: Chain, other: Chain) -> tuple[int, str]:
    """Return the sort key that puts first the chain nearest in length to another one."""
    return abs(chain.characters - other.characters), chain.drawn.key


def whole_side(drawn: Drawn) -> Side:
    """Return a whole text as one side. One that was cut has no end that could be learned: it is open."""
    answer = drawn.answer
    return make_side(answer.think, answer.answer, is_open=answer.state not in ("finished", "no-think"))


def open_side(run: Run, chain: Chain, decisive: int) -> Side:
    """Return the reasoning of a chain up to ``open_tokens`` tokens behind the step with index ``decisive``, as open side.

    A step that does harm itself is not kept whole: the side ends as many tokens behind its beginning.
    """
    step = chain.steps[decisive]
    place = step.start if chain.labels[decisive] == "harmful" else step.stop
    return make_side(cut_after(run.chat, chain.drawn.answer.think, place, run.options.pp.open_tokens), is_open=True)


def finish_record(
    run: Run,
    form: str,
    number: int,
    *,
    chosen: Chain,
    rejected: Chain,
    rejected_side: Side,
    step: int,
    synth: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Return the record of a pair if its sides share the tokens before the fork as training encodes them; else None.

    Args:
        number: of the pair among those of its prompt and form.
        rejected: the chain that the rejected side is made of.
        step: number of steps that both sides share.
        synth: what ``meta.synth`` says, but for what all forms have in common.
    """
    prompt, answer = chosen.prompt, chosen.drawn.answer
    described = {
        "fork": {"step": step},
        "turn": {"chosen": chosen.first("turn", start=step), "rejected": rejected.first("turn", start=step)},
        "outcomes": {"chosen": chosen.judged.outcome, "rejected": rejected.judged.outcome},
        "judge": run.judge.spec.name,
        "steps": run.step_judge.name,
    }
    record = make_pair_record(
        prompt,
        kind="pp-cot",
        form=form,
        number=number,
        chosen=make_side(answer.think, answer.answer),
        rejected=rejected_side,
        synth={**synth, **described},
    )
    lengths = _measure(run, record, prompt, rejected.prefix(step))
    if lengths is None:
        run.funnel.leave_out(prompt.id, form, "the sides do not share the fork", chosen.drawn.key)
        return None
    record["meta"]["synth"]["fork"]["token"] = lengths.shared
    record["meta"]["synth"]["lengths"] = {"chosen": lengths.chosen, "rejected": lengths.rejected}
    return record


def _measure(run: Run, record: Mapping[str, Any], prompt: Prompt, prefix: str) -> PairLengths | None:
    try:
        fork = find_fork(run.chat, prompt.item.prompt, prefix)
    except SaroError:
        # It could be continued with the new step behind it, and is too short by itself.
        return None
    return measure_pair(run.chat, record, fork)
