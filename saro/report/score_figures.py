"""Draws the scores of models and attacks: tables of rates, recovery curves, ratios of tokens and turning points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from saro.report.evaluation_files import Row
from saro.report.number import TIMES, answers_link, find_filters, format_number, score_text
from saro.report.svg import COLOURS, WIDTH, Figure, drawing, format_percent, make_figure, model_colour, model_marker

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
        format_percent(ax, "y")
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
            format_percent(ax, "x")
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
            figsize=(WIDTH if len(panels) > 1 else 5, 3.3),
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
            format_percent(ax, "both")
        axes[0][0].set_ylabel("chains that have spoken of safety")
        return make_figure("turning_point", "Where the reasoning first speaks of safety", alt, drawn)


def _share_turned(turns: Sequence[float | None]) -> str:
    return format_number(sum(turn is not None for turn in turns) / len(turns), "rate")


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
