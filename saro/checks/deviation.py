"""Log-probs of some of a run's records by several versions of one model, and how far the versions are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from saro.data.chat_format import ChatFormat
from saro.data.records import Pair, holds_pairs, read_examples, read_pairs
from saro.data.tree import SequenceTree, build_tree
from saro.errors import SaroError
from saro.model.policy import Policy
from saro.train.reference import score
from saro.train.steps import packs_of

# An export may move log-probs by this share of what training moved them by, and so many times what rounding does. The
# latter adds in quadrature to what is missing, so that an export that lost all is noticed from 1.3 times the noise on.
ALLOWED = 0.1
_ALLOWED_NOISE = 1.5
# Rows whose probabilities over the whole vocabulary are held at a time.
_ROWS = 256


@dataclass(frozen=True)
class Deviation:
    """How far an export is from what was trained: means over the scored tokens, in nats.

    Attributes:
        shift: of |log-prob of the export - log-prob as trained|.
        change: of |log-prob as trained - log-prob of the base model|: what training did.
        noise: of what another layout, or a rounding to the dtype of the run's products, changes in the log-probs as
            trained; 0 where the export is scored as the trained model was.
        tokens: how many were scored.
        records: whose they are.
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
        """From the log-probs of the same tokens, (R,) each."""
        shift = (exported - trained).abs().mean().item()
        return cls(shift, (trained - base).abs().mean().item(), noise, len(exported), records)

    @property
    def allowed(self) -> bool:
        return self.shift <= ALLOWED * self.change + _ALLOWED_NOISE * self.noise

    def __str__(self) -> str:
        share = f"{self.shift / self.change:.2%}" if self.change else "more than all"
        return (
            f"{self.shift:.2g} nats per token from the trained model, {share} of the {self.change:.2g} that training "
            f"changed; rounding alone makes {self.noise:.2g} ({self.tokens:,} tokens of {self.records} records)"
        )


def choose_records(files: Sequence[str], chat: ChatFormat, pack_tokens: int, number: int) -> list[SequenceTree]:
    """Up to ``number`` records from all over the files, examples or pairs; each is a tree of its sequences.

    What is longer than a pack is passed over. A sequence's ``record`` counts the sequences.

    Raises:
        SaroError: a file or a record is faulty, or all are too long.
    """
    records = [record for file in files for record in (read_pairs if holds_pairs(file) else read_examples)(file)]
    spread = dict.fromkeys([*(i * len(records) // number for i in range(number)), *range(len(records))])
    trees: list[SequenceTree] = []
    sequences = 0
    for index in spread:
        if len(trees) == number:
            break
        record = records[index]
        encoded = chat.encode_pair(record) if isinstance(record, Pair) else (chat.encode(record),)
        tree = build_tree([replace(sequence, record=sequences + i) for i, sequence in enumerate(encoded)])
        if tree.tokens <= pack_tokens:
            trees.append(tree)
            sequences += len(encoded)
    if not trees:
        raise SaroError(f"{files[0]}: all records are longer than the run's packs of {pack_tokens} tokens")
    return trees


def packed_logps(policy: Policy, trees: Sequence[SequenceTree], pack_tokens: int) -> torch.Tensor:
    """Log-probs of the scored tokens by the policy as in training: (R,) float64, sequence after sequence."""
    scored: dict[int, torch.Tensor] = {}
    packs = _bar(list(packs_of(trees, pack_tokens)), "packs")
    for pack, entries in score(policy, packs, policy.causal_lm.device):
        for position, record in enumerate(pack.records):
            scored[record] = torch.from_numpy(entries)[pack.entry_sequence == position].double()
    return torch.cat([scored[record] for record in sorted(scored)])


@torch.inference_mode()
def plain_logps(lm: PreTrainedModel, trees: Sequence[SequenceTree]) -> torch.Tensor:
    """The same by a model's own forward, one sequence at a time."""
    scored = []
    for sequence in _bar([s for tree in trees for s in tree.sequences], "sequences"):
        tokens = torch.from_numpy(sequence.tokens.astype(np.int64)).to(lm.device)
        logits = lm(input_ids=tokens[None, :-1], use_cache=False).logits[0, sequence.scored_from - 1 :]
        targets = tokens[sequence.scored_from :, None]
        for rows, row_targets in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
            scored.append(rows.float().log_softmax(-1).gather(1, row_targets)[:, 0].double().cpu())
    return torch.cat(scored)


def _bar(items: list, unit: str) -> tqdm:
    return tqdm(items, desc="scoring", unit=f" {unit}", delay=2, leave=False, disable=None)
