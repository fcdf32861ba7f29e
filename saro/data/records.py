"""Reads JSONL files as typed records. Every error names file:line and what to do, and never shows the record's text."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from saro.config import KINDS, PAIR_KINDS
from saro.data.jsonl import fault, parse_id, parse_kind, parse_text, read_objects, shown, type_name
from saro.errors import nearest

ROLES = ("system", "user", "assistant")

# Fields by format. A record has the fields of exactly one format, and any of the common ones.
_COMMON_FIELDS = ("id", "kind", "meta")
_PAIR_FIELDS = ("prompt", "chosen", "rejected")
_SIDE_FIELDS = ("reasoning", "answer", "open")
# A form becomes part of the names of metrics, in which a slash separates the parts.
_FORM = r"[a-z0-9][a-z0-9_-]{0,31}"
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
    """The text that the model should produce, without tags.

    Attributes:
        reasoning: the chain of reasoning, its steps joined by line ends. None if there is none, or if the record's
            format does not separate it from the answer.
        answer: the text after the reasoning; the whole response if ``reasoning`` is None.
        open: True if this is only the beginning of a response: it has no stop token and, without an answer, no closing
            tag. Only a side of a pair may be open.
    """

    reasoning: str | None
    answer: str
    open: bool = False

    @property
    def is_reasoning_open(self) -> bool:
        """True if the response ends inside its reasoning."""
        return self.open and self.reasoning is not None and not self.answer


@dataclass(frozen=True)
class Example:
    """One record of stage 1 (RW).

    Attributes:
        id: unique in its file; default "file-stem:17", with the line number.
        kind: one of ``KINDS``.
        prompt: turns, the last one the user's. In TRL's string format a str: raw text, without a chat template.
        response: the response to train on.
        where: "file.jsonl:17" for error messages: the file as the user named it, and the line.
    """

    id: str
    kind: str
    prompt: tuple[Message, ...] | str
    response: Response
    where: str


@dataclass(frozen=True)
class Pair:
    """One record of stage 2 (SRPO): a prompt, a preferred response and a rejected one.

    Attributes:
        id: unique in its file; default "file-stem:17", with the line number.
        kind: one of ``PAIR_KINDS``: the preference is about the outcome ("op-cot") or the process ("pp-cot").
        prompt: as in ``Example``.
        chosen, rejected: the two responses, which differ.
        where: "file.jsonl:17" for error messages: the file as the user named it, and the line.
        form: how the pair was made, such as "intervene", from ``meta.synth.form``; None if the record does not say.
            Metrics are also reported by form.
    """

    id: str
    kind: str
    prompt: tuple[Message, ...] | str
    chosen: Response
    rejected: Response
    where: str
    form: str | None = None


Record = TypeVar("Record", Example, Pair)


def read_examples(path: str | os.PathLike) -> Iterator[Example]:
    """Yield the examples of a JSONL file in order, reading line by line; blank lines are skipped.

    Formats: ours (``prompt``, ``reasoning``, ``answer``) and TRL's (``prompt`` and ``completion``, as strings or as
    messages; ``messages``, whose last turn is the response). Each may have ``id``, ``kind`` and ``meta`` (ignored).

    Raises SaroError during iteration: for a file that cannot be read or is empty, and for the first faulty record.
    """
    return _read_records(path, parse_example)


def _read_records(path: str | os.PathLike, parse: Callable[[dict[str, Any], str, str], Record]) -> Iterator[Record]:
    stem = Path(os.fsdecode(path)).stem
    first_line: dict[str, int] = {}
    for line, where, fields in read_objects(path):
        record = parse(fields, where, f"{stem}:{line}")
        if (first := first_line.setdefault(record.id, line)) != line:
            wrong = f"id {shown(record.id)} is already used on line {first}"
            fault(where, wrong, "give each record its own id, or none")
        yield record


def read_pairs(path: str | os.PathLike) -> Iterator[Pair]:
    """Yield the pairs of a JSONL file in order, reading line by line; blank lines are skipped.

    Formats: ours (``chosen`` and ``rejected`` are objects with ``reasoning`` and ``answer``) and TRL's (both are
    strings, used without a chat template, or both are a list of one assistant message). The prompt is always a field of
    its own: it is never guessed from what the two responses have in common. A side in our format may be ``open``: the
    beginning of a response, which may end inside its reasoning, without an answer.

    Raises SaroError during iteration: for a file that cannot be read or is empty, and for the first faulty record.
    """
    return _read_records(path, parse_pair)


def holds_pairs(path: str | os.PathLike) -> bool:
    """Return True if a file's first record has the fields of a pair. Raises SaroError like ``read_pairs``."""
    _, _, first = next(read_objects(path))
    return "chosen" in first or "rejected" in first


