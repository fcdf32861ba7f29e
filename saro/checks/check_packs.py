"""Check on the user's model, backend and data that packed runs equal those of the unmodified model.

Each part has its own tolerance. In the run's precision rounding hides small errors, so the layout of packs, the
attention backend and the kernels are checked apart; the model as a whole is run last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from saro.checks.check_attention import check_attention
from saro.checks.check_kernels import check_kernels, nonzero_adapter
from saro.checks.check_layout import LayoutCheck, check_layout
from saro.checks.forwards import Probe, all_scored, checkpointing
from saro.checks.noise import LARGEST_FACTOR, NOISE_FACTOR, all_experts, perturbed
from saro.data.dataset import ExampleSet, PairSet
from saro.data.tree import ScoredSequence, SequenceTree, build_tree, common_prefix
from saro.errors import SaroError
from saro.model.architectures import sliding_window
from saro.model.attention import UnfitAttention
from saro.model.liger import uses_liger
from saro.model.policy import Policy
from saro.model.unmodified import unmodified

# The layout is also checked on this many pairs of one prompt, as one tree.
_GROUP = 3
# The whole model runs this many tokens after the fork of a pair, or of an example; the layout of longer sequences is
# checked on a small model.
_TAIL = 64
# The whole model compares about this many rows of a sequence: native runs hold the logits of all compared rows.
_ROWS = 64


@dataclass(frozen=True)
class PackCheck:
    """The results of all parts.

    Attributes:
        layout: largest differences on a small random model in float32.
        attention: largest error of the attention backend, in units of the error of plain attention.
        kernels: largest error of the head and of the fused LoRA layers, in units of the error of plain PyTorch.
        logps: mean difference of the model's packed log-probs from its own on one sequence at a time, nats per row.
        logps_floor: mean difference of an unmodified run's log-probs: that of a padded batch or that of perturbed layers,
            whichever is larger.
        most, most_floor: the largest of these differences, nats.
        gradients, gradients_floor: mean differences of the gradients at the input embeddings.
    """

    layout: LayoutCheck
    attention: float
    kernels: float
    logps: float
    logps_floor: float
    most: float
    most_floor: float
    gradients: float
    gradients_floor: float


def check_packs(policy: Policy, data: ExampleSet | PairSet) -> PackCheck:
    """Check that a pack gives the log-probs and gradients of the unmodified model on one sequence at a time.

    - The layout: trees of the data in a small random model of the same class, in float32, to rounding.
    - The attention backend on the longest tree, with the model's head shapes in the run's precision, against float64.
    - The head and the fused LoRA layers on the model's own weights, gradients included, against float64.
    - The model as a whole, against the noise that another rounding of its layers makes.

    Pairs are checked as trees: the shared part is read once and gets the gradients of both sides.

    Raises:
        SaroError: one of them differs by more than rounding explains, or the check would not notice a leak between
            sequences.
    """
    window = sliding_window(policy.causal_lm.config)
    try:
        layout = check_layout(policy, [*_choose_trees(data, window), *_group_tree(data)], window)
        attention = check_attention(policy, [_longest_tree(data), _choose_trees(data, None)[0]])
        with policy.evaluating(), nonzero_adapter(policy):
            kernels = check_kernels(policy)
            return _check_whole(policy, data, layout, attention, kernels)
    except (UnfitAttention, TypeError) as error:
        # The model's own code raises this TypeError if it does not take the layout of a pack. Any other is a bug, perhaps ours.
        if isinstance(error, TypeError) and "unexpected keyword argument" not in str(error):
            raise
        raise SaroError(f"packed attention does not fit this model: {error}") from error


def _check_whole(
    policy: Policy, data: ExampleSet | PairSet, layout: LayoutCheck, attention: float, kernels: float
) -> PackCheck:
    """Run the model itself on the beginnings of two records."""
    probe = Probe.of(_short_trees(data), _ROWS)
    with checkpointing(policy), all_experts(policy):
        with unmodified(policy):
            # The true runs use float64 from the logits on. The padded run keeps float32, whose log-softmax over a
            # large vocabulary errs more than everything else: it belongs to the noise.
            truth = probe.run_natively(policy, torch.float64)
            padded = probe.run_padded(policy, torch.promote_types(policy.causal_lm.dtype, torch.float32))
            with perturbed(policy):
                rounded = probe.run_natively(policy, torch.float64)
        packed = probe.run_packed(policy)
    logps, gradients = packed.differences(truth)
    floors = [run.differences(truth) for run in (padded, rounded)]
    result = PackCheck(
        layout=layout,
        attention=attention,
        kernels=kernels,
        logps=logps.mean().item(),
        logps_floor=max(floor.mean().item() for floor, _ in floors),
        most=logps.max().item(),
        most_floor=max(floor.max().item() for floor, _ in floors),
        gradients=gradients.mean().item(),
        gradients_floor=max(floor.mean().item() for _, floor in floors),
    )
    _raise_if_different(policy, "log-probs", "on average", result.logps, result.logps_floor)
    _raise_if_different(policy, "log-probs", "in one row", result.most, LARGEST_FACTOR * result.most_floor)
    _raise_if_different(policy, "gradients", "on average", result.gradients, result.gradients_floor)
    return result


def _raise_if_different(policy: Policy, quantity: str, where: str, difference: float, floor: float) -> None:
    """Raise SaroError if packed runs differ from the model's own by more than the noise explains."""
    # Do not write "difference > ...": NaN must fail too.
    if not difference <= NOISE_FACTOR * floor:
        raise SaroError(
            f"packed {quantity} differ from the model's own by {difference:.3g} {where}, and two runs of its own by "
            f"{floor:.3g}: packed training would be wrong for this model and backend; try --model.attention sdpa, "
            "--model.head reference and --model.fused_lora false"
            + (", set --model.liger false" if uses_liger(policy.causal_lm) else "")
            + ", and report it"
        )


