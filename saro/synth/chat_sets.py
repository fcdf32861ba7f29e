"""Converts records in the formats of Alpaca and ShareGPT, in which many data sets are published."""

from __future__ import annotations

from typing import Any

from saro.data.jsonl import fault, shown, type_name
from saro.data.published import parse_field
from saro.errors import nearest

Record = dict[str, Any]

# Names of the speakers in ShareGPT and the sets that took its format over -> roles.
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}


def convert_alpaca(source: Record, number: int, where: str) -> Record | None:
    """Convert a record of Alpaca: ``instruction``, ``input``, which may be empty, and ``output``; perhaps ``system``.

    The prompt is the instruction and, after a line end, the input. ``history`` (pairs of earlier turns, as LLaMA-Factory
    has them) comes before it. Returns None for an empty output, of which Alpaca has some.
    """
    instruction = parse_field(source, "instruction", where)
    prompt = "\n".join([instruction, *_parse_optional(source, "input", where)])
    if source.get("output") == "":
        return None
    turns = [("system", text) for text in _parse_optional(source, "system", where)]
    history = source.get("history") or []
    if not isinstance(history, list) or any(not isinstance(said, list) or len(said) != 2 for said in history):
        fault(where, "history is not a list of [question, answer]", "fix or drop the record")
    for question, answer in history:
        turns += [("user", question), ("assistant", answer)]
    turns += [("user", prompt), ("assistant", parse_field(source, "output", where))]
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"id": f"alpaca-{number:06d}", "kind": "general", "messages": messages}


def convert_sharegpt(source: Record, number: int, where: str) -> Record | None:
    """Convert a record of ShareGPT: ``conversations``, a list of ``from`` and ``value``; perhaps ``system``.

    Returns None for a conversation that does not begin with the user's turn, after a system turn, or does not end with the
    assistant's: such ones were cut when they were collected.
    """
    turns = source.get("conversations")
    if not isinstance(turns, list):
        fault(where, f"conversations is {type_name(turns)}", "check that this is the format of the file")
    if source.get("tools") not in (None, "", []):
        fault(where, 'field "tools" would change the prompt', "drop the record")
    messages = [{"role": "system", "content": text} for text in _parse_optional(source, "system", where)]
    messages += [_parse_turn(turn, f"{where}: turn {i}") for i, turn in enumerate(turns, start=1)]
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken[0] != "user" or spoken[-1] != "assistant":
        return None
    return {"id": f"sharegpt-{number:06d}", "kind": "general", "messages": messages}


def _parse_turn(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        fault(where, f"is {type_name(turn)}", "check that this is the format of the file")
    speaker, text = (parse_field(turn, name, where) for name in ("from", "value"))
    if speaker not in _SPEAKERS:
        fault(where, f"unknown speaker {shown(speaker)}", nearest(speaker, _SPEAKERS))
    return {"role": _SPEAKERS[speaker], "content": text}


def _parse_optional(source: Record, name: str, where: str) -> list[str]:
    """Return a text field as a list, which is empty if the field is absent or has no text."""
    return [] if source.get(name) in (None, "") else [parse_field(source, name, where)]
