"""Steps with labels: right before the step that decides, wrong from there on, in the form that TRL reads."""

from __future__ import annotations

import json

import pytest

from saro.errors import SaroError
from saro.synth.export_prm import export_prm

SHARED = ["I read the question.", "I look at it closely."]


def pair(
    form: str, fork: int, *, chosen: list[str], rejected: list[str], id: str = "a", **rejected_side: object
) -> dict:
    return {
        "id": id,
        "kind": "pp-cot",
        "prompt": "Which one?",
        "chosen": {"reasoning": " ".join(chosen), "answer": "This one."},
        "rejected": {"reasoning": " ".join(rejected), "answer": "That one."} | rejected_side,
        "meta": {"synth": {"form": form, "fork": {"step": fork, "token": 9}}},
    }


GOOD, WRONG, LAST = "I turn to the good one.", "I take the wrong one.", "So be it."


@pytest.fixture
def export(records_file, tmp_path):
    """Export records; return the lines, and the result."""

    def run(*records: dict, **options: object):
        exported = export_prm(records_file(list(records)), tmp_path / "prm.jsonl", **options)
        lines = [json.loads(line) for line in (tmp_path / "prm.jsonl").read_text().splitlines()]
        return lines, exported

    return run


@pytest.mark.parametrize("form", ["intervene", "sibling"])
def test_the_step_behind_the_fork_is_the_first_wrong_one(export, form):
    lines, exported = export(pair(form, 2, chosen=[*SHARED, GOOD], rejected=[*SHARED, WRONG, LAST]))
    assert lines == [
        {"prompt": "Which one?", "completions": [*SHARED, GOOD], "labels": [True, True, True]},
        {"prompt": "Which one?", "completions": [*SHARED, WRONG, LAST], "labels": [True, True, False, False]},
    ]
    assert (exported.chains, exported.steps, exported.right) == (2, 7, 5)


@pytest.mark.parametrize("form", ["recover", "mirror"])
def test_a_cue_in_the_shared_beginning_is_wrong_on_both_sides_and_the_chosen_one_comes_back(export, form):
    lines, _ = export(pair(form, 3, chosen=[*SHARED, WRONG, GOOD], rejected=[*SHARED, WRONG, LAST]))
    assert [line["labels"] for line in lines] == [[True, True, False, True], [True, True, False, False]]


def test_of_two_chains_that_end_well_only_the_better_one_is_exported(export):
    lines, exported = export(pair("earlier", 1, chosen=[SHARED[0], GOOD], rejected=[*SHARED, GOOD]))
    assert [line["labels"] for line in lines] == [[True, True]]
    assert exported.left_out == {"a side that ends well": 1}


def test_what_an_open_side_has_after_the_deciding_step_is_cut(export, monkeypatch):
    record = pair("intervene", 2, chosen=[*SHARED, GOOD], rejected=[*SHARED, WRONG, "And th"])
    record["rejected"] = {"reasoning": record["rejected"]["reasoning"], "answer": "x", "open": True}
    # The readers of this version may not know open sides.
    monkeypatch.setattr("saro.synth.export_prm.parse_pair", _parse_without_open)
    lines, _ = export(record)
    assert lines[1]["completions"] == [*SHARED, WRONG]


def _parse_without_open(fields: dict, where: str, default_id: str):
    from saro.data.records import parse_pair

    sides = {name: {k: v for k, v in fields[name].items() if k != "open"} for name in ("chosen", "rejected")}
    return parse_pair(fields | sides, where, default_id)


def test_a_chain_in_two_pairs_is_written_once(export):
    first = pair("intervene", 2, chosen=[*SHARED, GOOD], rejected=[*SHARED, WRONG, LAST])
    second = pair("intervene", 2, id="b", chosen=[*SHARED, GOOD, LAST], rejected=[*SHARED, WRONG, LAST])
    lines, exported = export(first, second)
    assert len(lines) == exported.chains == 3
    assert exported.left_out == {"the chain of another pair": 1}


def test_chains_that_contradict_each_other_are_left_out(export):
    chain = [*SHARED, WRONG, LAST]
    # By its value the second step decides, by its label the third one.
    by_value = pair("sibling", 1, chosen=[SHARED[0], GOOD], rejected=chain)
    by_cue = pair("intervene", 2, id="b", chosen=[*SHARED, GOOD], rejected=chain)
    lines, exported = export(by_value, by_cue)
    assert [line["completions"] for line in lines] == [[SHARED[0], GOOD]]
    assert exported.left_out == {"its labels contradict another chain's": 3}
    assert (exported.chains, exported.steps, exported.right) == (1, 2, 2)


def test_the_same_steps_on_other_prompts_contradict_nothing(export):
    chain = [*SHARED, WRONG, LAST]
    by_value = pair("sibling", 1, chosen=[SHARED[0], GOOD], rejected=chain) | {"prompt": "Which other one?"}
    by_cue = pair("intervene", 2, id="b", chosen=[*SHARED, GOOD], rejected=chain)
    _, exported = export(by_value, by_cue)
    assert (exported.chains, exported.left_out) == (4, {})


def test_a_file_of_nothing_but_contradictions_is_refused(export, tmp_path):
    chain = [*SHARED, WRONG]
    first = pair("sibling", 1, chosen=[*SHARED, GOOD], rejected=chain)
    second = pair("intervene", 2, id="b", chosen=[*SHARED, GOOD], rejected=chain)
    with pytest.raises(SaroError, match="calls a step of every chain both right and wrong"):
        export(first, second)
    assert not (tmp_path / "prm.jsonl").exists()


def test_outcome_pairs_and_prompts_of_several_turns_are_left_out_and_counted(export, pairs):
    sound = pair("intervene", 2, chosen=[*SHARED, GOOD], rejected=[*SHARED, WRONG, LAST])
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Which one?"}]
    lines, exported = export(sound, pairs[0], sound | {"id": "c", "prompt": turns})
    assert len(lines) == 2
    assert exported.left_out == {"a prompt of several turns": 2, "no process pair": 2}


def test_a_file_without_process_pairs_is_refused_and_nothing_is_written(export, pairs, tmp_path):
    with pytest.raises(SaroError, match="holds no process pair that can be exported"):
        export(*pairs)
    assert not (tmp_path / "prm.jsonl").exists()


def test_a_fork_outside_the_chain_is_refused(export):
    with pytest.raises(
        SaroError, match=r"records\.jsonl:1: its fork is after step 7, and its rejected side has 3 steps"
    ):
        export(pair("intervene", 7, chosen=[*SHARED, GOOD], rejected=[*SHARED, WRONG]))


def test_an_existing_file_is_not_overwritten_unless_asked_for(export, tmp_path):
    sound = pair("intervene", 2, chosen=[*SHARED, GOOD], rejected=[*SHARED, WRONG, LAST])
    export(sound)
    with pytest.raises(SaroError, match="exists already"):
        export(sound)
    export(sound, overwrite=True)


def test_only_the_owner_can_read_the_chains(export, tmp_path):
    export(pair("intervene", 2, chosen=[*SHARED, GOOD], rejected=[*SHARED, WRONG, LAST]))
    assert (tmp_path / "prm.jsonl").stat().st_mode & 0o777 == 0o600
