"""A mapped set equals the one that is encoded in memory, is encoded once, and is encoded again only if that is needed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sets import PAIR_RECORDS
from tiny import IM_END, tiny_tokenizer

from saro.checks.check_masks import check_masks
from saro.config import DataConfig
from saro.data import encode_files as encode_module
from saro.data import encoded_folder as module
from saro.data.chat_format import ChatFormat
from saro.data.dataset import ExampleSet, PairSet
from saro.data.encode_files import encode_files, encode_pair_files
from saro.data.encoded_folder import map_encoded
from saro.data.lengths import LengthReport
from saro.errors import SaroError
from saro.model.architectures import TokenLimits

CHAT = ChatFormat(tiny_tokenizer(), frozenset({IM_END}), date(1999, 7, 4))
VOCABULARY = 300
OPTIONS = DataConfig(pack_tokens=512)
OPEN = {
    "id": "o",
    "prompt": "Why?",
    "chosen": {"answer": "d"},
    "rejected": {"reasoning": ["Hm."], "answer": "", "open": True},
}
FORMED = PAIR_RECORDS[1] | {"id": "f", "meta": {"synth": {"form": "mirror"}}}


@pytest.fixture(autouse=True)
def one_process(monkeypatch, cache):
    """Workers would import torch again; ``test_workers.py`` tests them."""
    monkeypatch.setattr(module, "count_workers", lambda: 1)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def map_files(said):
    """Return a function that maps files; ``said`` has a line for each time that they are encoded."""

    def get(*paths: str, kind="pairs", chat=CHAT, options=OPTIONS, vocabulary=VOCABULARY) -> ExampleSet | PairSet:
        check, checked = partial(check_masks, limits=TokenLimits(vocabulary)), {"vocabulary": vocabulary}
        return map_encoded(kind, list(paths), chat, options, check=check, checked=checked, say=said.append)

    return get


def assert_same_side(a: ExampleSet, b: ExampleSet) -> None:
    for name in ("tokens", "offsets", "prompt_tokens", "think_tokens", "kinds"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    assert (tuple(a.ids), tuple(a.where), a.dropped) == (b.ids, b.where, b.dropped)
    assert (a.is_open is None) == (b.is_open is None)
    assert a.is_open is None or a.is_open.tolist() == b.is_open.tolist()


def test_mapped_examples_equal_those_in_memory(map_files, records_file, examples):
    files = [records_file(examples[:9], "one.jsonl"), records_file(examples[9:], "two.jsonl")]
    limit = int(np.median(encode_files(files, CHAT, OPTIONS).lengths))
    options = DataConfig(pack_tokens=limit, too_long="drop")
    expected, mapped = encode_files(files, CHAT, options), map_files(*files, kind="examples", options=options)
    assert expected.dropped
    assert_same_side(mapped, expected)
    assert LengthReport.of(mapped) == LengthReport.of(expected)


def test_mapped_pairs_equal_those_in_memory(map_files, records_file, pairs):
    file = records_file([*pairs, *PAIR_RECORDS, OPEN, FORMED])
    expected, mapped = encode_pair_files([file], CHAT, OPTIONS), map_files(file)
    for side in ("chosen", "rejected"):
        assert_same_side(getattr(mapped, side), getattr(expected, side))
    assert (mapped.forms, mapped.prompts.tolist()) == (expected.forms, expected.prompts.tolist())
    assert mapped.shared_tokens.tolist() == expected.shared_tokens.tolist()
    assert LengthReport.of(mapped) == LengthReport.of(expected)


@pytest.mark.parametrize("records", [1, 3, 24])
def test_the_size_of_parts_changes_nothing(map_files, records_file, pairs, monkeypatch, records):
    expected = encode_pair_files([records_file(pairs)], CHAT, OPTIONS)
    monkeypatch.setattr(encode_module, "_PART_RECORDS", records)
    mapped = map_files(records_file(pairs))
    for side in ("chosen", "rejected"):
        assert_same_side(getattr(mapped, side), getattr(expected, side))
    assert mapped.prompts.tolist() == expected.prompts.tolist()


def test_nothing_of_a_mapped_set_is_in_memory(map_files, records_file, pairs):
    mapped = map_files(records_file(pairs))
    for array in (mapped.chosen.tokens, mapped.rejected.offsets, mapped.prompts, mapped.shared_tokens, mapped.kinds):
        assert isinstance(array.base, np.memmap)
        assert not array.flags.writeable


def test_files_are_encoded_once(map_files, said, records_file, pairs, monkeypatch):
    file = records_file(pairs)
    first = map_files(file)
    assert [line.partition("; encoding into ")[0] for line in said] == [f"{file}: not encoded yet"]
    monkeypatch.setattr(module, "encode_into", None)
    assert map_files(file).digest == first.digest
    assert len(said) == 1


def test_a_file_that_has_moved_is_not_encoded_again_and_errors_name_its_new_place(
    map_files, said, records_file, pairs, tmp_path
):
    file = records_file(pairs, "a.jsonl")
    map_files(file)
    moved = tmp_path / "elsewhere" / "a.jsonl"
    moved.parent.mkdir()
    shutil.move(file, moved)
    assert map_files(str(moved)).chosen.where[2] == f"{moved}:3"
    assert len(said) == 1


def test_the_same_file_in_two_places_is_the_same_set(map_files, records_file, pairs, tmp_path, cache):
    """Ranks on two machines compare their digests."""
    file = records_file(pairs, "a.jsonl")
    first = map_files(file).digest
    shutil.rmtree(cache)
    copy = tmp_path / "copy" / "a.jsonl"
    copy.parent.mkdir()
    shutil.copy(file, copy)
    assert map_files(str(copy)).digest == first
    shutil.rmtree(cache)
    assert map_files(records_file(pairs[1:], "a.jsonl")).digest != first


def test_a_missing_file_is_one_line(map_files, records_file, pairs):
    with pytest.raises(SaroError, match=r"train\.jsonl: there is no such file; "):
        map_files(records_file(pairs, "trian.jsonl").replace("trian", "train"))


@pytest.mark.parametrize(
    "change",
    [
        {"options": DataConfig(pack_tokens=511)},
        {"options": DataConfig(pack_tokens=512, too_long="drop")},
        {"options": DataConfig(pack_tokens=512, train_on="all")},
        {"vocabulary": 301},
        {"chat": replace(CHAT, think_tags=("<a>", "</a>"))},
        {"chat": replace(CHAT, template_variables={"a": 1})},
        {"chat": replace(CHAT, tokenizer=tiny_tokenizer(CHAT.tokenizer.chat_template + " "))},
        {"chat": replace(CHAT, tokenizer=tiny_tokenizer(extra=("<|more|>",)))},
    ],
    ids=["limit", "too long", "turns", "vocabulary", "tags", "variables", "template", "tokenizer"],
)
def test_whatever_may_change_tokens_or_checks_encodes_again(map_files, said, records_file, change):
    file = records_file(PAIR_RECORDS)
    map_files(file)
    map_files(file, **change)
    assert len(said) == 2


@pytest.mark.parametrize(("template", "times"), [("{{ strftime_now('%d') }}", 2), ("", 1)])
def test_another_day_encodes_again_only_if_prompts_show_the_day(map_files, said, records_file, template, times):
    chat = replace(CHAT, tokenizer=tiny_tokenizer(template + CHAT.tokenizer.chat_template))
    file = records_file(PAIR_RECORDS)
    for day in (date(2000, 1, 1), date(2000, 1, 2)):
        map_files(file, chat=replace(chat, template_date=day))
    assert len(said) == times


def test_special_tokens_that_are_split_encode_again(map_files, said, records_file):
    file = records_file(PAIR_RECORDS)
    splitting = tiny_tokenizer()
    splitting.backend_tokenizer.encode_special_tokens = True
    for tokenizer in (CHAT.tokenizer, splitting):
        map_files(file, chat=replace(CHAT, tokenizer=tokenizer))
    assert len(said) == 2


def test_other_records_and_another_name_of_the_file_encode_again(map_files, said, records_file, tmp_path):
    map_files(records_file(PAIR_RECORDS, "a.jsonl"))
    map_files(records_file([*PAIR_RECORDS, OPEN], "a.jsonl"))
    # Records without an id are named after their file.
    map_files(records_file(PAIR_RECORDS, "b.jsonl"))
    assert len(said) == 3


def flip(folder: Path) -> None:
    file = folder / "chosen.tokens.bin"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)


def cut(folder: Path) -> None:
    file = folder / "rejected.tokens.bin"
    file.write_bytes(file.read_bytes()[:-4])


def lose(folder: Path) -> None:
    (folder / "ids.content.bin").unlink()


def garble(folder: Path) -> None:
    (folder / "set.json").write_text("{")


@pytest.mark.parametrize("damage", [flip, cut, lose, garble])
def test_a_damaged_set_is_encoded_again(map_files, said, records_file, pairs, cache, damage):
    file = records_file(pairs)
    whole = map_files(file)
    tokens = whole.chosen.tokens.tolist()
    damage(*(cache / "encoded").glob("*[0-9a-f]/"))
    assert map_files(file).chosen.tokens.tolist() == tokens
    assert f"{file}: damaged in the cache; encoding into " in said[1]
    map_files(file)
    assert len(said) == 2


def test_a_set_of_other_records_in_its_place_is_not_read(map_files, said, records_file, pairs, cache):
    file = records_file(PAIR_RECORDS)
    map_files(file)
    (folder,) = (cache / "encoded").glob("*[0-9a-f]/")
    key = json.loads((folder / "key.json").read_text())
    (folder / "key.json").write_text(json.dumps(key | {"kind": "examples"}))
    map_files(file)
    assert said[1].startswith(f"{file}: the cache has other records in its place; encoding into ")


def test_a_wrong_record_is_the_error_of_encoding_in_memory_and_leaves_nothing(
    map_files, records_file, pairs, cache, monkeypatch
):
    # The reader, which is ahead, finds another fault behind it.
    wrong = pairs[7] | {"chosen": {"answer": "<|im_end|>"}}
    file = records_file([*pairs[:7], wrong, pairs[0]])
    monkeypatch.setattr(encode_module, "_PART_RECORDS", 2)
    with pytest.raises(SaroError) as in_memory:
        encode_pair_files([file], CHAT, OPTIONS)
    with pytest.raises(SaroError) as mapped:
        map_files(file)
    assert str(mapped.value) == str(in_memory.value)
    assert str(mapped.value).startswith(f"{file}:8: the response holds the model's control token")
    assert [item.suffix for item in (cache / "encoded").iterdir()] == [".lock"]


def test_every_record_is_checked_while_it_is_encoded(map_files, records_file):
    with pytest.raises(SaroError, match="the model embeds 20 tokens; they do not belong together"):
        map_files(records_file(PAIR_RECORDS), vocabulary=20)


def test_what_a_killed_process_left_is_removed(map_files, records_file, cache):
    file = records_file(PAIR_RECORDS)
    map_files(file)
    (folder,) = (cache / "encoded").glob("*[0-9a-f]/")
    left = folder.with_name(f".{folder.name}.0123abcd.tmp")
    folder.rename(left)
    map_files(file)
    assert not left.exists()


def test_a_cache_that_cannot_be_written_is_one_line(map_files, records_file, cache):
    cache.write_text("a file")
    with pytest.raises(SaroError, match=r"encoded.*: cannot be written .*; set SARO_CACHE to a folder with room$"):
        map_files(records_file(PAIR_RECORDS))
