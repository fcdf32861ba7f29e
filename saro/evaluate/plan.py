"""Says what an evaluation would ask, how long it would take, and what so many prompts can show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isinf
from statistics import fmean

from saro.draws.store import DrawStore
from saro.evaluate.questions import Asked
from saro.evaluate.statistics import smallest_effect
from saro.evaluate.suite import Item

_EXPECTED = {"refuse": "harmful prompts", "comply": "harmless prompts", "answer": "questions with a known answer"}


@dataclass(frozen=True)
class ModelPlan:
    """What one model would be asked.

    Attributes:
        name: the model.
        asked: number of its requests.
        stored: how many of them the store already has.
        prompt_tokens: tokens of the prompts that are not in the store; None for a server, whose tokenizer is not known.
        most_tokens: tokens that would be drawn at most.
        speed: tokens per second of earlier draws of this model on this machine; None if there are none.
        expected_tokens: tokens that would be drawn if each text had the average length of the stored ones under its attack,
            or of all if there are none; None without stored ones. Attacks that close the reasoning make texts short.
    """

    name: str
    asked: int
    stored: int
    prompt_tokens: int | None
    most_tokens: int
    speed: float | None
    expected_tokens: float | None

    @property
    def seconds(self) -> float | None:
        """Expected time; None if no speed is known. Without stored draws, every text is assumed to be cut."""
        if self.speed is None:
            return None
        return (self.most_tokens if self.expected_tokens is None else self.expected_tokens) / self.speed


def plan_model(
    store: DrawStore, name: str, identity: Mapping[str, object], asked: Sequence[Asked], concurrency: int = 1
) -> ModelPlan:
    """Return what a model would be asked; nothing is generated.

    Args:
        concurrency: how many draws are under way at a time, whose times overlap.
    """
    keys = [one.request.key(identity) for one in asked]
    stored = store.get(keys)
    missing = [one for one, key in zip(asked, keys, strict=True) if key not in stored]
    has_ids = all(one.request.ids is not None for one in asked)
    finished = {key: draw for key, draw in stored.items() if draw.failure is None}
    lengths = {key: draw.num_tokens for key, draw in finished.items()}
    seconds = sum(draw.seconds for draw in finished.values()) / concurrency
    by_attack: dict[str, list[int]] = {}
    for one, key in zip(asked, keys, strict=True):
        if key in lengths:
            by_attack.setdefault(one.question.attack.id, []).append(lengths[key])
    means = {attack: fmean(known) for attack, known in by_attack.items()}
    others = fmean(lengths.values()) if lengths else None
    expected = None if others is None else sum(means.get(one.question.attack.id, others) for one in missing)
    return ModelPlan(
        name=name,
        asked=len(asked),
        stored=len(asked) - len(missing),
        prompt_tokens=sum(len(one.request.ids) for one in missing) if has_ids else None,
        most_tokens=sum(one.request.sampling.max_tokens for one in missing),
        speed=sum(lengths.values()) / seconds if seconds > 0 else None,
        expected_tokens=expected,
    )


def describe_plan(plans: Sequence[ModelPlan], items: Sequence[Item]) -> list[str]:
    """Return lines that say what would be asked, and the smallest difference between two models that it can show."""
    lines = []
    for plan in plans:
        missing = plan.asked - plan.stored
        line = f"{plan.name}: {plan.asked:,} requests, {plan.stored:,} of them in the store"
        if missing:
            prompts = "" if plan.prompt_tokens is None else f"{plan.prompt_tokens:,} tokens of prompts, "
            line += f"; {prompts}at most {plan.most_tokens:,} tokens to draw"
            line += "; no speed is known yet" if plan.seconds is None else f"; about {describe_time(plan.seconds)}"
        lines.append(line)
    # By clusters, not items: what is not independent does not count twice.
    independent = {(item.suite, item.expect, item.cluster or item.id) for item in items}
    for (suite, expect), number in sorted(Counter((suite, expect) for suite, expect, _ in independent).items()):
        effect = smallest_effect(number, correlation=0.5)
        shown = "no difference shows" if isinf(effect) else f"a difference of {100 * effect:.0f} points shows"
        lines.append(
            f"{suite}, {number:,} {_EXPECTED[expect]}: between two models, {shown} in four of five evaluations "
            "(5 % level, one comparison)"
        )
    return lines


def describe_time(seconds: float) -> str:
    """Return a time in the unit that fits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
