"""Says what a stage would ask of its models, how many tokens that is, what it costs and how long it takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saro.data.chat_format import ChatFormat
from saro.draws.request import FINAL_FAILURES, Draw, Request
from saro.draws.store import DrawStore
from saro.evaluate.plan import describe_time
from saro.evaluate.questions import Asked
from saro.synth.synth_options import BudgetOptions

# Draws of the store from which the speed of a model is taken: keys are hashes, so the first ones are a random sample.
_SAMPLE = 1_000
# Characters of a token of English text, for prompts of a server whose tokenizer is not known.
_CHARACTERS = 4


@dataclass(frozen=True)
class Plan:
    """The texts that a stage asks of the generator and of its judges.

    Attributes:
        asked: texts of the first round.
        stored: how many of them the store has; failures that would be drawn again do not count.
        prompt_tokens: tokens of the prompts of the others.
        distinct_tokens: the same, counting what prompts share at their beginning once, as a prefix cache does.
        is_estimate: True if prompts are counted by their characters, because the tokenizer is not known.
        drawn_tokens: most tokens to draw in the first round.
        followups: most texts of later rounds, which depend on what the first one gives.
        followup_tokens: most tokens to draw in them.
        followup_prompt_tokens: most tokens of their prompts.
        verdicts: most replies of the judges, of which each may be asked for twice; 0 if rules judge.
        speed: tokens per second of earlier draws of the generator; None if the store has none.
        mean_tokens: tokens of an earlier draw of the generator, on average; None if the store has none. Both are taken
            from texts of this round if it has some: with other templates or attacks, texts are longer or shorter.
    """

    asked: int
    stored: int
    prompt_tokens: int
    distinct_tokens: int
    is_estimate: bool
    drawn_tokens: int
    followups: int
    followup_tokens: int
    followup_prompt_tokens: int
    verdicts: int
    speed: float | None
    mean_tokens: float | None

    def price(self, budget: BudgetOptions) -> float:
        """Return the most that the generator's texts cost, without its prefix cache."""
        prompts = self.prompt_tokens + self.followup_prompt_tokens
        drawn = self.drawn_tokens + self.followup_tokens
        return (prompts * budget.input_price + drawn * budget.output_price) / 1e6

    @property
    def seconds(self) -> float | None:
        """Expected time of the generator if all later rounds are needed; None if no speed is known."""
        if self.speed is None:
            return None
        return (self.asked - self.stored + self.followups) * self.mean_tokens / self.speed


def plan_stage(
    store: DrawStore,
    identity: Mapping[str, Any],
    asked: Sequence[Asked],
    *,
    followups: int = 0,
    more_prompt: int = 0,
    max_tokens: int,
    judges: int = 0,
    more_read: int = 0,
    concurrency: int = 1,
) -> Plan:
    """Return what a stage would ask. Nothing is sent.

    Args:
        identity: ``Generator.identity`` of the generator.
        asked: texts of the first round.
        followups: most texts of later rounds.
        more_prompt: most tokens that their prompts have beside the longest prompt of the first round and a text.
        max_tokens: longest text, in tokens.
        judges: number of judges that are models: each reads each text, and once more if its reply cannot be read.
        more_read: what some judges read beside, each once or twice: answers on which one is tried first, guided texts
            that have to pass gates, prompts that get hazards.
        concurrency: how many draws are under way at a time, whose times overlap.
    """
    by_key = {one.request.key(identity): one.request for one in asked}
    stored = store.get([*by_key])
    missing = [request for key, request in by_key.items() if _would_draw(stored.get(key))]
    longest = max((_count_prompt(request) for request in by_key.values()), default=0)
    speed, mean_tokens = _measure(_measurable(stored.values()) or _find_sample(store, identity), concurrency)
    return Plan(
        asked=len(by_key),
        stored=len(by_key) - len(missing),
        prompt_tokens=sum(_count_prompt(request) for request in missing),
        distinct_tokens=_count_distinct(missing),
        is_estimate=any(request.ids is None for request in missing),
        drawn_tokens=sum(request.sampling.max_tokens for request in missing),
        followups=followups,
        followup_tokens=followups * max_tokens,
        followup_prompt_tokens=followups * (longest + more_prompt + max_tokens),
        verdicts=2 * (judges * (len(by_key) + followups) + more_read),
        speed=speed,
        mean_tokens=mean_tokens,
    )


