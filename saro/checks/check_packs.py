"""Checks on the user's model, backend and data that packed runs equal those of the unmodified model, or aborts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature

import numpy as np
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from saro.checks.noise import NOISE_FACTOR, perturbed
from saro.data.dataset import ExampleSet, PairSet
from saro.data.packs import Pack, lay_out
from saro.data.tree import ScoredSequence, SequenceTree, build_tree
from saro.errors import SaroError
from saro.model.architectures import dropout_options, sliding_window
from saro.model.liger import uses_liger
from saro.model.policy import Policy
from saro.model.unmodified import unmodified

# Compare at most this many rows of the shortest and of the longest sequence. A native run holds the logits of all
# compared rows: for a thousand rows of the largest vocabularies they take 8 GiB.
_ROWS = 64
# Scale of the entries of lora_B in the check. A layer's output then changes by a few per cent, far more than rounding.
_LORA_B_SCALE = 0.005

# Log-probs (R,) and gradients at the embeddings (T, D) of one run.
_Run = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class PackCheck:
    """Mean absolute differences from the unmodified model on one sequence at a time.

    Attributes:
        logps: difference of packed log-probs, nats per row.
        logps_floor: difference of an unmodified run's log-probs: that of a padded batch or that of perturbed layers,
            whichever is larger.
        gradients: difference of the packed run's gradients at the input embeddings.
        gradients_floor: difference of an unmodified run's gradients, as in ``logps_floor``.
        control: difference of packed log-probs without isolation, nats per row, in the rows that another tree can
            reach. It must be large.
    """

    logps: float
    logps_floor: float
    gradients: float
    gradients_floor: float
    control: float


def check_packs(policy: Policy, data: ExampleSet | PairSet) -> PackCheck:
    """Check that packed log-probs and gradients are those of the unmodified model on one sequence at a time.

    Pairs are checked as trees: the shared part is read once and gets the gradients of both sides. Rows of long
    sequences are sampled. Gradients are compared at the input embeddings: those of every layer arrive there, and no
    parameter's gradient is allocated.

    Raises:
        SaroError: they differ by more than ``NOISE_FACTOR`` times the difference of two unmodified runs, or the check
            would not notice a leak between sequences.
    """
    window = sliding_window(policy.causal_lm.config)
    trees = _choose_trees(data, window)
    sequences = [sequence for tree in trees for sequence in tree.sequences]
    rows = _choose_rows(trees)
    compared = _choose_entries(sequences, rows)
    try:
        with policy.evaluating(), nonzero_adapter(policy), _checkpointing(policy):
            with unmodified(policy):
                # The true runs use float64 from the logits on. The padded run keeps float32, whose log-softmax over a
                # large vocabulary errs more than everything else: it belongs to the noise.
                true_runs = [_run_natively(policy, [s], rows, torch.float64) for s in sequences]
                padded_dtype = torch.promote_types(policy.causal_lm.dtype, torch.float32)
                padded_run = _run_natively(policy, sequences, rows, padded_dtype)
                with perturbed(policy):
                    perturbed_runs = [_run_natively(policy, [s], rows, torch.float64) for s in sequences]
            pack = lay_out(trees).to(policy.causal_lm.device)
            packed_rows = pack.entry_row[compared.to(pack.entry_row.device)]
            packed = _run_packed(policy, pack, packed_rows)
            with torch.no_grad():
                leaky_logps = policy(pack, isolated=False)[packed_rows]
    except (TypeError, ValueError) as error:
        raise SaroError(f"packed attention does not fit this model: {error}") from error
    truth = _map_to_pack(true_runs, trees, packed)
    padded = _map_to_pack([padded_run], trees, packed)
    rounded = _map_to_pack(perturbed_runs, trees, packed)
    reached = _reached_by_leak(compared, trees, window).to(leaky_logps.device)
    result = PackCheck(
        logps=_mean_difference(packed[0], truth[0]),
        logps_floor=max(_mean_difference(padded[0], truth[0]), _mean_difference(rounded[0], truth[0])),
        gradients=_mean_difference(packed[1], truth[1]),
        gradients_floor=max(_mean_difference(padded[1], truth[1]), _mean_difference(rounded[1], truth[1])),
        control=_mean_difference(leaky_logps[reached], truth[0][reached]),
    )
    _raise_if_different(policy, "log-probs", result.logps, result.logps_floor)
    _raise_if_different(policy, "gradients", result.gradients, result.gradients_floor)
    if not result.control > NOISE_FACTOR * result.logps_floor:
        raise SaroError(
            "the check of packs has no power here: without isolation the log-probs differ by only "
            f"{result.control:.3g}, at a noise of {result.logps_floor:.3g}"
        )
    return result


def _raise_if_different(policy: Policy, quantity: str, difference: float, floor: float) -> None:
    """Raise SaroError if packed runs differ from the model's own by more than the noise explains."""
    # Not "difference > ...", because NaN must fail too.
    if not difference <= NOISE_FACTOR * floor:
        raise SaroError(
            f"packed {quantity} differ from the model's own by {difference:.3g} on average, and two runs of its own by "
            f"{floor:.3g}: packed training would be wrong for this model and backend; try --model.attention sdpa, "
            "--model.head reference and --model.fused_lora false"
            + (", leave --model.liger out" if uses_liger(policy.causal_lm) else "")
            + ", and report it"
        )


