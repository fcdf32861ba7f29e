"""Example -> prompt ids, completion ids and the kind of each scored token, through the model's chat template.

The prompt's ids are exactly what the model reads at inference; the completion's ids follow it, up to and including
the stop token. The template never renders the completion, so it cannot drop the reasoning from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import cached_property
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from saro.data.records import Example, Message, Pair, Response
from saro.data.tree import RowKind, ScoredSequence
from saro.errors import SaroError

# Stands for an answer when the template is asked what it puts after one; no template has a reason to change it.
_PROBE = "saro-probe-answer"


@dataclass(frozen=True)
class ChatFormat:
    """How conversations become token ids for one model.

    Attributes:
        tokenizer: a fast tokenizer (character offsets are needed).
        stop_ids: the ids at which generation ends (``generation_config.eos_token_id``).
        template_date: the day that templates see as today.
        think_tags: opening and closing tag of the reasoning.
        template_variables: further variables for the template, such as ``enable_thinking``.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    template_date: date
    think_tags: tuple[str, str] = ("<think>", "</think>")
    template_variables: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise SaroError("the model has no fast tokenizer (tokenizer.json); convert it with transformers first")
        if not self.stop_ids:
            raise SaroError("the model names no end token: set eos_token_id in its generation_config.json")

    def render_prompt(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as the template writes it. Raises SaroError where the template refuses it."""
        return self._apply_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def inference_prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's ids as transformers itself makes them for generation: what the encoding is checked against."""
        return self._apply_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)

    def _apply_template(self, messages: Sequence[Message], **options: Any) -> Any:
        if self.tokenizer.chat_template is None:
            raise SaroError(
                "the model has no chat template; give one with --data.chat_template FILE, or use string prompts"
            )
        variables = {"date_string": self.template_date.strftime("%d %b %Y")} | dict(self.template_variables or {})
        try:
            return self.tokenizer.apply_chat_template(
                [{"role": m.role, "content": m.content} for m in messages],
                chat_template=self._clockless_template,
                **options,
                **variables,
            )
        except TemplateError as error:
            # A syntax error has the place on a line of its own.
            message = " ".join(str(error).split())
            raise SaroError(f"the model's chat template refuses this conversation: {message}") from error

    def prompt_ids(self, prompt: Sequence[Message] | str) -> list[int]:
        """Ids that the model reads before it answers, with at most one BOS. A string is raw text, no template."""
        if isinstance(prompt, str):
            return self._raw_prompt_ids(prompt)
        return self._ids(self.render_prompt(prompt))

    def completion_text(self, rendered_prompt: str, response: Response) -> str:
        """The text that follows a rendered prompt, without the stop token.

        Where the template has already opened the reasoning, the text starts after the opening tag.
        """
        opening, closing = self.think_tags
        begun = rendered_prompt.rstrip().endswith(opening)
        text = response.answer
        if response.reasoning is not None:
            if opening in response.reasoning or closing in response.reasoning:
                raise SaroError(f"the reasoning holds a {opening} or {closing} tag of its own; remove it")
            text = f"{opening}\n{response.reasoning}\n{closing}\n\n{text}"
        elif begun and not text.lstrip().startswith(opening):
            # The template has begun to think; an answer without reasoning ends that at once.
            text = f"{opening}\n\n{closing}\n\n{text}"
        if rendered_prompt.rstrip().endswith(closing) and text.lstrip().startswith(opening):
            raise SaroError(
                f"the chat template closes the reasoning ({closing}) before the answer begins; "
                "set --data.template_variables.enable_thinking true, or what this template calls it"
            )
        if begun:
            text = text.lstrip().removeprefix(opening)
            if rendered_prompt.endswith("\n"):
                text = text.removeprefix("\n")
        return text

    def encode(self, example: Example, record: int = 0) -> ScoredSequence:
        """Token ids of one example, and which of them are scored: those of the completion, stop token included.

        Raises SaroError, with the example's file and line, for what cannot be right.
        """
        return self._encode(example.prompt, example.response, example.where, record)

    def encode_pair(self, pair: Pair, record: int = 0) -> tuple[ScoredSequence, ScoredSequence]:
        """The two sequences of a pair, chosen and rejected, on the same prompt ids. Raises as ``encode`` does."""
        chosen = self._encode(pair.prompt, pair.chosen, pair.where, record)
        rejected = self._encode(pair.prompt, pair.rejected, pair.where, record)
        if np.array_equal(chosen.tokens, rejected.tokens):
            raise SaroError(f"{pair.where}: chosen and rejected are the same tokens; drop this pair")
        return chosen, rejected

    def _encode(self, prompt: Sequence[Message] | str, response: Response, where: str, record: int) -> ScoredSequence:
        try:
            if isinstance(prompt, str):
                prompt_ids = self._raw_prompt_ids(prompt)
                completion, kinds = self._completion(response.answer, self._raw_turn_end)
            else:
                rendered = self.render_prompt(prompt)
                prompt_ids = self._ids(rendered)
                completion, kinds = self._completion(self.completion_text(rendered, response), self._turn_end)
        except SaroError as error:
            raise SaroError(f"{where}: {error}") from error
        bos = self.tokenizer.bos_token_id
        if bos is not None and prompt_ids[:2] == [bos, bos]:
            raise SaroError(f"{where}: the prompt begins with two BOS tokens; remove the one in its text")
        tokens = np.array(prompt_ids + completion, np.int32)
        return ScoredSequence(tokens, len(prompt_ids), np.array(kinds, np.uint8), record)

    def _completion(self, text: str, turn_end: str) -> tuple[list[int], list[int]]:
        encoded = self.tokenizer(text + turn_end, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded.input_ids
        if ids[-1] not in self.stop_ids:
            raise SaroError("the stop token merges with the end of the answer; end the answer with another character")
        # Of the response alone: what the template writes before its end token may well be a control token.
        of_response = (i for i, (start, _) in zip(ids, encoded.offset_mapping, strict=True) if start < len(text))
        control = self._control_ids.intersection(of_response)
        if control:
            names = ", ".join(repr(self.tokenizer.convert_ids_to_tokens(i)) for i in sorted(control))
            raise SaroError(f"the response holds the model's control token {names} as text; remove or rewrite it")
        closing = self.think_tags[1]
        think_end = text.find(closing) + len(closing) if closing in text else 0
        kinds = [RowKind.THINK if start < think_end else RowKind.ANSWER for start, _ in encoded.offset_mapping]
        kinds[-1] = RowKind.STOP
        if closing in text and closing not in self.tokenizer.decode(ids):
            raise SaroError(
                f"the tokenizer does not keep the tag {closing}; set --data.think_tags to tags that it keeps"
            )
        return ids, kinds

    @cached_property
    def _clockless_template(self) -> str:
        """The chat template with its clock stopped at ``template_date``.

        transformers takes only plain data as variables, no function, so a macro of the same name shadows its
        ``strftime_now``: it replaces each directive by what it is on that day.
        """
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            if "default" not in template:
                raise SaroError(
                    f"the model has several chat templates ({', '.join(sorted(template))}) and no default; "
                    "give one with --data.chat_template FILE"
                )
            template = template["default"]
        if "strftime_now" not in template:
            return template
        midnight = datetime.combine(self.template_date, time())
        directives = [f"%{flag}{letter}" for letter in "aAbBcCdDeFgGhHIjmMpRSTuUVwWxXyYzZ" for flag in ("-", "")]
        replaced = "".join(f"|replace({d!r}, {midnight.strftime(d)!r})" for d in directives)
        return f"{{%- macro strftime_now(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro +%}}{template}"

    @cached_property
    def _turn_end(self) -> str:
        """What the template puts after an answer, up to and including the first token that ends generation."""
        probe = (Message("user", "Hello"), Message("assistant", _PROBE))
        _, found, suffix = self.render_prompt(probe, add_generation_prompt=False).rpartition(_PROBE)
        if not found:
            raise SaroError("the chat template does not write the assistant's answer; give one that does")
        encoded = self.tokenizer(suffix, add_special_tokens=False, return_offsets_mapping=True)
        for token, (_, stop) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
            if token in self.stop_ids:
                return suffix[:stop]
        names = ", ".join(repr(self.tokenizer.convert_ids_to_tokens(i)) for i in sorted(self.stop_ids))
        raise SaroError(
            f"after an answer the chat template writes {suffix!r}, and generation ends at {names} alone: the model would "
            "never learn to stop; add the template's end token to eos_token_id in generation_config.json"
        )

    @cached_property
    def _raw_turn_end(self) -> str:
        eos = self.tokenizer.eos_token_id
        token = eos if eos in self.stop_ids else min(self.stop_ids)
        return self.tokenizer.convert_ids_to_tokens(token)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        tags = {self.tokenizer.convert_tokens_to_ids(tag) for tag in self.think_tags}
        unknown = {self.tokenizer.unk_token_id}
        named = frozenset(self.tokenizer.all_special_ids)
        # Llama 3 names only its BOS and end token; <|start_header_id|> is a special token all the same.
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        # GPT-2's unknown token is its end token too, and a tag that the tokenizer does not know is the unknown token.
        return (named | special) - tags - unknown | self.stop_ids

    def _raw_prompt_ids(self, text: str) -> list[int]:
        with_special = self.tokenizer(text).input_ids
        plain = self._ids(text)
        # Some tokenizers also append an end token, after which no answer can follow: keep what comes before the text.
        extra = len(with_special) - len(plain)
        for n_before in range(extra + 1):
            if with_special[n_before : n_before + len(plain)] == plain:
                return with_special[: n_before + len(plain)]
        return with_special

    def _ids(self, text: str) -> list[int]:
        # The template writes its own BOS, so the tokenizer must not add another.
        return self.tokenizer(text, add_special_tokens=False).input_ids
