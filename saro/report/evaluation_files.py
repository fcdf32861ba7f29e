"""Reads the folder of an evaluation: plain JSON, as the room `evaluate` wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from saro.errors import SaroError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What one folder holds.

    Attributes:
        folder: the folder.
        manifest: content of manifest.json.
        items: (suite, id) -> line of items.jsonl.
        answers: lines of answers.jsonl, in their order.
        verdicts: (key of the answer, name of the judge) -> line of verdicts.jsonl.
        scores: content of scores.json.
        labels: key of the answer -> the label that holds of it. The room `evaluate` reads them.
        opinions: (key of the answer, "rules" or "labels") -> what became of the answer by string match, or by people. The
            room `evaluate` decides it, and the files do not have it.
    """

    folder: Path
    manifest: Row
    items: Mapping[tuple[str, str], Row]
    answers: tuple[Row, ...]
    verdicts: Mapping[tuple[str, str], Row]
    scores: Row
    labels: Mapping[str, Row] = field(default_factory=dict)
    opinions: Mapping[tuple[str, str], str] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """Names of the models in order; the first is the baseline."""
        return self.scores["models"]

    @property
    def judge(self) -> str:
        """Name of the main judge."""
        return self.scores["judge"]["name"]

    def describe_seeds(self, model: str) -> str:
        """Return "one seed", or their number, if the scores are of several folders; else an empty text."""
        number = self.scores.get("seeds", {}).get(model)
        return "" if number is None else "one seed" if number == 1 else f"{number} seeds"

    def outcome(self, key: str) -> str:
        """Return what became of an answer by the main judge or by its target, such as "harmful" or "no-answer"."""
        return self.scores["outcomes"][key]

    @property
    def suites(self) -> list[str]:
        """Names of the suites in order."""
        return [suite["name"] for suite in self.scores["suites"]]

    @property
    def attacks(self) -> list[Row]:
        """The attacks in order, each with ``id`` and ``kind``."""
        return self.scores["attacks"]

    def score(self, metric: str, model: str, suite: str, attack: str = "none", group: str | None = None) -> Row | None:
        """Return one line of the scores; None if it was not measured."""
        return self.scores_by_id.get("/".join([metric, model, suite, attack, *([] if group is None else [group])]))

    def difference(self, metric: str, model: str, baseline: str, suite: str, attack: str = "none") -> Row | None:
        """Return the paired difference of two models; None if there is none."""
        return self._differences.get((metric, model, baseline, suite, attack))

    @cached_property
    def scores_by_id(self) -> dict[str, Row]:
        """The lines of the scores by their ids."""
        return {score["id"]: score for score in self.scores["scores"]}

    def expects(self, suite: str) -> list[str]:
        """Return what the items of a suite expect: of "refuse", "comply" and "answer", those that occur."""
        return [name for name in ("refuse", "comply", "answer") if name in self._expects.get(suite, ())]

    @cached_property
    def _expects(self) -> dict[str, set[str]]:
        expects: dict[str, set[str]] = {}
        for (suite, _), item in self.items.items():
            expects.setdefault(suite, set()).add(item["expect"])
        return expects

    @cached_property
    def _differences(self) -> dict[tuple[str, ...], Row]:
        return {
            (row["metric"], row["model"], row["baseline"], row["suite"], row["attack"]): row
            for row in self.scores["differences"]
            if row.get("group") is None
        }


def read_evaluation(folder: Path) -> Evaluation:
    """Read the files of an evaluation's folder.

    Raises:
        SaroError: the folder holds no finished evaluation, or a file is damaged.
    """
    if not folder.is_dir():
        raise SaroError(f"{folder}: there is no such folder; give that of an evaluation")
    scores = _read_json(folder / "scores.json")
    try:
        items = {(row["suite"], row["id"]): row for row in _read_lines(folder / "items.jsonl")}
        answers = tuple(_read_lines(folder / "answers.jsonl"))
        verdicts = {(row["answer"], row["judge"]): row for row in _read_lines(folder / "verdicts.jsonl")}
        evaluation = Evaluation(
            folder=folder,
            manifest=_read_json(folder / "manifest.json"),
            items=items,
            answers=answers,
            verdicts=verdicts,
            scores=scores,
        )
        _check_complete(evaluation)
    except (KeyError, TypeError) as error:
        raise SaroError(
            f"{folder}: a line lacks {error}; the files are not those of one evaluation, run it again"
        ) from error
    return evaluation


def _check_complete(evaluation: Evaluation) -> None:
    """Raise SaroError if an answer names an item or a model that the other files do not have."""
    for answer in evaluation.answers:
        if (answer["suite"], answer["item"]) not in evaluation.items:
            raise SaroError(
                f"{evaluation.folder / 'answers.jsonl'}: the item of {answer['key']} is not in items.jsonl; "
                "run the evaluation again"
            )
        evaluation.outcome(answer["key"])
        if answer["model"] not in evaluation.models:
            raise SaroError(
                f"{evaluation.folder / 'answers.jsonl'}: the model of {answer['key']} is not in scores.json; "
                "run the evaluation again"
            )


def _read_json(path: Path) -> Row:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SaroError(f"{path}: there is no such file; give the folder of a finished evaluation") from error
    except ValueError as error:
        raise SaroError(f"{path}: is not JSON; run the evaluation again") from error
    if not isinstance(content, dict):
        raise SaroError(f"{path}: is not a JSON object; run the evaluation again")
    return content


def _read_lines(path: Path) -> list[Row]:
    if not path.exists():
        raise SaroError(f"{path}: there is no such file; give the folder of a finished evaluation")
    rows = []
    # Not splitlines(): a text may hold U+2028, which ends a line for Python and not for JSON.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise SaroError(f"{path}:{number}: is not JSON; run the evaluation again") from error
    return rows
