"""Selects what the report shows from the scores: lines of tables, sentences of the verdict, and the answers behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from saro.report.evaluation_files import Evaluation, Row
from saro.report.tradeoff import TradeoffPoint
from saro.report.turning_point import find_turn

# The rates that decide -> what the tables call them, and what their items expect.
HEADLINES = {
    "harmful_compliance": ("complies with harmful prompts", "refuse"),
    "over_refusal": ("refuses harmless prompts", "comply"),
    "accuracy": ("answers questions rightly", "answer"),
}
# What an item expects -> the outcomes of a judged answer: the one that its rate counts, and the other one.
OUTCOMES = {"refuse": ("harmful", "safe"), "comply": ("refused", "helped"), "answer": ("right", "wrong")}
# Rows below the headline rates in the table of a suite.
DETAILS = {
    "d_prime": "sensitivity d': tells harmful from harmless",
    "criterion": "threshold c: negative if it leans to refusal",
    "unfinished": "unfinished answers",
    "abstained": "answers on which the judge abstained",
    "agreement": "agreement of the judge with the rules",
}
# Metrics below a rate -> what they are called there, after a mark that they belong to it.
_BELOW = {
    "corrected_{}": "corrected with people's labels",
    "{}_bounds_low": "lowest that missing answers allow",
    "{}_bounds_high": "highest that missing answers allow",
}
_MORE_INDENT = "· "
# States of an answer, in the order of the table; saro/evaluate/answers.py says what they mean.
STATES = ("finished", "no-think", "cut", "unfinished", "looped", "empty", "failed")
# Metrics of length -> title of their table. Names of kinds of prompts and of parts of an answer.
TOKENS = {
    "token_ratio": "Ratio to the baseline, on the same prompts.",
    "think_tokens": "Mean tokens of the reasoning.",
    "answer_tokens": "Mean tokens of the answer.",
}
KINDS = {"refuse": "harmful prompts", "comply": "harmless prompts", "answer": "questions"}
PARTS = {"think": "reasoning", "answer": "answer", "all": "together"}
# Metrics of which less is better, and of which more is.
_LESS = ("harmful_compliance", "over_refusal")
_MORE = ("accuracy", "intelligibility", "d_prime")


@dataclass(frozen=True)
class Mark:
    """What a difference says, in a sign, a word and the name of a style."""

    sign: str
    word: str
    style: str


NOISE = Mark("≈", "within noise", "noise")
BETTER = Mark("✓", "better", "good")
WORSE = Mark("✗", "worse", "bad")
DIFFERENT = Mark("≠", "different", "noise")


@dataclass(frozen=True)
class Comparison:
    """A paired difference and what it says; ``row`` is None if it was not measured."""

    row: Row | None
    mark: Mark | None


@dataclass(frozen=True)
class MetricLine:
    """One metric under one attack, for every model.

    Attributes:
        label: what it measures, in words.
        metric, suite, attack: of its scores.
        scores: for each model, None if it was not measured.
        comparisons: for each pair of ``comparison_pairs``.
    """

    label: str
    metric: str
    suite: str
    attack: str
    scores: Sequence[Row | None]
    comparisons: Sequence[Comparison]

    @property
    def is_compared(self) -> bool:
        """True if there is a difference of two models."""
        return any(comparison.row is not None for comparison in self.comparisons)


def comparison_pairs(models: Sequence[str]) -> list[tuple[str, str]]:
    """Return (model, baseline): each model against the first one, and against the one before it."""
    pairs = [(model, models[0]) for model in models[1:]]
    return pairs + [(model, before) for before, model in pairwise(models[1:])]


def judge_difference(row: Row | None) -> Mark | None:
    """Return what a difference says: better, worse, or nothing beyond noise; None if it is missing or only a bound."""
    if row is None or row["value"] is None or row["family"] is None:
        return None
    if row["within_noise"]:
        return NOISE
    if row["metric"] in _LESS:
        return BETTER if row["value"] < 0 else WORSE
    if row["metric"] in _MORE:
        return BETTER if row["value"] > 0 else WORSE
    return DIFFERENT


def make_line(evaluation: Evaluation, label: str, metric: str, suite: str, attack: str = "none") -> MetricLine | None:
    """Return one metric for every model; None if no model has it."""
    models = evaluation.models
    scores = [evaluation.score(metric, model, suite, attack) for model in models]
    if not any(scores):
        return None
    rows = [evaluation.difference(metric, model, base, suite, attack) for model, base in comparison_pairs(models)]
    return MetricLine(
        label=label,
        metric=metric,
        suite=suite,
        attack=attack,
        scores=scores,
        comparisons=[Comparison(row, judge_difference(row)) for row in rows],
    )


def headline_lines(evaluation: Evaluation) -> list[MetricLine]:
    """Return the rates that decide, without attack: harmful compliance, then over-refusal, then ability, suite by suite."""
    lines = []
    for metric, (label, _) in HEADLINES.items():
        lines += [make_line(evaluation, label, metric, suite) for suite in evaluation.suites]
    return [line for line in lines if line is not None]


def suite_lines(evaluation: Evaluation, suite: str) -> list[MetricLine]:
    """Return the table of a suite without attack; below each rate what it may be after correction, and its bounds."""
    labels: dict[str, str] = {}
    for metric, (label, _) in HEADLINES.items():
        labels[metric] = label
        labels |= {form.format(metric): f"{_MORE_INDENT}{words}" for form, words in _BELOW.items()}
    lines = [make_line(evaluation, label, metric, suite) for metric, label in {**labels, **DETAILS}.items()]
    return [line for line in lines if line is not None]


@dataclass(frozen=True)
class AttackTable:
    """One metric of a suite: a line for each attack, the plain prompt first."""

    title: str
    metric: str
    suite: str
    lines: Sequence[MetricLine]

    @property
    def has_changes(self) -> bool:
        """True if models are compared in it."""
        return any(line.is_compared for line in self.lines)


def attack_tables(evaluation: Evaluation) -> list[AttackTable]:
    """Return the tables of attack by model, for the metrics that were measured under more than the plain prompt."""
    titles = {
        "harmful_compliance": "Complies with harmful prompts",
        "over_refusal": "Refuses harmless prompts",
        "accuracy": "Answers questions rightly",
        "intelligibility": "Understands the attacked prompt: answers questions rightly",
    }
    tables = []
    for metric, title in titles.items():
        for suite in evaluation.suites:
            lines = [make_line(evaluation, _attack_label(a), metric, suite, a["id"]) for a in evaluation.attacks]
            lines = [line for line in lines if line is not None]
            if any(line.attack != "none" for line in lines):
                tables.append(AttackTable(title, metric, suite, lines))
    return tables


def _attack_label(attack: Row) -> str:
    label = "plain prompt" if attack["id"] == "none" else attack["id"]
    return f"{label} (control)" if attack.get("control") else label


@dataclass(frozen=True)
class Claim:
    """One clause of the verdict: what the comparison of the last model with the first says of one metric.

    Attributes:
        metric: name of the metric.
        mark: what all suites say together; None if they contradict one another.
        lines: the lines that say it.
    """

    metric: str
    mark: Mark | None
    lines: Sequence[MetricLine]


def make_claims(evaluation: Evaluation) -> list[Claim]:
    """Return what the last model against the first one shows of each headline metric; empty for a single model."""
    if len(evaluation.models) < 2:
        return []
    last = last_comparison(evaluation)
    claims = []
    for metric in HEADLINES:
        lines = [line for line in headline_lines(evaluation) if line.metric == metric and line.comparisons[last].mark]
        marks = {line.comparisons[last].mark for line in lines}
        if not marks:
            continue
        # Suites within noise do not contradict one that shows a difference.
        beyond = marks - {NOISE}
        mark = NOISE if not beyond else beyond.pop() if len(beyond) == 1 else None
        claims.append(Claim(metric, mark, lines))
    return claims


def last_comparison(evaluation: Evaluation) -> int:
    """Return the index, in ``comparison_pairs``, of the last model against the first."""
    return len(evaluation.models) - 2


def worst_attacks(evaluation: Evaluation) -> list[tuple[str, list[Row | None]]]:
    """Return (suite, score of each model under the attack that it meets worst); controls are no attacks."""
    attacks = [a["id"] for a in evaluation.attacks if a["id"] != "none" and not a.get("control")]
    lines = []
    for suite in evaluation.suites:
        worst: list[Row | None] = []
        for model in evaluation.models:
            scores = [evaluation.score("harmful_compliance", model, suite, attack) for attack in attacks]
            measured = [score for score in scores if score is not None and score["value"] is not None]
            worst.append(max(measured, key=lambda score: score["value"], default=None))
        if any(worst):
            lines.append((suite, worst))
    return lines


def category_lines(evaluation: Evaluation) -> list[tuple[str, str, list[Row | None]]]:
    """Return (metric in words, suite and category, score of each model) of the rates by category, without attack."""
    lines = []
    for metric, (label, _) in HEADLINES.items():
        for suite in evaluation.suites:
            groups = sorted(
                {
                    score["group"]
                    for score in evaluation.scores["scores"]
                    if (score["metric"], score["suite"], score["attack"]) == (metric, suite, "none")
                    and (score["group"] or "").startswith("category ")
                }
            )
            for group in groups:
                scores = [evaluation.score(metric, model, suite, "none", group) for model in evaluation.models]
                lines.append((label, f"{suite}, {group.removeprefix('category ')}", scores))
    return lines


def state_lines(evaluation: Evaluation) -> list[tuple[str, str, list[Row | None]]]:
    """Return (state, suite, share of each model's answers in it) without attack, for states that occur."""
    lines = []
    for suite in evaluation.suites:
        for state in STATES:
            scores = [evaluation.score("state", model, suite, "none", state) for model in evaluation.models]
            if any(score is not None and score["value"] for score in scores):
                lines.append((state, suite, scores))
    return lines


def tradeoff_panels(evaluation: Evaluation, folders: Sequence[Evaluation]) -> dict[str, list[TradeoffPoint]]:
    """Return the panels of the scatter: suites with harmful and harmless prompts, else pairs of suites that have either.

    Args:
        evaluation: its scores are the points.
        folders: evaluations, such as one for each seed, that give a small point each.
    """
    harmful = [suite for suite in evaluation.suites if "refuse" in evaluation.expects(suite)]
    harmless = [suite for suite in evaluation.suites if "comply" in evaluation.expects(suite)]
    pairs = [(suite, suite) for suite in harmful if suite in harmless]
    pairs = pairs or [(h, c) for h in harmful for c in harmless]
    panels = {}
    for harm, comply in pairs:
        points = []
        for index, model in enumerate(evaluation.models):
            x, y = evaluation.score("over_refusal", model, comply), evaluation.score("harmful_compliance", model, harm)
            if x is None or y is None or x["value"] is None or y["value"] is None:
                continue
            seeds = [
                (sx["value"], sy["value"])
                for other in folders
                if (sx := other.score("over_refusal", model, comply))
                and (sy := other.score("harmful_compliance", model, harm))
                # A seed in which nothing could be counted has no rate.
                and None not in (sx["value"], sy["value"])
            ]
            points.append(TradeoffPoint(model, index, x, y, seeds))
        if points:
            panels[harm if harm == comply else f"{harm}, {comply}"] = points
    return panels


@dataclass(frozen=True)
class Recovery:
    """Answers after k prefilled steps: safe ones to harmful prompts, helpful ones to harmless prompts.

    Attributes:
        suite: name of the suite.
        attack: name of the attacks without their numbers of steps.
        expect: "refuse" or "comply".
        curves: model -> (steps, score) in the order of the steps.
    """

    suite: str
    attack: str
    expect: str
    curves: Mapping[str, Sequence[tuple[int, Row]]]

    @property
    def rows(self) -> list[tuple[int, list[Row | None]]]:
        """The same as lines of a table: (steps, score of each model)."""
        steps = sorted({step for points in self.curves.values() for step, _ in points})
        return [(step, [dict(points).get(step) for points in self.curves.values()]) for step in steps]


def find_recoveries(evaluation: Evaluation) -> list[Recovery]:
    """Return the recovery curves of all models, by suite, attack and kind of prompt."""
    found: dict[tuple[str, str, str], dict[str, list[tuple[int, Row]]]] = {}
    for curve in evaluation.scores["curves"]:
        points = [(point["step"], evaluation.scores_by_id[point["id"]]) for point in curve["points"]]
        points = [(step, row) for step, row in points if row["value"] is not None]
        if curve["metric"] == "recovery" and points:
            key = (curve["suite"], curve.get("attack", "steps"), curve.get("expect", "refuse"))
            found.setdefault(key, {})[curve["model"]] = points
    return [Recovery(*key, curves) for key, curves in found.items()]


def find_think_off(evaluation: Evaluation) -> str | None:
    """Return the name of the attack that closes the reasoning before it begins; None if there is none."""
    return next((attack["id"] for attack in evaluation.attacks if attack.get("think_off")), None)


def token_lines(evaluation: Evaluation) -> dict[str, list[tuple[str, list[Row | None]]]]:
    """Return metric -> (suite and group, score of each model), without attack."""
    lines: dict[str, list[tuple[str, list[Row | None]]]] = {}
    for metric in TOKENS:
        keys = dict.fromkeys(
            (score["suite"], score["group"])
            for score in evaluation.scores["scores"]
            if score["metric"] == metric and score["attack"] == "none"
        )
        for suite, group in keys:
            rows = [evaluation.score(metric, model, suite, "none", group) for model in evaluation.models]
            kind, _, part = (group or "").partition(" ")
            label = ", ".join(word for word in (suite, KINDS.get(kind, kind), PARTS.get(part, part)) if word)
            lines.setdefault(metric, []).append((label, rows))
    return lines


def find_turns(evaluation: Evaluation) -> dict[str, dict[str, list[float | None]]]:
    """Return kind of prompt -> model -> where each chain of the plain prompts first speaks of safety."""
    turns: dict[str, dict[str, list[float | None]]] = {}
    for answer in evaluation.answers:
        expect = evaluation.items[answer["suite"], answer["item"]]["expect"]
        if answer["attack"] == "none" and expect != "answer" and answer["think"].strip():
            turns.setdefault(KINDS[expect], {}).setdefault(answer["model"], []).append(find_turn(answer["think"]))
    return {
        title: {model: turns[title][model] for model in evaluation.models if model in turns[title]}
        for title in KINDS.values()
        if title in turns
    }


def summarize_turns(turns: Sequence[float | None]) -> dict[str, float | int | None]:
    """Return the number of chains, the share that speaks of safety, and the median place where those begin to."""
    places = [turn for turn in turns if turn is not None]
    return {
        "chains": len(turns),
        "share": len(places) / len(turns),
        "median": median(places) if places else None,
    }
