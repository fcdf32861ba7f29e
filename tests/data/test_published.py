"""Tests that published files are read exactly, and that every fault in one is named with its place."""

from __future__ import annotations

import csv
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saro.data.published import check_target, read_csv, read_csv_rows, read_records
from saro.errors import SaroError

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(st.lists(TEXTS, min_size=1))
def test_csv_fields_are_read_as_they_were_written(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *([str(number), text] for number, text in enumerate(texts))])
    rows = list(read_csv(path, ("id", "text")))
    assert [row["text"] for _, row in rows] == texts
    # The place is the line on which the row begins, whatever line ends its fields hold.
    lines = re.split(rb"\r\n|\r|\n", path.read_bytes())
    assert all(lines[int(where.rpartition(":")[2]) - 1].startswith(row["id"].encode()) for where, row in rows)


def test_a_byte_order_mark_and_spaces_in_the_header_do_not_hide_a_column(tmp_path):
    (tmp_path / "t.csv").write_bytes("\ufeffid, text\r\n1,é\r\n".encode())
    assert [row for _, row in read_csv(tmp_path / "t.csv", ("id", "text"))] == [{"id": "1", "text": "é"}]


def test_rows_without_a_header_are_all_rows(tmp_path):
    (tmp_path / "t.csv").write_text('a,"b\nc"\n\nd,e\n')
    rows = [(where.rpartition(":")[2], row) for where, row in read_csv_rows(tmp_path / "t.csv")]
    assert rows == [("1", ["a", "b\nc"]), ("4", ["d", "e"])]


def test_a_file_that_does_not_exist_names_the_nearest(tmp_path):
    (tmp_path / "xstest.csv").write_text("id\n1\n")
    with pytest.raises(SaroError, match=r"there is no such file; did you mean .*xstest\.csv\?"):
        list(read_csv(tmp_path / "xtest.csv", ("id",)))


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": 2}]', '\n [{"a": 1},\n{"a": 2}]', '{"a": 1}\n\n{"a": 2}\n'])
def test_objects_are_read_from_an_array_or_from_lines(tmp_path, text):
    (tmp_path / "t").write_text(text)
    assert [(number, value) for number, _, value in read_records(tmp_path / "t")] == [(1, {"a": 1}), (2, {"a": 2})]


def test_a_target_may_be_overwritten_when_asked_but_never_if_it_is_the_source(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    check_target(source, target, overwrite=False)
    source.write_text("a")
    target.write_text("b")
    with pytest.raises(SaroError, match="exists already"):
        check_target(source, target, overwrite=False)
    check_target(source, target, overwrite=True)
    with pytest.raises(SaroError, match="is the source itself"):
        check_target(source, tmp_path / "." / "in", overwrite=True)
