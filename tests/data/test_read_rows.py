"""Tests that Parquet files and hub data sets give the records that JSONL gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from saro.data.read_rows import hash_rows, read_rows
from saro.data.records import read_examples, read_pairs
from saro.errors import SaroError

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -c constraints.txt -e '.[data]'")
pq = pytest.importorskip("pyarrow.parquet")
USER, REPLY = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
# The union of many columns: in a table, all records and all messages have all of them.
RECORDS = [
    {"id": "a", "prompt": "Hi", "reasoning": "Because.", "answer": "So.", "score": 1.5},
    {"id": "b", "messages": [USER, {**REPLY, "reasoning_content": "Hm."}, USER, REPLY], "raw": b"\xff"},
    {"id": "c", "prompt": [USER], "completion": [REPLY]},
]
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("reasoning_content", pa.string())]))
# A column has one type, so that prompts that are texts and messages are in two files.
TEXTS = [record for record in RECORDS if isinstance(record.get("prompt"), str)]


def write_parquet(path: Path, records: list[dict], **columns: pa.DataType) -> str:
    names = dict.fromkeys(name for record in records for name in record)
    arrays = {name: pa.array([record.get(name) for record in records], columns.get(name)) for name in names}
    pq.write_table(pa.table(arrays), path)
    return str(path)


def write_lines(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record, default=str) + "\n" for record in records))
    return str(path)


def parsed(examples) -> list:
    return [(example.id, example.prompt, example.response, example.ignored) for example in examples]


def test_a_parquet_file_has_the_records_of_the_same_jsonl(tmp_path):
    records = [record for record in RECORDS if record not in TEXTS]
    path = write_parquet(tmp_path / "d.parquet", records, messages=MESSAGES, prompt=MESSAGES, completion=MESSAGES)
    ours, lines = list(read_examples(path)), list(read_examples(write_lines(tmp_path / "d.jsonl", records)))
    assert [one[:3] for one in parsed(ours)] == [one[:3] for one in parsed(lines)]
    # A table has the column raw for all records.
    assert [example.ignored for example in ours] == [("raw",)] * 2
    assert [example.where for example in ours] == [f"{path}:1", f"{path}:2"]
    texts = write_parquet(tmp_path / "t.parquet", TEXTS)
    assert parsed(read_examples(texts)) == parsed(read_examples(write_lines(tmp_path / "t.jsonl", TEXTS)))


def test_pairs_of_a_parquet_file_may_have_sides_that_do_not_say_whether_they_are_open(tmp_path):
    sides = {"chosen": {"reasoning": None, "answer": "a", "open": None}, "rejected": {"reasoning": "b", "answer": "c"}}
    (pair,) = read_pairs(write_parquet(tmp_path / "p.parquet", [{"prompt": "Hi"} | sides]))
    assert (pair.chosen.answer, pair.chosen.open, pair.rejected.reasoning) == ("a", False, "b")


def test_records_without_ids_are_named_by_file_and_row(tmp_path):
    path = write_parquet(tmp_path / "d.parquet", [{"prompt": "Hi", "answer": str(i)} for i in range(1100)])
    examples = list(read_examples(path))
    assert (examples[1099].id, examples[1099].response.answer) == ("d:1100", "1099")


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([{"prompt": "Hi", "answer": None}], ":1: answer is null; give a string"),
        ([{"prompt": b"\xff", "answer": "a"}], ":1: prompt is a value of the type bytes; give a string or a list"),
        ([{"text": "Hi"}], ':1: field "prompt" is missing; add it'),
    ],
)
def test_a_faulty_row_is_named(tmp_path, records, expected):
    path = write_parquet(tmp_path / "d.parquet", records)
    with pytest.raises(SaroError) as caught:
        list(read_examples(path))
    assert str(caught.value).startswith(path + expected)


def test_an_id_or_kind_that_is_null_in_some_rows_of_a_table_is_absent(tmp_path):
    rows = {"prompt": ["a", "b"], "answer": ["c", "d"], "kind": ["safety", None], "id": ["x", None]}
    pq.write_table(pa.table(rows), tmp_path / "d.parquet")
    records = list(read_examples(tmp_path / "d.parquet"))
    assert [(record.id, record.kind) for record in records] == [("x", "safety"), ("d:2", "general")]


@pytest.mark.parametrize(
    "content",
    [b"", b"PAR1", b"PAR1" + b"\0" * 64 + b"PAR1", b'{"prompt": "Hi"}'],
    ids=["empty", "cut", "zeros", "JSON"],
)
def test_a_broken_parquet_file_is_an_error(tmp_path, content):
    (tmp_path / "d.parquet").write_bytes(content)
    with pytest.raises(SaroError, match=r"d\.parquet: broken Parquet \(\w+\); write the file again"):
        list(read_examples(tmp_path / "d.parquet"))


def test_a_parquet_file_without_rows_is_an_error(tmp_path):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "d.parquet")
    with pytest.raises(SaroError, match=r"d\.parquet: the file has no records; check how it was written"):
        list(read_examples(tmp_path / "d.parquet"))


@pytest.mark.parametrize(("library", "name"), [("pyarrow", "d.parquet"), ("datasets", "hf://org/name:train")])
def test_a_missing_library_is_named_with_the_extra_that_has_it(tmp_path, monkeypatch, library, name):
    write_parquet(tmp_path / "d.parquet", TEXTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(SaroError) as caught:
        list(read_examples(name))
    assert str(caught.value) == (
        f"{name}: reading it needs {library}, which is not installed; "
        "run in saro's folder: pip install -c constraints.txt -e '.[data]'"
    )


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Gives a hub of one data set, org/name, with the split train; returns the arguments with which it was asked."""
    datasets = pytest.importorskip("datasets")
    load, asked = datasets.load_dataset, []
    write_lines(tmp_path / "train.jsonl", TEXTS * 2)

    def load_dataset(path: str, name: str | None, *, split: str, revision: str | None):
        asked.append((path, name, split, revision))
        return load("json", data_files={"train": str(tmp_path / "train.jsonl")}, split=split, cache_dir=tmp_path / "hf")

    monkeypatch.setattr(datasets, "load_dataset", lambda **options: load_dataset(options.pop("path"), **options))
    return asked


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf://org/name:train", ("org/name", None, "train", None)),
        ("hf://datasets/org/name:train", ("org/name", None, "train", None)),
        ("hf://org/name@v1.0:train", ("org/name", None, "train", "v1.0")),
        ("hf://org/name@refs/pr/7:train", ("org/name", None, "train", "refs/pr/7")),
        ("hf://org/name@v1.0/main:train[:1]", ("org/name", "main", "train[:1]", "v1.0")),
    ],
)
def test_the_name_of_a_split_has_revision_and_configuration(hub, name, expected):
    assert next(read_rows(name))[1] == f"{name}:1"
    assert hub == [expected]


