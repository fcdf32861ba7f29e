"""Render conversations with a model's chat template, and refuse those of which the template leaves something out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from saro.data.messages import ROLES, Message, RecordMessage, find_tools
from saro.errors import SaroError


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations for one model.

    Attributes:
        tokenizer: has the template.
        today: date that ``strftime_now`` gives to the template.
        variables: more variables for the template, such as ``enable_thinking``.
    """

    tokenizer: PreTrainedTokenizerBase
    today: date
    variables: Mapping[str, Any]

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Render a conversation with the template.

        Raises SaroError if the template refuses it, or leaves out a role, the tools or a call.
        """
        rendered = self._apply(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        # Templates write system, user and assistant turns. Many silently leave out what they do not know.
        parts: dict[str, str] = {}
        probed: list[Message] = []
        for i, turn in enumerate(messages):
            if turn.role not in ROLES:
                probe = f"saro-probe-turn-{i}-"
                parts[probe] = f"{turn.role} turns"
                turn = replace(turn, content=probe)
            if isinstance(turn, RecordMessage):
                if turn.calls is not None and turn.content and turn is not messages[-1]:
                    probe = f"saro-probe-text-{i}-"
                    parts[probe] = "text beside tool_calls"
                    turn = replace(turn, content=probe)
                turn, names = turn.rename_functions(f"saro_probe_{i}_")
                parts |= names
            probed.append(turn)
        written = self._apply(probed, tokenize=False) if parts else ""
        for probe, part in parts.items():
            if probe not in written:
                raise SaroError(
                    f"the model's chat template leaves {part} out; drop the record, or give a template that "
                    "writes them with --data.chat_template FILE"
                )
        return rendered

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Return a prompt's ids as transformers makes them for generation."""
        return self._apply(messages, tokenize=True, add_generation_prompt=True, return_dict=False)

    @property
    def shows_date(self) -> bool:
        """True if prompts may depend on ``today``."""
        return "strftime_now" in str(self.tokenizer.chat_template)

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        if self.tokenizer.chat_template is None:
            raise SaroError(
                "the model has no chat template; give one with --data.chat_template FILE, or use string prompts"
            )
        # Only the user's own variables: Llama 3.1's template writes another date as soon as date_string is given, and no
        # server gives it.
        variables = dict(self.variables)
        tools = find_tools(messages)
        if tools is not None:
            self._check_own_tools(variables)
            variables["tools"] = tools
        try:
            return self.tokenizer.apply_chat_template(
                [m.template_fields() for m in messages],
                chat_template=self._dated,
                **options,
                **variables,
            )
        except TemplateError as error:
            # jinja2 gives the place of a syntax error on a second line, and our errors have one line.
            message = " ".join(str(error).split())
            raise SaroError(f"the model's chat template refuses this conversation: {message}") from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            # Tools and arguments may be of any shape. Python's message may hold the record's text.
            raise SaroError(
                f"the model's chat template fails on this conversation ({type(error).__name__}); fix its tools and calls, or "
                "drop the record"
            ) from error

    def _check_own_tools(self, variables: Mapping[str, Any]) -> None:
        """Raise SaroError if a record with tools of its own cannot have them."""
        if "tools" in variables:
            raise SaroError("the record has tools, and so has --data.template_variables.tools; remove one of them")
        if isinstance(self.tokenizer.chat_template, dict) and "tool_use" in self.tokenizer.chat_template:
            raise SaroError(
                "the model has a chat template of its own for records with tools (tool_use); give it to all records with "
                "--data.chat_template FILE"
            )

    @cached_property
    def _dated(self) -> str:
        """Return the chat template, in which ``strftime_now`` gives ``today`` instead of the current time.

        transformers takes plain data as template variables, but no functions. So a macro of the same name shadows
        transformers' ``strftime_now``, and replaces each directive in the format with its value on that day.
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
        midnight = datetime.combine(self.today, time())
        directives = [f"%{flag}{letter}" for letter in "aAbBcCdDeFgGhHIjmMpRSTuUVwWxXyYzZ" for flag in ("-", "")]
        replaced = "".join(f"|replace({d!r}, {midnight.strftime(d)!r})" for d in directives)
        # With %Y as the only directive (%-Y is its form without padding), on a day in 2024, the macro would read
        #   {%- macro strftime_now(format) -%}{{ format|replace('%-Y', '2024')|replace('%Y', '2024') }}{%- endmacro +%}
        # The "+" in the last tag keeps a line end with which the template may begin.
        return f"{{%- macro strftime_now(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro +%}}{template}"
