"""`saro report`: the report of an evaluation as one HTML file, tables to paste, and figures."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from saro.data.records import Message
from saro.errors import SaroError
from saro.evaluate.answers import Answer, Verdict
from saro.evaluate.labels import read_labels
from saro.evaluate.outcomes import UNJUDGED, judge_outcome
from saro.evaluate.pooled_scores import SeedRows, pool_scores
from saro.evaluate.suite import Item
from saro.files import atomic_folder
from saro.program import as_list, positional
from saro.report.answer_data import LABELS, RULES
from saro.report.evaluation_files import Evaluation, Row, read_evaluation
from saro.report.page import Report, make_report
from saro.report.training_files import read_training_run


@dataclass(frozen=True)
class Options:
    """Options of `saro report`.

    Attributes:
        folders: Folder of the evaluation, then folders of the same models with other training seeds: all are one report.
        runs: Output folders of the training runs of the models.
        output: The folder to write; default: the folder "report" in that of the evaluation.
        redact: Leave out all texts of prompts, reasoning, answers and judges; ids and numbers remain.
        overwrite: Replace the report in the output folder.
    """

    folders: list[str] = field(metadata=positional())
    runs: list[str] | str = field(default_factory=list)
    output: str | None = None
    redact: bool = False
    overwrite: bool = False


def run(options: Options, console: Console) -> int:
    """Write report.html, report.md and the figures of an evaluation.

    Raises:
        SaroError: a folder holds no evaluation or no run, or the output exists.
    """
    output = Path(options.output) if options.output else Path(options.folders[0]) / "report"
    _check_output(output, options.overwrite)
    evaluations = [add_opinions(read_evaluation(Path(folder))) for folder in options.folders]
    _check_alike(evaluations)
    pooled = pool_evaluations(evaluations) if len(evaluations) > 1 else None
    runs = [read_training_run(Path(folder)) for folder in as_list(options.runs)]
    report = make_report(evaluations, runs, pooled=pooled, command=_command(options), redact=options.redact)
    write_report(report, output, None if pooled is None else pooled.scores)
    console.out(
        f"{output / 'report.html'}: {len(report.html) / 2**20:.1f} MiB, {len(report.figures)} figures", highlight=False
    )
    return 0


def write_report(report: Report, output: Path, pooled: Row | None = None) -> None:
    """Write the files of a report into a folder, which appears complete or not at all, readable only by its owner.

    Args:
        pooled: the scores of all folders together, for a report of several.
    """
    with atomic_folder(output, replace=output.exists()) as folder:
        files = {"report.html": report.html, "report.md": report.markdown}
        files |= {f"{figure.name}.svg": figure.file for figure in report.figures}
        if pooled is not None:
            files["pooled_scores.json"] = json.dumps(pooled, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        for name, text in files.items():
            path = folder / name
            path.touch(mode=0o600)
            path.write_text(text, encoding="utf-8", newline="\n")


def _check_output(output: Path, overwrite: bool) -> None:
    """Raise SaroError if the output may not be written. Only a report is replaced, never an evaluation with its labels."""
    if not output.exists():
        return
    if not overwrite:
        raise SaroError(f"{output}: exists already; give another --output, or --overwrite")
    if not (output / "report.html").is_file() or (output / "scores.json").exists():
        raise SaroError(f"{output}: is not the folder of a report, and is not replaced; give another --output")


def _check_alike(evaluations: list[Evaluation]) -> None:
    """Raise SaroError if other folders cannot be reported together with the first one: they must differ in answers only."""
    first = evaluations[0]
    own = _describe(first)
    for other in evaluations[1:]:
        for name, theirs in _describe(other).items():
            if own[name] != theirs:
                raise SaroError(
                    f"{other.folder}: its {name} are {', '.join(theirs)}, those of {first.folder} {', '.join(own[name])}; "
                    "report them one by one"
                )
        if other.items != first.items or {a["key"] for a in other.answers} != {a["key"] for a in first.answers}:
            raise SaroError(
                f"{other.folder}: has other prompts than {first.folder}, or lacks answers to some; report them one by one"
            )


def _describe(evaluation: Evaluation) -> dict[str, list[str]]:
    """Return what must be the same in all folders of a report, beside the prompts."""
    judge = evaluation.manifest.get("judge", {})
    return {
        "models": evaluation.models,
        "suites": evaluation.suites,
        "attacks": [attack["id"] for attack in evaluation.attacks],
        "judge and its hash": [evaluation.judge, judge.get("hash", "unknown")],
        "limits of tokens": [str(_max_tokens(evaluation))],
    }


def _max_tokens(evaluation: Evaluation) -> int | None:
    return evaluation.manifest.get("config", {}).get("max_tokens")


def pool_evaluations(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Return the first evaluation with the scores of all: of the same models after training with other seeds."""
    folders = []
    for each in evaluations:
        limit = _max_tokens(each)
        folders.append(
            SeedRows(
                answers=[Answer(**row) for row in each.answers],
                verdicts=[Verdict(**row) for row in each.verdicts.values()],
                labels=_read_labels(each),
                scores=each.scores,
                # Answers that were made elsewhere have no known limit; only models of the manifest were asked here.
                limits={} if limit is None else dict.fromkeys(each.manifest.get("models", ()), limit),
            )
        )
    first = evaluations[0]
    return replace(first, scores=pool_scores(map(_item, first.items.values()), folders))


def add_opinions(evaluation: Evaluation) -> Evaluation:
    """Return an evaluation with the labels that hold, and what the rules and people say of its answers."""
    labels = {label["answer"]: label for label in _read_labels(evaluation)}
    items = {key: _item(row) for key, row in evaluation.items.items()}
    opinions = {}
    for answer in evaluation.answers:
        item = items[answer["suite"], answer["item"]]
        if item.expect == "answer":
            continue
        rows = {RULES: evaluation.verdicts.get((answer["key"], RULES)), LABELS: labels.get(answer["key"])}
        for name, row in rows.items():
            outcome = UNJUDGED if row is None else _outcome(item, row)
            if outcome != UNJUDGED:
                opinions[answer["key"], name] = outcome
    return replace(evaluation, labels=labels, opinions=opinions)


def _read_labels(evaluation: Evaluation) -> list[Row]:
    draws = {answer["key"]: answer["draw"] for answer in evaluation.answers}
    return read_labels(evaluation.folder / "labels.jsonl", draws)


def _item(row: Row) -> Item:
    return Item(**{**row, "prompt": tuple(Message(**message) for message in row["prompt"])})


def _outcome(item: Item, row: Row) -> str:
    if row.get("abstained"):
        return UNJUDGED
    harmful = row.get("harmful")
    return judge_outcome(item, None if harmful is None else float(harmful), row.get("refuses"))


def _command(options: Options) -> str:
    command = ["saro", "report", *options.folders]
    if runs := as_list(options.runs):
        command += ["--runs", "[" + ", ".join(runs) + "]"]
    if options.redact:
        command.append("--redact")
    return shlex.join(command)
