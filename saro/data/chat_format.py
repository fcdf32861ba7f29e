"""Encode examples, pairs and beginnings of responses as token ids, through the model's chat template.

The prompt's ids are exactly those that the model reads at inference. The completion's ids follow, up to and including
the stop token, as they would if prompt and completion were tokenized together. The template never renders the completion,
so it cannot drop the reasoning from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from saro.config import THINK_TAGS
from saro.data.answer_turn import AnswerTurn
from saro.data.chat_template import ChatTemplate
from saro.data.messages import Message
from saro.data.records import Example, Pair, Response
from saro.data.response_tokens import ResponseTokenizer, StableTokens
from saro.data.tree import RowKind, ScoredSequence, common_prefix
from saro.errors import SaroError


class EqualSides(SaroError):
    """The two sides of a pair are the same tokens."""


def equal_sides(where: str) -> EqualSides:
    """Return the error of a pair whose two sides are the same tokens."""
    return EqualSides(
        f"{where}: chosen and rejected are the same tokens; drop this pair, or set --data.equal_sides drop"
    )


@dataclass(frozen=True)
class Prefill:
    """The beginning of a response that a model is to continue, as text without tags.

    Attributes:
        reasoning: beginning of the reasoning, or all of it; None for a response without reasoning.
        closed: True if the reasoning ends here and the answer follows.
        answer: beginning of the answer; empty unless the reasoning is closed or there is none.
    """

    reasoning: str | None = None
    closed: bool = False
    answer: str = ""

    def __post_init__(self) -> None:
        if self.answer and self.reasoning is not None and not self.closed:
            raise ValueError("an answer cannot follow reasoning that is not closed")


class PrefilledPrompt(NamedTuple):
    """A prompt and the beginning of a response, as token ids.

    Attributes:
        ids: ids of the prompt, then those of the response's beginning.
        prefilled: number of ids of the response.
    """

    ids: tuple[int, ...]
    prefilled: int


class _Prompt(NamedTuple):
    """A prompt as text and tokens.

    Attributes:
        messages: the conversation; None for a string prompt, which does not go through the template.
        text: the rendered conversation, or the string.
        ids: (n,) ids that the model reads before it answers.
    """

    messages: Sequence[Message] | None
    text: str
    ids: list[int]


class _Completion(NamedTuple):
    """A response as tokens.

    Attributes:
        text: the response with its tags and what the template writes around it.
        ids: (n,) ids, with the stop token unless the response is open.
        starts: the place in the text where each token begins.
        kinds: (n,) uint8, the ``RowKind`` of each token.
    """

    text: str
    ids: list[int]
    starts: list[int]
    kinds: np.ndarray


@dataclass(frozen=True)
class ChatFormat:
    """Encodes conversations as token ids for one model.

    Attributes:
        tokenizer: a fast tokenizer (character offsets are needed).
        stop_ids: ids that end generation (``generation_config.eos_token_id``).
        template_date: date that ``strftime_now`` gives to templates.
        think_tags: opening and closing tag of the reasoning.
        template_variables: more variables for the template, such as ``enable_thinking``.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    template_date: date
    think_tags: tuple[str, str] = THINK_TAGS
    template_variables: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise SaroError("the model has no fast tokenizer (tokenizer.json); convert it with transformers first")
        if not self.stop_ids:
            raise SaroError("the model names no end token: set eos_token_id in its generation_config.json")

    @cached_property
    def _responses(self) -> ResponseTokenizer:
        return ResponseTokenizer(self.tokenizer)

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template."""
        return ChatTemplate(self.tokenizer, self.template_date, dict(self.template_variables or {}))

    @cached_property
    def _turn(self) -> AnswerTurn:
        return AnswerTurn(self.template, self.tokenizer, self.stop_ids, self._control_ids, self.think_tags)

    @property
    def answer_start(self) -> str:
        """Return what a model writes between a prompt and its response, see ``AnswerTurn.start``; most write nothing."""
        return self._turn.start

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """Render the prompt that the model answers; see ``ChatTemplate.render``."""
        return self.template.render(messages)

    def inference_prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return a prompt's ids as transformers makes them for generation; ``check_masks`` compares ours with them."""
        return self.template.ids(messages)

    def prompt_ids(self, prompt: Sequence[Message] | str) -> list[int]:
        """Return the ids that the model reads before it answers. A string prompt does not go through the template."""
        if isinstance(prompt, str):
            return self._raw_prompt_ids(prompt)
        return self._responses.ids(self.render_prompt(prompt))

    def completion_text(self, rendered_prompt: str, response: Response) -> str:
        """Return the text that follows a rendered prompt, without the stop token.

        If the template has already opened the reasoning, the text starts after the opening tag. A response may hold its
        reasoning, as one pair of tags at its beginning, if the record gives none. Raises SaroError for any other tag.
        An open response that ends inside its reasoning has no closing tag.
        """
        opening, closing = self.think_tags
        opened = self.opens_reasoning(rendered_prompt)
        text = response.answer
        tags = self._find_tags(text)
        if response.reasoning is not None:
            for part, found in (("reasoning", self._find_tags(response.reasoning)), ("answer", tags)):
                if found:
                    raise SaroError(f"the {part} holds a {opening} or {closing} tag of its own; remove it")
            text = f"{opening}\n{response.reasoning}"
            if not response.is_reasoning_open:
                text += f"\n{closing}\n\n{response.answer}"
        elif opened and tags == [closing]:
            # A model that continued this prompt has written the text, and the prompt has opened the tag already.
            return text
        elif tags and (tags != [opening, closing] or not text.lstrip().startswith(opening)):
            raise SaroError(
                f"the response's {opening} and {closing} tags are not one pair at its beginning; "
                "write the reasoning once, before the answer, and remove other tags"
            )
        elif opened and not tags:
            # The template opened the think tag, and there is no reasoning: close the tag at once.
            text = f"{opening}\n\n{closing}\n\n{text}"
        if self.closes_reasoning(rendered_prompt) and text.lstrip().startswith(opening):
            raise SaroError(
                f"the chat template closes the reasoning ({closing}) before the answer begins; "
                "set --data.template_variables.enable_thinking true, or what this template calls it"
            )
        if opened:
            text = text.lstrip().removeprefix(opening)
            if rendered_prompt.endswith("\n"):
                text = text.removeprefix("\n")
        return text

    def prefill_ids(self, messages: Sequence[Message], prefill: Prefill | None = None) -> PrefilledPrompt:
        """Return the ids of a prompt and of the beginning of a response, as training encodes them.

        They are the first ids that ``encode`` gives for every response that begins with this text. So the end of the text
        is left out, back to a token that no continuation can change: after "Sure." the next character may be a line end,
        and ".\\n" one token. The model continues from there. A text loses least if it ends with a whole sentence.

        Raises:
            SaroError: the template refuses the conversation or has closed the reasoning, the text holds a think tag, or
                nothing of it is left.
        """
        rendered = self.render_prompt(messages)
        prompt_ids = tuple(self._responses.ids(rendered))
        if prefill is None:
            return PrefilledPrompt(prompt_ids, 0)
        reasoning = prefill.reasoning
        if reasoning == "" and prefill.closed and self.closes_reasoning(rendered):
            # The template has written the empty reasoning already.
            reasoning = None
        response = Response(reasoning, prefill.answer, open=not prefill.closed)
        text = self.completion_text(rendered, response)
        if not text:
            return PrefilledPrompt(prompt_ids, 0)
        text = self._turn.start + text
        stable = self._responses.find_stable(rendered, text)
        _check_kept(response, text, stable)
        return PrefilledPrompt(prompt_ids + tuple(stable.ids), len(stable.ids))

    def opens_reasoning(self, rendered_prompt: str) -> bool:
        """Return True if the template has opened the reasoning at the end of a rendered prompt."""
        return self._turn.opens_reasoning(rendered_prompt)

    def closes_reasoning(self, rendered_prompt: str) -> bool:
        """Return True if the template has closed the reasoning at the end of a rendered prompt."""
        return self._turn.closes_reasoning(rendered_prompt)

    def count_start(self, ids: Sequence[int]) -> int:
        """Return the number of ids with which a drawn response opens its answer (``answer_start``); 0 for most models."""
        if not ids or ids[0] not in self._control_ids:
            return 0
        start = self._responses.ids(self._turn.start)
        return len(start) if list(ids[: len(start)]) == start else 0

    def _find_tags(self, text: str) -> list[str]:
        """Return the think tags in a text, in their order."""
        # The longer one first: it may hold the other.
        longer_first = sorted(self.think_tags, key=len, reverse=True)
        return re.findall("|".join(map(re.escape, longer_first)), text)

    def encode(self, example: Example, record: int = 0) -> ScoredSequence:
        """Encode one example. The tokens of the completion are scored, including the stop token.

        Raises SaroError with the example's file and line if it cannot be encoded correctly.
        """
        if example.response.open:
            raise SaroError(f"{example.where}: the response has no end; only a side of a pair may be open")
        (sequence,) = self._encode(example.prompt, [example.response], example.where, record)
        return sequence

    def encode_pair(self, pair: Pair, record: int = 0) -> tuple[ScoredSequence, ScoredSequence]:
        """Encode a pair as its chosen and its rejected sequence, on the same prompt ids.

        An open side gets only the tokens that no continuation of it can change: its end is left out, back to the last such
        token. It has no stop token.

        Raises EqualSides if both have the same tokens. Raises SaroError as ``encode`` does, and if one side is the beginning
        of the other: every response that begins with the longer one then begins with the shorter one too, so that neither
        can be preferred.
        """
        chosen, rejected = self._encode(pair.prompt, [pair.chosen, pair.rejected], pair.where, record)
        if np.array_equal(chosen.tokens, rejected.tokens):
            raise equal_sides(pair.where)
        shared = common_prefix([chosen.tokens, rejected.tokens])
        if shared == min(len(chosen.tokens), len(rejected.tokens)):
            shorter, longer = ("chosen", "rejected") if shared == len(chosen.tokens) else ("rejected", "chosen")
            raise SaroError(
                f"{pair.where}: the open {shorter} side is only the beginning of the {longer} one; continue it past the "
                "place where the two part, or drop this pair"
            )
        return chosen, rejected

    def locate_tokens(self, prompt: Sequence[Message] | str, response: Response) -> tuple[str, list[int]]:
        """Return the text of a response as it is encoded, and the place in it where each scored token begins.

        The text has the tags and what the template writes around it, up to the stop token unless the response is open.
        Raises SaroError if the response cannot be encoded.
        """
        completion = self._encode_completion(self._read_prompt(prompt), response)
        # A tokenizer may put a space in front of the text, which then begins before it.
        return completion.text, [max(start, 0) for start in completion.starts]

    def _encode(
        self, prompt: Sequence[Message] | str, responses: Sequence[Response], where: str, record: int
    ) -> tuple[ScoredSequence, ...]:
        """Encode responses to one prompt, which is rendered and tokenized once."""
        try:
            read = self._read_prompt(prompt)
            completions = [self._encode_completion(read, response) for response in responses]
        except SaroError as error:
            raise SaroError(f"{where}: {error}") from error
        bos = self.tokenizer.bos_token_id
        if bos is not None and read.ids[:2] == [bos, bos]:
            raise SaroError(f"{where}: the prompt begins with two BOS tokens; remove the one in its text")
        return tuple(
            ScoredSequence(np.array(read.ids + completion.ids, np.int32), len(read.ids), completion.kinds, record)
            for completion in completions
        )

    def _read_prompt(self, prompt: Sequence[Message] | str) -> _Prompt:
        if isinstance(prompt, str):
            return _Prompt(None, prompt, self._raw_prompt_ids(prompt))
        rendered = self.render_prompt(prompt)
        return _Prompt(prompt, rendered, self._responses.ids(rendered))

    def _encode_completion(self, prompt: _Prompt, response: Response) -> _Completion:
        """Return a response as it follows a prompt."""
        if prompt.messages is None:
            start, text, turn_end = "", response.answer, self._raw_turn_end
        else:
            start, turn_end = self._turn.start, self._turn.end
            if response.calls is not None:
                start, turn_end = self._turn.space, self._end_after_calls(prompt, response)
            text = start + self.completion_text(prompt.text, response)
        if response.open:
            stable = self._responses.find_stable(prompt.text, text)
            _check_kept(response, text, stable)
            kinds = self._row_kinds(text, len(start), stable.ids, stable.starts, response.is_reasoning_open)
            return _Completion(text, stable.ids, stable.starts, kinds)
        ids, starts = self._responses.continue_prompt(prompt.text, text, turn_end)
        if ids[-1] not in self.stop_ids:
            raise SaroError("the stop token merges with the end of the answer; end the answer with another character")
        kinds = self._row_kinds(text, len(start), ids, starts, is_reasoning_open=False)
        kinds[-1] = RowKind.STOP
        return _Completion(text + turn_end, ids, starts, kinds)

    def _end_after_calls(self, prompt: _Prompt, response: Response) -> str:
        """Return what the template writes after the text of a response with calls. Raises SaroError if it cannot be used."""
        if self._find_tags(response.calls):
            raise SaroError(f"tool_calls hold a {' or '.join(self.think_tags)} tag; remove it")
        self._check_control(self._responses.ids(response.calls), "tool_calls hold")
        return self._turn.end_after_calls(prompt.messages, prompt.text, response)

    def _row_kinds(
        self, text: str, begin: int, ids: list[int], starts: list[int], is_reasoning_open: bool
    ) -> np.ndarray:
        """Return the part of a response that each of its tokens belongs to; the stop token counts as answer here.

        The response begins at ``begin`` in ``text``, after what the template writes before it. Raises SaroError if a control
        token is part of the response, or the closing tag is not part of the tokens.
        """
        begins = np.array(starts)
        # Check only the response: the template itself may write control tokens before and after it.
        in_response = (begin <= begins) & (begins < len(text))
        self._check_control(np.array(ids)[in_response].tolist(), "the response holds")
        closing = self.think_tags[1]
        think_end = 0
        if is_reasoning_open:
            think_end = len(text)
        elif closing in text:
            think_end = text.index(closing) + len(closing)
        if closing in text and closing not in self._responses.decode(ids):
            raise SaroError(
                f"the tokenizer does not keep the tag {closing}; set --data.think_tags to tags that it keeps"
            )
        return np.where(begins < think_end, np.uint8(RowKind.THINK), np.uint8(RowKind.ANSWER))

    def _check_control(self, ids: Iterable[int], holder: str) -> None:
        """Raise SaroError if a control token is among ids. ``holder`` says whose they are, such as "the response holds"."""
        control = self._control_ids.intersection(ids)
        if control:
            names = ", ".join(repr(self.tokenizer.convert_ids_to_tokens(i)) for i in sorted(control))
            raise SaroError(f"{holder} the model's control token {names} as text; remove or rewrite it")

    @cached_property
    def _raw_turn_end(self) -> str:
        """Return the end token that follows a response if there is no chat template."""
        eos = self.tokenizer.eos_token_id
        token = eos if eos in self.stop_ids else min(self.stop_ids)
        return self.tokenizer.convert_ids_to_tokens(token)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        """Return the ids of the control tokens, which no response may contain as text."""
        tags = {self.tokenizer.convert_tokens_to_ids(tag) for tag in self.think_tags}
        unknown = {self.tokenizer.unk_token_id}
        named = frozenset(self.tokenizer.all_special_ids)
        # all_special_ids is not enough: Llama 3 names only its BOS and end token there, not <|start_header_id|>.
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        # Add stop_ids last, because "- tags - unknown" may remove an end token: GPT-2's is also its unknown token, and
        # tags that are not in the vocabulary map to that.
        return (named | special) - tags - unknown | self.stop_ids

    def _raw_prompt_ids(self, text: str) -> list[int]:
        """Return the ids of a string prompt, after the special tokens with which the tokenizer begins every text."""
        with_special = self.tokenizer(text).input_ids
        plain = self._responses.ids(text)
        # Keep the tokens that the tokenizer puts before the text, and drop those after it: some tokenizers append an
        # end token, which no answer can follow.
        extra = len(with_special) - len(plain)
        for n_before in range(extra + 1):
            if with_special[n_before : n_before + len(plain)] == plain:
                return with_special[: n_before + len(plain)]
        return with_special


def _check_kept(response: Response, text: str, stable: StableTokens) -> None:
    """Raise SaroError if nothing is kept of the last part of an open response, whose text is ``text``."""
    last_part = response.reasoning if response.is_reasoning_open else response.answer
    if last_part and stable.characters <= len(text) - len(last_part):
        raise SaroError(
            "the whole text to continue may merge with what follows it; write a longer one that ends with a sentence"
        )
