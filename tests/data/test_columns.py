"""Columns in files hold what columns in memory hold."""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saro.data.columns import FileColumns, MemoryColumns, Texts, map_columns
from saro.errors import SaroError

# Surrogates cannot be encoded, and no record may hold them.
texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=4)
parts = st.lists(st.tuples(texts, st.lists(st.integers(0, 9), max_size=4)), min_size=1, max_size=4)


@given(parts)
def test_mapped_columns_equal_those_in_memory(parts):
    memory = MemoryColumns()
    with tempfile.TemporaryDirectory() as folder, closing(FileColumns(Path(folder))) as files:
        for columns in (memory, files):
            for words, lengths in parts:
                columns.append_texts("words", words)
                columns.append_offsets("offsets", np.array(lengths, np.int64))
                columns.append("lengths", np.array(lengths, np.int32))
        mapped = map_columns(Path(folder), files.finish())
        expected = memory.finish()
        for name in ("offsets", "lengths"):
            np.testing.assert_array_equal(mapped[name], expected[name])
            assert mapped[name].dtype == expected[name].dtype
        words = Texts(mapped["words.content"], mapped["words.offsets"])
        assert tuple(words) == words[:] == expected["words"]


def test_texts_are_a_sequence():
    words = Texts(np.frombuffer("aéz".encode(), np.uint8), np.array([0, 1, 3, 4]))
    assert (len(words), words[1], words[-1], words[1:], "z" in words, words.index("é")) == (
        *(3, "é", "z"),
        *(("é", "z"), True, 1),
    )
    with pytest.raises(IndexError):
        words[3]


def test_the_beginning_of_a_text_may_have_another_name_now():
    words = Texts(np.frombuffer(b"old:1new:2", np.uint8), np.array([0, 5, 10]), {"old:": "moved:"})
    assert tuple(words) == ("moved:1", "new:2")


@pytest.mark.parametrize("length", [None, 3, 5])
def test_a_file_that_is_missing_or_torn_is_an_error(tmp_path, length):
    with closing(FileColumns(tmp_path)) as columns:
        columns.append("a", np.arange(2, dtype=np.int32))
        described = columns.finish()
    file = tmp_path / "a.bin"
    if length is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(SaroError, match=r"a\.bin: cannot be mapped .*; remove its folder and start again$"):
        map_columns(tmp_path, described)
