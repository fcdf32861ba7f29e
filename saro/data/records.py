"""JSONL files -> typed records. Every error names file:line and the mend, and never shows the record's text."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from saro.config import KINDS, PAIR_KINDS
from saro.data.jsonl import fault, read_objects, shown, type_name
from saro.errors import nearest

ROLES = ("system", "user", "assistant")

# The fields of each format of an example; a record has those of one format, and any of the common ones.
_COMMON_FIELDS = ("id", "kind", "meta")
_PAIR_FIELDS = ("prompt", "chosen", "rejected")
_EXAMPLE_FORMATS = {
    "native": ("prompt", "reasoning", "answer"),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of ``ROLES``.
        content: the turn's text, exactly as in the file.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Response:
    """What the model is to produce, as text without tags.

    Attributes:
        reasoning: the chain of reasoning, steps joined with a line end; None where the format does not tell it apart.
        answer: what follows the reasoning; the whole response where ``reasoning`` is None.
    """

    reasoning: str | None
    answer: str


@dataclass(frozen=True)
class Example:
    """One record of stage 1 (RW).

    Attributes:
        id: unique in its file; "file-stem:17" (the line) where the file gives none.
        kind: one of ``KINDS``.
        prompt: turns, the user's last; a str only in TRL's string format: raw text, without a chat template.
        response: the response to learn.
        where: file, named as the user did, and line, "file.jsonl:17": for error messages.
    """

    id: str
    kind: str
    prompt: tuple[Message, ...] | str
    response: Response
    where: str


@dataclass(frozen=True)
class Pair:
    """One record of stage 2 (SRPO): a prompt and two responses, of which the first is preferred.

    Attributes:
        id: unique in its file; "file-stem:17" (the line) where the file gives none.
        kind: one of PAIR_KINDS: "op-cot", told apart by the outcome, or "pp-cot", by the process.
        prompt: as in ``Example``.
        chosen, rejected: the two responses, which differ.
        where: file, named as the user did, and line, "file.jsonl:17": for error messages.
    """

    id: str
    kind: str
    prompt: tuple[Message, ...] | str
    chosen: Response
    rejected: Response
    where: str


Record = TypeVar("Record", Example, Pair)


def read_examples(path: str | os.PathLike) -> Iterator[Example]:
    """The examples of a JSONL file in its order, read line by line; blank lines are skipped.

    Formats: ours (``prompt``, ``reasoning``, ``answer``) and TRL's (``prompt`` and ``completion``, as text or as
    messages; ``messages``, whose last turn is the response). Each may have ``id``, ``kind`` and ``meta`` (ignored).

    Raises SaroError, when iterated: for a file that cannot be read or is empty, and for the first faulty record.
    """
    return _read(path, parse_example)


def _read(path: str | os.PathLike, parse: Callable[[dict[str, Any], str, str], Record]) -> Iterator[Record]:
    stem = Path(os.fsdecode(path)).stem
    first_line: dict[str, int] = {}
    for line, where, fields in read_objects(path):
        record = parse(fields, where, f"{stem}:{line}")
        if (first := first_line.setdefault(record.id, line)) != line:
            fault(where, f"id {shown(record.id)} is that of line {first}", "give each record its own id, or none")
        yield record


def read_pairs(path: str | os.PathLike) -> Iterator[Pair]:
    """The pairs of a JSONL file in its order, read line by line; blank lines are skipped.

    Formats: ours (``chosen`` and ``rejected`` are objects with ``reasoning`` and ``answer``) and TRL's (both are text,
    without a chat template, or both are one assistant message in a list). The prompt is always a field of its own: it is
    never guessed from what the two responses have in common.

    Raises SaroError, when iterated: for a file that cannot be read or is empty, and for the first faulty record.
    """
    return _read(path, parse_pair)


def holds_pairs(path: str | os.PathLike) -> bool:
    """Whether the first record of a JSONL file is a pair, by its fields. Raises SaroError as ``read_pairs`` does."""
    _, _, first = next(read_objects(path))
    return "chosen" in first or "rejected" in first


def parse_pair(record: dict[str, Any], where: str, default_id: str) -> Pair:
    """The pair that a JSON object holds, in any of the formats; raises SaroError at ``where`` if it is faulty."""
    for name in ("completion", "messages", "answer", "reasoning"):
        if name in record:
            fault(where, f"field {shown(name)} makes this an example, not a pair", "give examples to stage 1 (RW)")
    _format(record, {"pair": _PAIR_FIELDS}, where)
    sides = [record[name] for name in ("chosen", "rejected")]
    if all(isinstance(side, dict) for side in sides):
        prompt = _prompt(record["prompt"], "prompt", where)
        chosen, rejected = (_pair_side(record[name], name, where) for name in ("chosen", "rejected"))
    else:
        for name in ("chosen", "rejected"):
            if not isinstance(record[name], str | list):
                fault(where, f"{name} is {type_name(record[name])}", "give both sides in one form")
        prompt, chosen = _prompt_and_completion(record["prompt"], record["chosen"], where, "chosen")
        _, rejected = _prompt_and_completion(record["prompt"], record["rejected"], where, "rejected")
    if chosen == rejected:
        fault(where, "chosen equals rejected", "drop this pair")
    return Pair(_id(record, where, default_id), _kind(record, PAIR_KINDS, where), prompt, chosen, rejected, where)


def _pair_side(value: dict[str, Any], name: str, where: str) -> Response:
    for key in value:
        if key not in ("reasoning", "answer"):
            fault(where, f"{name} has the field {shown(key)}", nearest(key, ("reasoning", "answer")))
    if "answer" not in value:
        fault(where, f"{name} has no answer", "add it")
    return _response(value, where, f"{name}: ")


def parse_example(record: dict[str, Any], where: str, default_id: str) -> Example:
    """The example that a JSON object holds, in any of the formats; raises SaroError at ``where`` if it is faulty."""
    for name in ("chosen", "rejected"):
        if name in record:
            fault(where, f"field {shown(name)} makes this a preference pair", "give pairs to stage 2 (SRPO)")
    form = _format(record, _EXAMPLE_FORMATS, where)
    if form == "native":
        prompt = _prompt(record["prompt"], "prompt", where)
        response = _response(record, where)
    elif form == "prompt-completion":
        prompt, response = _prompt_and_completion(record["prompt"], record["completion"], where)
    else:
        *turns, last = _messages(record["messages"], "messages", where)
        if last.role != "assistant":
            fault(where, f"the last turn of messages is the {last.role}'s", "end with the assistant turn to learn")
        prompt = _conversation(turns, "messages before the last turn", where)
        response = Response(None, last.content)
    return Example(_id(record, where, default_id), _kind(record, KINDS, where), prompt, response, where)


def _format(record: dict[str, Any], formats: dict[str, tuple[str, ...]], where: str) -> str:
    """The one format whose fields the record has; unknown, mixed and missing fields are faults."""
    valid = dict.fromkeys([*(name for fields in formats.values() for name in fields), *_COMMON_FIELDS])
    for name in record:
        if name not in valid:
            fault(where, f'unknown field {shown(name)} (data of your own goes under "meta")', nearest(name, valid))
    given = [name for name in record if name not in _COMMON_FIELDS]
    fitting = [form for form, fields in formats.items() if set(given) <= set(fields)]
    if not fitting:
        listed = "; ".join(f"{', '.join(fields)} ({form})" for form, fields in formats.items())
        fault(where, f"fields of two formats: {', '.join(given)}", f"give those of one: {listed}")
    # A record with a prompt alone fits two formats: what it lacks is named for the first, ours.
    for name in formats[fitting[0]]:
        if name not in record and name != "reasoning":
            fault(where, f"field {shown(name)} is missing", "add it")
    return fitting[0]


def _prompt(value: Any, name: str, where: str) -> tuple[Message, ...]:
    """A prompt that goes through the chat template: text is one user turn."""
    if isinstance(value, str):
        return (Message("user", _text(value, name, where)),)
    if not isinstance(value, list):
        fault(where, f"{name} is {type_name(value)}", "give a text or a list of messages")
    return _conversation(_messages(value, name, where), name, where)


def _prompt_and_completion(
    prompt: Any, completion: Any, where: str, name: str = "completion"
) -> tuple[tuple[Message, ...] | str, Response]:
    """TRL's prompt and response, of which ``name`` is the field: both are text (no chat template) or both messages."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return _text(prompt, "prompt", where), Response(None, _text(completion, name, where))
    for field, value in (("prompt", prompt), (name, completion)):
        if not isinstance(value, str | list):
            fault(where, f"{field} is {type_name(value)}", "give a text or a list of messages")
    if not isinstance(prompt, list) or not isinstance(completion, list):
        wrong = f"prompt is {type_name(prompt)} and {name} is {type_name(completion)}"
        fault(where, wrong, "give both as text or both as lists of messages")
    turns = _messages(completion, name, where)
    if [turn.role for turn in turns] != ["assistant"]:
        fault(where, f"{name} is not one assistant turn", "put the turns before it into the prompt")
    return _conversation(_messages(prompt, "prompt", where), "prompt", where), Response(None, turns[0].content)


