"""A measurement finds its tasks, asks the model of a run, and writes numbers that belong to it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from run_files import ROOT
from scripted import Scripted

from saro.errors import SaroError
from saro.evaluate import lm_eval
from saro.evaluate.lm_eval import Options, describe_results, find_tasks, make_results, make_samples, measure, run
from saro.evaluate.subjects import Subject, find_measured

pytestmark = pytest.mark.usefixtures("one_thread")
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs saro[lm-eval]")

CHOICE_TASK = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} Answer:"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.0}}
"""
TEXT_TASK = """
task: sums_as_text
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 64, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
GROUP = """
group: all_sums
task: [sums, sums_as_text]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    """A folder with two tasks on the same six sums. lm-eval's own tasks are left out: their index takes seconds."""
    if importlib.util.find_spec("lm_eval") is not None:
        from lm_eval.tasks._index import TaskIndex

        build = TaskIndex.build
        monkeypatch.setattr(TaskIndex, "build", staticmethod(lambda paths: build(paths[1:])))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "sums.jsonl"
    rows = [{"question": f"What is {i} + 1?", "choices": [str(i), str(i + 1)], "answer": 1} for i in range(1, 7)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(CHOICE_TASK.format(data=data))
    (folder / "sums_as_text.yaml").write_text(TEXT_TASK.format(data=data))
    (folder / "group.yaml").write_text(GROUP)
    return folder


@pytest.fixture
def options(tmp_path, tasks, finished_run) -> Options:
    return Options(
        tasks="sums",
        run=str(finished_run()),
        include_path=str(tasks),
        output=str(tmp_path / "new" / "ability"),
        store=str(tmp_path / "draws.sqlite3"),
    )


def read_folder(options: Options) -> tuple[dict, dict, list[dict]]:
    folder = Path(options.output)
    results, manifest = (json.loads((folder / f"{name}.json").read_text()) for name in ("results", "manifest"))
    return results, manifest, [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@needs_lm_eval
def test_numbers_and_their_documents_are_written_with_the_models_identity(options, capsys):
    assert run(options) == 0
    results, manifest, samples = read_folder(options)
    task = results["tasks"]["sums"]
    assert (task["n"], task["of"], task["shots"], task["version"]) == (6, 6, 0, 2.0)
    assert [sample["document"] for sample in samples] == list(range(6))
    accuracy = sum(sample["metrics"]["acc"] for sample in samples) / 6
    assert task["metrics"]["acc,none"]["value"] == pytest.approx(accuracy)
    assert task["metrics"]["acc,none"]["higher_is_better"] is True
    assert f"sums  acc,none  {accuracy:.4f}" in capsys.readouterr().out
    model = find_measured(options.run, None)
    assert manifest["model"]["model"] == model.source.identity()
    assert manifest["model"]["template_date"] == "2024-07-26"
    assert manifest["options"]["tasks"] == "sums"
    assert "What is" not in (Path(options.output) / "samples.jsonl").read_text()


@needs_lm_eval
def test_the_trained_model_is_asked_not_its_base(options, tiny_model):
    trained = measure(options)
    base = measure(replace(options, run=None, model=tiny_model(), output=options.output + "-base"))
    assert trained["tasks"].keys() == base["tasks"].keys()
    identities = [
        read_folder(o)[1]["model"]["model"] for o in (options, replace(options, output=options.output + "-base"))
    ]
    assert identities[0]["files"] == identities[1]["files"]
    assert identities[0]["adapter"] is not None
    assert identities[1]["adapter"] is None
    assert read_folder(replace(options, output=options.output + "-base"))[1]["model"]["dtype"] != "auto"


@needs_lm_eval
def test_texts_are_asked_in_the_chat_format_and_matched_without_reasoning(options, monkeypatch):
    generators = []

    def make_generator(model: Subject, *_) -> Scripted:
        def reply(prompt: str) -> str:
            number = int(prompt.split("What is ")[1].split(" ")[0])
            return f"<think>\nAdd.\n\nIt is easy.\n</think>\n\n{number + number % 2}"

        generators.append(Scripted(model.chat, reply))
        return generators[-1]

    monkeypatch.setattr(Subject, "generator", make_generator)
    options = replace(options, tasks="all_sums", apply_chat_template=True, limit=4, num_fewshot=0)
    results = measure(options)
    # The right answer is number + 1, which the model gives to odd ones.
    assert results["tasks"]["sums_as_text"]["metrics"]["exact_match,none"]["value"] == 0.5
    assert (results["tasks"]["sums"]["n"], results["tasks"]["sums"]["of"]) == (4, 6)
    assert (results["counts"]["texts"], results["counts"]["unfinished"]) == (4, 0)
    (prompt, *_) = [generators[0].chat.tokenizer.decode(request.ids) for request in generators[0].asked]
    assert prompt == "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"


@needs_lm_eval
def test_a_measurement_that_was_stopped_draws_only_the_texts_that_it_lacks(options, monkeypatch):
    asked: list[str] = []

    def make_generator(model: Subject, *_) -> Scripted:
        def reply(prompt: str) -> str:
            asked.append(prompt)
            if len(asked) == 3:
                raise KeyboardInterrupt
            return "2"

        return Scripted(model.chat, reply)

    monkeypatch.setattr(Subject, "generator", make_generator)
    options = replace(options, tasks="sums_as_text")
    with pytest.raises(KeyboardInterrupt):
        measure(options)
    results = measure(options)
    assert results["tasks"]["sums_as_text"]["metrics"]["exact_match,none"]["value"] == pytest.approx(1 / 6)
    # Six prompts, and the one at which it was stopped once more.
    assert (len(asked), len({*asked})) == (7, 6)


@needs_lm_eval
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "sum"}, r"--tasks: there is no task sum; did you mean sums\?"),
        ({"run": "gone"}, "gone: there is no such folder"),
        ({"run": None}, "nothing to measure; name a finished --run, or a --model"),
        ({"include_path": "gone"}, "--include_path gone: there is no such folder"),
    ],
)
def test_what_does_not_exist_is_one_line(options, changes, message):
    with pytest.raises(SaroError, match=message) as caught:
        measure(replace(options, **changes))
    assert "\n" not in str(caught.value)
    assert not Path(options.output).exists()


