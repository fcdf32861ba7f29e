"""Check every prompt and every scored mask before the model is loaded."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from saro.data.chat_format import ChatFormat
from saro.data.dataset import ExampleSet, PairSet
from saro.data.records import Example, Pair
from saro.errors import SaroError
from saro.model.architectures import TokenLimits


def check_masks(
    data: ExampleSet | PairSet, chat: ChatFormat, records: Iterable[Example | Pair], limits: TokenLimits
) -> None:
    """Check encoded records: every sequence scores something and ends with its only stop token; open ones have none.

    Args:
        records: records whose prompts are also compared with those that ``apply_chat_template`` gives at inference. This
            takes a third of the time that encoding them took, so give all.
        limits: what the model's sequences may hold.

    Raises:
        SaroError: names the record that is wrong.
    """
    sides = (data.chosen, data.rejected) if isinstance(data, PairSet) else (data,)
    for side in sides:
        _check_tokens(side, limits)
        _check_scored(side, chat.stop_ids)
    position = {record_id: i for i, record_id in enumerate(data.ids)}
    for record in records:
        # A string prompt has no template, and a record that was dropped has no position.
        if isinstance(record.prompt, str) or record.id not in position:
            continue
        expected = chat.inference_prompt_ids(record.prompt)
        for side in sides:
            sequence = side.sequence(position[record.id])
            if sequence.tokens[: sequence.scored_from].tolist() != expected:
                raise SaroError(
                    f"{record.where}: the prompt's tokens differ from those that the model reads at inference"
                )


def _check_tokens(side: ExampleSet, limits: TokenLimits) -> None:
    """Check that the model embeds all token ids, and that no sequence is too long or stands for more than text."""
    if side.tokens.max() >= limits.vocabulary:
        raise SaroError(
            f"the tokenizer gives id {side.tokens.max()} and the model embeds {limits.vocabulary} tokens; "
            "they do not belong together"
        )
    if limits.longest is not None and side.lengths.max() > limits.longest:
        record = int(side.lengths.argmax())
        raise SaroError(
            f"record {side.ids[record]}: has {side.lengths[record]:,} tokens, and beyond {limits.longest:,} "
            f"{limits.beyond}; leave out longer records"
        )
    places = np.flatnonzero(np.isin(side.tokens, np.fromiter(limits.placeholders, np.int32)))
    if len(places):
        record = int(np.searchsorted(side.offsets, places[0], side="right")) - 1
        raise SaroError(
            f"record {side.ids[record]}: holds the token {side.tokens[places[0]]}, which stands for an image or a video; "
            "this model is trained on text only: leave such records out"
        )


def _check_scored(side: ExampleSet, stop_ids: frozenset[int]) -> None:
    """Check that the scored tokens of each sequence have their only stop token at the end, or none if it is open."""
    is_open = np.zeros(len(side), bool) if side.is_open is None else side.is_open
    ends = side.offsets[1:]
    is_stop = np.isin(side.tokens, np.fromiter(stop_ids, np.int32))
    stops_before = np.concatenate([[0], np.cumsum(is_stop)])
    stops = stops_before[ends] - stops_before[side.offsets[:-1] + side.prompt_tokens]
    wrong = np.where(is_open, stops != 0, (stops != 1) | ~is_stop[ends - 1])
    for i in np.flatnonzero(wrong)[:1]:
        if is_open[i]:
            raise SaroError(f"record {side.ids[i]}: the scored tokens of an open side hold a stop token")
        raise SaroError(f"record {side.ids[i]}: the scored tokens do not end with their only stop token")
