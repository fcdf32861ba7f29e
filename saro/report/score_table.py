"""Makes the compact table of an evaluation that the terminal shows at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from saro.report.number import MINUS, MISSING, interval_text, score_text
from saro.report.page_data import judge_difference

# Width of the longest interval, "[−10.0, +10.0]": in a narrow terminal names wrap and numbers do not.
_NUMBER_WIDTH = 14
# Of three models and their difference, 80 columns leave this for names.
_TEXT_WIDTH = 18
_STYLES = {"good": "green", "bad": "red", "noise": "dim"}
# Metric -> what the table calls it.
_LABELS = {
    "harmful_compliance": "harmful compliance",
    "over_refusal": "over-refusal",
    "accuracy": "right answers",
    "d_prime": "d'",
    "unfinished": "unfinished",
}


def score_table(scores: Mapping[str, Any]) -> Table:
    """Return the table of an evaluation: rates of all models with 95 % intervals, and the last one against the first.

    Under attack only the rates of harmful compliance are shown; the report has all.

    Args:
        scores: content of scores.json.
    """
    models = scores["models"]
    by_id = {score["id"]: score for score in scores["scores"]}
    table = Table(
        title="Scores with 95 % intervals",
        title_justify="left",
        caption="✓ better, ✗ worse, ≈ within noise, ≠ different",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    table.add_column("metric, suite, attack", min_width=_TEXT_WIDTH, overflow="fold")
    for model in models:
        table.add_column(escape(model), justify="right", min_width=_NUMBER_WIDTH, no_wrap=True)
    if len(models) > 1:
        table.add_column(
            escape(f"{models[-1]} {MINUS} {models[0]}"), justify="right", min_width=_NUMBER_WIDTH, no_wrap=True
        )
    for metric, suite, attack in _rows(scores):
        rows = [by_id.get(f"{metric}/{model}/{suite}/{attack}") for model in models]
        if any(rows):
            place = suite if attack == "none" else f"{suite}, {attack}"
            names = [f"{_LABELS[metric]}\n{place}"]
            cells = ["\n".join(filter(None, [score_text(row), interval_text(row)])) for row in rows]
            table.add_row(*map(escape, names + cells), *_difference_cells(scores, metric, suite, attack))
    return table


def _rows(scores: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (metric, suite, attack) of the rows, those without attack first."""
    suites = [suite["name"] for suite in scores["suites"]]
    attacks = [attack["id"] for attack in scores["attacks"] if attack["id"] != "none"]
    rows = [(metric, suite, "none") for suite in suites for metric in _LABELS]
    return rows + [("harmful_compliance", suite, attack) for suite in suites for attack in attacks]


def _difference_cells(scores: Mapping[str, Any], metric: str, suite: str, attack: str) -> list[str]:
    """Return the difference of the last model to the first and what it says; no cells for a single model."""
    first, last = scores["models"][0], scores["models"][-1]
    if first == last:
        return []
    wanted = (metric, suite, attack, last, first)
    fields = ("metric", "suite", "attack", "model", "baseline")
    found = (row for row in scores["differences"] if tuple(row[name] for name in fields) == wanted)
    row = next(found, None)
    mark = judge_difference(row)
    if mark is None:
        return [MISSING]
    style = _STYLES[mark.style]
    return [f"[{style}]{mark.sign}[/{style}] {escape(score_text(row))}\n{escape(interval_text(row))}"]
