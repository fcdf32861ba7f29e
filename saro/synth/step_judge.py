"""Says where chains turn and where they give in: a label for each step, by the rules or by a model that is asked once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saro.distributed.runtime import Runtime
from saro.draws.draw_all import draw_on_all_ranks
from saro.draws.request import Draw, Request, Sampling
from saro.draws.store import DrawStore
from saro.errors import SaroError
from saro.evaluate.judge import defuse, show_conversation
from saro.evaluate.judge_model import JudgeModel
from saro.synth.author import Drawn
from saro.synth.chain import split_steps
from saro.synth.safety_policy import Policy
from saro.synth.step_rules import LABELS, label_steps
from saro.synth.templates import read_template

# Longest reply: one line of JSON has about 12 tokens, and a model may think before it answers.
_TOKENS_PER_STEP = 24
_TOKENS_TO_THINK = 1024
# A greedy reply would be the same again, so the second one is drawn.
_SECOND = {"temperature": 0.7, "top_p": 0.95}


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
    policy: Policy | None = None
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
        asked: dict[str, Drawn] = {}
        for one in chains:
            if one.task.prompt.kind == "general" or not texts[one.key]:
                labels[one.key] = ("neutral",) * len(texts[one.key])
            else:
                asked[one.key] = one
        for number in (0, 1):
            unread = {key: one for key, one in asked.items() if labels.get(key) is None}
            labels |= self._ask(unread, texts, number)
        return [labels[one.key] for one in chains]

    def _ask(
        self, chains: Mapping[str, Drawn], texts: Mapping[str, Sequence[str]], number: int
    ) -> dict[str, tuple[str, ...] | None]:
        """Return key -> labels of all chains, None for those without a valid reply."""
        labels: dict[str, tuple[str, ...] | None] = dict.fromkeys(chains)
        requests: dict[str, Request] = {}
        for key, one in chains.items():
            request = self._request(one, texts[key], number)
            if request is not None:
                requests[key] = request
        if not requests:
            return labels
        draws = draw_on_all_ranks(
            self.runtime, self.store, self.model.generator, [*requests.values()], offline=self.offline
        )
        for key, draw in zip(requests, draws, strict=True):
            labels[key] = parse_labels(self._read_reply(draw), len(texts[key]))
        return labels

    def _request(self, chain: Drawn, steps: Sequence[str], number: int) -> Request | None:
        """Return the request about one chain; None if the judge's chat template refuses it."""
        chat = self.model.chat
        messages = read_template("steps").render(
            request=defuse(show_conversation(chain.task.prompt.item.prompt), chat),
            steps=[defuse(" ".join(step.split()), chat) for step in steps],
            policy=self.policy.for_writer(chain.task.prompt),
        )
        longest = _TOKENS_TO_THINK + _TOKENS_PER_STEP * len(steps)
        sampling = Sampling(longest, **(_SECOND if number else {}))
        if chat is None:
            return Request(sampling, messages=messages, number=number)
        try:
            return Request(sampling, ids=tuple(chat.prompt_ids(messages)), number=number)
        except SaroError:
            return None

    def _read_reply(self, draw: Draw) -> str:
        if draw.failure is not None or draw.finish == "length":
            return ""
        if draw.text is not None:
            return draw.text
        chat = self.model.chat
        return chat.tokenizer.decode([i for i in draw.ids or () if i not in chat.stop_ids], skip_special_tokens=False)


def parse_labels(reply: str, steps: int) -> tuple[str, ...] | None:
    """Return the labels in a reply, one line of JSON for each step: {"step": 1, "label": "neutral"}.

    None unless there is exactly one such line for each step, in order, and nothing else behind the model's own reasoning
    but empty lines and a fence around them. Never raises.
    """
    lines = [line.strip() for line in reply.rpartition("</think>")[2].strip().splitlines()]
    if lines and lines[0] in ("```", "```json", "```jsonl") and lines[-1] == "```":
        lines = lines[1:-1]
    labels = []
    for line in filter(None, lines):
        try:
            content = json.loads(line, object_pairs_hook=_make_object)
        except (ValueError, RecursionError):
            return None
        is_label = isinstance(content, dict) and content.keys() == {"step", "label"}
        if not is_label or content["label"] not in LABELS:
            return None
        if type(content["step"]) is not int or content["step"] != len(labels) + 1:
            return None
        labels.append(content["label"])
    return tuple(labels) if len(labels) == steps else None


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | None:
    """Return a JSON object as a dict; None if a key is there twice, of which json would drop one."""
    content = dict(pairs)
    return content if len(content) == len(pairs) else None
