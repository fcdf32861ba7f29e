"""Turns matplotlib's figures into SVG: files that stand alone, and elements for a page with its own colours and fonts."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from markupsafe import Markup

from saro.errors import SaroError, install_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"

# Name of a colour in the page's style sheet -> its value in a file, which is that of the light theme. The colours of the
# models are those of Okabe and Ito (2008), which people with any kind of colour vision can tell apart.
COLOURS = {
    "ink": "#1b1f24",
    "muted": "#667080",
    "rule": "#d5d9df",
    "faint": "#e9ecf0",
    "paper": "#fefefe",
    "model-0": "#5c6672",
    "model-1": "#0072b2",
    "model-2": "#d55e00",
    "model-3": "#009e73",
    "model-4": "#b0559a",
}
# Models differ in shape as well as in colour.
MARKERS = ("o", "s", "^", "D", "v")
WIDTH = 8.6  # inches, of a figure with several panels; the page scales a figure to its column
_STYLE = {
    "svg.fonttype": "none",
    # A dollar sign in a name is no formula.
    "text.parse_math": False,
    "font.size": 9.5,
    "font.sans-serif": ["DejaVu Sans"],
    "axes.edgecolor": COLOURS["rule"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": COLOURS["faint"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["rule"],
    "ytick.color": COLOURS["rule"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "text.color": COLOURS["ink"],
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class Figure:
    """One figure of the report.

    Attributes:
        name: name of its file, without the suffix.
        title: what it shows, in one line.
        alt: what can be read from it, for people who do not see it.
        file: content of the SVG file.
        element: the same as an element of the page, whose colours follow its theme.
    """

    name: str
    title: str
    alt: str
    file: str
    element: Markup


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in the report's style, without a display.

    Raises:
        SaroError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise SaroError("the report needs matplotlib" + install_extra("report")) from error
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE, "backend": "svg"}):
        yield


def model_colour(index: int) -> str:
    """Return the colour of the model with this place in the order."""
    return COLOURS[f"model-{index % len(MARKERS)}"]


def model_marker(index: int) -> str:
    """Return the shape of the points of the model with this place in the order."""
    return MARKERS[index % len(MARKERS)]


def make_figure(name: str, title: str, alt: str, drawn: MatplotlibFigure) -> Figure:
    """Write a figure of matplotlib as SVG; the same figure gives the same bytes."""
    import matplotlib
    from matplotlib import pyplot

    buffer = io.StringIO()
    # The salt decides the ids of markers and clip paths: several figures share one page.
    with matplotlib.rc_context({"svg.hashsalt": f"saro {name}"}):
        drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(drawn)
    text = buffer.getvalue()
    return Figure(name, title, alt, _without_links(text), _make_element(text, name, title, alt))


def _parse(text: str) -> ElementTree.Element:
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.fromstring(text)


def _without_links(text: str) -> str:
    """Return a figure as a file: its links lead to answers that only the page has."""
    root = _parse(text)
    for element in root.iter(f"{{{_SVG}}}a"):
        element.tag = f"{{{_SVG}}}g"
        element.attrib.pop(f"{{{_XLINK}}}href", None)
        element.attrib.pop("target", None)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _make_element(text: str, name: str, title: str, alt: str) -> Markup:
    """Return a figure as an element of the page.

    The page's Content-Security-Policy allows no style attributes, so they become attributes of SVG. The colours become
    variables of the page's style sheet, and ids are made unique in the page.
    """
    root = _parse(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    has_links = root.find(f".//{{{_SVG}}}a") is not None
    for element in root.iter():
        _style_to_attributes(element)
        for attribute, value in list(element.attrib.items()):
            if attribute == "id":
                element.set("id", f"{name}-{value}")
            elif attribute == f"{{{_XLINK}}}href":
                del element.attrib[attribute]
                is_local = element.tag != f"{{{_SVG}}}a"
                element.set("href", f"#{name}-{value[1:]}" if is_local else value)
            elif value.startswith("url(#"):
                element.set(attribute, value.replace("url(#", f"url(#{name}-"))
        if element.tag == f"{{{_SVG}}}a":
            element.attrib.pop("target", None)
    width, height = (root.attrib.pop(side) for side in ("width", "height"))
    root.set("class", "figure")
    root.set("role", "group" if has_links else "img")
    root.set("aria-label", f"{title}. {alt}")
    root.set("data-size", f"{width} {height}")
    markup = ElementTree.tostring(root, encoding="unicode")
    for variable, value in COLOURS.items():
        markup = re.sub(f'"{value}"', f'"var(--{variable})"', markup, flags=re.IGNORECASE)
    return Markup(markup)


def _style_to_attributes(element: ElementTree.Element) -> None:
    for declaration in element.attrib.pop("style", "").split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font":
            # Only the size and the weight: the family is that of the page.
            element.set("font-size", re.search(r"[\d.]+px", value)[0])
            if "bold" in value or "700" in value:
                element.set("font-weight", "600")
        elif key and key not in ("stroke-linejoin", "stroke-linecap"):
            element.set(key, value)


def format_percent(ax: Axes, which: str) -> None:
    """Write the numbers of an axis, "x", "y" or "both", as percentages."""
    from matplotlib.ticker import PercentFormatter

    if which in ("x", "both"):
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    if which in ("y", "both"):
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
