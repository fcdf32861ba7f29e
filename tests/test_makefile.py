"""`make saro` and `make ablation`: what they run, what they run again, and that an interrupted run goes on where it was.

Most tests replace the programs by a script that notes its arguments and writes its output, since they are about the
Makefile. The last one runs all of them on a tiny model.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from run_files import ROOT, metrics_of, steps_logged, wait_for
from tiny import save_tiny_model

from saro.data.records import read_examples, read_pairs

# Writes what each program writes last, and a held-out file for stage op; fails in the stage that $FAIL names.
SCRIPT = f"""#!{sys.executable}
import json, os, pathlib, sys
name, *arguments = sys.argv[1:] if sys.argv[0].endswith("saro") else sys.argv[sys.argv.index("no", 8) + 1:]
options = dict(zip(arguments, arguments[1:]))
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([name, *arguments]) + "\\n")
stage = arguments[0] if name == "synth" else name
if stage == os.environ.get("FAIL"):
    print("partial")
    sys.exit(2)
def write(path, text):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
if name == "convert":
    write(arguments[-1], "".join(f"{{n}}\\n" for n in range(1, 1001)))
elif stage == "check":
    print("FAIL lengths")
    sys.exit(int(os.environ.get("CHECK", 0)))
elif name == "synth":
    write(options["--output"], "" if stage in os.environ.get("EMPTY", "") else stage + "\\n")
    if stage == "op":
        write(options["--output"].replace(".jsonl", ".heldout.jsonl"), "held op\\n")
elif name.startswith("recipes/"):
    steps = int(options.get("--train.max_steps", 11))
    folder = options["--train.output"]
    write(folder + "/metrics.jsonl", "".join(json.dumps({{"step": n, "loss": 0.5}}) + "\\n" for n in range(1, steps + 1)))
    write(folder + "/final/tokenizer_config.json", "{{}}")
elif name == "evaluate":
    write(options["--output"] + "/scores.json", "{{}}")
elif name == "runs":
    steps = [len(open(folder + "/metrics.jsonl").readlines()) for folder in arguments if os.path.isdir(folder)]
    names = options.get("--names", "").strip("[]").split(",")
    lines = steps if "--steps" in arguments else map("{{}}: {{}} steps".format, names, steps)
    print(*lines, sep="\\n")
elif name == "report":
    write(arguments[0] + "/report/report.html", "<html>")
