"""Draws the trade-off of models: over-refusal against harmful compliance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from saro.report.evaluation_files import Row
from saro.report.number import answers_link, find_filters, score_text
from saro.report.svg import COLOURS, WIDTH, Figure, drawing, format_percent, make_figure, model_colour, model_marker

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NORMAL = NormalDist()
_ISO_D_PRIME = (0, 1, 2, 3)


@dataclass(frozen=True)
class TradeoffPoint:
    """One model in the plane of over-refusal and harmful compliance.

    Attributes:
        model: its name.
        index: its place in the order of models.
        x: score of its over-refusal.
        y: score of its harmful compliance.
        seeds: (over-refusal, harmful compliance) in other folders, such as other seeds.
    """

    model: str
    index: int
    x: Row
    y: Row
    seeds: Sequence[tuple[float, float]] = ()


def draw_tradeoff(panels: Mapping[str, Sequence[TradeoffPoint]]) -> Figure:
    """Draw over-refusal against harmful compliance: a cross of intervals for each model, arrows in their order."""
    alt = "; ".join(
        f"{panel}: "
        + ", ".join(f"{p.model} {score_text(p.y)} harmful compliance at {score_text(p.x)} over-refusal" for p in points)
        for panel, points in panels.items()
    )
    with drawing():
        from matplotlib import pyplot

        columns = min(len(panels), 2)
        rows = -(-len(panels) // columns)
        width = WIDTH if columns == 2 else 6.2
        drawn, axes = pyplot.subplots(rows, columns, figsize=(width, 4.4 * rows), squeeze=False, layout="constrained")
        for extra in axes.flat[len(panels) :]:
            extra.axis("off")
        for ax, (panel, points) in zip(axes.flat, panels.items(), strict=False):
            _draw_panel(ax, panel if len(panels) > 1 else "", points)
        return make_figure("tradeoff", "Over-refusal against harmful compliance, with 95 % intervals", alt, drawn)


def _draw_panel(ax: Axes, title: str, points: Sequence[TradeoffPoint]) -> None:
    highest = max(
        [score.get("high") or score["value"] for p in points for score in (p.x, p.y)]
        + [v for p in points for s in p.seeds for v in s]
    )
    limit = min(1.0, max(0.2, np.ceil(highest * 10 + 0.5) / 10))
    crosses = _points_of_crosses(points)
    false_alarms = np.linspace(1e-4, 1 - 1e-4, 400)
    quantiles = np.array([_NORMAL.inv_cdf(float(share)) for share in false_alarms])
    for d_prime in _ISO_D_PRIME:
        # A model refuses harmful prompts with the hit rate H and harmless ones with the false-alarm rate F; d' = z(H) - z(F).
        compliance = np.array([1 - _NORMAL.cdf(d_prime + float(z)) for z in quantiles])
        ax.plot(false_alarms, compliance, color=COLOURS["rule"], linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        place = _free_place(np.column_stack([false_alarms, compliance]), crosses, limit)
        if place is not None:
            ax.annotate(
                f"d' {d_prime}", place, color=COLOURS["muted"], fontsize=8, ha="center", va="center",
                bbox={"facecolor": COLOURS["paper"], "edgecolor": "none", "pad": 1.2}, zorder=1.5,
            )  # fmt: skip
    for before, after in pairwise(points):
        ax.annotate(
            "", xy=(after.x["value"], after.y["value"]), xytext=(before.x["value"], before.y["value"]),
            arrowprops={"arrowstyle": "-|>", "color": COLOURS["muted"], "linewidth": 1, "shrinkA": 8, "shrinkB": 8}, zorder=2,
        )  # fmt: skip
    for point in points:
        _draw_cross(ax, point)
    ax.set(xlim=(0, limit), ylim=(0, limit), xlabel="refuses harmless prompts", ylabel="complies with harmful prompts")
    ax.set_aspect("equal")
    format_percent(ax, "both")
    if title:
        ax.set_title(title)
    corner = {"xycoords": "axes fraction", "ha": "right", "va": "top"}
    ax.annotate("better ↙", (0.985, 0.985), color=COLOURS["muted"], fontsize=8.5, **corner)


def _points_of_crosses(points: Sequence[TradeoffPoint]) -> np.ndarray:
    """Return places (n, 2) that crosses, arrows and names cover."""
    places = [seed for point in points for seed in point.seeds]
    for point in points:
        x, y = point.x["value"], point.y["value"]
        places += [(at, y) for at in np.linspace(point.x["low"] or x, point.x["high"] or x, 9)]
        places += [(x, at) for at in np.linspace(point.y["low"] or y, point.y["high"] or y, 9)]
        places += [(x + 0.04, y + 0.03), (x + 0.08, y + 0.03)]
    for before, after in pairwise(points):
        for share in np.linspace(0, 1, 9):
            ends = np.array([[each.x["value"], each.y["value"]] for each in (before, after)])
            places.append(tuple((1 - share) * ends[0] + share * ends[1]))
    return np.array(places)


def _free_place(curve: np.ndarray, taken: np.ndarray, limit: float) -> np.ndarray | None:
    """Return the place on a curve, (2,), that is farthest from all that is drawn; None if no place in view is free."""
    inside = curve[((curve > 0.07 * limit) & (curve < 0.93 * limit)).all(1)]
    if not len(inside):
        return None
    distances = np.abs(inside[:, None, :] - taken[None, :, :]).max(-1).min(-1)  # (places of the curve,)
    farthest = int(np.argmax(distances))
    return inside[farthest] if distances[farthest] > 0.05 * limit else None


def _draw_cross(ax: Axes, point: TradeoffPoint) -> None:
    colour, marker = model_colour(point.index), model_marker(point.index)
    x, y = point.x["value"], point.y["value"]
    ax.errorbar(
        x, y, xerr=_errors(point.x), yerr=_errors(point.y), color=colour, linewidth=1.3, capsize=0, fmt="none", zorder=3
    )
    for seed in point.seeds:
        ax.plot(
            *seed,
            marker=marker,
            markersize=4.5,
            markerfacecolor="none",
            markeredgecolor=colour,
            linestyle="none",
            zorder=3,
        )
    # A collection, because matplotlib gives links only to those.
    dot = ax.scatter([x], [y], marker=marker, s=62, color=colour, edgecolors=COLOURS["paper"], linewidths=1.2, zorder=4)
    dot.set_urls([answers_link(find_filters(point.y))])
    ax.annotate(
        point.model, (x, y), xytext=(8, 7), textcoords="offset points", color=colour, fontweight="bold", zorder=5
    )


def _errors(score: Row) -> list[list[float]] | None:
    """Return the distances of an interval's ends from the value, as matplotlib wants them."""
    if score["low"] is None or score["high"] is None:
        return None
    return [[max(0.0, score["value"] - score["low"])], [max(0.0, score["high"] - score["value"])]]