@needs_lm_eval
def test_lm_evals_own_tasks_and_those_of_the_folder_are_known(tmp_path):
    from saro.evaluate.lm_eval_tasks import CheckedTasks

    (tmp_path / "sums.yaml").write_text(CHOICE_TASK.format(data="sums.jsonl"))
    assert {"gsm8k", "mmlu", "sums"} <= set(CheckedTasks(str(tmp_path)).all_tasks)


@needs_lm_eval
def test_a_run_that_has_not_finished_is_refused(options, finished_run, tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "manifest.json").write_text((finished_run() / "manifest.json").read_text())
    with pytest.raises(SaroError, match="the run has not finished"):
        measure(replace(options, run=str(tmp_path / "begun")))


@needs_lm_eval
def test_a_task_without_its_data_is_one_line(options, tasks):
    (tasks / "sums.jsonl").unlink()
    with pytest.raises(SaroError, match="--tasks sums: a task or its data cannot be loaded") as caught:
        measure(options)
    assert "\n" not in str(caught.value)


@needs_lm_eval
def test_a_task_that_runs_the_models_code_is_refused(options, tasks):
    file = tasks / "sums.yaml"
    file.write_text(file.read_text() + "unsafe_code: true\n")
    with pytest.raises(SaroError, match="--tasks sums: runs code that the model writes"):
        measure(options)


@needs_lm_eval
def test_results_are_replaced_only_if_asked(options):
    measure(options)
    with pytest.raises(SaroError, match="holds results already; give another name, or --overwrite"):
        measure(options)
    measure(replace(options, overwrite=True, limit=2))
    assert read_folder(options)[0]["tasks"]["sums"]["n"] == 2


@needs_lm_eval
def test_a_folder_of_something_else_is_never_replaced(options):
    with pytest.raises(SaroError, match="the folder holds something else"):
        measure(replace(options, output=options.run, overwrite=True))


