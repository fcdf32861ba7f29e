"""Checks the encoded data of a run before its model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from saro.checks.check_masks import check_masks
from saro.checks.check_overlap import check_overlap
from saro.data.chat_format import ChatFormat
from saro.data.dataset import ExampleSet, PairSet
from saro.data.records import Example, Pair
from saro.model.architectures import TokenLimits


def check_data(
    sets: Mapping[str, ExampleSet | PairSet],
    records: Mapping[str, Iterable[Example | Pair]],
    chat: ChatFormat,
    limits: TokenLimits,
    allow_overlap: bool,
) -> None:
    """Check prompts and masks of every set, and that no held-out prompt is trained on.

    Args:
        sets: the encoded sets: "train", and "heldout" if records are held out.
        records: the records of each set.
        limits: what the model's sequences may hold.
        allow_overlap: held-out prompts may be trained on.

    Raises:
        SaroError: see ``check_masks`` and ``check_overlap``.
    """
    for name, data in sets.items():
        check_masks(data, chat, records[name], limits)
    if "heldout" in sets and not allow_overlap:
        check_overlap(sets["heldout"], sets["train"])
