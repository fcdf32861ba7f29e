"""Tests that the recipes train on data in the forms in which it is published."""

from __future__ import annotations

import json

import pytest

TURNS = ("Hi", "Hello", "Why?", "Because.", "Oh?", "Yes.")
ULTRAFEEDBACK_FIELDS = {"prompt_id": "x", "score_chosen": 8.0, "score_rejected": 2.0}


def talk(number: int, last: str = "Yes.") -> list[dict]:
    said = [f"{TURNS[0]} {number}", *TURNS[1:-1], last]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def test_rw_trains_on_all_turns_of_a_parquet_file(recipes, rw_arguments, tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    file = str(tmp_path / "talk.parquet")
    pq.write_table(pa.Table.from_pylist([{"messages": talk(i), "source": "x"} for i in range(8)]), file)
    options = {"data_train": json.dumps([file]), "data_heldout": "[]", "data_train_on": "all"}
    done = recipes.run(*rw_arguments(**options, train_max_steps=2))
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["records"]["train"]["records"], manifest["records"]["train"]["ignored"]) == (
        {"general": 24},
        ["source"],
    )
    assert list(manifest["data"]) == [file]
    # The data are part of what a run is made from: a resumed run may not change them.
    pq.write_table(pa.Table.from_pylist([{"messages": talk(i)} for i in range(8)]), file)
    done = recipes.run(*rw_arguments("--resume", **options, train_max_steps=3))
    assert done.code == 2
    assert "the data is not what the run began with" in done.err


def test_srpo_trains_on_records_of_ultrafeedback(srpo, srpo_arguments, records_file, tmp_path):
    records = [
        {"prompt": talk(i)[0]["content"], "messages": talk(i), "chosen": talk(i), "rejected": talk(i, "No.")}
        for i in range(8)
    ]
    file = records_file([record | ULTRAFEEDBACK_FIELDS for record in records], "ultrafeedback.jsonl")
    done = srpo(*srpo_arguments(data_train=json.dumps([file]), data_heldout="[]", train_max_steps=1))
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "run" / "manifest.json").read_text())["records"]["train"]
    assert (report["records"], report["ignored"]) == ({"op-cot": 8}, sorted(ULTRAFEEDBACK_FIELDS))
