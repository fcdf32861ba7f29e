"""Parse the ``tools`` of a record, which the assistant may call, and the ``tool_calls`` of its turns."""

import json
from collections.abc import Sequence
from typing import Any

from saro.data.jsonl import fault, parse_json, parse_text, shown, type_name
from saro.errors import nearest

_CALL_FIELDS = ("id", "type", "function")
_FUNCTION_FIELDS = ("name", "arguments")


def parse_tools(value: Any, where: str) -> str | None:
    """Parse the tools of a record: a list of OpenAI's form, or JSON text of one. None and empty lists are no tools.

    Returns JSON text of the list: it can be hashed and compared, as the turns of a prompt must be.

    Raises SaroError at ``where`` if it is not a list of ``{"type": "function", "function": {"name": ...}}``, or holds null
    outside of JSON text: a table adds that for the fields of other records.
    """
    tools = _parse_list(value, "tools", where)
    for i, tool in enumerate(tools, start=1):
        _parse_function(tool, f"tools: tool {i}", where)
    return _as_json(tools, "tools", where, is_table=not isinstance(value, str)) if tools else None


def parse_calls(value: Any, name: str, where: str) -> str | None:
    """Parse the calls of an assistant turn: a list of OpenAI's form, or JSON text of one. See ``parse_tools``.

    Arguments are an object, or JSON text of one, which becomes the object: chat templates expect that.

    Raises SaroError at ``where`` if it is not a list of ``{"function": {"name": ..., "arguments": ...}}``, or arguments hold
    null outside of JSON text.
    """
    is_table = not isinstance(value, str)
    items = enumerate(_parse_list(value, name, where), start=1)
    calls = [_parse_call(item, f"{name}: call {i}", where, is_table) for i, item in items]
    return _as_json(calls, name, where, is_table=False) if calls else None


def rename_functions(text: str | None, prefix: str) -> tuple[str | None, list[str]]:
    """Return tools or calls, as JSON text, in which each function has a name of its own with this prefix; and the names."""
    if text is None:
        return None, []
    items = json.loads(text)
    names = [f"{prefix}{i}_" for i in range(len(items))]
    renamed = [item | {"function": item["function"] | {"name": name}} for item, name in zip(items, names, strict=True)]
    return json.dumps(renamed, ensure_ascii=False), names


def _parse_list(value: Any, name: str, where: str) -> list[Any]:
    if value is None or value == "":
        return []
    if isinstance(value, str):
        value = parse_json(parse_text(value, name, where), f"{where}: {name}") or []
    if not isinstance(value, list):
        fault(where, f"{name} is {type_name(value)}", "give a list, or JSON text of one")
    return value


def _parse_function(value: Any, name: str, where: str) -> dict[str, Any]:
    """Return the function of a tool or of a call."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict):
        fault(where, f"{name} has no function", 'give {"type": "function", "function": {"name", ...}}')
    parse_text(function.get("name"), f"{name}: name", where)
    return function


def _parse_call(value: Any, name: str, where: str, is_table: bool) -> dict[str, Any]:
    function = _without_null(_parse_function(value, name, where), _FUNCTION_FIELDS, name, where)
    call = _without_null(value, _CALL_FIELDS, name, where)
    if call.get("type", "function") != "function":
        fault(where, f"{name} is not of the type function", "drop the record")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        is_table = False
        arguments = parse_json(parse_text(arguments, f"{name}: arguments", where), f"{where}: {name}: arguments")
    if not isinstance(arguments, dict):
        fault(where, f"{name}: arguments are {type_name(arguments)}", "give an object, or JSON text of one")
    _as_json(arguments, f"{name}: arguments", where, is_table=is_table)
    return call | {"function": function | {"arguments": arguments}}


def _without_null(value: dict[str, Any], fields: Sequence[str], name: str, where: str) -> dict[str, Any]:
    """Return the fields of an object that are not null. Raises SaroError for fields that are not among ``fields``."""
    given = {key: item for key, item in value.items() if item is not None}
    for key in given:
        if key not in fields:
            fault(where, f"{name} has the field {shown(key)}", nearest(key, fields))
    return given


def _as_json(value: Any, name: str, where: str, *, is_table: bool) -> str:
    """Return a value as JSON text. If it may be from a table, null is an error anywhere in it."""
    if is_table and _has_null(value):
        fault(where, f"{name}: null stands where a table may have added it", "give them as JSON text, or leave it out")
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        fault(where, f"{name} cannot be written as JSON", "give them as JSON text")
    return parse_text(text, name, where)


def _has_null(value: Any) -> bool:
    """Return True if a value of JSON is null or holds null. It is a loop, because values may be nested deep."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if item is None:
            return True
        if isinstance(item, dict | list):
            waiting += item.values() if isinstance(item, dict) else item
    return False