def _response(value: dict[str, Any], where: str, prefix: str = "") -> Response:
    """Our format's response: the fields ``reasoning`` (text, list of steps, null or absent) and ``answer``."""
    reasoning = value.get("reasoning")
    if isinstance(reasoning, list):
        if not reasoning:
            fault(where, f"{prefix}reasoning has no steps", "add one, or leave the field out")
        steps = [_text(step, f"{prefix}reasoning step {i}", where) for i, step in enumerate(reasoning, start=1)]
        reasoning = "\n".join(steps)
    elif isinstance(reasoning, str):
        reasoning = _text(reasoning, f"{prefix}reasoning", where, "write it, or leave the field out")
    elif reasoning is not None:
        fault(where, f"{prefix}reasoning is {type_name(reasoning)}", "give a text or a list of steps")
    return Response(reasoning, _text(value["answer"], f"{prefix}answer", where))


def _messages(value: Any, name: str, where: str) -> list[Message]:
    """A list of messages, each checked for itself."""
    if not isinstance(value, list):
        fault(where, f"{name} is {type_name(value)}", "give a list of messages")
    if not value:
        fault(where, f"{name} is an empty list", "add its messages")
    return [_message(item, f"{name}: message {i}", where) for i, item in enumerate(value, start=1)]


def _message(value: Any, name: str, where: str) -> Message:
    if not isinstance(value, dict):
        fault(where, f"{name} is {type_name(value)}", 'give an object {"role", "content"}')
    for key in value:
        if key not in ("role", "content"):
            fault(where, f"{name} has the field {shown(key)}", "a message has only role and content; remove it")
    for key in ("role", "content"):
        if key not in value:
            fault(where, f"{name} has no {key}", "add it")
    role = value["role"]
    if role not in ROLES:
        found = f"the role {shown(role)}" if isinstance(role, str) else f"a role that is {type_name(role)}"
        fault(where, f"{name} has {found}", nearest(role, ROLES))
    # An empty system turn is how people switch off the system prompt that some templates put in.
    return Message(role, _text(value["content"], f"{name}: content", where, may_be_empty=role == "system"))


