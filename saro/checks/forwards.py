"""Run trees as a pack, and their sequences one at a time by the unmodified model, and compare the two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from inspect import signature

import numpy as np
import torch
from torch import nn

from saro.data.packs import Pack, lay_out
from saro.data.tree import ScoredSequence, SequenceTree
from saro.model.architectures import dropout_options
from saro.model.policy import Policy
from saro.model.recompute import recomputable_layers


@dataclass(frozen=True, eq=False)
class PassResult:
    """The results of one forward and backward pass.

    Attributes:
        logps: (R,) log-probs of the compared entries, nats.
        gradients: (T, D) gradients of their sum at the input embeddings of the pack's tokens. A token that several
            sequences share has the sum of their gradients.
    """

    logps: torch.Tensor
    gradients: torch.Tensor

    def differences(self, other: PassResult) -> tuple[torch.Tensor, torch.Tensor]:
        """Return |difference| of the log-probs, (R,), and of the gradients, (T, D), in float64."""
        return (
            (self.logps.double() - other.logps.double()).abs(),
            (self.gradients.double() - other.gradients.double()).abs(),
        )


@dataclass(frozen=True, eq=False)
class Probe:
    """Trees that are run in both ways.

    Gradients are compared at the input embeddings: those of every layer arrive there, and no parameter's gradient is
    allocated.

    Attributes:
        trees: their sequences score all tokens but the first, so that any row can be compared.
        rows: (K,) ascending positions. Every sequence that has them is compared there, in the next token's log-prob.
    """

    trees: tuple[SequenceTree, ...]
    rows: torch.Tensor

    @classmethod
    def of(cls, trees: Sequence[SequenceTree], most_rows: int | None = None) -> Probe:
        """Choose the rows: all, or about ``most_rows`` of the shortest and of the longest sequence, spread evenly.

        Both sides of every fork and the end of each sequence are always compared.
        """
        lengths = [len(s.tokens) - 1 for tree in trees for s in tree.sequences]
        starts = [node.start for tree in trees for node in tree.nodes]
        edges = [[start - 1 for start in starts if start], starts, [n - 1 for n in lengths]]
        spread = [np.linspace(0, n - 1, min(n, most_rows or n)).round() for n in (min(lengths), max(lengths))]
        return cls(tuple(trees), torch.from_numpy(np.unique(np.concatenate(edges + spread).astype(np.int64))))

    @cached_property
    def sequences(self) -> list[ScoredSequence]:
        """The sequences of all trees."""
        return [sequence for tree in self.trees for sequence in tree.sequences]

    @cached_property
    def entries(self) -> torch.Tensor:
        """(R,) indices of the compared rows among the entries of all sequences, which are scored from token 1 on."""
        lengths = [len(s.row_kinds) for s in self.sequences]
        starts = np.cumsum([0, *lengths[:-1]]).tolist()
        return torch.cat([start + self.rows[self.rows < n] for start, n in zip(starts, lengths, strict=True)])

    def run_packed(self, policy: Policy) -> PassResult:
        """Run the policy on one pack of all trees."""
        pack, rows = self._pack(policy)
        with _captured_embeddings(policy) as captured:
            logps = policy(pack)[rows]
        (gradient,) = torch.autograd.grad(logps.sum(), captured)
        return PassResult(logps.detach(), gradient[0])

    @torch.no_grad()
    def run_leaky(self, policy: Policy) -> torch.Tensor:
        """Return the log-probs (R,) of a pack whose sequences see each other."""
        pack, rows = self._pack(policy)
        return policy(pack, isolated=False)[rows]

    def run_natively(self, policy: Policy, softmax: torch.dtype) -> PassResult:
        """Run each sequence alone by the model's own forward; call it in the context ``unmodified``.

        ``softmax``: dtype of the log-softmax.
        """
        runs = [_run_natively(policy, [s], self.rows, softmax) for s in self.sequences]
        return self._map_to_pack(runs)

    def run_padded(self, policy: Policy, softmax: torch.dtype) -> PassResult:
        """Run all sequences as one right-padded batch by the model's own forward; see ``run_natively``."""
        return self._map_to_pack([_run_natively(policy, self.sequences, self.rows, softmax)])

    def _pack(self, policy: Policy) -> tuple[Pack, torch.Tensor]:
        """Return the pack, and the compared rows (R,) among its rows."""
        pack = lay_out(self.trees).to(policy.causal_lm.device)
        return pack, pack.entry_row[self.entries.to(pack.entry_row.device)]

    def _map_to_pack(self, runs: Sequence[PassResult]) -> PassResult:
        """Join the runs of all sequences in the layout of the pack."""
        logps = torch.cat([run.logps for run in runs])
        gradients = torch.cat([run.gradients for run in runs]).double()
        positions = _read_positions(self.trees).to(gradients.device)
        on_pack = gradients.new_zeros(sum(tree.tokens for tree in self.trees), gradients.shape[1])
        return PassResult(logps, on_pack.index_add(0, positions, gradients))


def _run_natively(
    policy: Policy, sequences: Sequence[ScoredSequence], rows: torch.Tensor, softmax: torch.dtype
) -> PassResult:
    """Run the model's own forward on a right-padded batch; the gradients are those of the sequences' tokens, in order."""
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
    with policy.gathered(lm):
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
    return PassResult(result.detach(), torch.cat([gradient[i, : len(s.tokens) - 1] for i, s in enumerate(sequences)]))


@contextmanager
def checkpointing(policy: Policy) -> Iterator[None]:
    """Keep gradient checkpointing on although the policy is in eval mode, so that what fits in training fits here.

    Checkpointing stays off if the model has dropout, because a layer in training mode would apply it.
    """
    lm = policy.causal_lm
    layers = []
    if not any(dropout_options(lm.config).values()):
        layers = [layer for layer in recomputable_layers(lm) if layer.gradient_checkpointing]
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


def all_scored(tokens: np.ndarray, record: int) -> ScoredSequence:
    """Return a sequence in which all tokens but the first are scored."""
    return ScoredSequence(tokens, 1, np.zeros(len(tokens) - 1, np.uint8), record)
