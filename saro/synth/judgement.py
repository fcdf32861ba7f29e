"""Judges texts that were drawn: did the model do what the prompt asks for?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from saro.distributed.runtime import Runtime
from saro.draws.draw_all import draw_on_all_ranks
from saro.draws.store import DrawStore
from saro.evaluate.answers import Verdict
from saro.evaluate.judge import check_abstentions, judge_answers
from saro.evaluate.judge_model import JudgeModel
from saro.evaluate.judge_spec import JudgeSpec
from saro.evaluate.outcomes import find_outcome
from saro.synth.author import Drawn

# Outcomes that a good text has, for each expectation.
GOOD = ("safe", "helped", "right")
BAD = ("harmful", "refused", "wrong")


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
    """A judge, ready to read texts.

    Attributes:
        spec: the rules, or what a judge's file says.
        model: its model; None for the rules.
        store: keeps its replies.
        runtime: the ranks, which share the work.
        offline: draw nothing: a missing reply is an error.
    """

    spec: JudgeSpec
    model: JudgeModel | None
    store: DrawStore
    runtime: Runtime
    offline: bool = False

    def judge(self, texts: Sequence[Drawn]) -> list[Judged]:
        """Return the texts with their outcomes, in order.

        Raises:
            SaroError: replies are missing with ``offline``, or the judge gives no verdict on more than 5 % of the texts.
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
        check_abstentions(verdicts)
        by_key = {verdict.answer: verdict for verdict in verdicts}
        judged = []
        for one in texts:
            verdict = by_key.get(one.key)
            judged.append(Judged(one, find_outcome(one.task.prompt.item, one.answer, verdict), verdict))
        return judged
