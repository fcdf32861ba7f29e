"""Draws the figures of the report, from plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from saro.report.number import TIMES, answers_link, find_filters, format_number, score_text
from saro.report.svg import COLOURS, Figure, drawing, make_figure, model_colour, model_marker
from saro.report.training_files import TrainingRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

_NORMAL = NormalDist()
_ISO_D_PRIME = (0, 1, 2, 3)
_WIDTH = 8.6  # inches; the page scales a figure to its column


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
        width = _WIDTH if columns == 2 else 6.2
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
    _percent(ax, "both")
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


def draw_heat_map(
    name: str, title: str, models: Sequence[str], attacks: Sequence[str], values: Sequence[Sequence[Row | None]]
) -> Figure:
    """Draw a rate for each attack and model as a shaded table; the number is in each cell."""
    shares = np.array(
        [[np.nan if row is None or row["value"] is None else row["value"] for row in line] for line in values]
    )
    alt = "; ".join(
        f"{attack}: " + ", ".join(f"{model} {score_text(row)}" for model, row in zip(models, line, strict=True))
        for attack, line in zip(attacks, values, strict=True)
    )
    with drawing():
        from matplotlib import pyplot
        from matplotlib.colors import LinearSegmentedColormap

        drawn, ax = pyplot.subplots(figsize=(2.4 + 1.15 * len(models), 0.7 + 0.34 * len(attacks)), layout="constrained")
        shades = LinearSegmentedColormap.from_list("rates", [COLOURS["faint"], COLOURS["model-2"]])
        ax.pcolormesh(
            np.ma.masked_invalid(shares), cmap=shades, vmin=0, vmax=1, edgecolors=COLOURS["paper"], linewidth=2
        )
        for i, j in np.ndindex(shares.shape):
            ax.text(j + 0.5, i + 0.5, score_text(values[i][j]), ha="center", va="center", fontsize=8.5)
        ax.set_xticks(np.arange(len(models)) + 0.5, models)
        ax.set_yticks(np.arange(len(attacks)) + 0.5, attacks)
        ax.invert_yaxis()
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_title(title)
        return make_figure(name, title, alt, drawn)


def draw_recovery(
    name: str, title: str, curves: Mapping[str, Sequence[tuple[int, Row]]], order: Sequence[str]
) -> Figure:
    """Draw the share of good answers against the number of foreign steps of reasoning that were prefilled."""
    alt = "; ".join(
        f"{model}: " + ", ".join(f"{score_text(row)} after {k} steps" for k, row in points)
        for model, points in curves.items()
    )
    with drawing():
        from matplotlib import pyplot

        drawn, ax = pyplot.subplots(figsize=(5.6, 3.3), layout="constrained")
        ends = {}
        for model, points in curves.items():
            index = order.index(model)
            colour, marker = model_colour(index), model_marker(index)
            steps = [step for step, _ in points]
            shares = [row["value"] for _, row in points]
            ax.fill_between(
                steps,
                [row["low"] for _, row in points],
                [row["high"] for _, row in points],
                color=colour,
                alpha=0.12,
                linewidth=0,
            )
            ax.plot(steps, shares, color=colour)
            dots = ax.scatter(
                steps, shares, marker=marker, s=40, color=colour, edgecolors=COLOURS["paper"], linewidths=1, zorder=3
            )
            dots.set_urls([answers_link(find_filters(row)) for _, row in points])
            ends[model] = (steps[-1], shares[-1], colour)
        _label_ends(ax, ends)
        ax.set(ylim=(0, 1.02), xlabel="steps of a foreign chain that the model continues")
        ax.set_xticks(sorted({step for points in curves.values() for step, _ in points}))
        ax.grid(axis="y")
        _percent(ax, "y")
        return make_figure(name, title, alt, drawn)


def draw_rates(
    name: str, title: str, groups: Sequence[str], models: Sequence[str], values: Sequence[Sequence[Row | None]]
) -> Figure:
    """Draw a rate with its interval for each group and model, as points on lines."""
    return _draw_dots(name, title, groups, models, values, "rate")


def draw_token_ratios(
    title: str, groups: Sequence[str], models: Sequence[str], values: Sequence[Sequence[Row | None]]
) -> Figure:
    """Draw the ratio of tokens to the baseline for each kind of prompt, part of the answer and model."""
    return _draw_dots("token_overhead", title, groups, models, values, "ratio")


def _draw_dots(
    name: str,
    title: str,
    groups: Sequence[str],
    models: Sequence[str],
    values: Sequence[Sequence[Row | None]],
    unit: str,
) -> Figure:
    alt = "; ".join(
        f"{group}: "
        + ", ".join(f"{model} {score_text(row)}" for model, row in zip(models, line, strict=True) if row is not None)
        for group, line in zip(groups, values, strict=True)
    )
    with drawing():
        from matplotlib import pyplot
        from matplotlib.ticker import FuncFormatter

        # A model without values, such as the baseline of ratios, takes no room.
        shown = [j for j in range(len(models)) if any(line[j] is not None for line in values)]
        height = 0.8 + (0.16 + 0.15 * len(shown)) * len(groups)
        drawn, ax = pyplot.subplots(figsize=(6.6, height), layout="constrained")
        for place, j in enumerate(shown):
            colour = model_colour(j)
            offset = (place - (len(shown) - 1) / 2) * 0.24
            rows = [
                (i + offset, line[j])
                for i, line in enumerate(values)
                if line[j] is not None and line[j]["value"] is not None
            ]
            for at, row in rows:
                if row["low"] is not None:
                    ax.plot([row["low"], row["high"]], [at, at], color=colour, linewidth=1.4)
            ax.scatter(
                [row["value"] for _, row in rows], [at for at, _ in rows], marker=model_marker(j), s=38, color=colour,
                edgecolors=COLOURS["paper"], linewidths=1, zorder=3, label=models[j],
            )  # fmt: skip
        if unit == "ratio":
            ax.axvline(1, color=COLOURS["muted"], linewidth=0.9, linestyle=(0, (4, 3)))
        ax.set_yticks(range(len(groups)), groups)
        ax.set_ylim(len(groups) - 0.5, -0.5)
        ax.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
        ax.spines["left"].set_visible(False)
        ax.grid(axis="x")
        if unit == "rate":
            ax.set_xlim(0, 1)
            _percent(ax, "x")
        else:
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{TIMES}"))
        drawn.legend(loc="outside upper left", ncols=len(shown), fontsize=9, handletextpad=0.3)
        return make_figure(name, title, alt, drawn)


def draw_turns(panels: Mapping[str, Mapping[str, Sequence[float | None]]], order: Sequence[str]) -> Figure:
    """Draw, for each kind of prompt and model, which share of the chains has spoken of safety by each position.

    Args:
        panels: kind of prompt -> model -> position in each chain, None for a chain that never does.
    """
    alt = "; ".join(
        f"{panel}: " + ", ".join(f"{model} {_share_turned(turns)} of the chains" for model, turns in models.items())
        for panel, models in panels.items()
    )
    with drawing():
        from matplotlib import pyplot

        drawn, axes = pyplot.subplots(
            1,
            len(panels),
            figsize=(_WIDTH if len(panels) > 1 else 5, 3.3),
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for ax, (panel, models) in zip(axes[0], panels.items(), strict=True):
            ends = {}
            for model, turns in models.items():
                index = order.index(model)
                places = np.sort([turn for turn in turns if turn is not None])
                shares = np.arange(1, len(places) + 1) / len(turns)
                x, y = [0.0, *places, 1.0], [0.0, *shares, shares[-1] if len(shares) else 0.0]
                ax.step(x, y, where="post", color=model_colour(index))
                ends[model] = (1.0, y[-1], model_colour(index))
            _label_ends(ax, ends)
            ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="position in the reasoning")
            ax.set_title(panel)
            ax.grid(axis="y")
            _percent(ax, "both")
        axes[0][0].set_ylabel("chains that have spoken of safety")
        return make_figure("turning_point", "Where the reasoning first speaks of safety", alt, drawn)


def _share_turned(turns: Sequence[float | None]) -> str:
    return format_number(sum(turn is not None for turn in turns) / len(turns), "rate")


# Panels of a run's figure: title -> metrics and the names of their lines.
_TRAINING_PANELS: Mapping[str, Mapping[str, str]] = {
    "loss": {"loss": "all", "loss/think": "reasoning", "loss/answer": "answer"},
    "learning rate": {"lr": ""},
    "gradient norm": {"grad_norm": ""},
    "reward margin, training pairs": {
        "rewards/margins": "all",
        "op-cot/rewards/margins": "op-cot",
        "pp-cot/rewards/margins": "pp-cot",
    },
    "change of log-probs, nats": {"delta_logps/chosen": "chosen", "delta_logps/rejected": "rejected"},
    "share of chosen that fell": {"chosen_fell": ""},
    "tokens per second": {"tokens_per_second": ""},
    "peak memory, GiB": {"peak_memory_gib": ""},
}


def draw_training(run: TrainingRun, name: str) -> Figure:
    """Draw the course of a run: one small panel for each metric that it wrote, and the margins of its held-out pairs."""
    panels = {
        title: {name: run.series(metric) for metric, name in metrics.items() if run.series(metric)[0]}
        for title, metrics in _TRAINING_PANELS.items()
    }
    panels = {title: lines for title, lines in panels.items() if lines}
    has_margins = run.margins is not None
    alt = "Panels over the steps: " + ", ".join([*panels, *(["margins of the held-out pairs"] if has_margins else [])])
    with drawing():
        from matplotlib import pyplot
        from matplotlib.ticker import MaxNLocator

        number = len(panels) + has_margins
        rows = -(-number // 3)
        drawn, axes = pyplot.subplots(rows, 3, figsize=(_WIDTH, 2.05 * rows), squeeze=False, layout="constrained")
        for extra in axes.flat[number:]:
            extra.axis("off")
        for ax, (title, lines) in zip(axes.flat, panels.items(), strict=False):
            for index, (label, (steps, values)) in enumerate(lines.items()):
                style = ("-", (0, (5, 2)), (0, (1.5, 1.5)))[index]
                marker = "o" if len(steps) < 4 else None
                ax.plot(
                    steps,
                    values,
                    color=model_colour(index + 1 if len(lines) > 1 else 1),
                    linestyle=style,
                    linewidth=1.4,
                    marker=marker,
                    markersize=3,
                    label=label,
                )
            if len(lines) > 1:
                ax.legend(fontsize=7.5, handlelength=1.8, loc="best")
            ax.set_title(title, fontsize=8.5)
        if has_margins:
            _draw_margin_fan(axes.flat[number - 1], *run.margins)
        for ax in axes.flat[:number]:
            ax.grid(axis="y")
            ax.tick_params(labelsize=7.5)
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            ax.yaxis.set_major_locator(MaxNLocator(4))
        return make_figure(name, f"Course of {run.name}", alt, drawn)


def _draw_margin_fan(ax: Axes, steps: np.ndarray, margins: np.ndarray) -> None:
    ax.plot(steps, margins, color=COLOURS["model-1"], alpha=0.16, linewidth=0.7)
    ax.plot(steps, margins.mean(1), color=COLOURS["model-1"], linewidth=2)
    ax.axhline(0, color=COLOURS["muted"], linewidth=0.7)
    ax.set_title("margins of held-out pairs, nats", fontsize=8.5)


def _errors(score: Row) -> list[list[float]] | None:
    """Return the distances of an interval's ends from the value, as matplotlib wants them."""
    if score["low"] is None or score["high"] is None:
        return None
    return [[max(0.0, score["value"] - score["low"])], [max(0.0, score["high"] - score["value"])]]


def _percent(ax: Axes, which: str) -> None:
    from matplotlib.ticker import PercentFormatter

    if which in ("x", "both"):
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    if which in ("y", "both"):
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def _label_ends(ax: Axes, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Write the names of lines at their right ends, moved apart where they would overlap."""
    space = 0.075  # of the axis: the height of a name
    places: list[float] = []
    for model, (x, y, colour) in sorted(ends.items(), key=lambda end: end[1][1]):
        place = max(y, places[-1] + space) if places else y
        places.append(place)
        ax.annotate(
            model,
            (x, place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )
