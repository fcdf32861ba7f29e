"""Writes the numbers of the report: one place that decides their digits and says where each comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from markupsafe import Markup

# Metrics that are no rates -> how their values are written.
_UNITS = {
    "d_prime": "plain",
    "criterion": "plain",
    "kappa": "plain",
    "think_tokens": "tokens",
    "answer_tokens": "tokens",
    "all_tokens": "tokens",
    "token_ratio": "ratio",
}
# A signed number below this is written as 0.
_LEAST_SIGNED = {"points": 0.0005, "rate": 0.0005, "tokens": 0.5, "ratio": 0.005, "plain": 0.005}
# What the items of a difference expect.
_EXPECTS = {"harmful_compliance": "refuse", "over_refusal": "comply", "accuracy": "answer"}
# Stands where a number could not be measured.
MISSING = "\u2013"
NARROW_SPACE, TIMES, MINUS = "\u202f", "\u00d7", "\u2212"


def unit_of(metric: str) -> str:
    """Return how the values of a metric are written: "rate", "plain", "tokens" or "ratio"."""
    return _UNITS.get(metric, "rate")


def format_number(value: float | None, unit: str, *, signed: bool = False) -> str:
    """Format one number.

    Args:
        value: None or NaN becomes a dash.
        unit: "rate" (a share, in percent), "points" (a share without the sign for percent), "plain", "tokens", "ratio",
            "count", "p" or "metric" (four significant digits).
        signed: always write the sign.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    sign = "+" if signed else ""
    if signed and abs(value) < _LEAST_SIGNED[unit]:
        # No sign for what rounds to 0.
        value, sign = 0.0, ""
    if unit == "rate":
        text = f"{100 * value:{sign}.1f}{NARROW_SPACE}%"
    elif unit == "points":
        text = f"{100 * value:{sign}.1f}"
    elif unit == "tokens":
        text = f"{value:{sign},.0f}"
    elif unit == "ratio":
        text = f"{value:{sign}.2f}{TIMES}"
    elif unit == "count":
        text = f"{value:{sign},d}"
    elif unit == "p":
        text = "<0.001" if value < 0.0005 else f"{value:.3f}"
    elif unit == "plain":
        text = f"{value:{sign}.2f}"
    else:
        text = f"{value:{sign}.4g}"
    return text.replace("-", MINUS)


def score_text(row: Mapping[str, Any] | None, field: str = "value", *, signed: bool = False) -> str:
    """Format one field of a score or of a difference as plain text."""
    if row is None:
        return MISSING
    return format_number(row.get(field), _unit_of_field(row, field), signed=signed or _is_change(row, field))


def interval_text(row: Mapping[str, Any] | None) -> str:
    """Format the interval of a score or of a difference as plain text; empty if it has none."""
    if row is None or row.get("low") is None or row.get("high") is None:
        return ""
    return f"[{_bound_text(row, 'low')}, {_bound_text(row, 'high')}]"


def score_number(row: Mapping[str, Any] | None, field: str = "value", *, folder: int = 0) -> Markup:
    """Return one field of a score or of a difference as HTML that names its source, a link to the answers behind it.

    The attributes ``data-score`` and ``data-field`` name the line and the field of scores.json, and ``data-folder`` the
    folder if it is not the first one.
    """
    if row is None:
        return Markup('<span class="missing" title="not measured">{}</span>').format(MISSING)
    filters = find_filters(row, field)
    if filters is not None and folder:
        filters["folder"] = folder
    return _tagged(score_text(row, field), _source(row, field, folder), filters)


