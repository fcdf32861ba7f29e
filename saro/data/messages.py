"""Parse conversations: their turns, and the order in which turns may stand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from saro.data.jsonl import fault, parse_text, shown, type_name
from saro.data.tool_calls import parse_calls, parse_tools, rename_functions
from saro.errors import nearest

ROLES = ("system", "user", "assistant")
# Only records may have these roles: not every chat template writes them, and ``ChatFormat`` checks that the model's does.
RECORD_ROLES = (*ROLES, "developer", "tool")
# Names under which published data has the reasoning of an assistant turn. transformers gives them to templates as the first.
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_TOOL_FIELDS = ("name", "tool_call_id")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of ``ROLES``, or of ``RECORD_ROLES`` in a record.
        content: the turn's text, exactly as in the file.
    """

    role: str
    content: str

    def template_fields(self) -> dict[str, Any]:
        """Return the turn as chat templates take it."""
        return asdict(self)


@dataclass(frozen=True)
class RecordMessage(Message):
    """A turn with the fields that only turns of records have, as they are in the file.

    Attributes:
        reasoning: an assistant's reasoning in a field of its own. In an earlier turn of a prompt, the chat template gets it
            as at inference, and decides whether the model reads it.
        calls: an assistant's calls, as ``parse_calls`` returns them. The content beside them may be empty.
        tools: on the first turn, what the assistant may call in the conversation, as ``parse_tools`` returns it.
        name, tool_call_id: a tool turn's function, and the call that it answers. Few templates write them.
    """

    reasoning: str | None = None
    calls: str | None = None
    tools: str | None = None
    name: str | None = None
    tool_call_id: str | None = None

    def template_fields(self) -> dict[str, Any]:
        """Return the turn as chat templates take it, without ``tools``, which they take beside the turns."""
        calls = None if self.calls is None else json.loads(self.calls)
        others = {_REASONING_FIELDS[0]: self.reasoning, "tool_calls": calls}
        others |= {name: getattr(self, name) for name in _TOOL_FIELDS}
        given = {name: value for name, value in others.items() if value is not None}
        return {"role": self.role, "content": self.content} | given

    def rename_functions(self, prefix: str) -> tuple[RecordMessage, dict[str, str]]:
        """Return the turn with other names of functions, and the field of each name: "tools" or "tool_calls"."""
        tools, tool_names = rename_functions(self.tools, f"{prefix}tool_")
        calls, call_names = rename_functions(self.calls, f"{prefix}call_")
        fields = dict.fromkeys(tool_names, "tools") | dict.fromkeys(call_names, "tool_calls")
        return replace(self, tools=tools, calls=calls), fields


def parse_messages(value: Any, name: str, where: str, *, in_record: bool = False) -> list[Message]:
    """Parse a list of messages; their order is not checked.

    Args:
        name: name of the list, for the error message.
        where: file and line, for the error message.
        in_record: accept what only records may have: ``RECORD_ROLES``, the fields of ``RecordMessage``, and fields that are
            null or empty, as in columns of a table.

    Raises SaroError at ``where`` if a message is faulty.
    """
    if not isinstance(value, list):
        fault(where, f"{name} is {type_name(value)}", "give a list of messages")
    if not value:
        fault(where, f"{name} is an empty list", "add its messages")
    parse = _parse_record_message if in_record else _parse_message
    return [parse(item, f"{name}: message {i}", where) for i, item in enumerate(value, start=1)]


def parse_prompt(value: Any, name: str, where: str, *, in_record: bool = False) -> tuple[Message, ...]:
    """Parse a prompt for the chat template: a string is one user turn. Raises SaroError at ``where`` if it is faulty."""
    if isinstance(value, str):
        return (Message("user", parse_text(value, name, where)),)
    if not isinstance(value, list):
        fault(where, f"{name} is {type_name(value)}", "give a string or a list of messages")
    return check_prompt(parse_messages(value, name, where, in_record=in_record), name, where)


def add_tools(prompt: tuple[Message, ...] | str, value: Any, where: str) -> tuple[Message, ...] | str:
    """Return a prompt whose first turn has the tools of its record. ``value`` is the record's field; None and empty are none.

    Raises SaroError at ``where`` if it is faulty, or the prompt is raw text, which no template writes tools into.
    """
    tools = parse_tools(value, where)
    if tools is None:
        return prompt
    if isinstance(prompt, str):
        fault(where, "tools stand beside a prompt of raw text", "give the prompt as a list of messages")
    return (RecordMessage(**vars(prompt[0]) | {"tools": tools}), *prompt[1:])


