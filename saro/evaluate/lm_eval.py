"""Measures a model's general ability on lm-eval's tasks: python -m saro.evaluate.lm_eval --run output/srpo --tasks gsm8k

Writes a folder with three files:

- ``results.json``: ``{"format": 1, "tasks": {NAME: {"n", "of", "shots", "version", "metrics"}}, "groups": {NAME:
  {"tasks", "metrics"}}, "counts"}``. ``n`` documents were asked ``of`` those that the task has. ``metrics`` is
  ``{"METRIC,FILTER": {"value", "stderr", "higher_is_better"}}``, with null where lm-eval has no number. ``counts`` are
  those of ``SaroLM``.
- ``samples.jsonl``: ``{"task", "document", "hash", "filter", "metrics"}`` of each document, so that two models can be
  compared document by document. It holds numbers, and no text.
- ``manifest.json``: the model by its contents, the options, and versions.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import saro
from saro.config import check_at_least
from saro.errors import SaroError, install_extra, nearest
from saro.files import atomic_folder
from saro.program import parse_tool, quiet_libraries, run_program

_FORMAT = 1
# lm-eval's own defaults: its published numbers have these few-shot examples.
_SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}


@dataclass(frozen=True)
class Options:
    """Options of the measurement.

    Attributes:
        tasks: Names of lm-eval's tasks or groups, separated by commas; * stands for any letters.
        run: Folder of a finished run.
        model: Folder or hub name of a model to measure instead; with --run in the chat format and precision of that run,
            as its base.
        limit: Use only the first documents of each task, so many.
        num_fewshot: Number of examples before each question; default as each task says.
        output: Folder to write.
        overwrite: Replace an existing folder of results.
        include_path: Folder with more tasks, as lm-eval's YAML files.
        apply_chat_template: Ask in the format of the model's conversations. Choices are then scored where the answer
            would begin, before any reasoning.
        no_think: Let the model answer at once, after empty reasoning; goes with --apply_chat_template.
        max_tokens: Longest text in tokens, with its reasoning; default as each task says, which is too short for most
            models that reason.
        pack_tokens: Most tokens in one forward pass that scores choices. A context is read once if its choices fit.
        store: File that keeps every generated text, so that a measurement that was stopped goes on where it was; default in
            saro's cache folder, as for saro evaluate. Choices are scored again.
    """

    tasks: str
    run: str | None = None
    model: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    output: str = "output/lm-eval"
    overwrite: bool = False
    include_path: str | None = None
    apply_chat_template: bool = False
    no_think: bool = False
    max_tokens: int | None = None
    pack_tokens: int = 8192
    store: str | None = None

    def __post_init__(self) -> None:
        check_at_least(self, "--", 1, "limit", "max_tokens", "pack_tokens")
        check_at_least(self, "--", 0, "num_fewshot")
        if not self.task_names:
            raise SaroError("--tasks names no task")
        if self.no_think and not self.apply_chat_template:
            raise SaroError("--no_think goes with --apply_chat_template: a plain prompt has no reasoning to leave out")

    @property
    def task_names(self) -> list[str]:
        """The names in ``tasks``."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]


def run(options: Options) -> int:
    """Measure a model's general ability on lm-eval's tasks, and print a line for each number.

    Raises:
        SaroError: as ``measure`` does.
    """
    results = measure(options)
    for line in describe_results(results):
        print(line)
    print(f"written to {options.output}")
    return 0


