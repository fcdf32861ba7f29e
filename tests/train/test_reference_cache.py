"""The cache returns the log-probs that were added, whatever happens to processes and files."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from saro.errors import SaroError
from saro.train import reference_cache
from saro.train.reference_cache import ReferenceCache, sequence_key

KEY = {"weights": "a"}


def key(i: int) -> bytes:
    return i.to_bytes(16, "little")


def values(i: int) -> np.ndarray:
    return np.arange(i, 2 * i + 1, dtype=np.float32)


def load(cache: ReferenceCache, *numbers: int) -> list[list[float]]:
    keys = [key(i) for i in numbers]
    assert cache.find(keys) == [True] * len(keys)
    logps, offsets = cache.load(keys, [i + 1 for i in numbers])
    return [logps[a:b].tolist() for a, b in pairwise(offsets)]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("shards/*.safetensors"))


pytestmark = pytest.mark.usefixtures("cache")


def test_added_values_are_returned_in_the_order_of_the_keys():
    ReferenceCache.of(KEY).add({key(i): values(i) for i in (3, 0, 5)})
    assert load(ReferenceCache.of(KEY), 5, 3, 0, 5) == [values(i).tolist() for i in (5, 3, 0, 5)]


def test_a_key_that_was_not_added_is_not_found():
    cache = ReferenceCache.of(KEY)
    assert cache.find([key(1)]) == [False]
    cache.add({key(1): values(1)})
    assert cache.find([key(1), key(2)]) == [True, False]


@pytest.mark.parametrize("change", [{"weights": "b"}, {"weights": "a", "dtype": "bfloat16"}])
def test_another_reference_has_its_own_cache(change):
    ReferenceCache.of(KEY).add({key(1): values(1)})
    assert ReferenceCache.of(change).find([key(1)]) == [False]


def test_the_folder_says_what_its_values_were_scored_with():
    assert '"weights": "a"' in (ReferenceCache.of(KEY).folder / "key.json").read_text()


def test_adding_twice_does_no_harm():
    for _ in range(2):
        ReferenceCache.of(KEY).add({key(4): values(4)})
    assert load(ReferenceCache.of(KEY), 4) == [values(4).tolist()]


def test_if_a_key_is_added_twice_the_first_value_stays():
    """A resumed run must read the bits that it started with, even if another run has scored the same rows since."""
    ReferenceCache.of(KEY).add({key(4): values(4)})
    ReferenceCache.of(KEY).add({key(4): values(4) + 1, key(5): values(5)})
    assert load(ReferenceCache.of(KEY), 4) == [values(4).tolist()]


def test_a_folder_that_cannot_be_written_gives_one_line(cache):
    cache.write_text("a file")
    with pytest.raises(SaroError, match=r"cannot be written .*; set SARO_CACHE to another folder"):
        ReferenceCache.of(KEY)


def test_the_dtype_is_kept():
    ReferenceCache.of(KEY).add({key(1): values(1).astype(np.float64)})
    cache = ReferenceCache.of(KEY)
    cache.find([key(1)])
    assert cache.load([key(1)], [2])[0].dtype == np.float64


def test_many_rows_are_spread_over_shards(monkeypatch, cache):
    monkeypatch.setattr(reference_cache, "SHARD_ROWS", 10)
    ReferenceCache.of(KEY).add({key(i): values(i) for i in range(8)})
    assert len(shards(cache)) > 2
    assert load(ReferenceCache.of(KEY), *range(8)) == [values(i).tolist() for i in range(8)]


def test_the_index_is_rebuilt_if_it_is_missing_old_or_broken(cache):
    of_key = ReferenceCache.of(KEY)
    of_key.add({key(1): values(1)})
    load(of_key, 1)
    index = of_key.folder / "index.safetensors"
    old = index.read_bytes()
    of_key.add({key(2): values(2)})
    for content in (None, old, b"broken", b""):
        index.unlink()
        if content is not None:
            index.write_bytes(content)
        assert load(ReferenceCache.of(KEY), 1, 2) == [values(1).tolist(), values(2).tolist()]


def test_an_index_that_is_up_to_date_is_not_rebuilt():
    of_key = ReferenceCache.of(KEY)
    of_key.add({key(1): values(1)})
    load(of_key, 1)
    before = (of_key.folder / "index.safetensors").stat().st_mtime_ns
    load(ReferenceCache.of(KEY), 1)
    assert (of_key.folder / "index.safetensors").stat().st_mtime_ns == before


def test_a_key_may_end_with_zeros():
    """NumPy's strings lose them."""
    keys = np.array([[1] * 15 + [0], [0] * 16], np.uint8)
    cache = ReferenceCache.of(KEY)
    cache.add({keys[0].tobytes(): values(1), keys[1].tobytes(): values(2)})
    assert cache.find(keys) == [True, True]
    assert cache.load(keys, [2, 3])[0].tolist() == [*values(1), *values(2)]


# Small shards become large ones.


def fill(folder: Path, numbers: Iterable[int]) -> ReferenceCache:
    """Add keys one by one, so that each has a shard of its own."""
    of_key = ReferenceCache.of(KEY)
    for i in numbers:
        of_key.add({key(i): values(i)})
    assert len(shards(folder)) == len(list(numbers))
    return of_key


