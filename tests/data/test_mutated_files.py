"""Mutates files of every format: each is accepted, or refused by one line that names its place.

`SARO_MUTATIONS=100000 pytest tests/data/test_mutated_files.py` tries that many of each format, in some minutes.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_cases import CHATS, TOOLS, chat_of

from saro.data.records import read_example_files, read_pairs
from saro.errors import SaroError
from saro.synth.public_sets import convert

MUTATIONS = int(os.environ.get("SARO_MUTATIONS", "60"))
USER, SO, NO = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "So."), ("assistant", "No."))
)
THINK = SO | {"reasoning_content": "Hm."}
FUNCTION = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
TOOLS_OF = [{"type": "function", "function": FUNCTION}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": {"a": 1}}}],
}
SAME = CALL | {"tool_calls": '[{"function": {"name": "add", "arguments": "{}"}}]'}
CALLED = [USER, CALL, {"role": "tool", "name": "add", "tool_call_id": "1", "content": "4"}]
TOOL = [USER, SO, {"role": "tool", "content": "4"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Use tools."}]
NAMES = (
    "prompt",
    "completion",
    "messages",
    "chosen",
    "rejected",
    "reasoning",
    "answer",
    "open",
    "id",
    "kind",
    "meta",
    "role",
)
NAMES += (
    "content",
    "reasoning_content",
    "thinking",
    "tool_calls",
    "label",
    "tools",
    "function",
    "name",
    "arguments",
    "from",
    "value",
    "output",
    "system",
    "x",
)
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1e400,
    3.5,
    10**30,
    "",
    " ",
    "a",
    "\0",
    "\ud800",
    "<think>",
    "</think>",
    "<|im_end|>",
)
VALUES += (
    "assistant",
    "user",
    "tool",
    "human",
    "do not print me",
    [],
    {},
    [USER],
    [USER, SO],
    SO,
    [None],
    [[]],
    {"answer": "a"},
)

FORMATS: dict[str, list[dict[str, Any]]] = {
    "native": [{"kind": "safety", "prompt": "Hi", "reasoning": ["a", "b"], "answer": "c", "meta": {}}],
    "strings": [{"prompt": "Hi", "completion": " So."}],
    "messages": [{"messages": [*SYSTEM, USER, THINK, USER, SO], "prompt": "Hi", "source": "x"}],
    "completion": [{"prompt": TOOL, "completion": [THINK]}, {"prompt": "Hi", "completion": [SO]}],
    "native pairs": [{"prompt": "Hi", "chosen": {"reasoning": "a", "answer": "b"}, "rejected": {"answer": "c", "open": True}}],
    "pairs of strings": [{"prompt": "Hi", "chosen": " So.", "rejected": " No."}],
    "pairs of messages": [{"prompt": TOOL, "chosen": [SO], "rejected": [NO]}, {"prompt": "Hi", "chosen": [THINK], "rejected": [NO]}],
    "implicit prompts": [{"chosen": [*SYSTEM, USER, SO], "rejected": [*SYSTEM, USER, NO], "score_chosen": 1.0}],
    "ultrafeedback": [{"prompt": "Hi", "messages": [USER, SO], "chosen": [USER, SO], "rejected": [USER, NO]}],
    "calls": [{"messages": [*CALLED, SAME], "tools": TOOLS_OF}, {"messages": [*CALLED, SO], "tools": json.dumps(TOOLS_OF)}],
    "pairs of calls": [{"prompt": [USER], "chosen": [CALL], "rejected": [SAME], "tools": TOOLS_OF}],
    "alpaca": [{"instruction": "Hi", "input": "a", "output": "So.", "system": "b", "history": [["a", "b"]]}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "So."}]}],
}  # fmt: skip
CALLING = chat_of(TOOLS)
# What may be wrong with no single place, and so names only the file.
WHOLE_FILE = ("the file has no records", "all of its records are without", "broken JSON", "not UTF-8", "broken Parquet")


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of everything in a record."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from places(item)


def mutate(records: list[dict[str, Any]], draw: random.Random) -> list[Any]:
    """Change one to three places of a file's records: drop, replace, repeat, rename, add or cut something."""
    records = copy.deepcopy(records)
    for _ in range(draw.randint(1, 3)):
        found = list(places(records))
        if not found:
            break
        container, key = draw.choice(found)
        change = draw.choice(("drop", "value", "copy", "rename", "add", "text"))
        if change == "drop":
            del container[key]
        elif change == "value":
            container[key] = copy.deepcopy(draw.choice(VALUES))
        elif change == "copy":
            other, name = draw.choice(found)
            container[key] = copy.deepcopy(other[name])
        elif change == "rename" and isinstance(container, dict):
            container[draw.choice((*NAMES, f"{key}s", key[1:]))] = container.pop(key)
        elif change == "add" and isinstance(container, dict):
            container[draw.choice(NAMES)] = copy.deepcopy(draw.choice(VALUES))
        elif change == "add" and isinstance(container, list):
            container.insert(draw.randint(0, len(container)), copy.deepcopy(draw.choice(VALUES)))
        elif isinstance(container[key], str):
            text, at = container[key], draw.randint(0, len(container[key]))
            container[key] = text[:at] + draw.choice(("", "\0", "\ud800", "\n", "<|im_end|>", "é")) + text[at + 1 :]
    return records


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Change, drop or repeat some bytes of a file."""
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(content) + 1)
        stop = min(len(content), start + draw.choice((0, 1, 1, 4, 40)))
        put = draw.choice((b"", bytes([draw.randrange(256)]), content[start:stop] * 2, b"\xff", b"\n", b"[", b'"'))
        content = content[:start] + put + content[stop:]
    return content


def read(name: str, path: Path) -> None:
    """Read and encode a file, or convert it first, as training does."""
    chat = CALLING if "calls" in name else CHATS["chatml"]
    if name in ("alpaca", "sharegpt"):
        target = path.with_suffix(".out")
        convert(name, path, target, overwrite=True)
        for example in read_example_files([target]):
            chat.encode(example)
        return
    if "chosen" in FORMATS[name][0]:
        for pair in read_pairs(path):
            chat.encode_pair(pair)
    if "chosen" not in FORMATS[name][0] or name == "ultrafeedback":
        for example in read_example_files([path], "all"):
            chat.encode(example)


def outcome(run: Callable[[], None], path: Path) -> str:
    """Return "accepted" or "refused". A refusal is one line with place, fault and advice, and without a record's text."""
    try:
        run()
    except SaroError as error:
        message = str(error)
        assert "\n" not in message
        assert "do not print me" not in message
        assert "; " in message
        place, _, fault = message.partition(": ")
        # A converted file is refused by the place in it.
        assert place.startswith((str(path), str(path.with_suffix(".out"))))
        assert ":" in place or fault.startswith(("record ", *WHOLE_FILE)), message
        return "refused"
    return "accepted"


