"""Read files as typed records. Every error names file:line and what to do, and never shows the record's text."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from saro.config import KINDS, PAIR_KINDS
from saro.data.jsonl import fault, how_to_add, parse_id, parse_kind, parse_text, shown, type_name
from saro.data.messages import Message, RecordMessage, add_tools, check_prompt, parse_messages, parse_prompt
from saro.data.read_rows import read_rows
from saro.data.record_fields import EXAMPLE_FORMATS, PAIR_FORMATS, READ_COLUMNS, check_columns, find_format, get_synth
from saro.errors import nearest

# The two responses of a pair. Its sequences come in this order in every tree and pack, next to each other.
SIDES = ("chosen", "rejected")
CHOSEN, REJECTED = 0, 1
_SIDE_FIELDS = ("reasoning", "answer", "open")
# A form becomes part of the names of metrics, in which a slash separates the parts.
_FORM = r"[a-z0-9][a-z0-9_-]{0,31}"


@dataclass(frozen=True)
class Response:
    """The text that the model should produce, without tags.

    Attributes:
        reasoning: the chain of reasoning, its steps joined by line ends. None if there is none, or if the record's
            format does not separate it from the answer.
        answer: the text after the reasoning; the whole response if ``reasoning`` is None. Empty only beside calls.
        open: True if this is only the beginning of a response: it has no stop token and, without an answer, no closing
            tag. Only a side of a pair may be open.
        calls: the functions that the response calls after the answer, as ``parse_calls`` returns them. The chat template
            writes them.
    """

    reasoning: str | None
    answer: str
    open: bool = False
    calls: str | None = None

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
        prompt: turns, the last one the user's or a tool's. In TRL's string format a str: raw text, without a chat template.
        response: the response to train on.
        where: "file.jsonl:17" for error messages: the file as the user named it, and the line.
        ignored: names of the record's fields that no format knows.
        conversation: ``where`` of the record that this is one of several turns of; None for a whole record.
    """

    id: str
    kind: str
    prompt: tuple[Message, ...] | str
    response: Response
    where: str
    ignored: tuple[str, ...] = ()
    conversation: str | None = None


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
        ignored: as in ``Example``.
    """

    id: str
    kind: str
    prompt: tuple[Message, ...] | str
    chosen: Response
    rejected: Response
    where: str
    form: str | None = None
    ignored: tuple[str, ...] = ()


Record = TypeVar("Record", Example, Pair)


def read_examples(path: str | os.PathLike) -> Iterator[Example]:
    """Yield the examples of a file in order.

    Files are those of ``read_rows``. Formats: ours (``prompt``, ``reasoning``, ``answer``) and TRL's (``prompt`` and
    ``completion``, as strings or as messages; ``messages``, whose last turn is the response). Each may have ``id`` and
    ``kind``. Other fields are ignored, if they cannot change what the record means.

    Raises SaroError during iteration: for a file that cannot be read or is empty, and for the first faulty record.
    """
    return _read_records(path, parse_example)


def read_pairs(path: str | os.PathLike, *, may_be_equal: bool = False) -> Iterator[Pair]:
    """Yield the pairs of a file in order.

    Formats: ours (``chosen`` and ``rejected`` are objects with ``reasoning`` and ``answer``) and TRL's (both are
    strings, used without a chat template, or both are lists of messages). Lists are one assistant message, after a
    ``prompt``; or they are two whole conversations, which differ only in their last message. The prompt is never guessed
    from the text that two responses have in common. A side in our format may be ``open``: the beginning of a response,
    which may end inside its reasoning, without an answer.

    Args:
        may_be_equal: yield pairs whose two sides are the same, too.

    Raises SaroError during iteration: for a file that cannot be read or is empty, and for the first faulty record.
    """
    return _read_records(path, partial(parse_pair, may_be_equal=may_be_equal))


def _read_records(path: str | os.PathLike, parse: Callable[[dict[str, Any], str, str], Record]) -> Iterator[Record]:
    stem = Path(os.fsdecode(path)).stem
    first_line: dict[str, int] = {}
    for line, where, fields in read_rows(path, READ_COLUMNS):
        record = parse(fields, where, f"{stem}:{line}")
        if (first := first_line.setdefault(record.id, line)) != line:
            wrong = f"id {shown(record.id)} is already used on line {first}"
            fault(where, wrong, "give each record its own id, or none")
        yield record


def read_example_files(
    paths: Iterable[str | os.PathLike], train_on: Literal["last", "all"] = "last"
) -> Iterator[Example]:
    """Yield the examples of several files. An id that occurred in an earlier file gets a number: ID@2, ID@3.

    Args:
        train_on: "all" yields each assistant turn of a conversation as an example of its own; see ``split_turns``.

    Raises SaroError as ``read_examples`` does, and for a file that is given twice.
    """
    records = (record for path in each_once(paths) for record in read_examples(path))
    if train_on == "all":
        records = (turn for record in records for turn in split_turns(record))
    return with_own_ids(records)


def read_pair_files(paths: Iterable[str | os.PathLike], *, may_be_equal: bool = False) -> Iterator[Pair]:
    """Yield the pairs of several files; see ``read_example_files`` and ``read_pairs``."""
    return with_own_ids(record for path in each_once(paths) for record in read_pairs(path, may_be_equal=may_be_equal))


def each_once(paths: Iterable[str | os.PathLike]) -> Iterator[str | os.PathLike]:
    """Yield the paths. Raises SaroError for one that is given twice."""
    seen: set[str] = set()
    for path in paths:
        if os.fspath(path) in seen:
            fault(os.fsdecode(path), "the file is given twice", "name it once")
        seen.add(os.fspath(path))
        yield path


def with_own_ids(records: Iterable[Record]) -> Iterator[Record]:
    """Yield records. A record with the id of an earlier one gets a number, whatever their files are called.

    Raises SaroError if that is the id of another record.
    """
    ids: set[str] = set()
    times: Counter[str] = Counter()
    for record in records:
        id = record.id
        if id in ids:
            times[id] += 1
            id = f"{id}@{times[id] + 1}"
        if id in ids:
            fault(
                record.where,
                f"id {shown(record.id)} is already used, and so is {shown(id)}",
                "rename it",
            )
        ids.add(id)
        yield record if id == record.id else replace(record, id=id)


def split_turns(example: Example) -> Iterator[Example]:
    """Yield an example for each assistant turn of a conversation, each after the prompt that inference would give it.

    So a template that drops the reasoning of earlier turns drops it from the prompts of later turns, and from no response.
    The last one keeps the record's id.

    Raises SaroError for an assistant turn that answers nothing.
    """
    prompt = example.prompt
    turns = [] if isinstance(prompt, str) else [i for i, turn in enumerate(prompt) if turn.role == "assistant"]
    if not turns:
        yield example
        return
    example = replace(example, conversation=example.where)
    for i in turns:
        where = f"{example.where}, message {i + 1}"
        before = check_prompt(prompt[:i], "the turns before it", where)
        yield replace(
            example, id=f"{example.id}:message-{i + 1}", prompt=before, response=_as_response(prompt[i]), where=where
        )
    yield example


def holds_pairs(path: str | os.PathLike) -> bool:
    """Return True if a file's first record has the fields of a pair. Raises SaroError like ``read_pairs``."""
    _, _, first = next(read_rows(path, READ_COLUMNS))
    return any(first.get(name) is not None for name in SIDES)


