"""Checks every scored mask before the model is loaded."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from saro.data.chat_format import ChatFormat
from saro.data.dataset import ExampleSet, PairSet
from saro.data.records import Example, Pair
from saro.errors import SaroError

# Compare the prompts of only this many records with those at inference, because rendering takes time.
SAMPLED_PROMPTS = 64


def check_masks(
    data: ExampleSet | PairSet, chat: ChatFormat, records: Iterable[Example | Pair], vocabulary: int
) -> None:
    """Check encoded records: every sequence scores something and ends with its only stop token.

    Args:
        records: records whose prompts are also compared with those that ``apply_chat_template`` gives at inference.
        vocabulary: number of tokens that the model embeds; all token ids must lie below it.

    Raises:
        SaroError: names the record that is wrong.
    """
    if isinstance(data, PairSet):
        records = list(records)
        check_masks(data.chosen, chat, records, vocabulary)
        check_masks(data.rejected, chat, records, vocabulary)
        return
    if data.tokens.max() >= vocabulary:
        raise SaroError(
            f"the tokenizer gives id {data.tokens.max()} and the model embeds {vocabulary} tokens; "
            "they do not belong together"
        )
    stops = np.fromiter(chat.stop_ids, np.int32)
    for i, record_id in enumerate(data.ids):
        sequence = data.sequence(i)
        is_stop = np.isin(sequence.tokens[sequence.scored_from :], stops)
        if not is_stop[-1] or is_stop[:-1].any():
            raise SaroError(f"record {record_id}: the scored tokens do not end with their only stop token")
    position = {record_id: i for i, record_id in enumerate(data.ids)}
    for record in records:
        if isinstance(record.prompt, str) or record.id not in position:
            continue
        sequence = data.sequence(position[record.id])
        expected = chat.inference_prompt_ids(record.prompt)
        if sequence.tokens[: sequence.scored_from].tolist() != expected:
            raise SaroError(f"{record.where}: the prompt's tokens differ from those that the model reads at inference")
