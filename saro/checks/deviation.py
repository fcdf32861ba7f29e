"""Measure how far an export is from the model that was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from saro.checks.noise import EXPORT_FACTOR, EXPORT_SHARE
from saro.data.chat_format import ChatFormat, EqualSides
from saro.data.records import Example, Pair
from saro.data.tree import SequenceTree, build_tree
from saro.data.unpaired_records import read_records
from saro.errors import SaroError


@dataclass(frozen=True)
class Deviation:
    """The distance of an export from the trained model: averages over the scored tokens, in nats.

    Attributes:
        shift: mean of |log-prob of the export - log-prob as trained|.
        change: mean of |log-prob as trained - log-prob of the base model|, which is what training did.
        noise: mean change of the log-probs as trained by another layout, or by rounding to the run's compute dtype; 0
            if the export is scored exactly as the trained model was.
        tokens: number of scored tokens.
        records: number of records that they come from.
    """

    shift: float
    change: float
    noise: float
    tokens: int
    records: int

    @classmethod
    def of(
        cls, exported: torch.Tensor, trained: torch.Tensor, base: torch.Tensor, noise: float, records: int
    ) -> Deviation:
        """Compare the log-probs of the same scored tokens, (E,) each, nats."""
        shift = (exported - trained).abs().mean().item()
        change = (trained - base).abs().mean().item()
        return cls(shift=shift, change=change, noise=noise, tokens=len(exported), records=records)

    @property
    def is_allowed(self) -> bool:
        """True if the shift is at most a share of the change plus what noise explains."""
        return self.shift <= EXPORT_SHARE * self.change + EXPORT_FACTOR * self.noise

    def __str__(self) -> str:
        share = f"{self.shift / self.change:.2%}" if self.change else "more than all"
        return (
            f"{self.shift:.2g} nats per token from the trained model, {share} of the {self.change:.2g} that training "
            f"changed; rounding explains {self.noise:.2g} ({self.tokens:,} tokens of {self.records} records)"
        )


def choose_records(files: Sequence[str], chat: ChatFormat, pack_tokens: int, number: int) -> list[SequenceTree]:
    """Choose up to ``number`` records, examples or pairs, spread over the files. Each becomes a tree of its sequences.

    Records longer than a pack are skipped, and pairs with two equal sides, which the run left out. The ``record`` of a sequence is
    its number among the chosen sequences.

    Raises:
        SaroError: a file or a record is faulty, or all are too long.
    """
    records: list[Example | Pair] = []
    for file in files:
        records += read_records(file, may_be_equal=True)
    evenly = [i * len(records) // number for i in range(number)]
    # The other records follow, in case some of these are too long.
    order = dict.fromkeys([*evenly, *range(len(records))])
    trees: list[SequenceTree] = []
    sequences = 0
    for index in order:
        if len(trees) == number:
            break
        record = records[index]
        try:
            encoded = chat.encode_pair(record) if isinstance(record, Pair) else (chat.encode(record),)
        except EqualSides:
            continue
        tree = build_tree([replace(sequence, record=sequences + i) for i, sequence in enumerate(encoded)])
        if tree.tokens <= pack_tokens:
            trees.append(tree)
            sequences += len(encoded)
    if not trees:
        raise SaroError(f"{files[0]}: all records are longer than the run's packs of {pack_tokens} tokens")
    return trees
