"""Chooses the held-out prompts that a model answers, and counts the reasoning tokens of an answer."""

from __future__ import annotations

from collections.abc import Sequence

from saro.config import KINDS, PAIR_KINDS
from saro.data.chat_format import ChatFormat
from saro.data.records import Record


def choose_prompts(records: Sequence[Record], number: int) -> list[Record]:
    """Return the first ``number`` records, alternating between their kinds, and only the first one on each prompt."""
    first_on_prompt: dict[object, Record] = {}
    for record in records:
        first_on_prompt.setdefault(record.prompt, record)
    by_kind = [[r for r in first_on_prompt.values() if r.kind == kind] for kind in KINDS + PAIR_KINDS]
    alternating = [group[i] for i in range(len(records)) for group in by_kind if i < len(group)]
    return alternating[:number]


def label_prompts(records: Sequence[Record], show_texts: bool) -> list[tuple[str, str | None]]:
    """Return (id, text) for each record: the text of its prompt's last turn, or None if texts are not to be shown."""
    labels: list[tuple[str, str | None]] = []
    for record in records:
        text = record.prompt if isinstance(record.prompt, str) else record.prompt[-1].content
        labels.append((record.id, text if show_texts else None))
    return labels


def count_reasoning_tokens(answer: str, chat: ChatFormat) -> int:
    """Count the tokens between the tags, or up to the end if the closing tag is missing; 0 without any tag.

    If the template opens the reasoning, the answer has only the closing tag.
    """
    opening, closing = chat.think_tags
    before, has_opening, rest = answer.partition(opening)
    reasoning = ""
    if has_opening:
        reasoning = rest
    elif closing in before:
        reasoning = before
    return len(chat.tokenizer(reasoning.partition(closing)[0], add_special_tokens=False).input_ids)
