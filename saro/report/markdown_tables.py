"""Writes the tables of the report as Markdown, to paste."""

from __future__ import annotations

from collections.abc import Sequence

from saro.report.evaluation_files import Evaluation, Row
from saro.report.number import MINUS, MISSING, interval_text, score_text
from saro.report.page_data import (
    TOKENS,
    Comparison,
    MetricLine,
    attack_tables,
    comparison_pairs,
    find_recoveries,
    suite_lines,
    token_lines,
)


def make_markdown(evaluation: Evaluation, figures: Sequence[str], command: str) -> str:
    """Return report.md: the verdict, what stands against it, and the tables of the page.

    Args:
        figures: names of the figures' files without the suffix.
        command: how the report was made; may be empty.
    """
    models = evaluation.models
    parts = [f"# Evaluation of {', '.join(map(_cell, models))}"]
    parts.append("\n".join(f"- {_cell(sentence)}" for sentence in evaluation.scores.get("verdict", [])))
    parts.append("\n".join(f"> **⚠** {_cell(threat['text'])}\n" for threat in evaluation.scores["threats"]))
    parts.append(
        f"Judge: {_cell(evaluation.judge)}. Values with 95 % intervals; differences are paired, in percentage points for "
        "rates, with p after Holm; ≈ is within noise."
    )
    named = [f"{model} ({seeds})" if (seeds := evaluation.describe_seeds(model)) else model for model in models]
    heads = [f"{model} {MINUS} {baseline}" for model, baseline in comparison_pairs(models)]
    for suite in evaluation.suites:
        rows = [
            [line.label, *map(_score, line.scores), *map(_difference, line.comparisons)]
            for line in suite_lines(evaluation, suite)
        ]
        parts += [f"## {_cell(suite)}", _table(["", *named, *heads], rows)]
    for table in attack_tables(evaluation):
        rows = [[line.label, *map(_score, line.scores), *_last_change(line)] for line in table.lines]
        last = [heads[len(models) - 2]] if len(models) > 1 else []
        parts += [f"## {table.title}: {_cell(table.suite)}", _table(["attack", *named, *last], rows)]
    for recovery in find_recoveries(evaluation):
        kind = "without harm" if recovery.expect == "refuse" else "helpful"
        rows = [[str(step), *map(_score, scores)] for step, scores in recovery.rows]
        parts += [
            f"## Answers {kind} after {_cell(recovery.attack)}: {_cell(recovery.suite)}",
            _table(["steps", *recovery.curves], rows),
        ]
    for metric, lines in token_lines(evaluation).items():
        rows = [[label, *map(_score, scores)] for label, scores in lines]
        parts += [f"## {TOKENS[metric].rstrip('.')}", _table(["", *named], rows)]
    parts.append("\n".join(f"![{name}]({name}.svg)" for name in figures))
    if command:
        parts.append(f"Made with `{command}`.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _score(score: Row | None) -> str:
    return f"{score_text(score)} {interval_text(score)}".strip()


def _difference(comparison: Comparison) -> str:
    row = comparison.row
    if row is None or row["value"] is None:
        return MISSING
    says = "" if comparison.mark is None else f", p {score_text(row, 'p_holm')} {comparison.mark.sign}"
    return f"{score_text(row)} {interval_text(row)}{says}"


def _last_change(line: MetricLine) -> list[str]:
    """Return the cell of the last model against the first; none for a single model."""
    models = len(line.scores)
    return [_difference(line.comparisons[models - 2])] if models > 1 else []


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = "| " + " | ".join(["---", *["---:"] * (len(heads) - 1)]) + " |"
    written = ["| " + " | ".join(map(_cell, line)) + " |" for line in (heads, *rows)]
    return "\n".join([written[0], rule, *written[1:]])


def _cell(text: str) -> str:
    """Return a text that stays one cell, and text: names come from files of other people."""
    for character in "\\`*_[]|<>#":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
