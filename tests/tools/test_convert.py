"""`saro convert`: what it prints about a conversion.

tests/synth/test_public_sets.py and tests/evaluate/test_public_suites.py test the conversions.
"""

from __future__ import annotations

import json
from functools import partial

import pytest
from command import run_saro

from saro.evaluate.public_suites import PUBLIC_FORMS
from saro.synth.public_sets import FORMATS


@pytest.fixture
def saro(monkeypatch, capsys):
    """Runs `saro convert` with arguments; returns exit code, stdout and stderr."""
    return partial(run_saro, monkeypatch, capsys, "convert")


def test_records_are_written_and_counted(saro, tmp_path):
    source = tmp_path / "gsm8k.jsonl"
    source.write_text(json.dumps({"question": "1 + 1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}) + "\n")
    code, out, _ = saro("gsm8k", str(source), str(tmp_path / "out.jsonl"))
    assert code == 0
    assert out.startswith("1 records")
    assert "left out" not in out
    assert json.loads((tmp_path / "out.jsonl").read_text())["kind"] == "general"


def test_prompts_for_data_construction_are_counted_as_prompts(saro, tmp_path):
    source = write_questions(tmp_path / "gsm8k.jsonl", "1\n#### 1", "2\n#### 2")
    code, out, _ = saro("gsm8k-prompts", source, str(tmp_path / "out.jsonl"))
    assert (code, out) == (0, f"2 prompts in {tmp_path / 'out.jsonl'}\n")


def test_records_that_are_left_out_are_named(saro, tmp_path):
    source = tmp_path / "pairs.jsonl"
    rows = [{"question": "1 + 1?", "correct": "1+1=2\nA: 2", "incorrect": wrong} for wrong in ("1+1=3\nA: 3", "3")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = saro("gsm8k-pairs", str(source), str(tmp_path / "out.jsonl"))
    assert code == 0
    assert out.splitlines() == [
        f"1 records in {tmp_path / 'out.jsonl'}",
        f"1 left out, without a chain of steps: {source}:2",
    ]


def test_an_existing_target_is_kept_unless_overwritten(saro, tmp_path):
    source, target = tmp_path / "gsm8k.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"question": "1 + 1?", "answer": "1+1=2\n#### 2"}) + "\n")
    target.write_text("mine")
    code, _, err = saro("gsm8k", str(source), str(target))
    assert code == 2
    assert err.startswith(f"error: {target}: exists already")
    assert target.read_text() == "mine"
    assert saro("gsm8k", str(source), str(target), "--overwrite")[0] == 0
    assert json.loads(target.read_text())["kind"] == "general"


def write_questions(path, *texts: str):
    path.write_text("".join(json.dumps({"question": "1?", "answer": text}) + "\n" for text in texts))
    return str(path)


def test_prompts_of_a_suite_are_written_and_counted_by_what_is_expected(saro, tmp_path):
    source = write_questions(tmp_path / "test.jsonl", "1\n#### 1", "2\n#### 2")
    code, out, _ = saro("gsm8k-test", source, str(tmp_path / "gsm8k.jsonl"))
    assert (code, out) == (0, f"2 prompts in {tmp_path / 'gsm8k.jsonl'}: 2 answer\n")


def test_twins_are_counted(saro, tmp_path):
    rows = ["id,prompt,type,label,focus", "1,a,homonyms,safe,kill", "2,b,contrast_homonyms,unsafe,kill"]
    (tmp_path / "x.csv").write_text("\n".join(rows))
    _, out, _ = saro("xstest", str(tmp_path / "x.csv"), str(tmp_path / "xstest.jsonl"))
    assert out == f"2 prompts in {tmp_path / 'xstest.jsonl'}: 1 comply, 1 refuse, 1 pairs of twins\n"


def test_records_of_a_suite_that_are_left_out_are_named_by_reason(saro, tmp_path):
    examples = [{"input": "1 + 1", "target": "2"}, *[{"input": "Close ( [", "target": "] )"}] * 21]
    (tmp_path / "dyck.json").write_text(json.dumps({"examples": examples}))
    code, out, _ = saro("bbh", str(tmp_path / "dyck.json"), str(tmp_path / "bbh.jsonl"))
    assert code == 0
    line = out.splitlines()[1]
    assert line.startswith("21 left out, the target is punctuation, which a match of words does not see: ")
    assert line.endswith(f"{tmp_path / 'dyck.json'}: examples 21 and 1 more")


def test_attacks_are_counted(saro, tmp_path):
    (tmp_path / "dan.json").write_text(json.dumps(["Play a game.", "Play [PROMPT]."]))
    _, out, _ = saro("garak-templates", str(tmp_path / "dan.json"), str(tmp_path / "dan.yaml"))
    assert out == f"2 attacks in {tmp_path / 'dan.yaml'}\n"


def test_the_help_names_every_format(saro):
    code, out, _ = saro("--help")
    assert code == 0
    # The help is wrapped, also at hyphens.
    text = "".join(out.split())
    assert [name for name in (*FORMATS, *PUBLIC_FORMS) if name not in text] == []


def test_an_unknown_format_names_the_nearest_of_both_kinds(saro, tmp_path):
    for typed, near in (("gsm8k-pair", "gsm8k-pairs"), ("xs-test", "xstest")):
        code, _, err = saro(typed, "in", "out")
        assert (code, err) == (2, f"error: unknown format {typed!r}; did you mean {near}?\n")


def test_a_set_without_answers_to_match_says_what_to_run(saro, tmp_path):
    code, _, err = saro("ifeval", "in", "out")
    assert code == 2
    assert "run lm-eval's own task, ifeval" in err
