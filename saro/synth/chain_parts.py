"""Holds what process pairs are made from, chains with outcomes and labels, and makes their sides and records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saro.data.chat_format import ChatFormat
from saro.draws.request import Sampling
from saro.synth.author import Author, Drawn
from saro.synth.branch import Fork, cut_after, measure_pair
from saro.synth.chain import Step, split_steps
from saro.synth.funnel import Funnel
from saro.synth.gates import check_text
from saro.synth.judgement import Judge, Judged
from saro.synth.policy import Policy
from saro.synth.prompts import Prompt
from saro.synth.step_judge import StepJudge
from saro.synth.synth_options import Options
from saro.synth.synth_records import Side, make_pair_record, make_side


@dataclass(frozen=True)
class Run:
    """What every stage of one run needs.

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
    policy: Policy
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
    steps: tuple[Step, ...]
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
    def tokens(self) -> int:
        """Number of tokens that the model drew."""
        return self.drawn.answer.tokens["think"] + self.drawn.answer.tokens["answer"]

    def first(self, *labels: str, start: int = 0) -> int | None:
        """Return the index of the first step from ``start`` on that has one of the labels; None if there is none."""
        return next((i for i in range(start, len(self.labels)) if self.labels[i] in labels), None)

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


def drop_repeats(chains: Sequence[Chain]) -> list[Chain]:
    """Return the chains without those whose text another one before them has."""
    texts = {(chain.drawn.answer.think, chain.drawn.answer.answer): chain for chain in reversed(chains)}
    return [chain for chain in chains if texts[chain.drawn.answer.think, chain.drawn.answer.answer] is chain]


def find_fault(run: Run, judged: Judged, prefix: str) -> str | None:
    """Return why a continuation of the beginning of a chain cannot be a chosen side; None if it can."""
    if not judged.is_good:
        return f"outcome {judged.outcome}"
    if not judged.drawn.answer.think.startswith(prefix.strip()):
        # The ids of the fork leave its last characters to the model.
        return "another beginning"
    return check_text(judged.drawn, run.chat, run.policy, banded=False)


def whole_side(drawn: Drawn) -> Side:
    """Return a whole text as one side. One that was cut has no end that could be learned: it is open."""
    answer = drawn.answer
    return make_side(answer.think, answer.answer, is_open=answer.state not in ("finished", "no-think"))


def open_side(run: Run, chain: Chain, decisive: int) -> Side:
    """Return the reasoning of a chain up to ``open_tokens`` tokens behind the step with index ``decisive``, as open side."""
    stop = chain.steps[decisive].stop
    return make_side(cut_after(run.chat, chain.drawn.answer.think, stop, run.options.pp.open_tokens), is_open=True)


def finish_record(
    run: Run, form: str, number: int, *, chosen: Drawn, rejected: Side, fork: Fork, synth: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the record of a pair if its sides share the fork's tokens as training encodes them; else None.

    Args:
        number: of the pair among those of its prompt and form.
        synth: what ``meta.synth`` says, but for what is measured here.
    """
    prompt = chosen.task.prompt
    record = make_pair_record(
        prompt,
        kind="pp-cot",
        form=form,
        number=number,
        chosen=make_side(chosen.answer.think, chosen.answer.answer),
        rejected=rejected,
        synth={**synth, "judge": run.judge.spec.name, "steps": run.step_judge.name},
    )
    lengths = measure_pair(run.chat, record, fork)
    if lengths is None:
        run.funnel.leave_out(prompt.id, form, "the sides do not share the fork", chosen.key)
        return None
    meta = record["meta"]["synth"]
    meta["fork"] = {**meta["fork"], "token": lengths.shared}
    meta["lengths"] = {"chosen": lengths.chosen, "rejected": lengths.rejected}
    run.funnel.count(form, "pairs")
    return record