def parse_pair(record: dict[str, Any], where: str, default_id: str, *, may_be_equal: bool = False) -> Pair:
    """Parse a record as a pair, in any of the formats. Raises SaroError at ``where`` if it is faulty.

    Two sides that are the same are a fault, unless ``may_be_equal``.
    """
    ignored = check_columns(record, where)
    if record.get("messages") is not None and record["messages"] == record.get("chosen"):
        # UltraFeedback: messages repeats the chosen conversation, for stage 1.
        record = {name: value for name, value in record.items() if name != "messages"}
    for name in ("completion", "messages", "answer", "reasoning"):
        if record.get(name) is not None:
            fault(where, f"field {shown(name)} makes this an example, not a pair", "give examples to stage 1 (RW)")
    find_format(record, PAIR_FORMATS, where)
    prompt, chosen, rejected = _parse_sides(record, where)
    prompt = add_tools(prompt, record.get("tools"), where)
    if chosen == rejected and not may_be_equal:
        fault(where, "chosen equals rejected", "drop this pair; --data.equal_sides drop does so in training")
    id, kind = parse_id(record, where, default_id), parse_kind(record, PAIR_KINDS, where)
    form = _parse_form(record, where)
    return Pair(
        id=id, kind=kind, prompt=prompt, chosen=chosen, rejected=rejected, where=where, form=form, ignored=ignored
    )


def _parse_sides(record: dict[str, Any], where: str) -> tuple[tuple[Message, ...] | str, Response, Response]:
    """Return the prompt, the chosen and the rejected response of a pair."""
    sides = [record[name] for name in SIDES]
    if all(isinstance(side, list) for side in sides):
        chosen, rejected = (parse_messages(record[name], name, where, in_record=True) for name in SIDES)
        if len(chosen) > 1 or len(rejected) > 1:
            return _parse_conversations(record.get("prompt"), chosen, rejected, where)
    if "prompt" not in record:
        fix = how_to_add(record, "prompt")
        fault(where, 'field "prompt" is missing', f"{fix}; it is never guessed from the text of the two sides")
    if all(isinstance(side, dict) for side in sides):
        prompt = parse_prompt(record["prompt"], "prompt", where, in_record=True)
        return prompt, *(_parse_pair_side(record[name], name, where) for name in SIDES)
    for name in SIDES:
        if not isinstance(record[name], str | list):
            fault(where, f"{name} is {type_name(record[name])}", "give both sides in one form")
    prompt, chosen = _parse_prompt_and_completion(record["prompt"], record["chosen"], where, "chosen")
    other, rejected = _parse_prompt_and_completion(record["prompt"], record["rejected"], where, "rejected")
    if prompt != other:
        fault(where, "one side is a string and the other a list", "give both sides in one form")
    return prompt, chosen, rejected


