"""Parses conversations: their turns, and the order in which turns may stand."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from saro.data.jsonl import fault, parse_text, shown, type_name
from saro.errors import nearest

ROLES = ("system", "user", "assistant")
# Only records may have these roles: not every chat template writes them, and ``ChatFormat`` checks that the model's does.
RECORD_ROLES = (*ROLES, "developer", "tool")
# Names under which published data has the reasoning of an assistant turn. transformers gives them to templates as the first.
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of ``ROLES``, or of ``RECORD_ROLES`` in a record.
        content: the turn's text, exactly as in the file.
    """

    role: str
    content: str

    def template_fields(self) -> dict[str, str]:
        """Return the turn as chat templates take it."""
        return asdict(self)


@dataclass(frozen=True)
class ReasoningMessage(Message):
    """An assistant turn whose reasoning is in a field of its own.

    Attributes:
        reasoning: the reasoning, exactly as in the file. In an earlier turn of a prompt, the chat template gets it as at
            inference, and decides whether the model reads it.
    """

    reasoning: str

    def template_fields(self) -> dict[str, str]:
        """Return the turn as chat templates take it."""
        return {"role": self.role, "content": self.content, _REASONING_FIELDS[0]: self.reasoning}


def parse_messages(value: Any, name: str, where: str, *, in_record: bool = False) -> list[Message]:
    """Parse a list of messages; their order is not checked.

    Args:
        name: name of the list, for the error message.
        where: file and line, for the error message.
        in_record: accept what only records may have: ``RECORD_ROLES``, reasoning in a field of its own, and fields that
            are null or empty, as in columns of a table.

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


def _parse_message(value: Any, name: str, where: str, roles: Sequence[str] = ROLES) -> Message:
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
    return Message(role, parse_text(value["content"], f"{name}: content", where, may_be_empty=role == "system"))


def _parse_record_message(value: Any, name: str, where: str) -> Message:
    if not isinstance(value, dict):
        return _parse_message(value, name, where)
    # A table has all fields for all messages: those that a message does not have are null.
    given = {key: item for key, item in value.items() if key in ("role", "content") or item not in (None, [])}
    if "tool_calls" in given:
        fault(where, f"{name} has tool_calls", "write the call into content as the model writes it, or drop the record")
    fields = [key for key in _REASONING_FIELDS if key in given]
    if len(fields) > 1:
        fault(where, f"{name} has {' and '.join(fields)}", "keep one of them")
    reasoning = [given.pop(field) for field in fields]
    message = _parse_message(given, name, where, RECORD_ROLES)
    if not fields:
        return message
    if message.role != "assistant":
        fault(where, f"{name}: a {message.role} turn has {fields[0]}", "only the assistant reasons; remove it")
    text = parse_text(reasoning[0], f"{name}: {fields[0]}", where, "write it, or leave the field out")
    return ReasoningMessage(message.role, message.content, text)
