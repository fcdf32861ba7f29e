"""Find what a chat template writes around an assistant's text: before it, after it, and after text with tool calls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from saro.data.chat_template import ChatTemplate
from saro.data.messages import Message, RecordMessage
from saro.data.records import Response
from saro.data.response_tokens import ResponseTokenizer
from saro.errors import SaroError

# Placeholder answer, used to find out what the template writes after one. No template has a reason to change it.
_PROBE = "saro-probe-answer"


class AnswerTurn:
    """The assistant's last turn, as a model's template writes it.

    Args:
        stop_ids: ids that end generation.
        control_ids: ids of control tokens, which no response holds as text.
        think_tags: opening and closing tag of the reasoning.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: frozenset[int],
        control_ids: frozenset[int],
        think_tags: tuple[str, str],
    ) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._control_ids = control_ids
        self._think_tags = think_tags
        self._responses = ResponseTokenizer(tokenizer)

    def opens_reasoning(self, rendered_prompt: str) -> bool:
        """Return True if the template has opened the reasoning at the end of a rendered prompt."""
        return rendered_prompt.rstrip().endswith(self._think_tags[0])

    def closes_reasoning(self, rendered_prompt: str) -> bool:
        """Return True if the template has closed the reasoning at the end of a rendered prompt."""
        return rendered_prompt.rstrip().endswith(self._think_tags[1])

    def end_after_calls(self, prompt: Sequence[Message], rendered: str, response: Response) -> str:
        """Return what the template writes after the text of a response with calls, up to the token that ends generation.

        Raises SaroError if it does not write the calls after the text.
        """
        content = response.answer and _PROBE
        if response.reasoning is not None and not content:
            # The calls must be able to come after text: gpt-oss writes them right after the role.
            self.end_after_calls(prompt, rendered, Response(None, _PROBE, calls=response.calls))
        turn = RecordMessage("assistant", content, calls=response.calls)
        written = self._template.render([*prompt, turn], add_generation_prompt=False)
        opening, closing = self._think_tags
        # A template may have opened the reasoning in the prompt, or closed an empty one. Here it writes an empty one, or none.
        empty = rf"{re.escape(opening)}\s*{re.escape(closing)}\s*"
        if self.opens_reasoning(rendered):
            start = rendered[: rendered.rindex(opening)]
        else:
            start = re.sub(f"{empty}$", "", rendered)
        beginning, rest = written[: len(start)], re.sub(rf"^\s*{empty}", "", written[len(start) :])
        before = self.space + content
        if beginning != start or not rest.startswith(before):
            raise SaroError(
                "the chat template does not write tool_calls after the text of their turn; drop the record, or give a "
                "template that does with --data.chat_template FILE"
            )
        turn_end = self._until_stop(rest.removeprefix(before))
        if turn_end is None:
            raise SaroError(
                "after tool_calls the chat template writes no token that ends generation; add the one that it writes to "
                "eos_token_id in generation_config.json"
            )
        return turn_end

    @cached_property
    def _rendered_probe(self) -> tuple[str, str]:
        """Return what the template writes before and after an assistant's answer."""
        probe = (Message("user", "Hello"), Message("assistant", _PROBE))
        before, probe_found, after = self._template.render(probe, add_generation_prompt=False).rpartition(_PROBE)
        if not probe_found:
            raise SaroError("the chat template does not write the assistant's answer; give one that does")
        return before, after

    @cached_property
    def start(self) -> str:
        """Return what a model writes between a prompt and an answer: white space, such as Llama 2's, or control tokens.

        gpt-oss opens the channel of its answer, after a prompt that ends with the role. Other text, such as the empty
        reasoning that Qwen3's template writes, is not part of it.
        """
        before, _ = self._rendered_probe
        prompt = self._template.render((Message("user", "Hello"),))
        written = before.removeprefix(prompt)
        if not before.startswith(prompt) or any(tag in written for tag in self._think_tags):
            return ""
        has_control = not self._control_ids.isdisjoint(self._responses.ids(written))
        return written if has_control or not written.strip() else ""

    @cached_property
    def space(self) -> str:
        """Return ``start`` if it is white space, else nothing: calls may be written without the rest."""
        return "" if self.start.strip() else self.start

    @cached_property
    def end(self) -> str:
        """Return what the template writes after an answer, up to and including the first token that ends generation."""
        _, suffix = self._rendered_probe
        turn_end = self._until_stop(suffix)
        if turn_end is not None:
            return turn_end
        names = ", ".join(repr(self._tokenizer.convert_ids_to_tokens(i)) for i in sorted(self._stop_ids))
        raise SaroError(
            f"after an answer the chat template writes {suffix!r}, and generation ends only at {names}: the model "
            "would never learn to stop; add the template's end token to eos_token_id in generation_config.json"
        )

    def _until_stop(self, text: str) -> str | None:
        """Return a text up to and including the first token that ends generation, None if there is none."""
        for token, (_, stop) in zip(*self._responses.locate(text), strict=True):
            if token in self._stop_ids:
                return text[:stop]
        return None