def _map_to_pack(runs: Sequence[_Run], trees: Sequence[SequenceTree], packed: _Run) -> _Run:
    """Join the native runs of all sequences in the layout of the pack.

    A token that several sequences share gets the sum of their gradients.
    """
    logps = torch.cat([logps for logps, _ in runs])
    gradients = torch.cat([gradients for _, gradients in runs])
    on_pack = torch.zeros_like(packed[1])
    positions = _read_positions(trees).to(on_pack.device)
    return logps, on_pack.index_add(0, positions, gradients.to(on_pack))


def _reached_by_leak(compared: torch.Tensor, trees: Sequence[SequenceTree], window: int | None) -> torch.Tensor:
    """Return (R,) bool, True for the compared entries of the second tree whose window reaches into the first."""
    leak_begins = sum(len(sequence.row_kinds) for sequence in trees[0].sequences)
    reached = compared >= leak_begins
    return reached & (compared < leak_begins + window) if window else reached


@contextmanager
def nonzero_adapter(policy: Policy) -> Iterator[None]:
    """Give a new adapter small non-zero weights: at zero, its errors would not show. Restores the zeros at the end."""
    zero_parameters = [p for name, p in policy.trainable().items() if "lora_B" in name and not p.any()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in zero_parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * _LORA_B_SCALE)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zero_parameters:
                parameter.zero_()


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
        return [_all_scored(first, shortest), _all_scored(data.sequence(other).tokens, other)]
    # All have the same length: the second is the beginning of the first.
    return [_all_scored(first, shortest), _all_scored(first[: max(2, len(first) * 3 // 4)], shortest)]


def _all_scored(tokens: np.ndarray, record: int) -> ScoredSequence:
    """Return a sequence in which all tokens but the first are scored."""
    return ScoredSequence(tokens, 1, np.zeros(len(tokens) - 1, np.uint8), record)


def _choose_trees(data: ExampleSet | PairSet, window: int | None) -> list[SequenceTree]:
    """Return the sequences of ``choose_sequences`` as trees. Both sides of a pair share a tree, as in training."""
    if isinstance(data, ExampleSet):
        return [build_tree([s]) for s in choose_sequences(data, window)]
    chosen = choose_sequences(data.chosen, window)
    return [build_tree([s, _all_scored(data.rejected.sequence(s.record).tokens, s.record)]) for s in chosen]


def _choose_rows(trees: Sequence[SequenceTree]) -> torch.Tensor:
    """Return ascending positions (K,). Every sequence that has them is compared there, in the next token's log-prob.

    They include both sides of every fork and the end of each sequence; the others are spread evenly.
    """
    lengths = [len(s.tokens) - 1 for tree in trees for s in tree.sequences]
    starts = [node.start for tree in trees for node in tree.nodes]
    edges = [[start - 1 for start in starts if start], starts, [n - 1 for n in lengths]]
    spread = [np.linspace(0, n - 1, min(n, _ROWS)).round() for n in (min(lengths), max(lengths))]
    return torch.from_numpy(np.unique(np.concatenate(edges + spread).astype(np.int64)))


def _run_natively(
    policy: Policy, sequences: Sequence[ScoredSequence], rows: torch.Tensor, softmax: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the model's own forward on a right-padded batch.

    Args:
        rows: positions, ascending, see ``_choose_rows``.
        softmax: dtype of the log-softmax.

    Returns:
        Log-probs (R,) of the rows of all sequences, and gradients (T, D) at the embeddings of their T tokens.
    """
    lm = policy.causal_lm
    longest = max(len(s.tokens) for s in sequences) - 1
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, s in enumerate(sequences):
        n = len(s.tokens) - 1
        ids[i, :n] = torch.from_numpy(s.tokens[:-1].astype(np.int64))
        mask[i, :n] = 1
    rows = rows[rows < longest]
    # A batch of one needs no mask, and without one transformers takes a fast path.
    arguments = {} if len(sequences) == 1 else {"attention_mask": mask.to(lm.device)}
    # A model with code of its own may not have logits_to_keep, or may take only a number of last positions.
    is_transformers = type(lm).__module__.startswith("transformers.models.")
    can_choose = is_transformers and "logits_to_keep" in signature(lm.forward).parameters
    if can_choose:
        arguments["logits_to_keep"] = rows.to(lm.device)
    with _captured_embeddings(policy) as captured, policy.precision():
        logits = lm(input_ids=ids.to(lm.device), use_cache=False, **arguments).logits
        if not can_choose:
            logits = logits[:, rows.to(lm.device)]
    logps = []
    for i, s in enumerate(sequences):
        own_rows = rows[rows < len(s.tokens) - 1]
        targets = torch.from_numpy(s.tokens.astype(np.int64))[own_rows + 1].to(lm.device)
        logps.append(logits[i, : len(own_rows)].to(softmax).log_softmax(-1).gather(1, targets[:, None])[:, 0])
    result = torch.cat(logps)
    (gradient,) = torch.autograd.grad(result.sum(), captured)
    return result.detach(), torch.cat([gradient[i, : len(s.tokens) - 1] for i, s in enumerate(sequences)])


def _run_packed(policy: Policy, pack: Pack, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the policy on a pack. Returns log-probs (R,) of ``rows``, and gradients (T, D) at the embeddings."""
    with _captured_embeddings(policy) as captured:
        logps = policy(pack)[rows]
    (gradient,) = torch.autograd.grad(logps.sum(), captured)
    return logps.detach(), gradient[0]


@contextmanager
def _checkpointing(policy: Policy) -> Iterator[None]:
    """Keep gradient checkpointing on although the policy is in eval mode, so that what fits in training fits here.

    Checkpointing stays off if the model has dropout, because a layer in training mode would apply it.
    """
    lm = policy.causal_lm
    layers = []
    if not any(dropout_options(lm.config).values()):
        layers = [m for m in lm.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    for layer in layers:
        # Set only the layer itself: train() would also switch the modules inside it.
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


@contextmanager
def _captured_embeddings(policy: Policy) -> Iterator[list[torch.Tensor]]:
    """Make the output (1, T, D) of the input embeddings a leaf of the graph, and append it to the yielded list."""
    captured: list[torch.Tensor] = []

    def make_leaf(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        captured.append(output.detach().requires_grad_())
        return captured[-1].clone()  # a model may scale it in place (CTRL), which a leaf does not allow

    handle = policy.causal_lm.get_input_embeddings().register_forward_hook(make_leaf)
    try:
        yield captured
    finally:
        handle.remove()


def _choose_entries(sequences: Sequence[ScoredSequence], rows: torch.Tensor) -> torch.Tensor:
    """Return the indices (R,) of ``rows`` among the entries of all sequences, which are scored from token 1 on."""
    lengths = [len(s.row_kinds) for s in sequences]
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    return torch.cat([start + rows[rows < n] for start, n in zip(starts, lengths, strict=True)])


def _read_positions(trees: Sequence[SequenceTree]) -> torch.Tensor:
    """Return the positions (T,) of all sequences' tokens in the pack of ``trees``, without the last token of each."""
    positions, start = [], 0
    for tree in trees:
        ends = start + np.cumsum([node.fed_tokens for node in tree.nodes])
        runs = [np.arange(end - node.fed_tokens, end) for node, end in zip(tree.nodes, ends, strict=True)]
        for sequence, path in zip(tree.sequences, tree.paths, strict=True):
            positions.append(np.concatenate([runs[i] for i in path])[: len(sequence.tokens) - 1])
        start = int(ends[-1])
    return torch.from_numpy(np.concatenate(positions))


def _mean_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().mean().item()
