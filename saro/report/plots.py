"""Plot a run's margins.jsonl: the margin of each held-out pair over the steps, their mean, and the accuracy.

python -m saro.report.plots output/srpo --output margins.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from saro.errors import SaroError, install_extra
from saro.program import run_program


def read_margins(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps of the evaluations, (S,), and the margins in nats, (S, P).

    Pairs are in the order of the first evaluation.
    """
    margins: dict[int, dict[str, float]] = {}  # step -> id -> margin
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        margins.setdefault(row["step"], {})[row["id"]] = row["margin"]
    steps = sorted(margins)
    ids = list(margins[steps[0]])
    return np.array(steps), np.array([[margins[step][id] for id in ids] for step in steps])


def draw(steps: np.ndarray, margins: np.ndarray, title: str, output: Path) -> None:
    """Write the plot to a PNG file. Raises SaroError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise SaroError("the plot needs matplotlib" + install_extra("report")) from error

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (margin_axes, accuracy_axes) = pyplot.subplots(
        2, 1, sharex=True, figsize=(7, 5), height_ratios=(3, 1), layout="constrained"
    )
    margin_axes.plot(steps, margins, color="tab:blue", alpha=0.15, linewidth=0.8)
    margin_axes.plot(
        steps, margins.mean(1), color="tab:blue", linewidth=2.5, label=f"mean of {margins.shape[1]} held-out pairs"
    )
    margin_axes.axhline(0, color="black", linewidth=0.6)
    margin_axes.set_ylabel("margin to the reference, nats")
    margin_axes.legend(loc="upper left")
    margin_axes.set_title(title)
    accuracy_axes.plot(steps, (margins > 0).mean(1), color="tab:orange", linewidth=2)
    accuracy_axes.set_ylim(0, 1)
    accuracy_axes.set_ylabel("margin > 0")
    accuracy_axes.set_xlabel("step")
    figure.savefig(output, dpi=110)


def main() -> int:
    """Plot the run that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of an SRPO run")
    parser.add_argument("--output", type=Path, default=Path("margins.png"), help="PNG file to write")
    parser.add_argument("--title", default="SRPO: margins of held-out pairs", help="title above the plot")
    options = parser.parse_args()
    file = options.run / "margins.jsonl"
    if not file.is_file():
        raise SaroError(f"{file}: there is no such file; give the folder of an SRPO run with held-out pairs")
    steps, margins = read_margins(file)
    draw(steps, margins, options.title, options.output)
    print(f"{options.output}: {len(steps)} evaluations of {margins.shape[1]} pairs")
    return 0


if __name__ == "__main__":
    run_program(main)