def parse_pair(record: dict[str, Any], where: str, default_id: str) -> Pair:
    """Parse a JSON object as a pair, in any of the formats. Raises SaroError at ``where`` if it is faulty."""
    if "label" in record and "chosen" not in record:
        fault(where, 'field "label" makes this a labelled response, not a pair', "set --preference.loss kto")
    for name in ("completion", "messages", "answer", "reasoning"):
        if name in record:
            fault(where, f"field {shown(name)} makes this an example, not a pair", "give examples to stage 1 (RW)")
    _find_format(record, {"pair": _PAIR_FIELDS}, where)
    sides = [record[name] for name in ("chosen", "rejected")]
    if all(isinstance(side, dict) for side in sides):
        prompt = parse_prompt(record["prompt"], "prompt", where)
        chosen, rejected = (_parse_pair_side(record[name], name, where) for name in ("chosen", "rejected"))
    else:
        for name in ("chosen", "rejected"):
            if not isinstance(record[name], str | list):
                fault(where, f"{name} is {type_name(record[name])}", "give both sides in one form")
        prompt, chosen = _parse_prompt_and_completion(record["prompt"], record["chosen"], where, "chosen")
        _, rejected = _parse_prompt_and_completion(record["prompt"], record["rejected"], where, "rejected")
    if chosen == rejected:
        fault(where, "chosen equals rejected", "drop this pair")
    id, kind = parse_id(record, where, default_id), parse_kind(record, PAIR_KINDS, where)
    return Pair(id, kind, prompt, chosen, rejected, where, _parse_form(record, where))


def _parse_pair_side(value: dict[str, Any], name: str, where: str) -> Response:
    for key in value:
        if key not in _SIDE_FIELDS:
            fault(where, f"{name} has the field {shown(key)}", nearest(key, _SIDE_FIELDS))
    is_open = value.get("open", False)
    if not isinstance(is_open, bool):
        fault(where, f"{name}: open is {type_name(is_open)}", "give true or false, or leave the field out")
    if is_open and value.get("reasoning") is not None and value.get("answer", "") == "":
        # Without an answer, the response ends inside the reasoning.
        return Response(_parse_reasoning(value, where, f"{name}: "), "", open=True)
    if "answer" not in value:
        fault(where, f"{name} has no answer", "add it")
    return replace(_parse_response(value, where, f"{name}: "), open=is_open)


def _parse_form(record: dict[str, Any], where: str) -> str | None:
    """Return ``meta.synth.form``, how data construction made a pair; None if there is none. Other meta is not read."""
    meta = record.get("meta")
    synth = meta.get("synth") if isinstance(meta, dict) else None
    form = synth.get("form") if isinstance(synth, dict) else None
    if form is None:
        return None
    fix = 'give a short name, such as "intervene", or leave it out'
    if not isinstance(form, str):
        fault(where, f"meta.synth.form is {type_name(form)}", fix)
    if not re.fullmatch(_FORM, form):
        fault(where, f"meta.synth.form is {shown(form)}, not 1 to 32 of the characters a-z 0-9 _ -", fix)
    if form in PAIR_KINDS:
        fault(where, f"meta.synth.form is {shown(form)}, the name of a kind of pair", "give the form another name")
    return form


def parse_example(record: dict[str, Any], where: str, default_id: str) -> Example:
    """Parse a JSON object as an example, in any of the formats. Raises SaroError at ``where`` if it is faulty."""
    for name in ("chosen", "rejected"):
        if name in record:
            fault(where, f"field {shown(name)} makes this a preference pair", "give pairs to stage 2 (SRPO)")
    if "label" in record:
        wrong = 'field "label" makes this a labelled response, which may be undesirable'
        fault(where, wrong, "give it to stage 2 (SRPO) with --preference.loss kto, or remove the field")
    if "open" in record:
        fault(where, 'only a side of a pair may be "open"', "finish the response and leave the field out")
    form = _find_format(record, _EXAMPLE_FORMATS, where)
    if form == "native":
        prompt = parse_prompt(record["prompt"], "prompt", where)
        response = _parse_response(record, where)
    elif form == "prompt-completion":
        prompt, response = _parse_prompt_and_completion(record["prompt"], record["completion"], where)
    else:
        *turns, last = parse_messages(record["messages"], "messages", where)
        if last.role != "assistant":
            fault(where, f"the last turn of messages is the {last.role}'s", "end with the assistant turn to learn")
        prompt = _parse_conversation(turns, "messages before the last turn", where)
        response = Response(None, last.content)
    id, kind = parse_id(record, where, default_id), parse_kind(record, KINDS, where)
    return Example(id, kind, prompt, response, where)


