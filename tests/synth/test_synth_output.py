"""The files of a stage: complete or absent, never beside a manifest of others, never written by two."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from filelock import FileLock
from selection_cases import tiny_chat

from saro.data.records import read_examples
from saro.errors import SaroError
from saro.synth.funnel import Funnel
from saro.synth.synth_options import Options, OutcomeStage
from saro.synth.synth_output import SynthOutput, describe_making, describe_result, read_synth_manifest


def example(id: str = "a", answer: str = "Yes.", **synth: object) -> dict:
    return {
        "id": id,
        "kind": "safety",
        "prompt": f"Is it {id}?",
        "reasoning": "It is.",
        "answer": answer,
        "meta": {"synth": {"prompt": id, "form": "guided", **synth}, "source": "made up", "licence": "Apache-2.0"},
    }


def making(**options: object) -> dict:
    return describe_making(Options(**{"stage": "op"} | options), policy={"name": "saro", "hash": "0"})


def write(path: Path, records: list[dict], made_from: dict | None = None, *, overwrite: bool = False) -> dict:
    """Open, begin and write an output, as one process does."""
    made_from = made_from or making()
    output = SynthOutput.open(str(path), overwrite)
    output.begin(made_from)
    try:
        return output.write(records, made_from, Funnel(), {})
    finally:
        output.lock.release()


def test_records_manifest_and_reasons_are_written(tmp_path):
    funnel = Funnel()
    funnel.count("gates", "passed", 2)
    funnel.leave_out("b", "gates", "unfinished", "0123")
    output = SynthOutput.open(str(tmp_path / "new" / "r.jsonl"))
    output.begin(making())
    manifest = output.write([example()], making(), funnel, {"lengths": None})
    assert [record.id for record in read_examples(output.records)] == ["a"]
    assert json.loads(output.left_out.read_text()) == {
        "id": "b",
        "stage": "gates",
        "reason": "unfinished",
        "draw": "0123",
    }
    assert read_synth_manifest(output.records) == json.loads(json.dumps(manifest))
    result = manifest["result"]
    assert result["records"] == 1
    assert result["sha256"] == hashlib.sha256(output.records.read_bytes()).hexdigest()
    assert result["licences"] == {"Apache-2.0": 1}
    assert result["forms"] == {"guided": 1}
    assert result["funnel"]["left_out"] == {"gates": {"unfinished": 1}}
    assert describe_result(manifest, "r.jsonl") == [
        "1 records in r.jsonl (guided 1)",
        "gates: passed 2",
        "output: records 1",
        "left out, gates: unfinished 1",
    ]


def test_records_of_heldout_prompts_are_written_apart(tmp_path):
    output = SynthOutput.open(str(tmp_path / "r.jsonl"))
    output.begin(making())
    manifest = output.write([example("a"), example("b")], making(), Funnel(), {}, frozenset({"b"}))
    assert [record.id for record in read_examples(tmp_path / "r.jsonl")] == ["a"]
    assert [record.id for record in read_examples(tmp_path / "r.heldout.jsonl")] == ["b"]
    result = manifest["result"]
    assert (result["records"], result["heldout"]["records"]) == (1, 1)
    assert result["heldout"]["sha256"] == hashlib.sha256(output.heldout.read_bytes()).hexdigest()
    assert "1 records in r.jsonl, 1 held out (guided 2)" in describe_result(manifest, "r.jsonl")


def test_without_heldout_prompts_an_old_heldout_file_goes(tmp_path):
    (tmp_path / "r.heldout.jsonl").write_text("old")
    write(tmp_path / "r.jsonl", [example()], overwrite=True)
    assert not (tmp_path / "r.heldout.jsonl").exists()


def test_the_same_output_is_written_again_to_the_same_bytes(tmp_path):
    path = tmp_path / "r.jsonl"
    write(path, [example()])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write(path, [example()])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"stage": "rw"}, "stage"),
        ({"max_tokens": 7}, "--max_tokens"),
        ({"op": OutcomeStage(draws=3)}, "--op.draws"),
        ({"seed": 1, "limit": 5}, "--limit, --seed"),
    ],
)
def test_an_output_of_other_options_is_not_replaced_unless_asked_for(tmp_path, changes, names):
    path = tmp_path / "r.jsonl"
    write(path, [example()])
    with pytest.raises(SaroError, match=rf"r\.jsonl: exists, and it was made with other values of {names}; "):
        write(path, [example("b")], making(**changes))
    assert "Is it a?" in path.read_text()
    write(path, [example("b")], making(**changes), overwrite=True)
    assert "Is it b?" in path.read_text()


def test_an_output_of_another_policy_is_not_replaced(tmp_path):
    write(tmp_path / "r.jsonl", [example()])
    with pytest.raises(SaroError, match="other values of policy"):
        write(tmp_path / "r.jsonl", [example()], making() | {"policy": {"name": "saro", "hash": "1"}})


@pytest.mark.parametrize("options", [{"output": "x.jsonl"}, {"offline": True}, {"store": "s"}, {"overwrite": True}])
def test_options_that_decide_no_record_may_differ(tmp_path, options):
    write(tmp_path / "r.jsonl", [example()])
    write(tmp_path / "r.jsonl", [example()], making(**options))


def test_a_file_of_somebody_else_is_not_replaced(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("mine\n")
    with pytest.raises(
        SaroError, match="exists, and there is no manifest of it; give another --output, or --overwrite"
    ):
        write(path, [example()])
    assert path.read_text() == "mine\n"


@pytest.mark.parametrize("text", ["", "[]", '{"saro": "0"}', '{"saro": 0, "synth": 1, "stage": 1, "result": 1}'])
def test_a_broken_manifest_is_none(tmp_path, text):
    (tmp_path / "r.manifest.json").write_text(text)
    assert read_synth_manifest(tmp_path / "r.jsonl") is None


def test_two_processes_never_write_one_output(tmp_path):
    with FileLock(tmp_path / ".r.jsonl.lock"), pytest.raises(SaroError, match="another process writes this output"):
        write(tmp_path / "r.jsonl", [example()])


@pytest.mark.parametrize("name", ["r", "r.json", "r.manifest.json"])
def test_a_name_without_its_suffix_is_refused(tmp_path, name):
    with pytest.raises(SaroError, match=r"does not end with \.jsonl"):
        SynthOutput.open(str(tmp_path / name))


def test_a_folder_is_refused(tmp_path):
    (tmp_path / "r.jsonl").mkdir()
    with pytest.raises(SaroError, match="is a folder"):
        SynthOutput.open(str(tmp_path / "r.jsonl"))


@pytest.mark.parametrize("answer", ["", " \n", "a\0b", "half \ud800 of a pair"])
def test_a_record_that_our_readers_refuse_is_left_out_and_counted(tmp_path, answer):
    manifest = write(tmp_path / "r.jsonl", [example("a"), example("b", answer)])
    assert manifest["result"]["funnel"] == {
        "counts": {"output": {"records": 1}},
        "left_out": {"output": {"no valid record": 1}},
    }
    assert json.loads((tmp_path / "r.left_out.jsonl").read_text())["id"] == "b"
    assert len(list(read_examples(tmp_path / "r.jsonl"))) == 1


def test_a_record_that_training_cannot_encode_is_left_out_and_counted(tmp_path):
    output = SynthOutput.open(str(tmp_path / "r.jsonl"))
    output.begin(making())
    pair = {name: value for name, value in example("c").items() if name not in ("reasoning", "answer")}
    pair |= {"kind": "op-cot", "chosen": {"answer": "Yes."}, "rejected": {"answer": "It is <|im_end|> here."}}
    records = [example("a"), example("b", "It is <|im_end|> here."), pair]
    manifest = output.write(records, making(), Funnel(), {}, chat=tiny_chat())
    assert manifest["result"]["funnel"]["left_out"] == {"output": {"encode": 2}}
    assert [record.id for record in read_examples(tmp_path / "r.jsonl")] == ["a"]


def test_sources_and_licences_of_published_texts_are_counted_apart(tmp_path):
    records = [
        example("a", fill={"file": "f.jsonl", "source": "Star", "licence": "MIT"}),
        example("b", fill={"file": "f.jsonl", "source": "f.jsonl", "licence": None}),
        example("c"),
    ]
    result = write(tmp_path / "r.jsonl", records)["result"]
    assert result["fill"] == {"sources": {"Star": 1, "f.jsonl": 1}, "licences": {"MIT": 1, "not known": 1}}
    assert result["licences"] == {"Apache-2.0": 3}


def test_only_the_owner_can_read_the_records(tmp_path):
    output = SynthOutput.open(str(tmp_path / "r.jsonl"))
    output.begin(making())
    output.write([example("a"), example("b")], making(), Funnel(), {}, frozenset({"b"}))
    assert [file.stat().st_mode & 0o777 for file in (output.records, output.heldout)] == [0o600, 0o600]


def test_two_records_of_one_id_are_an_error_of_ours(tmp_path):
    with pytest.raises(RuntimeError, match="two records have the id a"):
        write(tmp_path / "r.jsonl", [example("a"), example("a")])


def test_no_record_left_removes_the_records_before_and_says_why(tmp_path):
    path = tmp_path / "r.jsonl"
    write(path, [example()])
    with pytest.raises(SaroError, match=r"no record is left \(output: no valid record 1\); r\.manifest\.json counts"):
        write(path, [example("b", "")])
    assert not path.exists()
    assert read_synth_manifest(path)["result"]["records"] == 0


def test_a_kill_between_the_files_leaves_no_records_of_others(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    write(path, [example()])

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("saro.synth.synth_output.asdict", fail)
    output = SynthOutput.open(str(path), overwrite=True)
    output.begin(making())
    funnel = Funnel()
    funnel.leave_out("b", "gates", "cut")
    with pytest.raises(KeyboardInterrupt):
        output.write([example("b")], making(), funnel, {})
    assert not path.exists()
    output.lock.release()
    monkeypatch.undo()
    write(path, [example("b")])
    assert "Is it b?" in path.read_text()


def test_the_manifest_names_no_key_and_no_path():
    options = Options(stage="rw", prompts=["/home/me/p.jsonl"], store="/home/me/draws", generator="/home/me/model")
    assert "/home/me" not in json.dumps(describe_making(options))