def choose_sequences(data: ExampleSet, window: int | None) -> list[ScoredSequence]:
    """Choose two sequences of different lengths: the shortest, and one well beyond the model's window if it has one.

    Each carries the index of its record. All of its tokens but the first are scored, so that the check can compare any
    row that another sequence could reach.
    """
    by_length = np.argsort(data.lengths, kind="stable")
    lengths = data.lengths[by_length]
    longer = int(np.searchsorted(lengths, lengths[0], side="right"))
    # At least 1.5 times the window, so that many rows have lost many keys. In a sequence of W + 1 tokens, of which W
    # are read, no row has lost a key to a window of W.
    beyond = min(int(np.searchsorted(lengths, max(1.5 * (window or 0), lengths[0]), side="right")), len(data) - 1)
    shortest = int(by_length[0])
    first = data.sequence(shortest).tokens
    if longer < len(data):
        other = int(by_length[beyond if window and lengths[beyond] > window + 1 else longer])
        return [all_scored(first, shortest), all_scored(data.sequence(other).tokens, other)]
    # All have the same length: the second is the beginning of the first.
    return [all_scored(first, shortest), all_scored(first[: max(2, len(first) * 3 // 4)], shortest)]


def _choose_trees(data: ExampleSet | PairSet, window: int | None) -> list[SequenceTree]:
    """Return the sequences of ``choose_sequences`` as trees. Both sides of a pair share a tree, as in training."""
    if isinstance(data, ExampleSet):
        return [build_tree([s]) for s in choose_sequences(data, window)]
    chosen = choose_sequences(data.chosen, window)
    return [build_tree([s, all_scored(data.rejected.sequence(s.record).tokens, s.record)]) for s in chosen]


def _group_tree(data: ExampleSet | PairSet) -> list[SequenceTree]:
    """Return one tree of several pairs on a prompt, or of several turns of a conversation; an empty list if there are none.

    It is cut some tokens after the forks.
    """
    groups = data.prompts if isinstance(data, PairSet) else data.conversations
    if groups is None:
        return []
    group = np.flatnonzero(groups == np.bincount(groups).argmax())[:_GROUP].tolist()
    if len(group) == 1:
        return []
    if isinstance(data, ExampleSet):
        return [build_tree(_cut([data.sequence(turn) for turn in group]))]
    return [build_tree([sequence for pair in group for sequence in _cut(data.sequences(pair))])]


def _cut(sequences: Sequence[ScoredSequence]) -> list[ScoredSequence]:
    """Return sequences cut some tokens after they diverge. A single sequence is cut after its beginning."""
    fork = common_prefix([s.tokens for s in sequences]) if len(sequences) > 1 else _TAIL
    return [all_scored(s.tokens[: fork + _TAIL], s.record) for s in sequences]


def _longest_tree(data: ExampleSet | PairSet) -> SequenceTree:
    """Return the tree of the longest record."""
    record = int(data.lengths.argmax())
    return build_tree(data.sequences(record) if isinstance(data, PairSet) else [data.sequence(record)])


def _short_trees(data: ExampleSet | PairSet) -> list[SequenceTree]:
    """Return the trees of ``_choose_trees``, cut some tokens after their fork."""
    return [build_tree(_cut(tree.sequences)) for tree in _choose_trees(data, None)]
