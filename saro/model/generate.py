"""Generate answers to prompts, in batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from saro.data.chat_format import ChatFormat
from saro.data.records import Message
from saro.model.attention import native_attention
from saro.model.policy import Policy


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    max_tokens: int,
    *,
    temperature: float = 0.0,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Continue prompts in one batch, in eval mode and with transformers' own attention.

    Args:
        prompts: token ids of each prompt.
        stop_ids: generation of a prompt ends at the first of these.
        max_tokens: longest continuation.
        temperature: 0 takes the likeliest token each time; above 0 tokens are drawn from the whole distribution.
        streamer: gets the prompt's tokens, then each new token at once; for a single prompt only.

    Returns:
        The new token ids of each prompt. The last one is a stop id unless the answer was cut at ``max_tokens``.
    """
    lm = policy.causal_lm
    longest = max(map(len, prompts))
    pad = min(stop_ids)
    # Pad on the left, so that all prompts end where generation begins.
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=lm.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=lm.device)
    options = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=temperature > 0,
        pad_token_id=pad,
        eos_token_id=sorted(stop_ids),
    )
    if temperature > 0:
        options.update(temperature=temperature, top_k=0, top_p=1.0)
    with (
        policy.evaluating(),
        native_attention(lm),
        policy.precision(),
        policy.gathered(lm),
        _without_generation_options(lm),
    ):
        output = lm.generate(input_ids=ids, attention_mask=mask, generation_config=options, streamer=streamer)
    return [_cut_padding(row, stop_ids) for row in output[:, longest:].tolist()]


def answer_prompts(
    policy: Policy, chat: ChatFormat, prompts: Sequence[Sequence[Message] | str], max_tokens: int
) -> list[str]:
    """Return greedy answers of at most ``max_tokens`` tokens to prompts, in one batch, without special tokens."""
    if not prompts:
        return []
    answers = generate(policy, [chat.prompt_ids(prompt) for prompt in prompts], chat.stop_ids, max_tokens)
    answers = [answer[chat.count_start(answer) :] for answer in answers]
    return [chat.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


@contextmanager
def _without_generation_options(lm: PreTrainedModel) -> Iterator[None]:
    """Leave out the options of generation_config.json: transformers takes each one that the caller does not set.

    Such as a repetition penalty, with which greedy tokens are not the likeliest.
    """
    own, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = own


def _cut_padding(tokens: list[int], stop_ids: Collection[int]) -> list[int]:
    """Return the tokens up to and including the first stop id: all after it is padding."""
    for i, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: i + 1]
    return tokens
