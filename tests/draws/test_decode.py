"""Texts that are continued side by side are those that each prompt gets alone from the unmodified model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded import load
from tiny import IM_END, KINDS_OF_LOGITS, KINDS_OF_MODEL, tiny_tokenizer

from saro.data.packs import lay_out
from saro.data.tree import ScoredSequence, build_tree
from saro.draws.decode import continue_texts, draw_tokens
from saro.draws.request import Request, Sampling
from saro.model.attention import native_attention
from saro.model.cached_attention import KeyValueCache, cache_bytes_per_token, continue_rows, generating, read_prompts
from saro.model.score import score_packs

pytestmark = pytest.mark.usefixtures("one_thread")
# Several stop ids, so that texts end at different times and their rows are filled again.
STOPS = (IM_END, *range(5, 264, 16))


def a_prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(61, 260, length).tolist())


def requests_of(*lengths: int, limits: tuple[int, ...] = (12,), **sampling: object) -> list[Request]:
    """Make requests with random prompts; limits of new tokens repeat."""
    return [
        Request(Sampling(max_tokens=limits[i % len(limits)], **sampling), ids=a_prompt(i, length))
        for i, length in enumerate(lengths)
    ]


# Prompts longer and shorter than the window of 8 tokens, and one of a single token; the last two begin alike.
REQUESTS = [
    *requests_of(3, 1, 14, 9, 30, 2, 5, 7, limits=(12, 5, 19)),
    Request(Sampling(max_tokens=9), ids=(*a_prompt(2, 14), 100)),
]


def generated_alone(policy, request: Request, stop_ids=STOPS) -> list[int]:
    """Continue one prompt with transformers' own generate, cache and attention."""
    prompt = torch.tensor([request.ids])
    with policy.evaluating(), native_attention(policy.causal_lm), torch.no_grad():
        output = policy.causal_lm.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.sampling.max_tokens,
            do_sample=False,
            eos_token_id=list(stop_ids),
            pad_token_id=0,
        )
    return output[0, len(request.ids) :].tolist()


def train_adapter(policy) -> None:
    """Give the adapter weights that change the model's texts."""
    torch.manual_seed(1)
    for parameter in policy.trainable().values():
        parameter.data.normal_(std=0.2)


@pytest.mark.parametrize("kind", [*KINDS_OF_MODEL, *KINDS_OF_LOGITS])
def test_greedy_tokens_are_those_of_each_prompt_alone(tiny_model, monkeypatch, kind):
    policy = load(tiny_model(kind), "full")
    alone = [generated_alone(policy, request) for request in REQUESTS]
    assert len({len(ids) for ids in alone}) > 3
    # The cache grows and shrinks on the way.
    monkeypatch.setattr("saro.model.cached_attention.BLOCK_TOKENS", 8)
    for rows in (1, 4, 8):
        assert [list(text.ids) for text in continue_texts(policy, REQUESTS, STOPS, rows)] == alone


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_greedy_tokens_of_an_adapter_are_those_of_each_prompt_alone(tiny_model, kind, method):
    policy = load(tiny_model(kind), method)
    plain = continue_texts(policy, REQUESTS, STOPS, 8)
    train_adapter(policy)
    texts = continue_texts(policy, REQUESTS, STOPS, 8)
    assert [list(text.ids) for text in texts] == [generated_alone(policy, request) for request in REQUESTS]
    assert texts != plain


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma4", "cohere2"])
def test_log_probs_after_a_prefilled_prompt_are_those_of_training(tiny_model, kind):
    policy = load(tiny_model(kind))
    train_adapter(policy)
    texts = continue_texts(policy, REQUESTS, (), 4, with_logps=True)
    for request, text in zip(REQUESTS, texts, strict=True):
        tokens = np.array([*request.ids, *text.ids], np.int32)
        kinds = np.zeros(len(text.ids), np.uint8)
        pack = lay_out([build_tree([ScoredSequence(tokens, len(request.ids), kinds, 0)])])
        ((_, expected),) = score_packs(policy, [pack])
        np.testing.assert_allclose(text.logps, expected, rtol=0, atol=1e-5)


def test_an_end_is_called_stop_and_a_cut_is_called_length(tiny_model):
    policy = load(tiny_model(), "full")
    texts = continue_texts(policy, REQUESTS, STOPS, 4)
    assert {text.finish for text in texts} == {"stop", "length"}
    for request, text in zip(REQUESTS, texts, strict=True):
        assert (text.ids[-1] in STOPS) == (text.finish == "stop")
        assert not set(text.ids[:-1]) & set(STOPS)
        assert text.finish == "stop" or len(text.ids) == request.sampling.max_tokens


def test_a_text_ends_when_it_holds_a_stop_text(tiny_model):
    policy = load(tiny_model(), "full")
    tokenizer = tiny_tokenizer()
    (free,) = continue_texts(policy, requests_of(5, limits=(40,)), (), 1)
    # Two tokens that follow each other nowhere before, and are a character each.
    pairs = [tokenizer.decode(free.ids[i : i + 2]) for i in range(40)]
    whole = [len(pair) == 2 and "�" not in pair for pair in pairs]
    at = next(i for i in range(3, 39) if whole[i] and pairs[i] not in pairs[:i])
    stopped = requests_of(5, limits=(40,), stop=("never there", pairs[at]))
    (text,) = continue_texts(policy, stopped, (), 1, tokenizer=tokenizer)
    assert (text.ids, text.finish) == (free.ids[: at + 2], "stop")


