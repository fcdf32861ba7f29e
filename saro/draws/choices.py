"""Reads the probabilities of given answers instead of drawing one: what a judge's verdict is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from saro.draws.request import Request
from saro.errors import SaroError
from saro.model.cached_attention import generating, read_prompts
from saro.model.policy import Policy


@dataclass(frozen=True)
class ChoiceTokens:
    """Choices as tokens.

    Attributes:
        shared: ids that all choices begin with; they are read after the prompt.
        first: for each choice, the id after ``shared``, by which it differs from all others.
    """

    shared: tuple[int, ...]
    first: tuple[int, ...]

    @classmethod
    def of(cls, choices: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> ChoiceTokens:
        """Encode choices, each on its own and without special tokens.

        Raises:
            SaroError: two choices cannot be told apart by one token.
        """
        ids = {choice: tokenizer.encode(choice, add_special_tokens=False) for choice in choices}
        shared = 0
        while len(choices) > 1 and len({tuple(i[: shared + 1]) for i in ids.values()}) == 1:
            shared += 1
        seen: dict[int, str] = {}
        for choice, tokens in ids.items():
            if len(tokens) <= shared:
                raise SaroError(f"choice {choice!r} is the beginning of all others, or empty; give another one")
            other = seen.setdefault(tokens[shared], choice)
            if other != choice:
                raise SaroError(f"choices {other!r} and {choice!r} begin with the same token; give others")
        if len(ids) < len(choices):
            raise SaroError(f"choices {', '.join(map(repr, choices))}: one is there twice; remove it")
        (any_ids, *_) = ids.values()
        return cls(tuple(any_ids[:shared]), tuple(tokens[shared] for tokens in ids.values()))


def read_choices(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request]
) -> list[tuple[float, ...]]:
    """Return the log-probs, nats, of each request's choices: those of their first differing tokens as the next token.

    They are log-probs among all tokens, so their probabilities may sum to less than 1. Tokens that all choices begin
    with are read with the prompt. Nothing is drawn, and the sampling options do not matter.

    Raises:
        SaroError: two choices of a request cannot be told apart by one token.
    """
    sets = {r.sampling.choices: ChoiceTokens.of(r.sampling.choices, tokenizer) for r in requests}
    prompts = [(*r.ids, *sets[r.sampling.choices].shared) for r in requests]
    with generating(policy):
        logps = read_prompts(policy, prompts).log_softmax(-1)
    return [tuple(row[list(sets[r.sampling.choices].first)].tolist()) for row, r in zip(logps, requests, strict=True)]