def count_tokens(text: str, chat: ChatFormat | None) -> int:
    """Return the number of tokens of a text; about as many if the tokenizer is not known."""
    if chat is None:
        return -(-len(text) // _CHARACTERS)
    return len(chat.tokenizer(text, add_special_tokens=False).input_ids)


def _would_draw(stored: Draw | None) -> bool:
    """Return True if a text would be drawn: the store lacks it, or has a failure that may not last."""
    return stored is None or (stored.failure is not None and stored.failure not in FINAL_FAILURES)


def _text_of(request: Request) -> str:
    if request.text is not None:
        return request.text
    return "".join(f"{message.role}\n{message.content}\n" for message in request.messages)


def _count_prompt(request: Request) -> int:
    return count_tokens(_text_of(request), None) if request.ids is None else len(request.ids)


def _count_distinct(requests: Sequence[Request]) -> int:
    """Return the tokens of all prompts, with what some of them share at their beginning counted once.

    In sorted order, what a prompt shares with any earlier one it shares with the one before it.
    """
    number = _add_new([request.ids for request in requests if request.ids is not None])
    characters = _add_new([_text_of(request) for request in requests if request.ids is None])
    return number + -(-characters // _CHARACTERS)


def _add_new(sequences: Sequence[Sequence[Any]]) -> int:
    number, before = 0, ()
    for sequence in sorted(sequences):
        number += len(sequence) - _count_shared(before, sequence)
        before = sequence
    return number


def _count_shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def _measurable(draws: Iterable[Draw]) -> list[tuple[int, float]]:
    """Return (tokens, seconds) of the draws that are texts with a known number of tokens."""
    return [(draw.num_tokens, draw.seconds) for draw in draws if draw.failure is None and draw.num_tokens]


def _find_sample(store: DrawStore, identity: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Return (tokens, seconds) of a sample of a model's draws in the store."""
    rows = [row for row in store.find("", _SAMPLE) if row["model"] == dict(identity)]
    keys = [row["key"] for row in rows if row["draw"] is not None]
    return _measurable(store.get(keys).values())


def _measure(texts: Sequence[tuple[int, float]], concurrency: int) -> tuple[float | None, float | None]:
    """Return tokens per second, and tokens of a text on average; None for both without texts."""
    tokens, seconds = (sum(values) for values in zip(*texts, strict=True)) if texts else (0, 0.0)
    if not seconds:
        return None, None
    return tokens * concurrency / seconds, tokens / len(texts)


def describe_plan(plan: Plan, budget: BudgetOptions) -> list[str]:
    """Return lines for people."""
    about = "about " if plan.is_estimate else ""
    missing = plan.asked - plan.stored
    lines = [f"{plan.asked:,} texts in the first round, {plan.stored:,} of them in the store"]
    if missing:
        lines.append(
            f"their prompts: {about}{plan.prompt_tokens:,} tokens, {about}{plan.distinct_tokens:,} with a prefix cache; "
            f"at most {plan.drawn_tokens:,} tokens to draw"
        )
    if plan.followups:
        lines.append(
            f"at most {plan.followups:,} texts more in later rounds: {plan.followup_tokens:,} tokens to draw, after prompts "
            f"of {plan.followup_prompt_tokens:,} tokens, most of which a prefix cache has"
        )
    if plan.verdicts:
        lines.append(f"at most {plan.verdicts:,} replies of judges, whose tokens and price are not counted here")
    if budget.input_price or budget.output_price:
        lines.append(f"at most {plan.price(budget):,.2f} at the given prices")
    if plan.seconds is not None and (missing or plan.followups):
        lines.append(
            f"{describe_time(plan.seconds)} at {plan.speed:,.0f} tokens/s and {plan.mean_tokens:,.0f} tokens a text, as "
            "measured on earlier texts"
        )
    elif missing:
        lines.append("the time is not known: the store has no text of this generator")
    return lines
