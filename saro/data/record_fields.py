"""Tell the formats of records apart by their fields, and decide which other fields may be ignored."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from saro.data.jsonl import fault, how_to_add, shown


@dataclass(frozen=True)
class Fields:
    """The fields of a format: those that a record of it must have, and those that it may have."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """All fields of the format."""
        return (*self.required, *self.optional)


# Fields that every format may have.
_COMMON_FIELDS = ("id", "kind", "meta", "tools")
EXAMPLE_FORMATS = {
    "native": Fields(("prompt", "answer"), ("reasoning",)),
    "prompt-completion": Fields(("prompt", "completion")),
    "messages": Fields(("messages",), ("prompt",)),
}
PAIR_FORMATS = {"pair": Fields(("chosen", "rejected"), ("prompt",))}
# Fields that change the meaning of a record, in our pairs or in published data -> the error and the fix. They are ignored
# if they are null or empty.
_ON_MESSAGE = (
    "stands beside the messages",
    "put it into the assistant's message, or name it reasoning beside an answer",
)
_REFUSED = (
    {
        "open": ('only a side of a pair may be "open"', "finish the response and leave the field out"),
        "label": (
            'field "label" makes this a labelled response, which may be undesirable',
            "give it to stage 2 (SRPO) with --preference.loss kto, or remove the field",
        ),
        "chat_template_kwargs": (
            'field "chat_template_kwargs" would change the prompt',
            "give the same ones to all with --data.template_variables",
        ),
        "image": ('field "image" is not text', "drop the record"),
        "images": ('field "images" is not text', "drop the record"),
    }
    | {
        name: (f'field "{name}" would change the prompt', "put it into the messages of the prompt, or drop it")
        for name in ("system", "system_prompt", "history", "input", "documents", "functions")
    }
    | {name: (f'field "{name}" is not text', "drop the record") for name in ("video", "videos", "audio", "audios")}
    | {name: (f'field "{name}" {_ON_MESSAGE[0]}', _ON_MESSAGE[1]) for name in ("reasoning_content", "thinking")}
)
# Formats that `saro convert` reads, by a field that only they have.
_CONVERTED = {"conversations": "sharegpt", "instruction": "alpaca"}
_FORMATS = (EXAMPLE_FORMATS | PAIR_FORMATS).values()
_KNOWN = frozenset(_COMMON_FIELDS).union(*(fields.all for fields in _FORMATS))
# The columns of a table that are read; others need not be.
READ_COLUMNS = _KNOWN | _REFUSED.keys() | _CONVERTED.keys()


def check_columns(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return the names of the fields that are ignored: those that no format knows.

    Raises SaroError for a field that changes what a record means, and for a name that is almost that of a known field.
    """
    unknown = record.keys() - _KNOWN
    if not unknown:
        return ()
    for name, (wrong, fix) in _REFUSED.items():
        if name in unknown and record[name] not in (None, "", [], {}):
            fault(where, wrong, fix)
    for name in unknown:
        if name not in READ_COLUMNS and (meant := _find_meant(name)):
            fault(where, f'unknown field {shown(name)} (data of your own goes under "meta")', f"did you mean {meant}?")
    # A field's name may be text that must not be printed.
    return tuple(sorted(shown(name).strip('"') for name in unknown - _REFUSED.keys()))


def find_format(record: Mapping[str, Any], formats: Mapping[str, Fields], where: str) -> str:
    """Return the one format whose fields the record has. Raises SaroError for mixed and missing fields.

    A field that is null counts as absent here: a table has the fields of all formats for all of its records.
    """
    given = [name for name in record if name in _KNOWN and name not in _COMMON_FIELDS and record[name] is not None]
    fitting = [form for form, fields in formats.items() if set(given) <= set(fields.all)]
    if not fitting:
        listed = "; ".join(f"{', '.join(fields.all)} ({form})" for form, fields in formats.items())
        fault(where, f"fields of two formats: {', '.join(given)}", f"give those of one: {listed}")
    # A record with only a prompt fits two formats: name the field that is missing in the first, which is ours.
    for name in formats[fitting[0]].required:
        if name not in record:
            for field, form in _CONVERTED.items():
                if record.get(field) is not None:
                    fault(where, f"field {shown(field)} is that of another format", f"convert it: saro convert {form}")
            fault(where, f"field {shown(name)} is missing", how_to_add(record, name))
    return fitting[0]


def get_synth(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``meta.synth``, in which ``saro synth`` says how it made a record; empty if there is none."""
    meta = record.get("meta")
    synth = meta.get("synth") if isinstance(meta, dict) else None
    return synth if isinstance(synth, dict) else {}


@lru_cache
def _find_meant(name: str) -> str | None:
    """Return the known field that this name misspells by one missing, added, changed or swapped character, or in capitals."""
    lower = name.lower()
    for known in sorted(_KNOWN):
        if lower == known or (len(known) > 4 and _is_one_edit(lower, known)):
            return known
    return None


def _is_one_edit(a: str, b: str) -> bool:
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[start:], b[start:]
    return a[1:] == b or a == b[1:] or a[1:] == b[1:] or (a[2:] == b[2:] and a[:2] == b[1::-1])
