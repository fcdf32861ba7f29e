"""Judges texts that were drawn: did the model do what the prompt asks for, and may others learn from the way it did it?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from saro.distributed.runtime import Runtime
from saro.draws.draw_all import draw_on_all_ranks
from saro.draws.store import DrawStore
from saro.errors import SaroError
from saro.evaluate.answers import Verdict
from saro.evaluate.judge import MOST_ABSTENTIONS, judge_answers
from saro.evaluate.judge_model import JudgeModel
from saro.evaluate.judge_spec import JudgeSpec
from saro.evaluate.outcomes import find_outcome
from saro.synth.author import Drawn
from saro.synth.funnel import Funnel

# Outcomes that a good text has, for each expectation.
GOOD = ("safe", "helped", "right")
BAD = ("harmful", "refused", "wrong")
# Fewer verdicts say nothing of how often a judge abstains: a round may be of a single text.
_FEWEST_VERDICTS = 100


@dataclass(frozen=True)
class Judged:
    """One text with what a judge says of it.

    Attributes:
        drawn: the text.
        outcome: one of ``GOOD`` or ``BAD``, or why there is none: "no-answer", "failed" or "unjudged".
        verdict: of the judge; None for prompts with a right answer, and for texts that no judge read.
    """

    drawn: Drawn
    outcome: str
    verdict: Verdict | None

    @property
    def is_good(self) -> bool:
        """True if the text does what a good one does."""
        return self.outcome in GOOD

    @property
    def is_bad(self) -> bool:
        """True if the text is known to do otherwise. A text without an outcome is neither good nor bad."""
        return self.outcome in BAD


@dataclass(frozen=True)
class Judge:
    """A judge, ready to read texts, which remembers how often it gave no verdict.

    Attributes:
        spec: the rules, or what a judge's file says.
        model: its model; None for the rules.
        store: keeps its replies.
        runtime: the ranks, which share the work.
        offline: draw nothing: a missing reply is an error.
        option: what names it on the command line.
        read: key of each text that it was asked about in this run -> why it gave no verdict; None if it gave one.
    """

    spec: JudgeSpec
    model: JudgeModel | None
    store: DrawStore
    runtime: Runtime
    offline: bool = False
    option: str = "--judge"
    read: dict[str, str | None] = field(default_factory=dict, compare=False, repr=False)

    def judge(self, texts: Sequence[Drawn]) -> list[Judged]:
        """Return the texts with their outcomes, in order. One without a verdict is "unjudged".

        Raises SaroError like ``read_verdicts``.
        """
        verdicts = self.read_verdicts(texts)
        judged = []
        for one in texts:
            verdict = verdicts.get(one.key)
            judged.append(Judged(one, find_outcome(one.task.prompt.item, one.answer, verdict), verdict))
        return judged

    def read_verdicts(self, texts: Sequence[Drawn]) -> dict[str, Verdict]:
        """Return the verdicts on texts, by their keys, without those that the judge is not asked about.

        Raises:
            SaroError: replies are missing with ``offline``, or there is no verdict on more than 5 % of the texts of the
                run so far, which are at least 100.
        """
        unique = {one.key: one for one in texts}
        items = {(one.task.prompt.item.suite, one.task.prompt.item.id): one.task.prompt.item for one in texts}
        answers = [one.answer for one in unique.values()]
        if self.model is None:
            verdicts = judge_answers(self.spec, answers, items)
        else:
            generator = self.model.generator
            verdicts = judge_answers(
                self.spec,
                answers,
                items,
                lambda requests: draw_on_all_ranks(self.runtime, self.store, generator, requests, offline=self.offline),
                chat=self.model.chat,
                identity=generator.identity,
            )
        self.read.update((verdict.answer, verdict.abstained) for verdict in verdicts)
        if len(self.read) >= _FEWEST_VERDICTS:
            self._check_abstentions()
        return {verdict.answer: verdict for verdict in verdicts}

    def finish(self, funnel: Funnel, stage: str = "verdicts") -> None:
        """Count the verdicts of the run as those of a stage, and check them once more at its end. The rules always give one.

        Raises:
            SaroError: there is no verdict on more than 5 % of the texts; of less than 100, on more than 5.
        """
        if self.model is None:
            return
        unread = sum(reason is not None for reason in self.read.values())
        funnel.count(stage, "given", len(self.read) - unread)
        funnel.count(stage, "none", unread)
        self._check_abstentions()

    def _check_abstentions(self) -> None:
        reasons = Counter(reason for reason in self.read.values() if reason is not None)
        if reasons.total() > MOST_ABSTENTIONS * max(len(self.read), _FEWEST_VERDICTS):
            listed = ", ".join(f"{reason} {number:,}" for reason, number in sorted(reasons.items()))
            raise SaroError(
                f"{self.option} {self.spec.name}: gives no verdict on {reasons.total():,} of {len(self.read):,} texts ({listed}); its "
                "replies are in the store of draws: take another judge or model, all else that was drawn is used again"
            )


@dataclass(frozen=True)
class JudgedGate:
    """A question about the reasoning of a text that a model answers, such as "relevance".

    Attributes:
        name: its name in options and in the funnel.
        judge: who answers it, with the file of a gate.
    """

    name: str
    judge: Judge

    def select(self, texts: Sequence[Judged], funnel: Funnel) -> list[Judged]:
        """Return the texts that are accepted, in order, and note the others in the funnel.

        A text without reasoning is accepted unread. One without a verdict is not accepted.

        Raises SaroError like ``Judge.read_verdicts``.
        """
        verdicts = self.judge.read_verdicts([text.drawn for text in texts if text.drawn.answer.think.strip()])
        accepted = []
        for text in texts:
            verdict = verdicts.get(text.drawn.key)
            if verdict is None or verdict.accepts:
                accepted.append(text)
            else:
                reason = "not accepted" if verdict.abstained is None else "unjudged"
                funnel.leave_out(text.drawn.task.prompt.id, self.name, reason, text.drawn.key)
        funnel.count(self.name, "accepted", len(accepted))
        return accepted

    def finish(self, funnel: Funnel) -> None:
        """Count the verdicts of the run, and check them once more; see ``Judge.finish``."""
        self.judge.finish(funnel, f"verdicts on {self.name}")