def measure(options: Options) -> dict[str, Any]:
    """Measure a model on tasks, and write the folder of the results.

    Returns:
        The content of results.json.

    Raises:
        SaroError: lm-eval is not installed; the folder, a task or its data, or the model is not there or not sound.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise SaroError("lm-eval is not installed" + install_extra("lm-eval"))
    output = Path(options.output).expanduser()
    _check_output(output, options.overwrite)
    # These take seconds.
    from lm_eval import simple_evaluate

    from saro.draws.store import find_store
    from saro.evaluate.lm_eval_tasks import CheckedTasks
    from saro.evaluate.saro_lm import SaroLM
    from saro.evaluate.subjects import find_measured
    from saro.runs.finished import this_device

    quiet_libraries()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = find_measured(options.run, options.model)
    tasks = CheckedTasks(options.include_path)
    names = find_tasks(options.task_names, tasks.all_tasks)
    lm = SaroLM.of(
        model,
        no_think=options.no_think,
        max_tokens=options.max_tokens,
        pack_tokens=options.pack_tokens,
        store=find_store(options.store),
    )
    # The model's weights are read at the first request, after all tasks and their data.
    found = simple_evaluate(
        model=lm,
        tasks=names,
        task_manager=tasks,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        apply_chat_template=options.apply_chat_template,
        **_SEEDS,
    )
    results = make_results(found, lm.counts)
    manifest = {
        "saro": saro.__version__,
        "model": {
            "name": model.name,
            "model": model.source.identity(),
            "method": model.options.method,
            "dtype": model.options.dtype,
            "device": str(this_device()),
            **model.describe_format(),
        },
        "options": asdict(options),
        "seeds": _SEEDS,
        "versions": {name: version(name) for name in ("lm_eval", "transformers", "torch", "datasets")},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(output, replace=output.is_dir()) as folder:
        _write_json(folder / "results.json", results)
        _write_json(folder / "manifest.json", manifest)
        lines = (json.dumps(sample, sort_keys=True) + "\n" for sample in make_samples(found["samples"]))
        (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    return results


def find_tasks(wanted: list[str], valid: list[str]) -> list[str]:
    """Return the names of tasks that are wanted, patterns as the names that they match.

    Raises:
        SaroError: there is no such task.
    """
    names: list[str] = []
    for name in wanted:
        matching = fnmatch.filter(valid, name)
        if not matching:
            raise SaroError(f"--tasks: there is no task {name}{nearest(name, valid)}")
        names += matching
    return list(dict.fromkeys(names))


def make_results(found: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of results.json for what lm-eval found."""
    tasks, groups = {}, {}
    for name, values in found["results"].items():
        metrics = _read_metrics(values, found["higher_is_better"].get(name, {}))
        if name in found["n-samples"]:
            tasks[name] = {
                "n": found["n-samples"][name]["effective"],
                "of": found["n-samples"][name]["original"],
                "shots": found["n-shot"].get(name),
                "version": found["versions"].get(name),
                "metrics": metrics,
            }
        elif metrics:
            groups[name] = {"tasks": found["group_subtasks"].get(name, []), "metrics": metrics}
    return {"format": _FORMAT, "tasks": tasks, "groups": groups, "counts": dict(counts)}


def make_samples(samples: Mapping[str, list[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield the lines of samples.jsonl: for each document the metrics that are plain numbers."""
    for task, documents in samples.items():
        for document in documents:
            values = {name: document[name] for name in document["metrics"]}
            yield {
                "task": task,
                "document": document["doc_id"],
                "hash": document["doc_hash"],
                "filter": document["filter"],
                "metrics": {name: float(v) for name, v in values.items() if _number(v) is not None},
            }


def describe_results(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each number, tasks first."""
    for name, task in results["tasks"].items():
        shots = f"{task['shots']} examples" if task["shots"] else "no examples"
        yield from _describe_metrics(name, task["metrics"], f"n {task['n']:,}, {shots}")
    for name, group in results["groups"].items():
        yield from _describe_metrics(name, group["metrics"], f"{len(group['tasks'])} tasks")


def _describe_metrics(name: str, metrics: Mapping[str, Mapping[str, Any]], how: str) -> Iterator[str]:
    for metric, number in metrics.items():
        value = "none" if number["value"] is None else f"{number['value']:.4f}"
        error = "" if number["stderr"] is None else f" ± {number['stderr']:.4f}"
        yield f"{name}  {metric}  {value}{error}  ({how})"


def _read_metrics(values: Mapping[str, Any], higher_is_better: Mapping[str, bool | None]) -> dict[str, dict[str, Any]]:
    """Return the metrics among lm-eval's values, whose keys are "METRIC,FILTER" and "METRIC_stderr,FILTER"."""
    metrics = {}
    for key, value in values.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        metrics[key] = {
            "value": _number(value),
            "stderr": _number(values.get(f"{metric}_stderr,{filter_name}")),
            "higher_is_better": higher_is_better.get(metric),
        }
    return metrics


def _number(value: Any) -> float | None:
    """Return a value as a float; None for one that is none, such as lm-eval's "N/A", or not finite."""
    # numpy's numbers are no subclasses of int, but convert.
    if isinstance(value, str | list | tuple | dict) or value is None:
        return None
    return float(value) if math.isfinite(value) else None


def _check_output(output: Path, overwrite: bool) -> None:
    if output.is_dir() and any(output.iterdir()):
        if not (output / "results.json").is_file():
            raise SaroError(f"--output {output}: the folder holds something else; give another name")
        if not overwrite:
            raise SaroError(f"--output {output}: holds results already; give another name, or --overwrite")
    elif output.exists() and not output.is_dir():
        raise SaroError(f"--output {output}: is a file; give another name")


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def _main() -> int:
    return run(parse_tool(Options, "python -m saro.evaluate.lm_eval", run.__doc__, sys.argv[1:]))


if __name__ == "__main__":
    run_program(_main)