def find_tools(messages: Sequence[Message]) -> list[dict[str, Any]] | None:
    """Return the tools of a conversation as chat templates take them, None if it has none."""
    first = messages[0] if messages else None
    return json.loads(first.tools) if isinstance(first, RecordMessage) and first.tools is not None else None


def as_messages(prompt: tuple[Message, ...] | str) -> tuple[Message, ...]:
    """Return the turns of a prompt; a string is one user turn."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def normalise_prompt(prompt: tuple[Message, ...] | str) -> tuple[tuple[str, str], ...]:
    """Return (role, text) of each turn of a prompt for comparison: in lower case, with single spaces."""
    return tuple((turn.role, " ".join(turn.content.casefold().split())) for turn in as_messages(prompt))


def check_prompt(turns: Sequence[Message], name: str, where: str) -> tuple[Message, ...]:
    """Check the turns of a prompt and return them.

    A system turn comes first, and a developer turn first or after it. A tool turn answers an assistant turn. The last turn
    is the user's or a tool's.
    """
    for i, (before, turn) in enumerate(pairwise(turns), start=2):
        if turn.role == "system":
            fault(where, f"{name}: message {i} is a system turn", "only the first may be one; move it there")
        if turn.role == "developer" and (i > 2 or before.role != "system"):
            fault(where, f"{name}: message {i} is a developer turn", "move it to the beginning")
        if turn.role == "tool" and before.role not in ("assistant", "tool"):
            fault(where, f"{name}: message {i} is a tool turn after the {before.role}'s", "add the assistant's call")
    if not turns:
        fault(where, f"{name}: there are none", "add the user turn to answer")
    first, last = turns[0].role, turns[-1].role
    if first == "tool":
        fault(where, f"{name}: the first turn is a tool's", "begin with the user's")
    if last == "assistant":
        fault(where, f"{name}: the last turn is the assistant's", "put it into the response or drop it")
    if last not in ("user", "tool"):
        fault(where, f"{name}: the last turn is the {last}'s", "add the user turn to answer")
    return tuple(turns)


def _parse_message(
    value: Any, name: str, where: str, roles: Sequence[str] = ROLES, may_be_empty: bool = False
) -> Message:
    if not isinstance(value, dict):
        fault(where, f"{name} is {type_name(value)}", 'give an object {"role", "content"}')
    for key in value:
        if key not in ("role", "content"):
            fault(where, f"{name} has the field {shown(key)}", "a message has only role and content; remove it")
    for key in ("role", "content"):
        if key not in value:
            fault(where, f"{name} has no {key}", "add it")
    role = value["role"]
    if role not in roles:
        wrong = f"the role {shown(role)}" if isinstance(role, str) else f"a role that is {type_name(role)}"
        fault(where, f"{name} has {wrong}", nearest(role, roles))
    if value["content"] is None:
        fault(where, f"{name}: content is null", "write the turn's text or drop the record")
    # Allow an empty system turn: people use it to switch off the system prompt that some templates insert.
    may_be_empty = may_be_empty or role == "system"
    return Message(role, parse_text(value["content"], f"{name}: content", where, may_be_empty=may_be_empty))


def _parse_record_message(value: Any, name: str, where: str) -> Message:
    if not isinstance(value, dict):
        return _parse_message(value, name, where)
    # A table has all fields for all messages: those that a message does not have are null.
    given = {key: item for key, item in value.items() if key in ("role", "content") or item not in (None, [])}
    fields = [key for key in _REASONING_FIELDS if key in given]
    if len(fields) > 1:
        fault(where, f"{name} has {' and '.join(fields)}", "keep one of them")
    role = given.get("role")
    others = {}
    for field in fields:
        if role in RECORD_ROLES and role != "assistant":
            fault(where, f"{name}: a {role} turn has {field}", "only the assistant reasons; remove it")
        others["reasoning"] = parse_text(
            given.pop(field), f"{name}: {field}", where, "write it, or leave the field out"
        )
    if role == "assistant" and (calls := parse_calls(given.pop("tool_calls", None), f"{name}: tool_calls", where)):
        others["calls"] = calls
        content = given.get("content")
        # White space beside the calls does not count as text: templates strip it.
        given["content"] = "" if content is None or (isinstance(content, str) and not content.strip()) else content
    if role == "tool":
        others |= {
            field: parse_text(given.pop(field), f"{name}: {field}", where) for field in _TOOL_FIELDS if field in given
        }
    message = _parse_message(given, name, where, RECORD_ROLES, may_be_empty="calls" in others)
    return RecordMessage(message.role, message.content, **others) if others else message
