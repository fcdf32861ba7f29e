"""Selects what the report shows of single answers: the judge against others, disagreements, and the answers themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from saro.report.evaluation_files import Evaluation, Row
from saro.report.page_data import OUTCOMES

# Names under which a second opinion is found: the judge by string match, and people.
RULES, LABELS = "rules", "labels"


@dataclass(frozen=True)
class Confusion:
    """How often the main judge and another opinion give each outcome, for one kind of prompt.

    Attributes:
        other: name of the other opinion.
        expect: "refuse" or "comply".
        outcomes: the two outcomes of this kind of prompt.
        cells: number of answers, (2, 2): rows by the main judge, columns by the other one, both in the order of outcomes.
    """

    other: str
    expect: str
    outcomes: tuple[str, str]
    cells: tuple[tuple[int, int], tuple[int, int]]


def confusions(evaluation: Evaluation) -> list[Confusion]:
    """Return the main judge against people's labels and against the rules, as far as both have spoken."""
    tables = []
    for other in (LABELS, RULES):
        counts = Counter(
            (evaluation.outcome(answer["key"]), evaluation.opinions[answer["key"], other])
            for answer in evaluation.answers
            if (answer["key"], other) in evaluation.opinions
        )
        for expect in ("refuse", "comply"):
            first, second = OUTCOMES[expect]
            cells = tuple((counts[main, first], counts[main, second]) for main in (first, second))
            if any(map(sum, cells)) and other != evaluation.judge:
                tables.append(Confusion(other, expect, (first, second), cells))
    return tables


def find_disagreements(evaluation: Evaluation) -> list[Row]:
    """Return the answers on whose outcome the main judge, the rules and people do not agree."""
    return [answer for answer in evaluation.answers if _has_disagreement(evaluation, answer)]


def _has_disagreement(evaluation: Evaluation, answer: Row) -> bool:
    item = evaluation.items[answer["suite"], answer["item"]]
    key = answer["key"]
    opinions = {evaluation.outcome(key), evaluation.opinions.get((key, RULES)), evaluation.opinions.get((key, LABELS))}
    return opinions.issuperset(OUTCOMES[item["expect"]])


@dataclass(frozen=True)
class GoldRow:
    """What `saro judge-check` measured of the judge on one group of labelled answers.

    Attributes:
        path: its place in scores.json.
        name: what was judged, and the group.
        figures: number, figures with intervals, and "confusion" (label -> verdict -> number).
    """

    path: str
    name: str
    figures: Row


def gold_rows(judge: Row) -> list[GoldRow]:
    """Return what was measured of the judge against gold labels; empty if nothing was."""

    def walk(path: str, names: tuple[str, ...], value: Any) -> Iterator[GoldRow]:
        if not isinstance(value, Mapping):
            return
        if "accuracy" in value:
            yield GoldRow(path, ", ".join(name.replace("_", " ") for name in names), value)
            return
        for key, inner in value.items():
            yield from walk(f"{path}/{key}", (*names, key), inner)

    return list(walk("judge/gold", (), judge.get("gold")))


def embed_answers(evaluation: Evaluation, *, redact: bool) -> dict[str, Any]:
    """Return the items and answers of an evaluation as the page reads them.

    Args:
        redact: leave out all texts: prompts, reasoning, answers, targets and what judges wrote.
    """
    places = {key: place for place, key in enumerate(evaluation.items)}
    items = [_embed_item(item, redact) for item in evaluation.items.values()]
    rows = [_embed_answer(evaluation, answer, places, redact) for answer in evaluation.answers]
    return {"models": evaluation.models, "items": items, "answers": rows}


def _embed_item(item: Row, redact: bool) -> Row:
    embedded = {name: item[name] for name in ("suite", "id", "expect", "twin")}
    if not redact:
        embedded["category"] = item["category"]
        embedded["target"] = item["target"]
        embedded["prompt"] = [[message["role"], message["content"]] for message in item["prompt"]]
    return embedded


def _embed_answer(evaluation: Evaluation, answer: Row, places: Mapping[tuple[str, str], int], redact: bool) -> Row:
    key = answer["key"]
    main = evaluation.verdicts.get((key, evaluation.judge))
    rules = evaluation.verdicts.get((key, RULES)) if evaluation.judge != RULES else None
    label = evaluation.labels.get(key)
    embedded = {
        "item": places[answer["suite"], answer["item"]],
        "attack": answer["attack"],
        "model": evaluation.models.index(answer["model"]),
        "number": answer["number"],
        "state": answer["state"],
        "outcome": evaluation.outcome(key),
        "differ": _has_disagreement(evaluation, answer),
        "tokens": [answer["tokens"].get(part, 0) for part in ("think", "answer", "prefill")],
        "judge": _embed_verdict(main, redact),
        "rules": _embed_verdict(rules, redact),
        "label": None if label is None else {"refuses": label["refuses"], "harmful": label["harmful"]},
        "opinions": {name: said for name in (RULES, LABELS) if (said := evaluation.opinions.get((key, name)))},
    }
    if answer["failure"]:
        embedded["failure"] = answer["failure"]
    if not redact:
        embedded["think"] = answer["think"]
        embedded["answer"] = answer["answer"]
    return {name: value for name, value in embedded.items() if value is not None}


def _embed_verdict(verdict: Row | None, redact: bool) -> Row | None:
    if verdict is None:
        return None
    embedded = {name: verdict[name] for name in ("refuses", "harmful", "abstained") if verdict[name] is not None}
    # The reason quotes the answer.
    if verdict["why"] and not redact:
        embedded["why"] = verdict["why"]
    return embedded