def test_without_requests_there_are_no_texts(tiny_model):
    assert continue_texts(load(tiny_model(), "full"), [], STOPS, 4) == []


def test_the_policy_trains_on_as_before(tiny_model):
    policy = load(tiny_model())
    policy.train()
    continue_texts(policy, REQUESTS[:2], STOPS, 2)
    assert policy.training
    assert policy.causal_lm.config._attn_implementation == "saro_packed"


def test_drawn_tokens_do_not_depend_on_the_batch(tiny_model):
    policy = load(tiny_model(), "full")
    requests = [
        *requests_of(3, 9, 4, temperature=1.5),
        *requests_of(6, 2, 8, temperature=0.8, top_p=0.9, top_k=20),
        *requests_of(7, 5),
    ]
    together = continue_texts(policy, requests, STOPS, 8)
    assert together == [continue_texts(policy, [request], STOPS, 1)[0] for request in requests]


def test_draws_of_one_prompt_differ_by_their_number(tiny_model):
    policy = load(tiny_model(), "full")
    draws = [Request(Sampling(max_tokens=12, temperature=3.0), ids=a_prompt(0, 5), number=n) for n in range(4)]
    texts = continue_texts(policy, draws, (), 4)
    assert len({text.ids for text in texts}) == 4
    assert texts == continue_texts(policy, draws, (), 4)


@pytest.mark.parametrize("kind", [*KINDS_OF_MODEL, *KINDS_OF_LOGITS])
def test_the_size_of_the_cache_is_known_from_the_config(tiny_model, kind):
    policy = load(tiny_model(kind), "full")
    cache = KeyValueCache(rows=2, dtype=torch.float32)
    with generating(policy):
        read_prompts(policy, [a_prompt(0, 3)], cache, [0])
    allocated = sum(x.nbytes for layer in cache.layers for x in layer)
    assert allocated == 2 * cache.capacity * cache_bytes_per_token(policy.causal_lm.config, torch.float32)


@pytest.mark.parametrize("pack_tokens", [4096, 30, 1])
def test_prompts_that_begin_alike_are_read_once_and_as_alone(tiny_model, monkeypatch, pack_tokens):
    monkeypatch.setattr("saro.model.cached_attention.PACK_TOKENS", pack_tokens)
    policy = load(tiny_model("mistral"), "full")
    start = a_prompt(0, 20)
    prompts = [(*start, 70), (*start, 71, 72), start, (*start, 70), a_prompt(1, 6)]
    with generating(policy):
        for group in (prompts, prompts[:4]):
            cache = KeyValueCache(5, torch.float32)
            first = read_prompts(policy, group, cache, range(len(group)))
            second = continue_rows(policy, cache, [80] * len(group), [len(p) for p in group])
            for prompt, now, then in zip(group, first, second, strict=True):
                alone = KeyValueCache(1, torch.float32)
                torch.testing.assert_close(now, read_prompts(policy, [prompt], alone, [0])[0], rtol=0, atol=1e-4)
                next_alone = continue_rows(policy, alone, [80], [len(prompt)])[0]
                torch.testing.assert_close(then, next_alone, rtol=0, atol=1e-4)


def test_a_model_that_never_calls_our_attention_is_refused(tiny_model):
    policy = load(tiny_model(), "full")
    policy.causal_lm.get_decoder().layers = torch.nn.ModuleList()
    with generating(policy), pytest.raises(ValueError, match="does not compute its attention by"):
        read_prompts(policy, [(5, 6)])


def expected_probs(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the distribution (V,) by transformers' own processors."""
    from transformers.generation.logits_process import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits[None])
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores[0].softmax(-1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.05, 0.5, 0.93, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 100]),
)
def test_tokens_are_drawn_as_often_as_transformers_processors_say(seed, temperature, top_p, top_k):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 3
    sampling = Sampling(1, temperature, top_p, top_k)
    points = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    # A neighbour with other options must not matter.
    rows = torch.cat([logits.expand(2000, -1), logits[None]])
    samplings = [sampling] * 2000 + [Sampling(1, 1.0, 0.9)]
    tokens = draw_tokens(rows, samplings, [*points.tolist(), 0.5])[:2000]
    shares = torch.bincount(tokens, minlength=40) / 2000
    torch.testing.assert_close(shares, expected_probs(logits, sampling), rtol=0, atol=1.01e-3)


def test_the_ends_of_the_random_numbers_draw_tokens_that_may_be_drawn():
    logits = torch.tensor([[float("-inf"), 1.0, 2.0, float("-inf")]] * 2)
    for options in ({}, {"top_p": 0.999}, {"top_k": 3}):
        tokens = draw_tokens(logits, [Sampling(1, 1.0, **options)] * 2, [0.0, 1 - 2**-53])
        assert set(tokens.tolist()) <= {1, 2}
