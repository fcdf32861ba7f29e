"""Suite prompts that a model was trained on are found, and training files that are gone are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saro.data.records import Message
from saro.demo import demo_file
from saro.evaluate.contamination import (
    WORDS,
    Contamination,
    TrainingFiles,
    find_contamination,
    find_training_files,
    read_training_prompts,
)
from saro.evaluate.suite import Item
from saro.files import file_hash

LONG = " ".join(f"word{i}" for i in range(20))


def item(text: str, id: str = "a") -> Item:
    return Item("suite", id, (Message("user", text),), "comply")


def kinds(text: str, *training: str) -> list[str]:
    found = find_contamination([item(text)], [(str(i), prompt) for i, prompt in enumerate(training)])
    return [contamination.kind for contamination in found]


# Comparing


@pytest.mark.parametrize(
    "training",
    [
        "What's the time?",
        "what's the time",
        "  What's\n\tthe TIME?! ",
        "What\u2019s the time\u2026",
        "\uff37hat's the time",
    ],
)
def test_case_punctuation_white_space_and_width_do_not_matter(training):
    assert kinds("What's the time?", training) == ["exact"]


@pytest.mark.parametrize("training", ["What's the timer?", "What's the time now?", "time the What's", ""])
def test_other_words_do(training):
    assert kinds("What's the time?", training) == []


def test_thirteen_words_in_a_row_are_found_inside_other_text():
    words = LONG.split()
    assert kinds(LONG, "Before. " + " ".join(words[3 : 3 + WORDS]) + ", after") == ["13-gram"]
    assert kinds(LONG, "Before. " + " ".join(words[3 : 2 + WORDS]) + ", after") == []
    assert kinds(LONG, " ".join([*words[:10], "other", *words[10:]])) == []


def test_the_same_text_counts_as_exact_wherever_it_comes():
    assert find_contamination([item(LONG)], [("part", LONG + " more"), ("whole", LONG)]) == [
        Contamination("suite", "a", "whole", "exact")
    ]


def test_the_first_record_is_named():
    (found,) = find_contamination([item("Why?")], [("r1", "How?"), ("r2", "why"), ("r3", "Why?")])
    assert found.record == "r2"


def test_items_are_reported_once_and_in_their_order():
    items = [item("A b", "x"), item(LONG, "y"), item("C d", "z"), item("a B", "w")]
    found = find_contamination(items, [("r1", LONG + "."), ("r2", "a b"), ("r3", "a b")])
    assert [(c.item, c.record) for c in found] == [("x", "r2"), ("y", "r1"), ("w", "r2")]


def test_text_without_spaces_between_words_is_compared_by_characters():
    text = "".join(chr(0x4E00 + i) for i in range(20))
    assert kinds(text, "x" + text[2 : 2 + WORDS] + "y") == ["13-gram"]
    assert kinds(text, "x" + text[2 : 1 + WORDS] + "y") == []


def test_prompts_without_words_are_never_found():
    assert kinds("?!", "...", "") == []


def test_all_user_turns_of_an_item_are_compared_and_no_others():
    turns = [("system", "S"), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?")]
    conversation = Item("suite", "a", tuple(Message(*turn) for turn in turns), "comply")
    assert find_contamination([conversation], [("r", "hi why")])
    assert not find_contamination([conversation], [("r", "Why?"), ("s", "S"), ("t", "Yes?")])


@given(
    before=st.lists(st.sampled_from("abc"), max_size=30),
    after=st.lists(st.sampled_from("abc"), max_size=30),
    other=st.lists(st.sampled_from("abc"), min_size=1, max_size=30),
)
def test_grams_are_found_as_by_the_definition(before, after, other):
    text = [*before, *after]
    has_gram = any(
        text[i : i + WORDS] == other[j : j + WORDS]
        for i in range(len(text) - WORDS + 1)
        for j in range(len(other) - WORDS + 1)
    )
    expected = ["exact"] if text == other else ["13-gram"] * has_gram
    assert kinds(" ".join(text), " ".join(other)) == expected


# Reading training files


def test_prompts_of_examples_and_pairs_are_read():
    for name in ("rw_train", "srpo_train"):
        prompts = list(read_training_prompts([demo_file(name)]))
        lines = [json.loads(line) for line in Path(demo_file(name)).read_text().splitlines()]
        assert {id for _, id, _ in prompts} == {line["id"] for line in lines}
        single = {(line["id"], line["prompt"]) for line in lines if isinstance(line["prompt"], str)}
        assert single <= {(id, text) for _, id, text in prompts}


def test_the_turns_of_a_conversation_are_read_together_and_one_by_one(records_file):
    turns = [("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?")]
    record = {"id": "r", "prompt": [{"role": role, "content": text} for role, text in turns], "answer": "So."}
    file = records_file([record])
    assert list(read_training_prompts([file])) == [(file, "r", "Hi\nWhy?"), (file, "r", "Hi"), (file, "r", "Why?")]


def test_raw_text_is_read(records_file):
    file = records_file([{"id": "r", "prompt": "Q: Why?", "completion": " So."}])
    assert list(read_training_prompts([file])) == [(file, "r", "Q: Why?")]


# Finding them

ANSWER = {"prompt": "Why?", "answer": "So."}


@pytest.fixture
def make_run(tmp_path):
    """Return a function that makes the folder of a finished run with its manifest, and returns final/."""

    def make(name: str, train: list[str], heldout: list[str] = (), start: str = "org/base", **model: object) -> Path:
        final = tmp_path / name / "final"
        final.mkdir(parents=True)
        (final / "adapter_model.safetensors").write_text(f"weights of {name}")
        (final / "adapter_config.json").write_text("{}")
        manifest = {
            "saro": "0.1.0",
            "template_date": "2024-07-26",
            "start": start,
            "model": {"name": "org/base", "commit": "c0ffee", "files": {}, "adapter": None} | model,
            "data": {file: file_hash(tmp_path / file) for file in [*train, *heldout]},
            "config": {"data": {"train": train, "heldout": list(heldout)}},
        }
        (final.parent / "manifest.json").write_text(json.dumps(manifest))
        return final

    return make


@pytest.fixture
def two_stages(make_run, records_file, tmp_path):
    """Make a run of each stage, and return final/ of the second one."""
    rw_train, srpo_train = (
        records_file([ANSWER], "rw.jsonl"),
        records_file([ANSWER, ANSWER | {"id": "b"}], "srpo.jsonl"),
    )
    heldout = records_file([ANSWER | {"id": "h"}], "heldout.jsonl")
    rw = make_run("rw", [rw_train], [heldout])
    adapter = {"adapter_model.safetensors": file_hash(rw / "adapter_model.safetensors"), "config": {}}
    return make_run("srpo", [srpo_train], [heldout], start=str(rw), adapter=adapter)


def test_the_files_of_both_stages_are_found_without_the_held_out_ones(two_stages, tmp_path):
    files = (tmp_path / "srpo.jsonl", tmp_path / "rw.jsonl")
    assert find_training_files(two_stages) == TrainingFiles(files)


def test_a_file_that_has_changed_is_unknown(two_stages, tmp_path):
    (tmp_path / "rw.jsonl").write_text(json.dumps(ANSWER | {"prompt": "How?"}))
    found = find_training_files(two_stages)
    assert found.files == (tmp_path / "srpo.jsonl",)
    assert found.unknown == (f"rw: {tmp_path}/rw.jsonl has changed since training",)


def test_a_file_that_is_gone_is_unknown(two_stages, tmp_path):
    (tmp_path / "srpo.jsonl").unlink()
    found = find_training_files(two_stages)
    assert found.files == (tmp_path / "rw.jsonl",)
    assert found.unknown == (f"srpo: {tmp_path}/srpo.jsonl is gone",)


@pytest.mark.parametrize("fault", ["gone", "changed"])
def test_a_first_stage_that_is_not_what_the_second_one_began_with_is_unknown(two_stages, tmp_path, fault):
    if fault == "gone":
        shutil.rmtree(tmp_path / "rw")
    else:
        (tmp_path / "rw" / "final" / "adapter_model.safetensors").write_text("weights of another run")
    found = find_training_files(two_stages)
    assert found.files == (tmp_path / "srpo.jsonl",)
    assert found.unknown == (f"srpo: {tmp_path}/rw/final, from which it started, is gone or has changed",)


def test_relative_names_are_found_from_the_folder_in_which_the_run_was_started(make_run, records_file, tmp_path):
    records_file([ANSWER], "rw.jsonl")
    final = make_run("rw", ["rw.jsonl"])
    assert find_training_files(final) == TrainingFiles((tmp_path / "rw.jsonl",))


def test_demo_files_are_found_in_the_package(make_run, tmp_path):
    old_place = tmp_path / "old" / "rw_train.jsonl"
    old_place.parent.mkdir()
    shutil.copy(demo_file("rw_train"), old_place)
    final = make_run("rw", [str(old_place)])
    shutil.rmtree(old_place.parent)
    assert find_training_files(final) == TrainingFiles((Path(demo_file("rw_train")),))


def test_a_model_of_the_hub_and_a_plain_folder_have_no_known_files(tmp_path):
    assert find_training_files("org/base") == TrainingFiles()
    assert find_training_files(tmp_path) == TrainingFiles()


@pytest.mark.parametrize("file", ["adapter_config.json", "export.json"])
def test_an_adapter_or_an_export_without_its_run_is_unknown(tmp_path, file):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / file).write_text("{}")
    (unknown,) = find_training_files(tmp_path / "copy").unknown
    assert unknown == f"{tmp_path}/copy: no manifest lies beside it; evaluate it in the folder of its run"


def test_a_manifest_that_names_no_files_is_unknown(make_run):
    final = make_run("rw", [])
    assert find_training_files(final).unknown == ("rw: its manifest names no training files",)