@pytest.mark.parametrize("name", FORMATS)
def test_a_mutated_file_is_accepted_or_refused_by_one_line(tmp_path, name):
    draw = random.Random(name)
    path = tmp_path / "data.jsonl"
    counts: Counter[str] = Counter()
    for number in range(MUTATIONS):
        records = mutate(FORMATS[name] * 2, draw) if number % 3 else FORMATS[name]
        content = "".join(json.dumps(record) + "\n" for record in records).encode()
        path.write_bytes(content if number % 3 else mutate_bytes(content, draw))
        counts[outcome(lambda: read(name, path), path)] += 1
    # The mutations are neither all harmless nor all fatal.
    assert min(counts["accepted"], counts["refused"]) > MUTATIONS / 50, counts


def test_a_mutated_parquet_file_is_accepted_or_refused_by_one_line(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    draw = random.Random(0)
    path, counts = tmp_path / "data.parquet", Counter()
    names = [name for name in FORMATS if name not in ("alpaca", "sharegpt")]
    for number in range(MUTATIONS):
        name = draw.choice(names)
        records = mutate(FORMATS[name], draw) if number % 2 else FORMATS[name]
        try:
            pq.write_table(pa.Table.from_pylist([r for r in records if isinstance(r, dict)]), path)
        except (pa.ArrowException, UnicodeEncodeError, OverflowError, AttributeError, TypeError):
            # A table cannot hold these records.
            continue
        if number % 2 == 0:
            path.write_bytes(mutate_bytes(path.read_bytes(), draw))
        counts[outcome(lambda name=name: read(name, path), path)] += 1
    assert min(counts["accepted"], counts["refused"]) > MUTATIONS / 50, counts