def _conversation(turns: list[Message], name: str, where: str) -> tuple[Message, ...]:
    """The turns of a prompt: at most one system turn, the first; the user's last."""
    for i, turn in enumerate(turns[1:], start=2):
        if turn.role == "system":
            fault(where, f"{name}: message {i} is a system turn", "only the first may be one; move it there")
    last = turns[-1].role if turns else "nobody"
    if last != "user":
        mend = "put it into the response or drop it" if last == "assistant" else "add the user turn to answer"
        fault(where, f"{name}: the last turn is the {last}'s" if turns else f"{name}: there are none", mend)
    return tuple(turns)


def _text(
    value: Any, name: str, where: str, mend: str = "write it or drop the record", may_be_empty: bool = False
) -> str:
    if not isinstance(value, str):
        fault(where, f"{name} is {type_name(value)}", "give a text")
    if not may_be_empty and not value.strip():
        fault(where, f"{name} is empty", mend)
    if (position := value.find("\0")) >= 0:
        fault(where, f"{name} has a NUL character at {position + 1}", "remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        wrong = f"{name} has half of a surrogate pair at character {error.start + 1}"
        fault(where, wrong, "write the whole character; the text was cut or converted wrongly")
    return value


def _id(record: dict[str, Any], where: str, default: str) -> str:
    value = record.get("id", default)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        fault(where, f"id is {type_name(value)}", "give a text or a whole number, or leave it out")
    return _text(value, "id", where, "fill it or leave it out")


def _kind(record: dict[str, Any], kinds: tuple[str, ...], where: str) -> str:
    value = record.get("kind", kinds[0])
    if value not in kinds:
        fault(where, f"kind is {shown(value) if isinstance(value, str) else type_name(value)}", nearest(value, kinds))
    return value
