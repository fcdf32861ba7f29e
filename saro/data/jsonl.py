"""Read the objects of JSONL files with their places, and check single fields.

Every error names file:line and what to do, and never shows the record's text.
"""

import codecs
import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from saro.errors import SaroError, nearest

# Names that other data sets give to our fields.
_OTHER_NAMES = {
    "prompt": ("question", "query", "problem"),
    "answer": ("response", "output", "solution"),
}


def read_objects(path: str | os.PathLike, form: str = "one JSON object") -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield (line number from 1, "file:line", object) for each line of a JSONL file. Blank lines are skipped.

    Args:
        form: what a line must hold, for the error message.

    Raises SaroError for a file that cannot be read, is not UTF-8 or has no records, and for a line without an object.
    """
    name = os.fsdecode(path)
    has_records = False
    with open_data(path) as file:
        # Binary lines end at "\n" only; text mode would also split at a lone "\r".
        for line, raw in enumerate(file, start=1):
            where = f"{name}:{line}"
            text = decode(raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw, where).rstrip()
            if not text:
                continue
            if not has_records and text.lstrip().startswith("["):
                fault(where, "a JSON array begins here", "write each of its objects on a line of its own (JSONL)")
            has_records = True
            # A line that does not begin as an object is no slip in one: the file is of another format.
            is_object = text.lstrip().startswith("{")
            value = parse_json(text, where, "fix it there" if is_object else f"write {form} on each line")
            if not isinstance(value, dict):
                fault(where, f"the line is {type_name(value)}", f"write {form} on each line")
            yield line, where, value
    if not has_records:
        fault(name, "the file has no records", "check how it was written")


def open_data(path: str | os.PathLike) -> BinaryIO:
    """Open a user's file for reading bytes. Raises SaroError; if there is no such file, it names the nearest one."""
    name = os.fsdecode(path)
    try:
        return open(name, "rb")
    except FileNotFoundError:
        folder = Path(name).parent
        if not folder.is_dir():
            fault(name, f"there is no folder {folder}", "check the path")
        names = [item.name for item in folder.iterdir() if item.is_file()]
        close = difflib.get_close_matches(Path(name).name, names, n=1)
        fault(name, "there is no such file", f"did you mean {folder / close[0]}?" if close else "check the path")
    except IsADirectoryError:
        fault(name, "is a folder", "name one file in it")
    except OSError as error:
        fault(name, f"cannot be read ({error.strerror})", "check the path and its permissions")


def decode(raw: bytes, where: str) -> str:
    """Decode UTF-8 bytes. Raises SaroError that names the faulty byte."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        fault(where, f"not UTF-8 at byte {error.start + 1}", "convert the file to UTF-8")


def parse_json(text: str, where: str, fix: str = "fix it there") -> Any:
    """Parse one JSON value, in which no object may have a key twice. Raises SaroError that names the place.

    Args:
        fix: what to do if it is broken, for the error message.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        # Safe to show: the parser's messages ("Expecting ',' delimiter") never quote the text.
        fault(where, f"broken JSON at {place} ({error.msg})", fix)
    except _DoubleKeyError as error:
        fault(where, f"field {shown(error.args[0])} is given twice", "keep one")
    except (ValueError, RecursionError):
        fault(where, "JSON with a number too long or nested too deep to read", "shorten it")


class _DoubleKeyError(Exception):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DoubleKeyError(next(key for key in keys if keys.count(key) > 1))
    return result


def fault(where: str, wrong: str, fix: str) -> NoReturn:
    """Raise SaroError "where: wrong; fix". ``fix`` says what to do, and may be the result of ``nearest``."""
    raise SaroError(f"{where}: {wrong}; {fix.removeprefix('; ')}") from None


def how_to_add(record: Mapping[str, Any], name: str) -> str:
    """Return what to do about a missing field: rename one that has the same meaning elsewhere, or add it."""
    other = next((other for other in _OTHER_NAMES.get(name, ()) if isinstance(record.get(other), str | list)), None)
    return "add it" if other is None else f"rename {other} to {name}"


def shown(name: str) -> str:
    """Quote a name for an error message. A string that does not look like a name may be harmful text: only count it."""
    return f'"{name}"' if re.fullmatch(r"[\w.:/@+-]{1,60}", name, re.ASCII) else f"({len(name)} characters of text)"


def type_name(value: Any) -> str:
    """Return the type of a value of JSON, or of a column of a table, for error messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), f"a value of the type {type(value).__name__}")


def parse_text(
    value: Any, name: str, where: str, fix: str = "write it or drop the record", may_be_empty: bool = False
) -> str:
    """Return ``value`` if it is a string that can be tokenized.

    Args:
        name: name of the string, for the error message.
        where: file and line, for the error message.
        fix: what to do if the string is empty.
        may_be_empty: accept a string without text.

    Raises SaroError for anything but a string, and for an empty string, a NUL character or half of a surrogate pair.
    """
    if not isinstance(value, str):
        fault(where, f"{name} is {type_name(value)}", "give a string")
    if not may_be_empty and not value.strip():
        fault(where, f"{name} is empty", fix)
    if (position := value.find("\0")) >= 0:
        fault(where, f"{name} has a NUL character at {position + 1}", "remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        wrong = f"{name} has half of a surrogate pair at character {error.start + 1}"
        fault(where, wrong, "write the whole character; the text was cut or converted wrongly")
    return value


def parse_id(record: dict[str, Any], where: str, default: str) -> str:
    """Return the id of a record as a string, or ``default`` if it has none. Raises SaroError at ``where``."""
    value = record.get("id", default)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        fault(where, f"id is {type_name(value)}", "give a string or a whole number, or leave it out")
    return parse_text(value, "id", where, "fill it or leave it out")


def parse_kind(record: dict[str, Any], kinds: tuple[str, ...], where: str) -> str:
    """Return the kind of a record, one of ``kinds``; the default is the first. Raises SaroError at ``where``."""
    value = record.get("kind", kinds[0])
    if value not in kinds:
        fault(where, f"kind is {shown(value) if isinstance(value, str) else type_name(value)}", nearest(value, kinds))
    return value
