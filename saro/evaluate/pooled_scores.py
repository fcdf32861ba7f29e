"""Makes the scores of evaluations of the same models after training with other seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from saro.evaluate.answers import Answer, Verdict
from saro.evaluate.cells import ScoreContext
from saro.evaluate.outcomes import make_rows
from saro.evaluate.scores import label_rows, score_rows
from saro.evaluate.suite import Item
from saro.evaluate.threats import SCORE_THREATS


@dataclass(frozen=True)
class SeedRows:
    """Holds the rows and scores of one folder.

    Attributes:
        answers, verdicts, labels: its rows, and the labels that hold.
        scores: content of its scores.json.
        limits: largest number of tokens of an answer, by model.
    """

    answers: Sequence[Answer]
    verdicts: Sequence[Verdict]
    labels: Sequence[Mapping[str, Any]]
    scores: Mapping[str, Any]
    limits: Mapping[str, int]


def pool_scores(items: Iterable[Item], folders: Sequence[SeedRows]) -> dict[str, Any]:
    """Return the content of scores.json for all folders together, which have the same models, suites, attacks and judge.

    A model with the same texts in all folders has one seed and counts once. Any other model has as many as there are
    folders: its answers to one prompt depend on each other, as draws do, and its intervals hold the variation of its seeds
    (``saro.evaluate.seeds``). "outcomes" are those of the first folder.
    """
    first = folders[0].scores
    seeds = {model: _count_seeds(model, folders) for model in first["models"]}
    context = ScoreContext(
        models=first["models"],
        suites=[suite["name"] for suite in first["suites"]],
        attacks=first["attacks"],
        judge=first["judge"]["name"],
        gold=first["judge"]["gold"],
        limits=folders[0].limits,
        threats=_find_other_threats(folders),
        seeds=seeds,
    )
    all_items = list(items)
    rows = []
    for seed, folder in enumerate(folders):
        own = label_rows(make_rows(all_items, folder.answers, folder.verdicts, context.judge), folder.labels)
        rows += [replace(row, seed=seed) for row in own if seed == 0 or seeds[row.answer.model] > 1]
    return score_rows(all_items, rows, context)


def _count_seeds(model: str, folders: Sequence[SeedRows]) -> int:
    texts = [{answer.key: answer.draw for answer in folder.answers if answer.model == model} for folder in folders]
    return 1 if all(each == texts[0] for each in texts) else len(folders)


def _find_other_threats(folders: Sequence[SeedRows]) -> list[dict[str, str]]:
    """Return the threats of all folders that do not follow from their scores, each once."""
    threats = [threat for folder in folders for threat in folder.scores["threats"]]
    texts = {threat["text"]: threat["id"] for threat in threats if threat["id"] not in SCORE_THREATS}
    return [{"id": name, "text": text} for text, name in texts.items()]
