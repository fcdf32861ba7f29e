"""Scores continuations of contexts, as lm-eval asks for them: text -> ids -> trees -> log-likelihoods.

The ids are those that lm-eval's own class for transformers models makes, so that the results are comparable with
published ones. The model reads them once: continuations of one context, and contexts with the same few-shot examples,
share what they have in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from saro.data.packs import lay_out
from saro.data.tree import RowKind, ScoredSequence, SequenceTree, build_tree, common_prefix
from saro.errors import SaroError
from saro.model.policy import Policy
from saro.model.score import split_sequences
from saro.program import progress_bar

# A tree's sequences may have this many keys for each token of the budget. Varlen attention gathers the keys of every
# path, so that many short questions after long few-shot examples would need far more memory than their tokens. At 16
# and 8192 tokens these are 0.5 GB for a model with 8 key heads of size 128 in bfloat16.
_KEYS_PER_TOKEN = 16


@dataclass(frozen=True)
class Continuation:
    """A context and the text whose probability after it is wanted, as token ids. Neither is empty."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """What a model says of a continuation.

    Attributes:
        logp: log-probability of all its tokens, nats.
        is_greedy: True if greedy decoding would give these tokens.
    """

    logp: float
    is_greedy: bool


@dataclass(frozen=True)
class TextEncoder:
    """Makes the ids of contexts and continuations as lm-eval's ``HFLM`` (0.4.13) does.

    Attributes:
        tokenizer: the model's tokenizer.
        is_rendered: the chat template has written the contexts, with all special tokens that the model was trained on.
    """

    tokenizer: PreTrainedTokenizerBase
    is_rendered: bool = False

    @property
    def prefix_id(self) -> int:
        """The token that an empty context stands for: BOS, or EOS in a model without BOS."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with the tokenizer's own special tokens unless the text begins with the prefix."""
        has_special = self.is_rendered or text.startswith(self.tokenizer.decode(self.prefix_id))
        return self.tokenizer.encode(text, add_special_tokens=not has_special)

    def encode_pair(self, context: str, continuation: str) -> Continuation:
        """Encode a context and its continuation. White space at the end of the context becomes the continuation's.

        Both are tokenized together; the continuation has the ids after the first n, if the context alone has n.

        Raises:
            SaroError: the continuation has no token of its own.
        """
        text = context.rstrip()
        continuation = context[len(text) :] + continuation
        if text:
            context_ids = self.encode(text)
            ids = self.encode(text + continuation)[len(context_ids) :]
        else:
            context_ids = []
            ids = self.tokenizer.encode(continuation, add_special_tokens=False)
        if not context_ids:
            # Something must predict the first token: the prefix, which may be that token.
            context_ids = ids[:1] if ids[:1] == [self.prefix_id] else [self.prefix_id]
            ids = ids[1:] if ids[:1] == [self.prefix_id] else ids
        if not ids:
            raise SaroError("the continuation has no token of its own; it is empty, or merges with the context's end")
        return Continuation(tuple(context_ids), tuple(ids))


def cut_context(continuation: Continuation, max_length: int) -> Continuation:
    """Return the continuation with as much of the end of its context as a model of ``max_length`` tokens reads.

    The last token predicts nothing and is not read.

    Raises:
        SaroError: the model does not read the whole continuation.
    """
    if len(continuation.tokens) > max_length:
        raise SaroError(
            f"the continuation is {len(continuation.tokens):,} tokens, and the model reads {max_length:,}; leave it out"
        )
    room = max_length + 1 - len(continuation.tokens)
    return Continuation(continuation.context[-room:], continuation.tokens)


def plan_trees(continuations: Sequence[Continuation], budget: int) -> Iterator[SequenceTree]:
    """Yield trees of at most ``budget`` tokens that hold each continuation once; its ``record`` is its index.

    In the order of their ids, contexts stand next to those with which they share most. All continuations of a context
    are in one tree. If it exceeds the budget for them, it holds no other context.
    """
    # Bytes of big-endian numbers have the order of the numbers, and are smaller than tuples of them.
    contexts = [np.array(continuation.context, ">u4").tobytes() for continuation in continuations]
    order = sorted(range(len(continuations)), key=lambda i: (contexts[i], continuations[i].tokens))
    tree: list[ScoredSequence] = []
    tokens = keys = 0
    for _, members in groupby(order, key=contexts.__getitem__):
        group = [_sequence_of(continuations[i], i) for i in members]
        new_tokens, new_keys = _count_new([*tree[-1:], *group])
        if tree and (tokens + new_tokens > budget or keys + new_keys > _KEYS_PER_TOKEN * budget):
            yield build_tree(tree)
            tree, tokens, keys = [], 0, 0
        if not tree:
            new_tokens, new_keys = _count_new([_NOTHING, *group])
        tree += group
        tokens += new_tokens
        keys += new_keys
    if tree:
        yield build_tree(tree)


@torch.no_grad()
def score_continuations(policy: Policy, trees: Iterable[SequenceTree]) -> dict[int, Likelihood]:
    """Return what a model says of each continuation, by the ``record`` of its sequence. The order of trees is free."""
    scored: dict[int, Likelihood] = {}
    # The largest first, so that memory runs out at once or not at all.
    largest_first = sorted(trees, key=lambda tree: -tree.tokens)
    with policy.evaluating():
        for tree in progress_bar(largest_first, "scoring", "trees"):
            pack = lay_out([tree])
            statistics = policy.statistics(pack.to(policy.causal_lm.device))
            logps = statistics.logps.cpu().double()[pack.entry_row].numpy()  # (E,)
            top1 = statistics.top1.cpu()[pack.entry_row].numpy()  # (E,)
            by_sequence = zip(split_sequences(pack, logps), split_sequences(pack, top1), strict=True)
            for record, (values, flags) in zip(pack.records, by_sequence, strict=True):
                scored[record] = Likelihood(float(values.sum()), bool(flags.all()))
    return scored


def _sequence_of(continuation: Continuation, record: int) -> ScoredSequence:
    tokens = np.array(continuation.context + continuation.tokens, np.int32)
    kinds = np.full(len(continuation.tokens), RowKind.ANSWER, np.uint8)
    return ScoredSequence(tokens, len(continuation.context), kinds, record)


# Shares no token with any sequence.
_NOTHING = ScoredSequence(np.array([-1, -1], np.int32), 1, np.zeros(1, np.uint8), -1)


def _count_new(sequences: Sequence[ScoredSequence]) -> tuple[int, int]:
    """Count the tokens, and the keys of these, that a tree with the first sequence reads for the others; at most so many."""
    tokens = keys = 0
    for before, sequence in pairwise(sequences):
        read = len(sequence.tokens) - 1
        # The last token of the sequence before is not read, so that it is new here.
        shared = min(common_prefix([before.tokens, sequence.tokens]), len(before.tokens) - 1, read)
        tokens += read - shared
        keys += read if read > shared else 0
    return tokens, keys