def _parse_conversations(
    prompt: Any, chosen: list[Message], rejected: list[Message], where: str
) -> tuple[tuple[Message, ...], Response, Response]:
    """Return prompt and responses of two whole conversations, which differ only in their last messages."""
    *turns, good = chosen
    if turns != rejected[:-1] or {good.role, rejected[-1].role} != {"assistant"}:
        wrong = "chosen and rejected are not one conversation with two last assistant turns"
        fault(where, wrong, "give both the same messages before the last one")
    turns = check_prompt(turns, "chosen before the last turn", where)
    _check_repeated_prompt(prompt, turns, where)
    return turns, _as_response(good), _as_response(rejected[-1])


def _check_repeated_prompt(prompt: Any, turns: tuple[Message, ...], where: str) -> None:
    """Check a prompt that is given beside whole conversations: it is the turns before the response, or one of the user's."""
    if prompt is None:
        return
    if isinstance(prompt, str):
        is_same = any(turn.role == "user" and turn.content == prompt for turn in turns)
    else:
        is_same = parse_prompt(prompt, "prompt", where, in_record=True) == turns
    if not is_same:
        fault(where, "prompt is not that of the conversation beside it", "fix it, or remove it")


def _parse_pair_side(value: dict[str, Any], name: str, where: str) -> Response:
    for key in value:
        if key not in _SIDE_FIELDS:
            fault(where, f"{name} has the field {shown(key)}", nearest(key, _SIDE_FIELDS))
    # A table has the field for all sides; null means that the record does not say.
    is_open = False if value.get("open") is None else value["open"]
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
    form = get_synth(record).get("form")
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
    """Parse a record as an example, in any of the formats. Raises SaroError at ``where`` if it is faulty."""
    ignored = check_columns(record, where)
    if record.get("messages") is not None and record["messages"] == record.get("chosen"):
        # UltraFeedback: the same conversation is an example, and the chosen side of a pair.
        record = {name: value for name, value in record.items() if name not in SIDES}
        ignored = (*ignored, *SIDES)
    for name in SIDES:
        if record.get(name) is not None:
            fault(where, f"field {shown(name)} makes this a preference pair", "give pairs to stage 2 (SRPO)")
    form = find_format(record, EXAMPLE_FORMATS, where)
    if form == "native":
        prompt = parse_prompt(record["prompt"], "prompt", where, in_record=True)
        response = _parse_response(record, where)
    elif form == "prompt-completion":
        prompt, response = _parse_prompt_and_completion(record["prompt"], record["completion"], where)
    else:
        *turns, last = parse_messages(record["messages"], "messages", where, in_record=True)
        if last.role != "assistant":
            fault(where, f"the last turn of messages is the {last.role}'s", "end with the assistant turn to learn")
        prompt = check_prompt(turns, "messages before the last turn", where)
        _check_repeated_prompt(record.get("prompt"), prompt, where)
        response = _as_response(last)
    prompt = add_tools(prompt, record.get("tools"), where)
    id, kind = parse_id(record, where, default_id), parse_kind(record, KINDS, where)
    return Example(id=id, kind=kind, prompt=prompt, response=response, where=where, ignored=ignored)


def _parse_prompt_and_completion(
    prompt: Any, completion: Any, where: str, name: str = "completion"
) -> tuple[tuple[Message, ...] | str, Response]:
    """Parse TRL's prompt and response (field ``name``). Two strings are used without a chat template.

    If the response is a list of messages, the chat template is used, and a string prompt is the user's turn.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        return parse_text(prompt, "prompt", where), Response(None, parse_text(completion, name, where))
    for field, value in (("prompt", prompt), (name, completion)):
        if not isinstance(value, str | list):
            fault(where, f"{field} is {type_name(value)}", "give a string or a list of messages")
    if isinstance(completion, str):
        wrong = f"prompt is {type_name(prompt)} and {name} is {type_name(completion)}"
        fault(where, wrong, "give both as strings or both as lists of messages")
    turns = parse_messages(completion, name, where, in_record=True)
    if [turn.role for turn in turns] != ["assistant"]:
        fault(where, f"{name} is not one assistant turn", "put the turns before it into the prompt")
    return parse_prompt(prompt, "prompt", where, in_record=True), _as_response(turns[0])


def _as_response(turn: Message) -> Response:
    if isinstance(turn, RecordMessage):
        return Response(turn.reasoning, turn.content, calls=turn.calls)
    return Response(None, turn.content)


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