def test_a_hub_data_set_has_the_records_of_its_files(hub, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(TEXTS[0]) + "\n")
    (example,) = read_examples("hf://org/name:train")
    (line,) = read_examples(tmp_path / "train.jsonl")
    assert parsed([example]) == parsed([line])


def test_the_hash_of_a_hub_data_set_changes_with_what_is_read_of_it_only(hub, tmp_path):
    hashes = []
    for change in ({}, {"score": 3.0}, {"answer": "No."}):
        write_lines(tmp_path / "train.jsonl", [TEXTS[0] | change])
        hashes.append(hash_rows("hf://org/name:train"))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    "name", ["hf://name:train", "hf://org/name", "hf://org/name:", "hf://org/name@:train", "hf://"]
)
def test_a_name_that_is_not_that_of_a_split_is_an_error(name):
    with pytest.raises(SaroError) as caught:
        list(read_examples(name))
    assert str(caught.value) == f"{name}: is not the name of a split; write hf://ORG/NAME[@REVISION][/CONFIG]:SPLIT"


def test_an_unknown_split_is_an_error_that_names_those_that_there_are(hub):
    with pytest.raises(SaroError, match=r"hf://org/name:test: cannot be loaded: Unknown split .test.*\['train'\]"):
        list(read_examples("hf://org/name:test"))


def test_a_hub_data_set_whose_files_are_broken_is_an_error(hub, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "do not print me')
    with pytest.raises(SaroError, match=r"^hf://org/name:train: cannot be loaded \(\w+\); check the connection and"):
        list(read_examples("hf://org/name:train"))


def test_a_hub_data_set_without_records_of_a_split_is_an_error(hub, tmp_path):
    with pytest.raises(SaroError, match="hf://org/name:train\\[2:1\\]: the split has no records; name another one"):
        list(read_examples("hf://org/name:train[2:1]"))


def test_a_hub_data_set_cannot_be_loaded_without_a_connection(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(SaroError) as caught:
        list(read_examples("hf://org/no-such-name:train"))
    assert str(caught.value) == (
        "hf://org/no-such-name:train: cannot be loaded (ConnectionError); check the connection and the data set, or give "
        "a file on this machine"
    )