def _find_format(record: dict[str, Any], formats: dict[str, tuple[str, ...]], where: str) -> str:
    """Return the one format whose fields the record has. Raises SaroError for unknown, mixed and missing fields."""
    valid = dict.fromkeys([*(name for fields in formats.values() for name in fields), *_COMMON_FIELDS])
    for name in record:
        if name not in valid:
            fault(where, f'unknown field {shown(name)} (data of your own goes under "meta")', nearest(name, valid))
    given = [name for name in record if name not in _COMMON_FIELDS]
    fitting = [form for form, fields in formats.items() if set(given) <= set(fields)]
    if not fitting:
        listed = "; ".join(f"{', '.join(fields)} ({form})" for form, fields in formats.items())
        fault(where, f"fields of two formats: {', '.join(given)}", f"give those of one: {listed}")
    # A record with only a prompt fits two formats: name the field that is missing in the first, which is ours.
    for name in formats[fitting[0]]:
        if name not in record and name != "reasoning":
            fault(where, f"field {shown(name)} is missing", "add it")
    return fitting[0]


def parse_prompt(value: Any, name: str, where: str) -> tuple[Message, ...]:
    """Parse a prompt for the chat template: a string is one user turn. Raises SaroError at ``where`` if it is faulty."""
    if isinstance(value, str):
        return (Message("user", parse_text(value, name, where)),)
    if not isinstance(value, list):
        fault(where, f"{name} is {type_name(value)}", "give a string or a list of messages")
    return _parse_conversation(parse_messages(value, name, where), name, where)


def _parse_prompt_and_completion(
    prompt: Any, completion: Any, where: str, name: str = "completion"
) -> tuple[tuple[Message, ...] | str, Response]:
    """Parse TRL's prompt and response (field ``name``): both strings, without a chat template, or both messages."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return parse_text(prompt, "prompt", where), Response(None, parse_text(completion, name, where))
    for field, value in (("prompt", prompt), (name, completion)):
        if not isinstance(value, str | list):
            fault(where, f"{field} is {type_name(value)}", "give a string or a list of messages")
    if not isinstance(prompt, list) or not isinstance(completion, list):
        wrong = f"prompt is {type_name(prompt)} and {name} is {type_name(completion)}"
        fault(where, wrong, "give both as strings or both as lists of messages")
    turns = parse_messages(completion, name, where)
    if [turn.role for turn in turns] != ["assistant"]:
        fault(where, f"{name} is not one assistant turn", "put the turns before it into the prompt")
    messages = parse_messages(prompt, "prompt", where)
    return _parse_conversation(messages, "prompt", where), Response(None, turns[0].content)


def _parse_response(value: dict[str, Any], where: str, prefix: str = "") -> Response:
    """Parse the response in our format: ``reasoning`` (string, list of steps, null or absent) and ``answer``."""
    reasoning = _parse_reasoning(value, where, prefix)
    return Response(reasoning, parse_text(value["answer"], f"{prefix}answer", where))


def _parse_reasoning(value: dict[str, Any], where: str, prefix: str) -> str | None:
    reasoning = value.get("reasoning")
    if isinstance(reasoning, list):
        if not reasoning:
            fault(where, f"{prefix}reasoning has no steps", "add one, or leave the field out")
        steps = [parse_text(step, f"{prefix}reasoning step {i}", where) for i, step in enumerate(reasoning, start=1)]
        reasoning = "\n".join(steps)
    elif isinstance(reasoning, str):
        reasoning = parse_text(reasoning, f"{prefix}reasoning", where, "write it, or leave the field out")
    elif reasoning is not None:
        fault(where, f"{prefix}reasoning is {type_name(reasoning)}", "give a string or a list of steps")
    return reasoning


def parse_messages(value: Any, name: str, where: str) -> list[Message]:
    """Parse a list of messages; their order is not checked. Raises SaroError at ``where`` if one is faulty."""
    if not isinstance(value, list):
        fault(where, f"{name} is {type_name(value)}", "give a list of messages")
    if not value:
        fault(where, f"{name} is an empty list", "add its messages")
    return [_parse_message(item, f"{name}: message {i}", where) for i, item in enumerate(value, start=1)]


def _parse_message(value: Any, name: str, where: str) -> Message:
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
        wrong = f"the role {shown(role)}" if isinstance(role, str) else f"a role that is {type_name(role)}"
        fault(where, f"{name} has {wrong}", nearest(role, ROLES))
    # Allow an empty system turn: people use it to switch off the system prompt that some templates insert.
    return Message(role, parse_text(value["content"], f"{name}: content", where, may_be_empty=role == "system"))


def _parse_conversation(turns: list[Message], name: str, where: str) -> tuple[Message, ...]:
    """Check the turns of a prompt and return them. Only the first may be a system turn; the last must be the user's."""
    for i, turn in enumerate(turns[1:], start=2):
        if turn.role == "system":
            fault(where, f"{name}: message {i} is a system turn", "only the first may be one; move it there")
    if not turns:
        fault(where, f"{name}: there are none", "add the user turn to answer")
    last = turns[-1].role
    if last == "assistant":
        fault(where, f"{name}: the last turn is the assistant's", "put it into the response or drop it")
    if last != "user":
        fault(where, f"{name}: the last turn is the {last}'s", "add the user turn to answer")
    return tuple(turns)
