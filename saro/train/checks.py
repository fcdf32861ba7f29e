"""Start-up checks: they run on the user's own model and backend, before step 1, and abort with a diagnosis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from saro.data.dataset import ExampleSet, PairSet
from saro.data.packs import Pack, lay_out
from saro.data.tree import ScoredSequence, SequenceTree, build_tree
from saro.errors import SaroError
from saro.model.attention import native_attention
from saro.model.fused_lora import pefts_own_lora
from saro.model.liger import transformers_own_layers, uses_liger
from saro.model.policy import Policy
from saro.model.supported import sliding_window

# Packed and native runs may differ by so many times what two native runs differ by.
_ALLOWED = 3.0
# Entries of lora_B in the check: a layer's output then changes by a few per cent, far more than rounding.
_AWAKE = 0.005


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

    Each carries the number of its record. All their tokens but the first are scored, so that the check sees every row that another sequence could reach.
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


def check_packs(policy: Policy, data: ExampleSet | PairSet) -> PackCheck:
    """Guarantee 3: packed log-probs and gradients are those of the unmodified model, one sequence at a time.

    Of pairs, whole trees are checked: what both sides share is read once and has the gradients of both.

    Gradients are compared at the input embeddings, through which those of every layer pass: no parameter's gradient is
    allocated.

    Raises:
        SaroError: they differ by more than three times what two native runs do, or the check cannot see a difference.
    """
    window = sliding_window(policy.causal_lm.config)
    trees = _choose_trees(data, window)
    sequences = [s for tree in trees for s in tree.sequences]
    was_training = policy.training
    policy.eval()
    try:
        with _awake(policy):
            lm = policy.causal_lm
            with native_attention(lm), pefts_own_lora(policy.model), transformers_own_layers(lm):
                # The truth is taken in float64 from the logits on. The noise is what a plain padded batch is off by,
                # whose fp32 log_softmax over a large vocabulary errs more than all else.
                alone = [_native(policy, [s], torch.float64) for s in sequences]
                padded = _native(policy, sequences, torch.promote_types(policy.causal_lm.dtype, torch.float32))
                with _rounded_otherwise(policy):
                    rounded = [_native(policy, [s], torch.float64) for s in sequences]
            pack = lay_out(trees).to(policy.causal_lm.device)
            packed = _packed(policy, pack)
            with torch.no_grad():
                leaky = policy(pack, isolated=False).index_select(0, pack.entry_row)
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
    reached = slice(leaks_from, leaks_from + window if window else None)
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


def _native(
    policy: Policy, sequences: Sequence[ScoredSequence], softmax: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs (R,) and embedding gradients (T, D) by the model's own forward on a right-padded batch."""
    lm = policy.causal_lm
    longest = max(len(s.tokens) for s in sequences) - 1
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, s in enumerate(sequences):
        n = len(s.tokens) - 1
        ids[i, :n] = torch.from_numpy(s.tokens[:-1].astype(np.int64))
        mask[i, :n] = 1
    with _embeddings(policy) as captured, policy.precision():
        # A batch of one goes without a mask, as transformers' own fast path does.
        arguments = {} if len(sequences) == 1 else {"attention_mask": mask.to(lm.device)}
        logits = lm(input_ids=ids.to(lm.device), use_cache=False, **arguments).logits
    logps = []
    for i, s in enumerate(sequences):
        rows = logits[i, s.scored_from - 1 : len(s.tokens) - 1]
        targets = torch.from_numpy(s.tokens[s.scored_from :].astype(np.int64)).to(lm.device)
        logps.append(rows.to(softmax).log_softmax(-1).gather(1, targets[:, None])[:, 0])
    result = torch.cat(logps)
    (gradient,) = torch.autograd.grad(result.sum(), captured)
    return result.detach(), torch.cat([gradient[i, : len(s.tokens) - 1] for i, s in enumerate(sequences)])


def _packed(policy: Policy, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the policy: log-probs (E,) of the pack's entries, gradients (T, D)."""
    with _embeddings(policy) as captured:
        logps = policy(pack).index_select(0, pack.entry_row)
    (gradient,) = torch.autograd.grad(logps.sum(), captured)
    return logps.detach(), gradient[0]


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


@contextmanager
def _awake(policy: Policy) -> Iterator[None]:
    """Inside, a new adapter changes the model a little: at zero, what it does wrong would not show."""
    asleep = [p for name, p in policy.trainable().items() if "lora_B" in name and not p.any()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in asleep:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * _AWAKE)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in asleep:
                parameter.zero_()


@contextmanager
def _rounded_otherwise(policy: Policy) -> Iterator[None]:
    """Inside, each entry of each layer's output, and of its gradient, is off by at most half a unit of rounding.

    A padded batch can agree with single sequences to the bit, where one kernel computes both. Another kernel, as near to
    the truth, does not: its roundings are these, and the layers above make of them what they make of any.
    """
    eps = torch.finfo(policy.autocast or policy.causal_lm.dtype).eps

    def round_otherwise(layer: int, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        if isinstance(output, tuple):
            return round_otherwise(layer, output[0]), *output[1:]
        # Seeded, so that a recomputed layer rounds alike.
        off = torch.rand(output.shape, generator=torch.Generator().manual_seed(layer)).sub_(0.5).mul_(eps)
        return (output * (1 + off.to(output.device))).to(output.dtype)

    number = policy.causal_lm.config.num_hidden_layers
    lists = [m for m in policy.causal_lm.modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    layers = [layer for of_model in lists for layer in of_model]
    handles = [
        layer.register_forward_hook(lambda _, __, output, i=i: round_otherwise(i, output))
        for i, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _embeddings(policy: Policy) -> Iterator[list[torch.Tensor]]:
    """Inside, the output of the input embeddings is a leaf of the graph, put into the list."""
    captured: list[torch.Tensor] = []

    def make_leaf(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        captured.append(output.detach().requires_grad_())
        return captured[-1]

    handle = policy.causal_lm.get_input_embeddings().register_forward_hook(make_leaf)
    try:
        yield captured
    finally:
        handle.remove()


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().mean().item()
