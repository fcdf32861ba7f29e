"""Says where chains turn and where they give in: a label for each step, by the rules or by a model that is asked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from saro.data.chain import split_steps
from saro.distributed.runtime import Runtime
from saro.draws.draw_all import draw_on_all_ranks
from saro.draws.store import DrawStore
from saro.evaluate.judge import defuse, show_conversation
from saro.evaluate.judge_model import JudgeModel
from saro.synth.author import Drawn
from saro.synth.safety_policy import SafetyPolicy
from saro.synth.step_rules import LABELS, label_steps
from saro.synth.strict_replies import Strict, ask_strictly, read_objects_of
from saro.synth.templates import read_template

# Longest reply: one line of JSON has about 12 tokens, and a model may think before it answers.
_TOKENS_PER_STEP = 24
_TOKENS_TO_THINK = 1024


@dataclass(frozen=True)
class StepJudge:
    """A judge of steps, ready to read chains.

    Attributes:
        model: its model; None for the rules (``saro.synth.step_rules``), which need nothing of what follows.
        policy: the policy that steps are read under.
        store: keeps the model's replies.
        runtime: the ranks, which share the work.
        offline: draw nothing: a missing reply is an error.
    """

    model: JudgeModel | None = None
    policy: SafetyPolicy | None = None
    store: DrawStore | None = None
    runtime: Runtime | None = None
    offline: bool = False

    @property
    def name(self) -> str:
        """ "rules" or "model"."""
        return "rules" if self.model is None else "model"

    def label(self, chains: Sequence[Drawn]) -> list[tuple[str, ...] | None]:
        """Return the label of each step of each chain, in order: those of ``LABELS`` for ``split_steps`` of its reasoning.

        None if the model gave no valid reply in two tries. The model is not asked about chains without steps and about
        general prompts, whose steps are all neutral.

        Raises:
            SaroError: the model cannot be asked, or replies are missing with ``offline``. No reply raises an error.
        """
        texts = {one.key: [step.text for step in split_steps(one.answer.think)] for one in chains}
        if self.model is None:
            return [label_steps(texts[one.key], one.task.prompt.kind) for one in chains]
        labels: dict[str, tuple[str, ...] | None] = {}
        questions: dict[str, Strict] = {}
        for one in chains:
            if one.task.prompt.kind == "general" or not texts[one.key]:
                labels[one.key] = ("neutral",) * len(texts[one.key])
            else:
                questions[one.key] = self._ask_about(one, texts[one.key])
        labels |= ask_strictly(
            self.model,
            questions,
            lambda key, reply: parse_labels(reply, len(texts[key])),
            lambda requests: draw_on_all_ranks(
                self.runtime, self.store, self.model.generator, requests, offline=self.offline
            ),
        )
        return [labels[one.key] for one in chains]

    def _ask_about(self, chain: Drawn, steps: Sequence[str]) -> Strict:
        """Return the question about one chain."""
        chat = self.model.chat
        messages = read_template("steps").render(
            request=defuse(show_conversation(chain.task.prompt.item.prompt), chat),
            steps=[defuse(" ".join(step.split()), chat) for step in steps],
            policy=self.policy.for_writer(chain.task.prompt),
        )
        return Strict(messages, _TOKENS_TO_THINK + _TOKENS_PER_STEP * len(steps))


def parse_labels(reply: str, steps: int) -> tuple[str, ...] | None:
    """Return the labels in a reply, one line of JSON for each step: {"step": 1, "label": "neutral"}.

    None unless there is exactly one such line for each step, in order, and nothing else; see ``read_objects_of``.
    Never raises.
    """
    labels = []
    for content in read_objects_of(reply) or ():
        if content.keys() != {"step", "label"} or content["label"] not in LABELS:
            return None
        if type(content["step"]) is not int or content["step"] != len(labels) + 1:
            return None
        labels.append(content["label"])
    return tuple(labels) if len(labels) == steps else None