def test_many_small_shards_become_few_with_the_same_values(cache):
    fill(cache, range(20)).compact()
    assert len(shards(cache)) == 1
    assert load(ReferenceCache.of(KEY), *range(20)) == [values(i).tolist() for i in range(20)]


def test_merged_shards_are_not_larger_than_others(cache, monkeypatch):
    monkeypatch.setattr(reference_cache, "SHARD_ROWS", 60)
    fill(cache, range(20)).compact()
    sizes = [len(load_file(shard)["logps"]) for shard in shards(cache)]
    assert max(sizes) <= 60
    assert len(sizes) < 20
    assert load(ReferenceCache.of(KEY), *range(20)) == [values(i).tolist() for i in range(20)]


def test_a_few_shards_stay_as_they_are(cache):
    of_key = fill(cache, range(7))
    before = shards(cache)
    of_key.compact()
    assert shards(cache) == before


def test_the_oldest_value_of_a_key_stays_in_a_merged_shard(cache):
    of_key = fill(cache, range(10))
    of_key.add({key(9): values(9) + 1})
    of_key.compact()
    of_key.add({key(8): values(8) + 1})
    assert load(ReferenceCache.of(KEY), 9, 8) == [values(9).tolist(), values(8).tolist()]


def test_a_process_that_has_read_the_index_finds_rows_that_were_merged_since(cache):
    reader = fill(cache, range(9))
    keys = [key(i) for i in range(9)]
    assert all(reader.find(keys))
    ReferenceCache.of(KEY).compact()
    logps, offsets = reader.load(keys, [i + 1 for i in range(9)])
    assert [logps[a:b].tolist() for a, b in pairwise(offsets)] == [values(i).tolist() for i in range(9)]


def test_rows_that_were_removed_since_are_an_error(cache):
    reader = fill(cache, [1])
    reader.find([key(1)])
    shards(cache)[0].unlink()
    with pytest.raises(SaroError, match="rows have been removed meanwhile; start again"):
        reader.load([key(1)], [2])


def test_a_damaged_shard_is_left_out_of_the_merged_one(cache):
    of_key = fill(cache, range(9))
    damaged = shards(cache)[4]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    of_key.compact()
    assert of_key.find([key(i) for i in range(9)]) == [i != 4 for i in range(9)]
    assert load(of_key, 3, 5) == [values(3).tolist(), values(5).tolist()]


def test_partial_files_of_a_killed_process_are_ignored(cache):
    of_key = ReferenceCache.of(KEY)
    of_key.add({key(1): values(1)})
    (shards(cache)[0].parent / ".0123.safetensors.89abcdef.tmp").write_bytes(b"half")
    assert load(ReferenceCache.of(KEY), 1) == [values(1).tolist()]


def test_a_truncated_shard_is_removed_and_its_keys_are_not_found(cache):
    ReferenceCache.of(KEY).add({key(1): values(1)})
    (shard,) = shards(cache)
    shard.write_bytes(shard.read_bytes()[:-3])
    assert ReferenceCache.of(KEY).find([key(1)]) == [False]
    assert not shards(cache)


def test_values_that_changed_on_disk_are_never_returned(cache):
    ReferenceCache.of(KEY).add({key(9): values(9)})
    (shard,) = shards(cache)
    content = bytearray(shard.read_bytes())
    position = bytes(content).index(values(9).tobytes())
    content[position] ^= 1
    shard.write_bytes(content)
    of_key = ReferenceCache.of(KEY)
    assert of_key.find([key(9)]) == [True]
    with pytest.raises(SaroError, match="was damaged on disk and has been removed; start again"):
        of_key.load([key(9)], [10])
    assert ReferenceCache.of(KEY).find([key(9)]) == [False]


def _add_many(folder: str, first: int) -> None:
    os.environ["SARO_CACHE"] = folder
    of_key = ReferenceCache.of(KEY)
    for i in range(first, first + 10):
        of_key.add({key(i): values(i)})
        assert of_key.find([key(i)]) == [True]


def test_processes_may_add_at_the_same_time(cache):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add_many, args=(str(cache), first)) for first in (0, 5, 10)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert load(ReferenceCache.of(KEY), *range(20)) == [values(i).tolist() for i in range(20)]


sequences = st.builds(
    lambda tokens, start: (tuple(tokens), min(start, len(tokens) - 1)),
    st.lists(st.integers(0, 300), min_size=2, max_size=5),
    st.integers(1, 4),
)


@settings(max_examples=200)
@given(sequences, sequences)
def test_keys_are_equal_only_for_equal_tokens_and_scored_spans(a, b):
    def of(drawn):
        tokens, start = drawn
        return sequence_key(np.array(tokens, np.int32), start)

    assert (of(a) == of(b)) == (a == b)


def test_a_key_does_not_depend_on_the_memory_layout_of_the_tokens():
    tokens = np.arange(20, dtype=np.int32)
    assert sequence_key(tokens[::2], 1) == sequence_key(tokens[::2].copy(), 1)