"""
PUBLIC = [
    *("star1.json", "gsm8k_train.jsonl", "xstest_prompts.csv", "simple_safety_tests.csv"),
    *("coconot_contrast_eval.jsonl", "gsm8k_test.jsonl"),
]
STAGES = ["rw", "recipes/rw.py", "op", "pp", "mirror", "check", "recipes/srpo.py", "evaluate", "report"]


def make_venv(folder: Path, programs: dict[str, str]) -> Path:
    """Return a folder that the Makefile takes for its virtual environment."""
    (folder / "bin").mkdir(parents=True)
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    for name in (".torch", ".demo"):
        (folder / name).touch()
    return folder


@dataclass
class Made:
    """What `make` did.

    Attributes:
        code: its exit code.
        out, err: what it printed.
        calls: the commands that it ran, each as its name and arguments.
    """

    code: int
    out: str
    err: str
    calls: list[list[str]]

    @property
    def stages(self) -> list[str]:
        """The stages that were run, without conversions."""
        return [call[1] if call[0] == "synth" else call[0] for call in self.calls if call[0] != "convert"]

    def options(self, stage: str) -> dict[str, str]:
        """The options of a stage; of those that are given twice, the last one."""
        (call,) = (call for call in self.calls if stage in call[:2])
        return dict(pairwise(call))


@pytest.fixture
def make(tmp_path, environment) -> Callable[..., Made]:
    """Return a function that runs `make` with programs that only note what they are asked."""
    venv = make_venv(tmp_path / "venv", dict.fromkeys(("saro", "accelerate"), SCRIPT))
    log = tmp_path / "calls"

    def run(*arguments: str, **variables: str) -> Made:
        log.write_text("")
        done = subprocess.run(
            ["make", *arguments, f"VENV={venv}", f"OUTPUT={tmp_path / 'out'}"],
            cwd=ROOT,
            env=environment | {"CALLS": str(log)} | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        calls = [json.loads(line) for line in log.read_text().splitlines()]
        return Made(done.returncode, done.stdout, done.stderr, calls)

    return run


@pytest.fixture
def public(tmp_path) -> str:
    """A folder with the names of the public sets."""
    (tmp_path / "public").mkdir()
    for name in PUBLIC:
        (tmp_path / "public" / name).write_text(name)
    return f"DATA={tmp_path / 'public'}"


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return time and content of all files."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def test_the_stages_run_in_order_and_a_second_make_runs_nothing(make, tmp_path):
    done = make("saro")
    assert (done.code, done.stages) == (0, STAGES), done.err
    assert done.out.rstrip().endswith("report.md")
    before = files_of(tmp_path / "out")
    again = make("saro")
    assert (again.code, again.calls) == (0, [])
    assert files_of(tmp_path / "out") == before


def test_parallel_make_keeps_the_order_of_stages_that_need_each_other(make, public):
    done = make("-j8", "saro", public)
    assert done.code == 0, done.err
    assert set(done.stages[3:5]) == {"pp", "mirror"}
    assert done.stages[:3] + done.stages[5:] == STAGES[:3] + STAGES[5:]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_fails_ends_make_and_the_next_one_goes_on_from_it(make, tmp_path, stage):
    failed = make("saro", FAIL=stage)
    assert failed.code == 2
    assert failed.stages == STAGES[: STAGES.index(stage) + 1]
    before = files_of(tmp_path / "out")
    done = make("saro")
    assert (done.code, done.stages) == (0, STAGES[STAGES.index(stage) :])
    after = files_of(tmp_path / "out")
    assert {name: after[name] for name in before if not name.endswith(".tmp")} == {
        name: content for name, content in before.items() if not name.endswith(".tmp")
    }


def test_a_deleted_output_is_made_again_with_all_that_follows(make, tmp_path):
    make("saro")
    (tmp_path / "out" / "saro" / "data" / "op.jsonl").unlink()
    assert make("saro").stages == STAGES[STAGES.index("op") :]


def test_stages_whose_records_were_deleted_are_made_again_though_the_joined_file_is_there(make, tmp_path):
    """As laptop.mk says: deleted are the files of some stages, and the folders of all after them."""
    make("saro")
    folder = tmp_path / "out" / "saro"
    for name in ("op", "pp", "mirror"):
        (folder / "data" / f"{name}.jsonl").unlink()
    shutil.rmtree(folder / "srpo")
    shutil.rmtree(folder / "evaluation")
    assert (folder / "pairs.jsonl").exists()
    assert make("saro").stages == STAGES[STAGES.index("op") :]


def test_recipes_always_go_on_with_the_run_in_their_folder(make):
    done = make("saro")
    for recipe in ("recipes/rw.py", "recipes/srpo.py"):
        (call,) = (call for call in done.calls if call[0] == recipe)
        assert "--resume" in call
        assert "--overwrite" not in call


def test_faults_that_check_finds_are_kept_and_shown_and_do_not_stop(make, tmp_path):
    done = make("saro", CHECK="1")
    assert done.code == 0
    assert "FAIL lengths\nsynth check found faults in the pairs; training goes on\n" in done.out
    assert (tmp_path / "out" / "saro" / "pairs.check.txt").read_text() == "FAIL lengths\n"


def test_a_check_that_cannot_read_stops(make, tmp_path):
    done = make("saro", CHECK="2")
    assert done.code == 2
    assert done.stages[-1] == "check"
    assert not (tmp_path / "out" / "saro" / "pairs.check.txt").exists()


def test_the_pairs_of_all_stages_and_people_are_joined_and_heldout_ones_apart(make, tmp_path):
    done = make("saro")
    folder = tmp_path / "out" / "saro"
    written = (ROOT / "saro/demo/srpo_train.jsonl").read_text()
    assert (folder / "pairs.jsonl").read_text() == f"op\npp\nmirror\n{written}"
    assert (folder / "pairs-heldout.jsonl").read_text().startswith("held op\n")
    assert done.options("recipes/srpo.py")["--data.heldout"] == f"[{folder}/pairs-heldout.jsonl]"


def test_joined_records_are_only_for_their_owner(make, tmp_path):
    make("saro")
    for name in ("examples", "examples-heldout", "pairs", "pairs-heldout"):
        assert (tmp_path / "out" / "saro" / f"{name}.jsonl").stat().st_mode & 0o077 == 0


def test_no_pairs_at_all_is_an_error_that_says_where_to_look(make, public, tmp_path):
    done = make("saro", public, EMPTY="op pp mirror")
    assert done.code == 2
    assert done.stages[-1] == "mirror"
    assert f"error: no record in {tmp_path}/out/saro/data/op.jsonl " in done.err
    assert not (tmp_path / "out" / "saro" / "pairs.jsonl").exists()


def test_without_heldout_records_none_are_named(make, public, tmp_path):
    done = make("saro", public)
    assert done.options("recipes/rw.py")["--data.heldout"] == "[]"
    assert (tmp_path / "out" / "saro" / "pairs.jsonl").read_text() == "op\npp\nmirror\n"


def test_public_prompts_of_rw_and_of_the_pairs_are_not_the_same(make, public, tmp_path):
    make("saro", public)
    folder = tmp_path / "out" / "saro" / "public"
    read = {file.stem: set(file.read_text().split()) for file in folder.glob("*.jsonl")}
    assert (len(read["gsm8k-rw"]), len(read["gsm8k-pairs"])) == (300, 100)
    assert not read["gsm8k-rw"] & read["gsm8k-pairs"]


def test_no_prompt_of_a_suite_may_be_in_the_data(make, public):
    done = make("saro", public)
    suites = {Path(name).stem for name in done.options("evaluate")["--suites"].strip("[]").split(",")}
    assert suites == {"xstest", "simple-safety-tests", "coconot-contrast", "gsm8k-200"}
    for stage in ("rw", "op", "pp", "mirror"):
        excluded = {Path(name).stem for name in done.options(stage)["--exclude"].strip("[]").split(",")}
        # 200 questions are asked, and none of the whole test set may be trained on.
        assert excluded == suites - {"gsm8k-200"} | {"gsm8k-test"}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_missing_public_file_is_named_before_any_stage(make, public, tmp_path, name):
    (tmp_path / "public" / name).unlink()
    done = make("saro", public)
    assert done.code == 2
    assert f"No rule to make target '{tmp_path}/public/{name}'" in done.err
    assert done.stages == []


@pytest.fixture
def ablation_data(public) -> str:
    """A folder with the names of the public sets that the ablation reads."""
    (Path(public.removeprefix("DATA=")) / "ailuminate_demo_en.csv").write_text("")
    return public


def evaluations(done: Made) -> dict[str, dict[str, str]]:
    """Return the options of each evaluation, in the order in which they were run, by the name of its folder."""
    calls = (dict(pairwise(call)) for call in done.calls if call[0] == "evaluate")
    return {Path(options["--output"]).name: options for options in calls}


def trained(done: Made) -> list[str]:
    """What the recipes trained, in order: the output folder and the file of records, as names in the folder of the run."""
    runs = []
    for call in done.calls:
        if call[0].startswith("recipes/"):
            options = dict(pairwise(call))
            names = (
                options[name].strip("[]").partition("/out/saro/")[2] for name in ("--train.output", "--data.train")
            )
            runs.append(" < ".join(names))
    return runs


def test_the_ablation_trains_each_model_once_from_its_records(make, ablation_data):
    done = make("ablation", ablation_data, "SEEDS=0 7")
    assert done.code == 0, done.err
    assert sorted(trained(done)) == [
        "ablation/dpo-0 < ablation/op.jsonl",
        "ablation/dpo-7 < ablation/op.jsonl",
        "ablation/op-0 < data/op.jsonl",
        "ablation/op-7 < data/op.jsonl",
        "ablation/pp-7 < pairs.jsonl",
        "ablation/sft < ablation/examples.jsonl",
        "rw < examples.jsonl",
        "srpo < pairs.jsonl",
    ]
    assert make("ablation", ablation_data, "SEEDS=0 7").calls == []


def test_the_ablation_begins_from_the_model_of_its_row_with_its_seed(make, ablation_data):
    done = make("ablation", ablation_data, "SEEDS=7")
    starts = {}
    for call in done.calls:
        if call[0] == "recipes/srpo.py":
            options = dict(pairwise(call))
            starts[Path(options["--train.output"]).name] = (
                options["--model.name"].partition("/out/saro/")[2],
                options["--train.seed"],
            )
    assert starts == {
        "dpo-7": ("ablation/sft/final", "7"),
        "op-7": ("rw/final", "7"),
        "pp-7": ("rw/final", "7"),
    }


def test_the_ablation_evaluates_six_models_a_seed_on_five_suites(make, ablation_data):
    done = make("ablation", ablation_data, "SEEDS=0 7")
    for name, options in evaluations(done).items():
        suites = {Path(name).stem for name in options["--suites"].strip("[]").split(",")}
        assert suites == {"xstest", "simple-safety-tests", "coconot-contrast", "gsm8k-200", "ailuminate-300"}
        if name.startswith("evaluation-"):
            assert len(options["--models"].split(",")) == len(options["--names"].split(",")) == 6
    assert {"rw", "sft", "srpo", "dpo-0", "op-7", "pp-7", "evaluation-0", "evaluation-7"} < set(evaluations(done))
    (report,) = (call for call in done.calls if call[0] == "report")
    assert [Path(name).name for name in report[1:3]] == ["evaluation-0", "evaluation-7"]


def test_each_model_of_the_ablation_answers_on_its_own_before_the_evaluations(make, ablation_data):
    done = make("-j8", "ablation", ablation_data, "SEEDS=7")
    *names, last = evaluations(done)
    assert (sorted(names), last) == (["dpo-7", "op-7", "pp-7", "rw", "sft"], "evaluation-7")
    # The base model is asked in the format of the RW run, as in the evaluation.
    for name in ("rw", last):
        assert evaluations(done)[name]["--models"].split(",")[0].endswith("/out/saro/rw")


def test_sft_is_trained_on_the_records_that_rw_kept(make, ablation_data):
    done = make("ablation", ablation_data, "SEEDS=0")
    answers = [call for call in done.calls if call[:2] == ["convert", "--overwrite"] and call[2] == "answers"]
    runs = {Path(call[-2]).name: dict(pairwise(call)).get("--as_trained", "") for call in answers}
    assert {name: run.partition("/out/saro/")[2] for name, run in runs.items()} == {
        "examples.jsonl": "rw",
        "op.jsonl": "",
        "op.heldout.jsonl": "",
    }


def test_all_preference_stages_of_the_ablation_take_as_many_steps_and_the_last_lines_say_so(make, ablation_data):
    done = make("ablation", ablation_data, "SEEDS=0 7")
    steps = {}
    for call in done.calls:
        if call[0] == "recipes/srpo.py":
            options = dict(pairwise(call))
            steps[Path(options["--train.output"]).name] = options.get("--train.max_steps")
    equal = dict.fromkeys(("dpo-0", "op-0", "dpo-7", "op-7"), "11")
    assert steps == equal | {"srpo": None, "pp-7": None}
    models = ["RW", "SFT", *(f"{name}-{seed}" for seed in (0, 7) for name in ("DPO", "RW+op", "RW+op+pp"))]
    lines = done.out.splitlines()
    begin = lines.index("RW: 11 steps")
    assert lines[begin : begin + 8] == [f"{model}: 11 steps" for model in models]


def test_no_prompt_of_the_ablations_suites_may_be_in_the_data(make, ablation_data):
    done = make("saro", ablation_data)
    for stage in ("rw", "op", "pp", "mirror"):
        assert "/ailuminate.jsonl" in done.options(stage)["--exclude"]


def test_the_ablation_needs_public_data(make):
    done = make("ablation")
    assert (done.code, done.calls) == (2, [])
    assert "error: make ablation DATA=DIR" in done.err


@pytest.mark.parametrize("change", ["SEED=1", "MODEL=other", "public"])
def test_another_seed_model_or_data_in_one_folder_is_refused(make, public, tmp_path, change):
    make("saro")
    before = files_of(tmp_path / "out")
    done = make("saro", public if change == "public" else change)
    assert (done.code, done.calls) == (2, [])
    assert "was begun with MODEL=demo DATA= SEED=0; give the same" in done.err
    assert files_of(tmp_path / "out") == before


def test_options_reach_their_stages_behind_those_of_the_config(make):
    extra = {"SYNTH": "--limit 7", "RW": "--train.lr 1e-3", "SRPO": "--train.lr 1e-5", "EVALUATE": "--limit 9"}
    done = make("saro", "SEED=3", *(f"{name}={value}" for name, value in extra.items()))
    for stage in ("rw", "op", "pp", "mirror"):
        assert (done.options(stage)["--limit"], done.options(stage)["--seed"]) == ("7", "3")
    assert done.options("recipes/rw.py")["--train.lr"] == "1e-3"
    assert done.options("recipes/srpo.py")["--train.lr"] == "1e-5"
    assert done.options("recipes/srpo.py")["--train.seed"] == "3"
    assert done.options("evaluate")["--limit"] == "9"


def test_the_plan_says_what_is_left_and_runs_nothing(make, tmp_path):
    make("saro", FAIL="op")
    plan = make("saro-plan")
    assert (plan.code, plan.calls) == (0, [])
    _, *lines = plan.out.splitlines()
    names = ["rw", "rw", "op", "pp", "mirror", "srpo", "evaluate", "report"]
    assert [line[7:].split()[0] for line in lines] == names
    assert [line.startswith("done") for line in lines] == [True, True, *[False] * 6]
    assert all(line.split()[-1].isdigit() for line in lines)


# All of it, with the programs themselves


@pytest.fixture
def start(tmp_path, environment) -> Callable[[], subprocess.Popen]:
    """Return a function that starts a tiny `make saro` in a process group of its own."""
    python = shlex.quote(sys.executable)
    programs = {"saro": "saro", "accelerate": "accelerate.commands.accelerate_cli"}
    venv = make_venv(
        tmp_path / "venv", {name: f'#!/bin/sh\nexec {python} -m {module} "$@"\n' for name, module in programs.items()}
    )
    model = save_tiny_model(tmp_path / "model", max_position_embeddings=8192)
    short = "--train.samples 1 --train.sample_tokens 4"
    variables = {
        "VENV": venv,
        "OUTPUT": tmp_path / "out",
        "MODEL": model,
        "SYNTH": "--limit 4 --max_tokens 8",
        "RW": f"--train.max_steps 6 --train.save_every 1 --data.pack_tokens 2048 {short}",
        "SRPO": f"--train.max_steps 2 --data.pack_tokens 2048 {short}",
        "EVALUATE": "--limit 4 --max_tokens 8 --attack_items 2",
    }
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    own = {"PYTHONPATH": path, "SARO_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "NO_PROGRESS": "1"}

    def run() -> subprocess.Popen:
        return subprocess.Popen(
            ["make", "saro", *(f"{name}={value}" for name, value in variables.items())],
            cwd=ROOT,
            env=environment | own,
            stdout=subprocess.DEVNULL,
            stderr=(tmp_path / "err").open("w"),
            start_new_session=True,
        )

    return run


@pytest.mark.whole
def test_the_whole_method_is_killed_in_a_stage_and_goes_on_to_its_report(start, tmp_path):
    folder = tmp_path / "out" / "saro"
    killed = start()
    wait_for(lambda: steps_logged(folder / "rw") > 1 or killed.poll() is not None, killed, seconds=300)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, (tmp_path / "err").read_text()
    assert not (folder / "rw" / "final").exists()
    before = files_of(folder / "data")
    first_metrics = metrics_of(folder / "rw")[0]

    done = start()
    assert done.wait() == 0, (tmp_path / "err").read_text()
    after = files_of(folder / "data")
    assert {name: after[name] for name in before} == before
    assert metrics_of(folder / "rw")[0] == first_metrics
    assert [line["step"] for line in metrics_of(folder / "rw") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    examples, pairs = list(read_examples(folder / "examples.jsonl")), list(read_pairs(folder / "pairs.jsonl"))
    assert (len(examples), len(pairs)) >= (104, 68)
    scores = json.loads((folder / "evaluation" / "scores.json").read_text())
    assert list(scores["models"]) == ["base", "RW", "SRPO"]
    for name in ("report.html", "report.md"):
        assert (folder / "evaluation" / "report" / name).stat().st_size > 1000

    before = files_of(folder)
    assert start().wait() == 0
    assert files_of(folder) == before