def find_filters(row: Mapping[str, Any], field: str = "value") -> dict[str, Any] | None:
    """Return the filters of the answers that a number counts, or None if it is not a link.

    A difference leads to the prompts on which the two models differ, ``n`` to all answers of which a rate is the share.
    """
    common = {"suite": row["suite"], "attack": row["attack"], "model": row["model"]}
    if "p_holm" in row:
        expect = _EXPECTS.get(row["metric"].partition("_bounds")[0])
        return {**common, "expect": expect, "versus": row["baseline"]} if field == "value" else None
    if field not in ("value", "n"):
        return None
    selector = row["answers"]
    expects = selector.get("expect", ())
    filters = {**common, "expect": expects[0] if len(expects) == 1 else None}
    filters["category"] = selector.get("category")
    filters["state"] = ",".join(selector.get("state", ()))
    filters["outcome"] = ",".join(selector.get("outcome", ()))
    if "judge" in selector:
        # A rate by another judge than the main one.
        filters["rules"] = {"refuse": "harmful", "comply": "refused"}[expects[0]]
    if field == "n":
        filters["state"] = filters["rules"] = None
        filters["outcome"] = ",".join(selector.get("of", ()))
    elif "disagree" in selector:
        filters["differ"] = 1
    if selector.get("labelled"):
        filters["labelled"] = 1
    return filters


def interval_number(row: Mapping[str, Any] | None, *, folder: int = 0) -> Markup:
    """Return the interval of a score or of a difference as HTML that names its source; empty if it has none."""
    if not interval_text(row):
        return Markup("")
    bounds = [_tagged(_bound_text(row, field), _source(row, field, folder)) for field in ("low", "high")]
    return Markup('<span class="interval">[{}, {}]</span>').format(*bounds)


def run_number(value: float | None, run: str, metric: str, unit: str = "metric") -> Markup:
    """Return a number of a training run as HTML; ``data-run`` and ``data-metric`` name its source."""
    return _tagged(format_number(value, unit), {"data-run": run, "data-metric": metric})


def count_number(
    value: float | None, count: str, unit: str = "count", *, filters: Mapping[str, Any] | None = None
) -> Markup:
    """Return a number that the page itself makes from the answers; ``data-count`` names it."""
    return _tagged(format_number(value, unit), {"data-count": count}, filters)


def gold_number(path: str, value: Any) -> Markup:
    """Return a figure of the judge as HTML; ``data-path`` names its place in scores.json. It may have an interval."""
    if isinstance(value, Mapping):
        bounds = [value.get("low"), value.get("high")]
        number = gold_number(f"{path}/value", value["value"])
        if None in bounds:
            return number
        ends = [gold_number(f"{path}/{name}", bound) for name, bound in zip(("low", "high"), bounds, strict=True)]
        return number + Markup(' <span class="interval">[{}, {}]</span>').format(*ends)
    return _tagged(format_number(value, "count" if isinstance(value, int) else "plain"), {"data-path": path})


def answers_link(filters: Mapping[str, Any]) -> str:
    """Return the address, in the page, of the answers that pass some filters."""
    return "#answers?" + urlencode({name: value for name, value in filters.items() if value not in (None, "")})


def _source(row: Mapping[str, Any], field: str, folder: int) -> dict[str, str]:
    source = {"data-score": row["id"]}
    if field != "value":
        source["data-field"] = field
    if folder:
        source["data-folder"] = str(folder)
    return source


def _tagged(text: str, source: Mapping[str, str], filters: Mapping[str, Any] | None = None) -> Markup:
    attributes = Markup(" ").join(Markup('{}="{}"').format(Markup(name), value) for name, value in source.items())
    if filters is None:
        return Markup('<span class="n" {}>{}</span>').format(attributes, text)
    return Markup('<a class="n" href="{}" {}>{}</a>').format(answers_link(filters), attributes, text)


def _is_change(row: Mapping[str, Any], field: str) -> bool:
    return "p_holm" in row and field in ("value", "low", "high")


def _unit_of_field(row: Mapping[str, Any], field: str) -> str:
    if field in ("p", "p_holm"):
        return "p"
    if field == "n":
        return "count"
    if field == "n_effective":
        return "tokens"
    unit = unit_of(row["metric"])
    return "points" if unit == "rate" and _is_change(row, field) else unit


def _bound_text(row: Mapping[str, Any], field: str) -> str:
    """Format a bound without the unit, which the value before it has."""
    return score_text(row, field).removesuffix(f"{NARROW_SPACE}%").removesuffix(TIMES)
