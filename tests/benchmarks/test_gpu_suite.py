"""The GPU suite loses no result: not when a step fails, takes too long, or is never started. Its tables are Markdown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import gpu_suite
import pytest
from gpu_suite import Folders, Step, Suite, group_steps, list_steps
from gpu_tables import MARKERS, insert, summarize
from loss_kernels_sides import SIDES
from peers_data import SIDES as PEERS
from random_model import SHAPES, split_shards, write_model
from run_files import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from saro.errors import SaroError

RESULTS = sorted((ROOT / "benchmarks/results/gpu").glob("*/results.json"))


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    made = Folders(*(tmp_path / name for name in ("results", "results/logs", "models", "runs", "out")))
    for folder in (made.results, made.logs, made.models, made.runs, made.out):
        folder.mkdir(parents=True, exist_ok=True)
    return made


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def writes(folders: Folders, name: str, value: object) -> str:
    """Return code that writes a result."""
    return f"open({str(folders.results / name)!r}, 'w').write({json.dumps(value)!r})"


def read_out(folders: Folders) -> dict:
    return json.loads((folders.out / "results.json").read_text())


def test_a_step_that_fails_stops_no_other_and_its_log_comes_back(folders, capsys):
    suite = Suite(folders, 60)
    suite.run(Step("broken", 30, (python("print('why it broke'); raise SystemExit(3)"),)))
    suite.run(Step("sound", 30, (python(writes(folders, "sound.json", {"figure": 7})),)))
    found = read_out(folders)
    assert found["steps"]["broken"]["code"] == 3
    assert found["steps"]["sound"]["code"] == 0
    assert found["sound"] == {"figure": 7}
    assert "why it broke" in capsys.readouterr().out
    with tarfile.open(folders.out / "logs.tar.gz") as archive:
        assert b"why it broke" in archive.extractfile("logs/broken.log").read()


def test_the_commands_of_a_step_end_with_the_first_that_fails(folders):
    late = writes(folders, "late.json", {})
    Suite(folders, 60).run(Step("chain", 30, (python("raise SystemExit(1)"), python(late))))
    assert "late" not in read_out(folders)


def test_a_step_over_its_limit_is_stopped_with_its_children_and_keeps_what_it_wrote(folders, tmp_path):
    child = f"import time; time.sleep(3); open({str(tmp_path / 'alive')!r}, 'w')"
    code = f"import subprocess, sys; {writes(folders, 'slow.json', [1])}; subprocess.run([sys.executable, '-c', {child!r}])"
    Suite(folders, 60).run(Step("slow", 2 / gpu_suite.SLOWNESS, (python(code),)))
    found = read_out(folders)
    assert str(found["steps"]["slow"]["code"]).startswith("stopped after")
    assert found["slow"] == [1]
    subprocess.run(python("import time; time.sleep(2)"), check=True)
    assert not (tmp_path / "alive").exists()


def test_results_are_written_while_a_step_runs(folders, monkeypatch):
    monkeypatch.setattr(gpu_suite, "WRITE_EVERY", 0.05)
    seen = []
    monkeypatch.setattr(Suite, "_write", lambda suite: seen.append(1))
    Suite(folders, 60).run(Step("waits", 30, (python("import time; time.sleep(0.5)"),)))
    assert len(seen) > 2  # once at its end, and meanwhile


def test_a_step_shows_no_results_of_an_earlier_call(folders):
    (folders.results / "failed.json").write_text('{"figure": 7}')
    (folders.results / "failed.trace.json.gz").touch()
    Suite(folders, 60).run(Step("failed", 30, (python("raise SystemExit(1)"),)))
    assert "failed" not in read_out(folders).keys() - {"steps"}
    assert not (folders.out / "failed.trace.json.gz").exists()


def test_results_of_which_no_table_can_be_made_are_written_and_named(folders):
    """The machine could not be described: its probe has an error instead of figures."""
    machine = {"machine": {"error": "RuntimeError: no driver"}}
    Suite(folders, 60).run(Step("probe", 30, (python(writes(folders, "probe.json", machine)),)))
    assert read_out(folders)["probe"] == machine
    assert "- no table: KeyError: 'packages'" in (folders.out / "summary.md").read_text()


def test_a_side_of_the_comparison_that_was_never_measured_is_named():
    entry = {"rounds": {"trl": []}, "errors": {}, "figures": {}}
    assert "- trl: not measured" in summarize({"srpo": {"tasks": {"srpo": entry}}})


def test_all_sides_of_the_loss_kernels_are_measured():
    assert {*gpu_suite.HEAD_SIDES, *gpu_suite.CUT_SIDES} == set(SIDES)


def test_all_sides_of_the_comparison_with_trl_are_measured():
    assert set(gpu_suite.SRPO_SIDES) == set(PEERS["srpo"])


def test_a_model_is_written_before_the_first_step_that_needs_it_and_again_only_after_a_failure(folders, monkeypatch):
    codes, ran = iter([1, 0, 0, 0]), []
    monkeypatch.setattr(gpu_suite, "run_command", lambda command, *_: ran.append(Path(command[1]).name) or next(codes))
    suite = Suite(folders, 60)
    for name in ("fails", "first", "second"):
        suite.run(Step(name, 30, (["python", f"{name}.py"],), models=("tiny-qwen3",)))
    assert ran == ["random_model.py", "random_model.py", "first.py", "second.py"]


def test_a_step_for_which_no_time_is_left_is_named(folders):
    suite = Suite(folders, 1)
    suite.run(Step("late", 30, (python(writes(folders, "late.json", {})),)))
    assert read_out(folders)["steps"]["late"]["code"] == "no time left"
    assert "late" not in {file.stem for file in folders.results.glob("*.json")}


def test_steps_that_measure_time_run_alone():
    steps = [
        Step(name, 1, (), alone=alone) for name, alone in zip("abcde", (True, False, False, True, True), strict=True)
    ]
    assert [[step.name for step in group] for group in group_steps(steps)] == [["a"], ["b", "c"], ["d"], ["e"]]


def test_steps_have_names_of_their_own_and_files_that_exist(folders):
    steps = list_steps(folders)
    assert len({step.name for step in steps}) == len(steps)
    scripts = {part for step in steps for command in step.commands for part in command if part.endswith(".py")}
    assert scripts
    assert all((ROOT / script).exists() for script in scripts)
    assert {model for step in steps for model in step.models} <= set(SHAPES)


def test_a_random_model_loads_and_is_written_once(tmp_path):
    write_model("tiny-qwen3", tmp_path)
    weights = tmp_path / "model-00001-of-00001.safetensors"
    written = weights.stat().st_mtime_ns
    write_model("tiny-qwen3", tmp_path)
    assert weights.stat().st_mtime_ns == written
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert 0.015 < model.model.layers[0].mlp.up_proj.weight.float().std() < 0.025
    assert (model.model.norm.weight == 1).all()
    ids = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [{"role": "user", "content": "é"}], return_dict=False
    )
    assert max(ids) < model.config.vocab_size


def test_shards_hold_every_tensor_once(monkeypatch):
    monkeypatch.setattr("random_model.SHARD_BYTES", 100)
    import torch

    shapes = {name: torch.Size([n]) for name, n in zip("abcd", (20, 30, 60, 1), strict=True)}
    shards = split_shards(shapes)
    assert [list(shard) for shard in shards] == [["a", "b"], ["c"], ["d"]]


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.parent.name)
def test_committed_results_make_tables(file):
    found = json.loads(file.read_text())
    tables = summarize(found)
    for line in tables.splitlines():
        if line.startswith("| --- "):
            width = line.count("|")
        elif line.startswith("| ") and "---" not in line and "`" not in line:
            assert line.endswith(" |")
            assert line.count("|") >= 3
    assert width
    assert all(name in tables for name in found["steps"])


def test_tables_replace_what_is_between_the_markers():
    begin, end = MARKERS
    document = f"before\n{begin}\nold\n{end}\nafter"
    changed = insert(document, "new", MARKERS)
    assert "old" not in changed
    assert changed.startswith("before\n")
    assert changed.endswith("\nafter")
    assert insert(changed, "new", MARKERS) == changed
    with pytest.raises(SaroError, match="lacks the lines"):
        insert("no markers", "new", MARKERS)


def test_an_unknown_step_is_refused_by_name(tmp_path):
    command = ["bash", "benchmarks/gpu/run.sh", "trainn"]
    environment = os.environ | {
        "DRY": "1",
        "WORK": str(tmp_path / "work"),
        "OUT": str(tmp_path / "out"),
        "PYTHON": sys.executable,
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no such step: trainn; there are probe, tests" in done.stderr


@pytest.mark.whole
@pytest.mark.timeout(2100)
def test_a_dry_run_passes_every_step(tmp_path):
    environment = {
        **os.environ,
        "DRY": "1",
        "TOTAL": "1800",
        "PYTHON": sys.executable,
        "WORK": str(tmp_path / "work"),
        "OUT": str(tmp_path / "out"),
    }
    done = subprocess.run(
        ["bash", "benchmarks/gpu/run.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert {name: end["code"] for name, end in found["steps"].items() if end["code"] != 0} == {}, done.stdout[-3000:]
    assert {"probe", "step_matrix", "loss_kernels", "srpo", "attention", "lora_linear"} <= set(found)
    assert (tmp_path / "out/summary.md").read_text() in done.stdout
