"""Continuations are scored in trees as each would be by itself, and what they share is read once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded import load
from tiny import BOS, tiny_tokenizer

from saro.errors import SaroError
from saro.evaluate.continuations import Continuation, TextEncoder, cut_context, plan_trees, score_continuations
from saro.model.unmodified import unmodified

pytestmark = pytest.mark.usefixtures("one_thread")


def random_continuations(*shapes: tuple[int, int], seed: int = 0) -> list[Continuation]:
    """Make continuations of (context, continuation) lengths, with random ids."""
    rng = np.random.default_rng(seed)
    return [Continuation(*(tuple(rng.integers(4, 264, n).tolist()) for n in shape)) for shape in shapes]


def alone(policy, continuation: Continuation) -> tuple[float, bool]:
    """Score one continuation by the model's own forward."""
    tokens = torch.tensor(continuation.context + continuation.tokens)
    with torch.no_grad(), unmodified(policy):
        rows = policy.causal_lm(tokens[None, :-1]).logits[0, len(continuation.context) - 1 :].double().log_softmax(-1)
    targets = tokens[len(continuation.context) :]
    return rows.gather(1, targets[:, None]).sum().item(), bool((rows.argmax(-1) == targets).all())


def choices_of(*contexts: int) -> list[Continuation]:
    """Make four choices after each context; all contexts begin with the same eight tokens."""
    (shared,) = random_continuations((8, 1), seed=1)
    made = []
    for number, length in enumerate(contexts):
        (context,) = random_continuations((length, 1), seed=10 + number)
        ends = random_continuations((1, 1), (1, 2), (1, 5), (1, 3), seed=20 + number)
        made += [Continuation(shared.context + context.context, end.tokens) for end in ends]
    return made


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "gemma2"])
def test_likelihoods_are_those_of_each_continuation_alone(tiny_model, kind):
    policy = load(tiny_model(kind))
    continuations = choices_of(5, 12, 30)
    scored = score_continuations(policy, plan_trees(continuations, 64))
    for i, continuation in enumerate(continuations):
        logp, is_greedy = alone(policy, continuation)
        assert scored[i].logp == pytest.approx(logp, abs=1e-4)
        assert scored[i].is_greedy == is_greedy


def test_what_greedy_decoding_gives_is_greedy(tiny_model):
    policy = load(tiny_model())
    context = choices_of(5)[0].context
    tokens: list[int] = []
    with torch.no_grad(), unmodified(policy):
        for _ in range(3):
            tokens.append(policy.causal_lm(torch.tensor([[*context, *tokens]])).logits[0, -1].argmax().item())
    other = [*tokens[:2], (tokens[2] + 1) % 264]
    trees = plan_trees([Continuation(context, tuple(tokens)), Continuation(context, tuple(other))], 64)
    scored = score_continuations(policy, trees)
    assert (scored[0].is_greedy, scored[1].is_greedy) == (True, False)


def test_a_context_is_read_once_for_all_its_choices():
    (tree,) = plan_trees(choices_of(12), 1000)
    # 20 tokens of the context, and of each choice all but the last.
    assert tree.tokens == 20 + 0 + 1 + 4 + 2


def test_examples_before_several_contexts_are_read_once():
    (tree,) = plan_trees(choices_of(12, 30), 1000)
    assert tree.tokens == 8 + (12 + 7) + (30 + 7)


IDS = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.builds(Continuation, IDS, IDS), max_size=12), st.integers(1, 30))
def test_every_continuation_is_in_one_tree_within_the_budget(continuations, budget):
    trees = list(plan_trees(continuations, budget))
    sequences = [sequence for tree in trees for sequence in tree.sequences]
    assert sorted(s.record for s in sequences) == list(range(len(continuations)))
    for sequence in sequences:
        continuation = continuations[sequence.record]
        assert tuple(sequence.tokens) == continuation.context + continuation.tokens
        assert sequence.scored_from == len(continuation.context)
    contexts = [{tuple(s.tokens[: s.scored_from]) for s in tree.sequences} for tree in trees]
    assert sum(map(len, contexts)) == len({c.context for c in continuations})
    assert all(tree.tokens <= budget or len(group) == 1 for tree, group in zip(trees, contexts, strict=True))


def test_short_questions_after_a_long_context_are_spread_over_trees():
    """Varlen attention gathers the keys of each: 100 contexts of 101 tokens have ten times as many as a tree may."""
    shared = tuple(range(4, 104))
    trees = list(plan_trees([Continuation((*shared, 110 + i), (1, 2)) for i in range(100)], 64))
    assert len(trees) > 5
    assert all(sum(map(len, (s.tokens for s in tree.sequences))) <= 16 * 64 for tree in trees)


def test_no_continuation_makes_no_tree(tiny_model):
    assert score_continuations(load(tiny_model()), plan_trees([], 64)) == {}


def test_a_context_that_is_too_long_loses_its_beginning():
    whole = Continuation(tuple(range(10)), (20, 21, 22))
    # The last token is not read, so that 12 tokens are read without a cut.
    assert cut_context(whole, 12) == whole
    assert cut_context(whole, 8) == Continuation((4, 5, 6, 7, 8, 9), (20, 21, 22))
    assert cut_context(whole, 3) == Continuation((9,), (20, 21, 22))


def test_a_continuation_that_is_too_long_is_refused():
    with pytest.raises(SaroError, match="the continuation is 3 tokens, and the model reads 2; leave it out"):
        cut_context(Continuation((1,), (20, 21, 22)), 2)


def test_spaces_at_the_end_of_a_context_become_the_continuations():
    encoder = TextEncoder(tiny_tokenizer())
    assert encoder.encode_pair("Is it? ", "yes") == encoder.encode_pair("Is it?", " yes")
    assert encoder.tokenizer.decode(encoder.encode_pair("Is it? ", "yes").tokens) == " yes"


def test_an_empty_context_is_the_prefix_token():
    encoder = TextEncoder(tiny_tokenizer())
    assert encoder.prefix_id == BOS
    assert encoder.encode_pair("", "yes").context == (BOS,)
    assert encoder.encode_pair(" ", "yes") == Continuation((BOS,), tuple(encoder.encode(" yes")))
    assert encoder.encode_pair("", "<|bos|>yes") == encoder.encode_pair("", "yes")


@pytest.mark.parametrize("context", ["", "Is it?"])
def test_a_continuation_without_a_token_is_refused(context):
    with pytest.raises(SaroError, match="the continuation has no token of its own"):
        TextEncoder(tiny_tokenizer()).encode_pair(context, "")


@pytest.mark.parametrize(("is_rendered", "text"), [(True, "Hello"), (False, "<|bos|>Hello")])
def test_no_second_bos_is_added(is_rendered, text):
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)]
    )
    assert TextEncoder(tokenizer).encode("Hello")[0] == BOS
    assert TextEncoder(tokenizer, is_rendered).encode(text).count(BOS) == text.count("<|bos|>")
