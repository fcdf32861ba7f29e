"""Start-up checks: they run on the user's own model and backend, before step 1, and abort with a diagnosis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from saro.data.dataset import ExampleSet, PairSet
from saro.data.packs import lay_out
from saro.data.tree import ScoredSequence, SequenceTree, build_tree
from saro.errors import SaroError
from saro.model.architectures import sliding_window
from saro.model.attention import native_attention
from saro.model.fused_lora import pefts_own_lora
from saro.model.liger import transformers_own_layers, uses_liger
from saro.model.policy import Policy
from saro.train.check_runs import awake, native_run, packed_run, recomputing_layers, rounded_otherwise

# Packed and native runs may differ by so many times what two native runs differ by.
_ALLOWED = 3.0
# So many rows of the shortest sequence and so many of the longest are compared, where they have more: a native run holds
# its logits whole, 8 GiB of them for a thousand rows of the largest vocabularies.
_ROWS = 64


@dataclass(frozen=True)
class PackCheck:
    """Mean absolute differences from the unmodified model on one sequence at a time.

    Attributes:
        logps, logps_floor: of packed log-probs, and of native ones in a padded batch or, where those differ by more, with
            each layer's output rounded otherwise: nats per row.
        gradients, gradients_floor: the same of the gradients at the input embeddings.
        control: of packed log-probs without isolation, in the rows that this reaches; it must be large.
    """

    logps: float
    logps_floor: float
    gradients: float
    gradients_floor: float
    control: float


def choose_sequences(data: ExampleSet, window: int | None) -> list[ScoredSequence]:
    """Two sequences of different lengths: the shortest, and one well beyond the model's window where there is one.

    Each carries the number of its record. All their tokens but the first are scored, so that the check can compare any row
    that another sequence could reach.
    """
    by_length = np.argsort(data.lengths, kind="stable")
    lengths = data.lengths[by_length]
    longer = int(np.searchsorted(lengths, lengths[0], side="right"))
    # Half as long again, so that many rows have lost many keys. Of W + 1 tokens W are read: no row has lost one.
    beyond = min(int(np.searchsorted(lengths, max(1.5 * (window or 0), lengths[0]), side="right")), len(data) - 1)
    shortest = int(by_length[0])
    first = data.sequence(shortest).tokens
    if longer < len(data):
        other = int(by_length[beyond if window and lengths[beyond] > window + 1 else longer])
        return [_all_scored(first, shortest), _all_scored(data.sequence(other).tokens, other)]
    # All are of one length: the second is a part of the first.
    return [_all_scored(first, shortest), _all_scored(first[: max(2, len(first) * 3 // 4)], shortest)]


def _all_scored(tokens: np.ndarray, record: int) -> ScoredSequence:
    return ScoredSequence(tokens, 1, np.zeros(len(tokens) - 1, np.uint8), record)


def _choose_trees(data: ExampleSet | PairSet, window: int | None) -> list[SequenceTree]:
    """The sequences of ``choose_sequences`` as training lays them out: a chosen one shares a tree with its rejected."""
    if isinstance(data, ExampleSet):
        return [build_tree([s]) for s in choose_sequences(data, window)]
    chosen = choose_sequences(data.chosen, window)
    return [build_tree([s, _all_scored(data.rejected.sequence(s.record).tokens, s.record)]) for s in chosen]


def _choose_rows(trees: Sequence[SequenceTree]) -> torch.Tensor:
    """Positions (K,), rising, whose next token's log-probs are compared in every sequence that has them.

    Those on both sides of every fork are among them, and the first and the last of each sequence; others spread evenly.
    """
    lengths = [len(s.tokens) - 1 for tree in trees for s in tree.sequences]
    starts = [node.start for tree in trees for node in tree.nodes]
    edges = [[start - 1 for start in starts if start], starts, [n - 1 for n in lengths]]
    spread = [np.linspace(0, n - 1, min(n, _ROWS)).round() for n in (min(lengths), max(lengths))]
    return torch.from_numpy(np.unique(np.concatenate(edges + spread).astype(np.int64)))


def check_packs(policy: Policy, data: ExampleSet | PairSet) -> PackCheck:
    """Guarantee 3: packed log-probs and gradients are those of the unmodified model, one sequence at a time.

    Of pairs, whole trees are checked: what both sides share is read once and has the gradients of both.

    Of long sequences some rows are compared, spread over them. Gradients are those at the input embeddings, through which
    those of every layer pass: no parameter's gradient is allocated.

    Raises:
        SaroError: they differ by more than three times what two native runs do, or the check cannot see a difference.
    """
    window = sliding_window(policy.causal_lm.config)
    trees = _choose_trees(data, window)
    sequences = [s for tree in trees for s in tree.sequences]
    rows = _choose_rows(trees)
    compared = _entries(sequences, rows)
    was_training = policy.training
    policy.eval()
    try:
        with awake(policy), recomputing_layers(policy):
            lm = policy.causal_lm
            with native_attention(lm), pefts_own_lora(policy.model), transformers_own_layers(lm):
                # The truth is taken in float64 from the logits on. The noise is what a plain padded batch is off by,
                # whose fp32 log_softmax over a large vocabulary errs more than all else.
                alone = [native_run(policy, [s], rows, torch.float64) for s in sequences]
                padded = native_run(policy, sequences, rows, torch.promote_types(policy.causal_lm.dtype, torch.float32))
                with rounded_otherwise(policy):
                    rounded = [native_run(policy, [s], rows, torch.float64) for s in sequences]
            pack = lay_out(trees).to(lm.device)
            packed_rows = pack.entry_row[compared.to(lm.device)]
            packed = packed_run(policy, pack, packed_rows)
            with torch.no_grad():
                leaky = policy(pack, isolated=False)[packed_rows]
    except (TypeError, ValueError) as error:
        raise SaroError(f"packed attention does not fit this model: {error}") from error
    finally:
        policy.train(was_training)
    # A token that several sequences share has the sum of their gradients.
    positions = _read_positions(trees).to(pack.input_ids.device)
    on_pack = torch.zeros_like(packed[1])

    def of_pack(runs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        logps, gradients = (torch.cat([run[i] for run in runs]) for i in range(2))
        return logps, on_pack.index_add(0, positions, gradients.to(on_pack))

    reference = of_pack(alone)
    others = of_pack([padded]), of_pack(rounded)
    # The rows that a leak reaches: of the second tree, whose window still holds some of the first.
    leaks_from = sum(len(s.row_kinds) for s in trees[0].sequences)
    reached = (compared >= leaks_from) & (compared < leaks_from + window if window else True)
    reached = reached.to(lm.device)
    result = PackCheck(
        logps=_difference(packed[0], reference[0]),
        logps_floor=max(_difference(other[0], reference[0]) for other in others),
        gradients=_difference(packed[1], reference[1]),
        gradients_floor=max(_difference(other[1], reference[1]) for other in others),
        control=_difference(leaky[reached], reference[0][reached]),
    )
    for what in ("logps", "gradients"):
        difference, floor = getattr(result, what), getattr(result, f"{what}_floor")
        if not difference <= _ALLOWED * floor:
            raise SaroError(
                f"packed {what} differ from the model's own by {difference:.3g} on average, and two runs of its own by "
                f"{floor:.3g}: packed training would be wrong for this model and backend; try --model.attention sdpa, "
                "--model.head reference and --model.fused_lora false"
                + (", leave --model.liger out" if uses_liger(policy.causal_lm) else "")
                + ", and report it"
            )
    if not result.control > _ALLOWED * result.logps_floor:
        raise SaroError(
            f"the check of packs has no power here: without isolation the log-probs differ by {result.control:.3g} only, "
            f"at a noise of {result.logps_floor:.3g}"
        )
    return result


def _entries(sequences: Sequence[ScoredSequence], rows: torch.Tensor) -> torch.Tensor:
    """Of the entries of ``sequences``, which are all scored from their second token on, those of ``rows``."""
    lengths = [len(s.row_kinds) for s in sequences]
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    return torch.cat([start + rows[rows < n] for start, n in zip(starts, lengths, strict=True)])


def _read_positions(trees: Sequence[SequenceTree]) -> torch.Tensor:
    """Where in the pack of ``trees`` each sequence's tokens but the last are, sequence after sequence."""
    positions, start = [], 0
    for tree in trees:
        ends = start + np.cumsum([node.fed_tokens for node in tree.nodes])
        runs = [np.arange(end - node.fed_tokens, end) for node, end in zip(tree.nodes, ends, strict=True)]
        for sequence, path in zip(tree.sequences, tree.paths, strict=True):
            positions.append(np.concatenate([runs[i] for i in path])[: len(sequence.tokens) - 1])
        start = int(ends[-1])
    return torch.from_numpy(np.concatenate(positions))


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().mean().item()