@needs_lm_eval
def test_a_base_model_is_asked_in_the_format_of_the_run(finished_run, tiny_model):
    run = finished_run()
    trained, base = find_measured(str(run), None), find_measured(str(run), tiny_model())
    assert base.source.adapter is None
    format_of = [(m.chat.template_date, m.chat.think_tags, m.chat.tokenizer.chat_template) for m in (trained, base)]
    assert format_of[0] == format_of[1]


def test_without_lm_eval_one_line_says_what_to_install(options, monkeypatch):
    monkeypatch.setattr(lm_eval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SaroError, match=r"lm-eval is not installed; run in saro's folder: .* -e '\.\[lm-eval\]'"):
        measure(options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 0}, "--limit is 0; it must be at least 1"),
        ({"num_fewshot": -1}, "--num_fewshot is -1; it must be at least 0"),
        ({"tasks": " , "}, "--tasks names no task"),
        ({"no_think": True}, "--no_think goes with --apply_chat_template"),
    ],
)
def test_options_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(SaroError, match=message):
        Options(**{"tasks": "sums"} | changes)


def test_the_command_line_says_what_is_missing():
    done = subprocess.run(
        [sys.executable, "-m", "saro.evaluate.lm_eval", "--run", "output/srpo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: missing --tasks; see python -m saro.evaluate.lm_eval --help\n"


def test_patterns_name_all_tasks_that_they_match():
    valid = ["gsm8k", "mmlu", "mmlu_law", "mmlu_marketing"]
    assert find_tasks(["mmlu_*", "gsm8k", "mmlu_law"], valid) == ["mmlu_law", "mmlu_marketing", "gsm8k"]
    with pytest.raises(SaroError, match=r"--tasks: there is no task gsm8; did you mean gsm8k\?"):
        find_tasks(["gsm8"], valid)


FOUND = {
    "results": {
        "sums": {"name": "sums", "alias": "sums", "sample_len": 6, "acc,none": 0.5, "acc_stderr,none": 0.2},
        "texts": {"alias": "texts", "bleu,first": float("nan"), "bleu_stderr,first": "N/A", "f1,first": 1},
        "all": {"alias": "all", "acc,none": 0.5, "acc_stderr,none": 0.2},
        "folder": {"alias": "folder"},
    },
    "n-samples": {"sums": {"original": 9, "effective": 6}, "texts": {"original": 2, "effective": 2}},
    "n-shot": {"sums": 5, "texts": 0},
    "versions": {"sums": 2.0},
    "higher_is_better": {"sums": {"acc": True}, "texts": {"bleu": True, "f1": None}},
    "group_subtasks": {"all": ["sums"], "folder": ["texts"]},
}


def test_metrics_have_null_where_lm_eval_has_no_number():
    results = make_results(FOUND, {"texts": 2})
    assert results["tasks"]["sums"] == {
        "n": 6,
        "of": 9,
        "shots": 5,
        "version": 2.0,
        "metrics": {"acc,none": {"value": 0.5, "stderr": 0.2, "higher_is_better": True}},
    }
    assert results["tasks"]["texts"]["metrics"] == {
        "bleu,first": {"value": None, "stderr": None, "higher_is_better": True},
        "f1,first": {"value": 1.0, "stderr": None, "higher_is_better": None},
    }
    # A group without a number of its own is only a list of tasks.
    assert results["groups"].keys() == {"all"}
    assert results["groups"]["all"]["tasks"] == ["sums"]
    json.dumps(results, allow_nan=False)


def test_a_line_names_task_metric_number_and_n():
    lines = list(describe_results(make_results(FOUND, {})))
    assert lines[0] == "sums  acc,none  0.5000 ± 0.2000  (n 6, 5 examples)"
    assert lines[1] == "texts  bleu,first  none  (n 2, no examples)"
    assert lines[-1] == "all  acc,none  0.5000 ± 0.2000  (1 tasks)"


def test_samples_hold_the_numbers_of_a_document_and_no_text():
    document = {
        "doc_id": 3,
        "doc_hash": "ab",
        "filter": "none",
        "metrics": ["acc", "bleu"],
        "acc": True,
        "bleu": ("a", "b"),
        "doc": {"question": "Why?"},
    }
    expected = {"task": "sums", "document": 3, "hash": "ab", "filter": "none", "metrics": {"acc": 1.0}}
    assert list(make_samples({"sums": [document]})) == [expected]
