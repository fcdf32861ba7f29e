"""The picture of the method: what the repository shows is what the script draws, and it can be read."""

from __future__ import annotations

import re
import sys
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree

import method_picture
import pytest
from run_files import ROOT

from saro.config import PAIR_KINDS
from saro.synth.synth_options import FORMS

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def picture() -> ElementTree.Element:
    return ElementTree.fromstring(method_picture.draw())


def test_the_file_in_the_repository_is_what_the_script_draws(tmp_path, monkeypatch, capsys):
    path = tmp_path / "method.svg"
    monkeypatch.setattr(sys, "argv", ["method_picture.py", "--output", str(path)])
    method_picture.main()
    assert path.read_bytes() == (ROOT / "benchmarks" / "results" / "method.svg").read_bytes()
    assert capsys.readouterr().out == f"{path}\n"


def test_the_same_picture_is_drawn_each_time_in_few_bytes():
    assert method_picture.draw() == method_picture.draw()
    assert len(method_picture.draw().encode()) < 12_000


def test_every_form_of_process_pairs_and_both_kinds_are_in_it(picture):
    words = {text.text for text in picture.iter(f"{SVG}text")}
    assert {*chain.from_iterable(FORMS.values()), *PAIR_KINDS} <= words


def test_it_needs_nothing_from_elsewhere_and_says_what_it_shows_to_those_who_do_not_see_it(picture):
    text = method_picture.draw()
    assert not re.search(r"<script|<image|@import|url\((?!#)|href", text)
    assert picture.get("role") == "img"
    named = picture.get("aria-labelledby").split()
    assert [element.text for element in picture.iter() if element.get("id") in named] == [
        "The method",
        method_picture.ALT,
    ]


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour (WCAG 2.2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_texts_and_marks_stand_out_in_both_themes(theme):
    """At least 4.5 for text and 3 for marks, as WCAG 2.2 asks."""
    styles = re.findall(r":root\{([^}]*)\}", method_picture.draw())
    colours = dict(entry.removeprefix("--").split(":") for entry in styles[theme].split(";"))
    for ground in (colours["card"], colours["ground"]):
        assert all(contrast(colours[name], ground) >= 4.5 for name in ("ink", "muted"))
        assert all(contrast(colours[name], ground) >= 3 for name in ("turn", "cue"))


def test_no_text_leaves_its_card_even_in_a_wide_font(picture):
    """DejaVu Sans is wider than the fonts of any common system."""
    matplotlib = pytest.importorskip("matplotlib")
    fonts = pytest.importorskip("PIL.ImageFont")
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    plain, bold = (fonts.truetype(str(folder / f"{name}.ttf"), 100) for name in ("DejaVuSans", "DejaVuSans-Bold"))
    cards = [
        {name: float(rect.get(name)) for name in ("x", "y", "width", "height")}
        for rect in picture.iter(f"{SVG}rect")
        if rect.get("class") in ("card", "model")
    ]
    widths = []
    for text in picture.iter(f"{SVG}text"):
        x, y = float(text.get("x")), float(text.get("y"))
        is_bold = "name" in (text.get("class") or "")
        size = 15 if "big" in (text.get("class") or "") else 13.5 if is_bold else 12.5
        words = "".join(text.itertext())
        width = (bold if is_bold else plain).getlength(words) * size / 100
        start = {None: x, "middle": x - width / 2, "end": x - width}[text.get("text-anchor")]
        inside = [c for c in cards if c["x"] <= x <= c["x"] + c["width"] and c["y"] <= y <= c["y"] + c["height"]]
        left, right = (inside[0]["x"], inside[0]["x"] + inside[0]["width"]) if inside else (0, method_picture.WIDTH)
        assert left + 4 <= start, words
        assert start + width <= right - 4, words
        widths.append(width)
    assert len(widths) > 30
