"""Draws the course of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from saro.report.svg import COLOURS, WIDTH, Figure, drawing, make_figure, model_colour
from saro.report.training_files import TrainingRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
        drawn, axes = pyplot.subplots(rows, 3, figsize=(WIDTH, 2.05 * rows), squeeze=False, layout="constrained")
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
