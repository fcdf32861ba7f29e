"""Small files leave nothing behind; of large ones, each machine encodes one copy, which its ranks map."""

from __future__ import annotations

import importlib.util
import json
from datetime import date
from functools import partial

import numpy as np
import pytest
from run_files import ROOT, assert_same_run
from tiny import IM_END, tiny_tokenizer

from saro.config import DataConfig, PreferenceConfig
from saro.data import encoded_folder
from saro.data.chat_format import ChatFormat
from saro.distributed.run_ranks import run_ranks
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.model.architectures import TokenLimits
from saro.runs.check_ranks import check_same_inputs
from saro.train import load_sets
from saro.train.load_sets import load_examples, load_preferences

CHAT = ChatFormat(tiny_tokenizer(), frozenset({IM_END}), date(1999, 7, 4))
OPTIONS = DataConfig(pack_tokens=512)
load_pairs = partial(load_preferences, preference=PreferenceConfig())
MANIFEST = dict.fromkeys(("code", "versions", "template", "model", "reference"))


@pytest.fixture
def encoded_large(monkeypatch):
    """Treat all files as large, and encode them in this process."""
    monkeypatch.setattr(load_sets, "MAPPED_BYTES", 0)
    monkeypatch.setattr(encoded_folder, "count_workers", lambda: 1)


def test_a_small_file_is_encoded_in_memory_and_nothing_is_written(runtime, records_file, pairs, cache):
    data = load_pairs(runtime, [records_file(pairs)], CHAT, OPTIONS, TokenLimits(300))
    assert data.digest is None
    assert not cache.exists()


def test_a_large_file_is_mapped(runtime, records_file, examples, pairs, cache, encoded_large):
    for load, records in ((load_examples, examples), (load_pairs, pairs)):
        data = load(runtime, [records_file(records, "records.jsonl")], CHAT, OPTIONS, TokenLimits(300))
        assert data.digest is not None
        assert len(data) == len(records)
    assert isinstance(data.chosen.tokens.base, np.memmap)


@pytest.mark.parametrize("large", [False, True])
def test_masks_are_checked_however_large_the_file_is(runtime, records_file, pairs, cache, large, request):
    if large:
        request.getfixturevalue("encoded_large")
    with pytest.raises(SaroError, match="the model embeds 20 tokens; they do not belong together"):
        load_pairs(runtime, [records_file(pairs)], CHAT, OPTIONS, TokenLimits(20))


def load_on_ranks(*files: str) -> None:
    """Load a large file, of which each rank may have its own, and print how often this rank encoded and what it has."""
    load_sets.MAPPED_BYTES = 0
    encoded_folder.count_workers = lambda: 1
    encoded = []
    encode = encoded_folder.encode_into
    encoded_folder.encode_into = lambda *args, **options: encoded.append(1) or encode(*args, **options)
    runtime = Runtime.start()
    file = files[min(runtime.rank, len(files) - 1)]
    try:
        data = load_pairs(runtime, [file], CHAT, OPTIONS, TokenLimits(300))
        check_same_inputs(runtime, MANIFEST, {"train": data})
        print(json.dumps([len(encoded), data.lengths.sum().item(), data.ids[3]]))
    except SaroError as error:
        print(error)
    runtime.end()


def test_one_rank_of_a_machine_encodes_and_all_map_the_same(recipes, records_file, pairs, cache):
    call = {"call": f"{__file__}:load_on_ranks", "variables": {"SARO_CACHE": str(cache)}}
    file = records_file(pairs)
    (*first, size, third), other = (json.loads(p.out) for p in recipes.run_ranks(2, file, **call))
    assert first == [1]
    assert other == [0, size, third]


def test_ranks_with_other_large_files_are_refused(recipes, records_file, pairs, cache):
    call = {"call": f"{__file__}:load_on_ranks", "variables": {"SARO_CACHE": str(cache)}}
    files = [records_file(pairs, "a.jsonl"), records_file(pairs[1:], "b.jsonl")]
    said = [p.out for p in recipes.run_ranks(2, *files, **call)]
    assert said == ["rank 1 differs from rank 0 in the token ids of train; give every rank the same files\n"] * 2


def run_mapped(*_: str) -> None:
    """Run SRPO on files that count as large."""
    load_sets.MAPPED_BYTES = 0
    encoded_folder.count_workers = lambda: 1
    spec = importlib.util.spec_from_file_location("srpo", ROOT / "recipes" / "srpo.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    run_ranks(recipe.main)


def test_a_run_on_mapped_pairs_is_the_run_on_pairs_in_memory(recipes, srpo_arguments, tmp_path, cache):
    own_cache = {"environment": {"SARO_CACHE": str(cache)}, "recipe": "srpo"}
    plain = recipes.run(*srpo_arguments(train_output=tmp_path / "plain"), **own_cache)
    mapped = recipes.run(*srpo_arguments(train_output=tmp_path / "mapped"), call=f"{__file__}:run_mapped", **own_cache)
    assert [plain.code, mapped.code] == [0, 0], plain.err + mapped.err
    assert ["encoding into" in process.err for process in (plain, mapped)] == [False, True]
    assert_same_run(tmp_path / "plain", tmp_path / "mapped")
