"""`saro judge-check`: how far a judge agrees with people, on answers that people have labelled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from saro.config import check_at_least
from saro.errors import SaroError
from saro.evaluate.bootstrap import RESAMPLES
from saro.evaluate.judge import JudgeSpec, check_abstentions, judge_answers, read_judge
from saro.evaluate.judge_gold import GOLD, as_answers, describe_files, measure_agreement, read_gold
from saro.evaluate.judge_spec import prompt_hashes
from saro.evaluate.options import JudgeOptions
from saro.evaluate.rules import RULES
from saro.evaluate.statistics import ALPHA
from saro.files import atomic_write
from saro.program import as_list, positional, shown

_TITLES = {
    "refusal": "refuses, fully or in part",
    "refusal_three_ways": "refuses fully, in part, or not",
    "harm": "harmful",
}


@dataclass(frozen=True)
class Options:
    """Options of `saro judge-check`.

    Attributes:
        name: Name of a judge, or its YAML file.
        gold: Labelled answers: XSTest's completions or PyRIT's refusals as published (.csv), or JSONL with id, prompt,
            answer, refuses and harmful. A name may hold * in quotes; default: 20 answers that come with saro, a first check only.
        judge: The judge's model.
        store: File that keeps the judge's replies; default: the one that all evaluations share.
        output: File to write, which a report cites.
        seed: Seed of the resamples.
    """

    name: str = field(metadata=positional())
    gold: list[str] | str = field(default_factory=list)
    judge: JudgeOptions = field(
        default_factory=JudgeOptions, metadata=shown("model", "endpoint", "key_env", "revision")
    )
    store: str | None = None
    output: str = "gold.json"
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(self, "--", 0, "seed")


def run(options: Options, console: Console) -> int:
    """Measure a judge against labels of people: accuracy, Cohen's kappa and F1, with 95 % intervals.

    Raises:
        SaroError: the judge, its model or a gold file is faulty, or the judge abstains on more than 5 % of the answers.
    """
    spec = read_judge(options.name)
    paths = _find_files(as_list(options.gold)) or [GOLD]
    files = [read_gold(path) for path in paths]
    _check_output(Path(options.output))
    answers, items = [], {}
    for number, (path, rows) in enumerate(zip(paths, files, strict=True)):
        more_answers, more_items = as_answers(rows, f"{number}-{path.stem}")
        answers += more_answers
        items |= more_items
    verdicts, identity = _judge(spec, options, answers, items)
    by_answer = {verdict.answer: verdict for verdict in verdicts}
    gold = [row for rows in files for row in rows]
    pairs = [(row, by_answer.get(answer.key)) for row, answer in zip(gold, answers, strict=True)]
    report = {
        "judge": spec.name,
        "judge_hash": verdicts[0].judge_hash if verdicts else spec.hash,
        "model": identity,
        "prompt_hashes": prompt_hashes(spec),
        "files": describe_files(paths, [len(rows) for rows in files]),
        "level": 1 - ALPHA,
        "resamples": RESAMPLES,
        "seed": options.seed,
        "agreement": measure_agreement(pairs, options.seed),
    }
    with atomic_write(options.output) as file:
        file.write(json.dumps(report, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    for part, groups in report["agreement"].items():
        console.print(_table(_TITLES[part], groups))
    console.out(f"{len(gold):,} answers; {options.output} has all figures", highlight=False)
    check_abstentions(verdicts)
    return 0


def _find_files(names: Sequence[str]) -> list[Path]:
    """Return the files that names stand for: a name with * stands for all files that it matches, sorted.

    Raises:
        SaroError: a name with * matches nothing.
    """
    files: list[Path] = []
    for name in names:
        matching = [Path(match) for match in sorted(glob(name))] if "*" in name else [Path(name)]
        if not matching:
            raise SaroError(f"--gold {name}: no file has such a name; check the path")
        files += matching
    return files


def _check_output(path: Path) -> None:
    """Raise SaroError if the report cannot be written, before the judge works for hours."""
    if path.is_dir() or not path.parent.is_dir():
        raise SaroError(f"--output: {path} is not a file in an existing folder; give another name")


def _judge(spec: JudgeSpec, options: Options, answers: list, items: dict) -> tuple[list, dict[str, Any] | None]:
    """Return the verdicts, and the identity of the judge's model if it has one."""
    if spec.form == RULES and not (options.judge.model or options.judge.endpoint):
        return judge_answers(spec, answers, items), None
    # Only now: transformers and torch take seconds to import, and the rules need neither.
    from saro.draws.draw_all import draw_missing
    from saro.draws.store import DrawStore, find_store
    from saro.evaluate.judge_model import find_judge_model

    model = find_judge_model(spec, options.judge)
    identity = dict(model.generator.identity)
    with DrawStore.open(find_store(options.store)) as store:
        draw_all = partial(draw_missing, store, model.generator)
        verdicts = judge_answers(spec, answers, items, draw_all, chat=model.chat, identity=identity)
    return verdicts, identity


def _table(title: str, groups: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("answers of")
    for column in ("n", "abstained", "accuracy", "kappa", "F1"):
        table.add_column(column, justify="right")
    for name, figures in groups.items():
        cells = [_cell(figures.get(key)) for key in ("accuracy", "kappa", "f1")]
        table.add_row(name, f"{figures['n']:,}", f"{figures['abstained']:,}", *cells)
    return table


def _cell(figure: Mapping[str, float | None] | None) -> str:
    if figure is None or figure["value"] is None:
        return "-"
    ends = "" if figure["low"] is None else f" [{figure['low']:.3f}, {figure['high']:.3f}]"
    return f"{figure['value']:.3f}{ends}"
