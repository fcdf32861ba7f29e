"""Prompts are answered in one batch as each would be alone, and the policy is left as it was."""

from __future__ import annotations

import pytest
import torch
from loaded import load
from tiny import IM_END

from saro.data.records import Message
from saro.model.generate import answer_prompts, generate
from saro.model.unmodified import unmodified

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22], [30]]


@pytest.fixture
def policy(tiny_model):
    return load(tiny_model())


def test_a_batch_gives_what_each_prompt_gives_alone(policy):
    batch = generate(policy, PROMPTS, {IM_END}, max_tokens=12)
    assert batch == [generate(policy, [prompt], {IM_END}, max_tokens=12)[0] for prompt in PROMPTS]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 4},
        {"min_new_tokens": 8, "suppress_tokens": [*range(100)]},
    ],
    ids=str,
)
def test_greedy_tokens_are_those_of_the_unmodified_model(policy, options):
    policy.causal_lm.generation_config.update(**options)
    own = policy.causal_lm.generation_config.to_dict()
    (answer,) = generate(policy, PROMPTS[:1], {IM_END}, max_tokens=8)
    tokens = list(PROMPTS[0])
    with torch.no_grad(), unmodified(policy):
        for token in answer:
            assert policy.causal_lm(torch.tensor([tokens])).logits[0, -1].argmax() == token
            tokens.append(token)
    assert policy.causal_lm.generation_config.to_dict() == own


def test_an_answer_ends_with_its_first_stop_token(policy):
    (free,) = generate(policy, PROMPTS[:1], {IM_END}, max_tokens=8)
    stop = free[3]
    (stopped,) = generate(policy, PROMPTS[:1], {stop, IM_END}, max_tokens=8)
    assert stopped == free[: free.index(stop) + 1]


def test_an_answer_that_ends_early_has_no_padding_in_a_batch(policy):
    alone = [generate(policy, [prompt], {IM_END}, max_tokens=8)[0] for prompt in PROMPTS]
    stop = alone[0][1]
    answers = generate(policy, PROMPTS, {stop}, max_tokens=8)
    assert answers[0][-1] == stop
    assert all(stop not in answer[:-1] for answer in answers)


def test_an_answer_is_cut_at_the_limit(policy):
    (answer,) = generate(policy, PROMPTS[:1], {IM_END}, max_tokens=3)
    assert len(answer) == 3


def test_a_temperature_draws_tokens_by_torchs_seed(policy):
    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return generate(policy, PROMPTS, {IM_END}, max_tokens=12, temperature=5.0)

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert draw(0) != generate(policy, PROMPTS, {IM_END}, max_tokens=12)


def test_the_policy_trains_on_as_before(policy):
    policy.train()
    generate(policy, PROMPTS, {IM_END}, max_tokens=2)
    assert policy.training
    assert policy.causal_lm.config._attn_implementation == "saro_packed"


def test_without_prompts_there_is_nothing_to_generate(policy):
    assert answer_prompts(policy, chat=None, prompts=[], max_tokens=4) == []


def test_answers_are_text_without_special_tokens(tiny_model, policy):
    from datetime import date

    from saro.config import DataConfig, ModelConfig
    from saro.model.source import find_model

    chat = find_model(ModelConfig(name=tiny_model())).chat_format(DataConfig(), date(2024, 7, 26))
    prompts = [(Message("user", "Why?"),), "raw text"]
    texts = answer_prompts(policy, chat, prompts, max_tokens=6)
    ids = generate(policy, [chat.prompt_ids(prompt) for prompt in prompts], chat.stop_ids, max_tokens=6)
    assert texts == [chat.tokenizer.decode(answer, skip_special_tokens=True) for answer in ids]
    assert not any("<|" in text for text in texts)
