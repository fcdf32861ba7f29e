"""Draw the method in one picture: where chains and pairs come from, what is trained on them, and what is measured.

    python benchmarks/method_picture.py

It writes benchmarks/results/method.svg, of which the README shows what is in the repository. The picture is 760 pixels
wide, as wide as GitHub's column. Its text is text. Colours follow the reader's theme, and it has a ground of its own,
because a page may have another theme than the reader. Turns and cues differ in shape as well as in colour.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from saro.files import atomic_write

OUTPUT = Path(__file__).parent / "results" / "method.svg"
WIDTH, HEIGHT = 760, 590
ALT = (
    "Prompts and a policy make RW chains, which the base model writes with the policy in view. RW trains the base model on "
    "them. The RW model writes texts without the policy, of which outcome pairs and five forms of process pairs are made. "
    "SRPO trains the RW model on the pairs. All three models are evaluated on held-out prompts, and a report compares them."
)

# Name of a class -> its colour in the light and in the dark theme. Blue and orange are those of Okabe and Ito (2008),
# which people with any kind of colour vision can tell apart.
_COLOURS = {
    "ink": ("#1b1f24", "#e6e9ee"),
    "muted": ("#57606c", "#a4adb9"),
    "rule": ("#c9ced6", "#444c57"),
    "card": ("#ffffff", "#1c2128"),
    "ground": ("#f5f6f8", "#14181d"),
    "turn": ("#0072b2", "#58b3ea"),
    "cue": ("#d55e00", "#f0883e"),
}
_FONT = "system-ui,-apple-system,'Segoe UI','Helvetica Neue',Arial,sans-serif"
# Distance of two steps, and how far the two sides of a pair part, in pixels.
_STEP, _APART = 19, 8
# A row of the table of forms.
_ROW = 40


@dataclass(frozen=True)
class Form:
    """One form of pairs, with the letters of its steps: n neutral, t turn, c cue.

    Attributes:
        name: as in ``meta.synth.form``.
        kind: kind of the records.
        words: what the pair teaches, in one line.
        shared: steps that both sides begin with.
        chosen, rejected: the steps of each side behind them.
    """

    name: str
    kind: str
    words: str
    shared: str
    chosen: str
    rejected: str


FORMS = (
    Form("outcome", "op-cot", "a whole good text over a whole bad one", "", "nntn", "nncn"),
    Form("intervene", "pp-cot", "turns where the other side gives in", "nn", "tn", "c"),
    Form("earlier", "pp-cot", "turns sooner; both sides end well", "n", "tn", "nntn"),
    Form("recover", "pp-cot", "turns right behind a step that gave in", "nc", "tn", "n"),
    Form("sibling", "pp-cot", "parts at the step that decides the end", "nn", "nn", "nn"),
    Form("mirror", "pp-cot", "back to help from needless caution", "nc", "tn", "nn"),
)


def draw() -> str:
    """Return the picture as the content of an SVG file; always the same."""
    parts = [
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
        *_draw_data(),
        *_draw_pairs(),
        *_draw_models(),
        *_draw_evaluation(),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-labelledby="title alt">'
    )
    about = [
        '<title id="title">The method</title>',
        f'<desc id="alt">{escape(ALT)}</desc>',
        f"<style>{_write_style()}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="point" d="M0 .8 7.5 4 0 7.2Z"/></marker></defs>',
    ]
    return "\n".join([head, *about, *parts, "</svg>"]) + "\n"


def _write_style() -> str:
    """Return the style sheet: the light theme, and the dark one for readers who have asked for it."""
    light, dark = (";".join(f"--{name}:{colours[theme]}" for name, colours in _COLOURS.items()) for theme in (0, 1))
    rules = (
        f":root{{{light}}}",
        f"@media(prefers-color-scheme:dark){{:root{{{dark}}}}}",
        f"text{{font:12.5px {_FONT};fill:var(--muted)}}",
        "text.name,.name{font-weight:600;font-size:13.5px;fill:var(--ink)}",
        "text.big{font-size:15px}",
        ".mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:11.5px}",
        ".ground{fill:var(--ground)}",
        ".card{fill:var(--card);stroke:var(--rule)}",
        ".model{fill:var(--card);stroke:var(--ink);stroke-width:1.6}",
        ".arrow{fill:none;stroke:var(--muted);stroke-width:1.6;marker-end:url(#head)}",
        ".point{fill:var(--muted)}",
        ".line{fill:none;stroke:var(--rule)}",
        ".path{fill:none;stroke:var(--muted);stroke-width:1.5}",
        ".chosen{fill:none;stroke:var(--turn);stroke-width:1.8}",
        ".rejected{fill:none;stroke:var(--cue);stroke-width:1.8;stroke-dasharray:4 2.5}",
        ".n{fill:var(--card);stroke:var(--muted);stroke-width:1.4}",
        ".t{fill:var(--turn)}",
        ".c{fill:var(--cue)}",
    )
    return "".join(rules)


def _draw_data() -> Iterator[str]:
    """Yield prompts, policy and the chains for RW, in the column on the left."""
    yield _card(16, 16, 256, 52)
    yield _text(30, 38, "Prompts", "name")
    yield _text(30, 56, "harmful, harmless twins, general")
    yield _card(16, 78, 256, 52)
    yield _text(30, 100, "Policy", "name")
    yield _text(30, 118, "rules on hazards and on refusals")
    yield _arrow("M144 130V150")
    yield _arrow("M272 42H290")
    yield _arrow("M272 104H290")
    yield _card(16, 152, 256, 176)
    yield _text(30, 176, "RW chains", "name")
    yield _path("path", [(34, 200), (34 + 5 * 24, 200)])
    yield from _steps("nnntn", [(34 + 24 * i, 200) for i in range(5)])
    yield '<rect class="n" x="154" y="189" width="62" height="22" rx="4"/>'
    yield _text(185, 204, "answer", anchor="middle")
    for line, words in enumerate(
        (
            "written with the policy in view,",
            "kept without it: the shortest text",
            "that passes gates and judge;",
            "public chains fill what is missing",
        )
    ):
        yield _text(30, 242 + 20 * line, words)


def _draw_pairs() -> Iterator[str]:
    """Yield the forms of pairs, in the column on the right."""
    yield _card(292, 16, 452, 312)
    yield _titled(306, 38, "Pairs", "of texts that the RW model itself writes")
    for row, form in enumerate(FORMS):
        top = 68 + _ROW * row
        if row == 1:
            yield _path("line", [(306, top - 17), (730, top - 17)])
        yield from _draw_form(form, 310, top + 4)
        yield _text(424, top, form.name, "name")
        yield _text(730, top, form.kind, "mono", anchor="end")
        yield _text(424, top + 16, form.words)
    yield from _draw_legend(313)


def _draw_form(form: Form, x: int, y: int) -> Iterator[str]:
    """Yield a pair as two paths of steps, the chosen one above, that part behind the shared steps."""
    shared = [(x + _STEP * i, y) for i in range(len(form.shared))]
    # Sides without shared steps begin at the prompt, which is where the paths part.
    fork = shared[-1] if shared else (x, y)
    if len(shared) > 1:
        yield _path("path", shared)
    sides = (("chosen", form.chosen, -_APART), ("rejected", form.rejected, _APART))
    for name, letters, offset in sides:
        places = [(fork[0] + _STEP * (i + 1), y + offset) for i in range(len(letters))]
        # The path goes on behind the last step: an answer or another step follows.
        yield _path(name, [fork, *places, (places[-1][0] + 13, y + offset)])
        yield from _steps(letters, places)
    yield from _steps(form.shared, shared)


def _draw_legend(y: int) -> Iterator[str]:
    entries = ((311, "n", "step"), (374, "t", "turns"), (442, "c", "gives in"))
    for x, letter, words in entries:
        yield from _steps(letter, [(x, y - 4)])
        yield _text(x + 9, y, words)
    yield _path("chosen", [(534, y - 4), (558, y - 4)])
    yield _text(565, y, "chosen")
    yield _path("rejected", [(636, y - 4), (660, y - 4)])
    yield _text(667, y, "rejected")


def _draw_models() -> Iterator[str]:
    """Yield the three models, what trains one into the next, and what each writes."""
    names = ((16, "Base model"), (300, "RW model"), (584, "SRPO model"))
    for x, name in names:
        yield f'<rect class="model" x="{x}" y="396" width="160" height="50" rx="25"/>'
        yield _text(x + 80, 426, name, "name big", anchor="middle")
    trained = ((176, 298, "RW", "SFT on chains"), (460, 582, "SRPO", "DPO on pairs"))
    for start, end, stage, words in trained:
        middle = (start + end) // 2
        yield _arrow(f"M{start} 421H{end}")
        yield _text(middle, 439, stage, "name", anchor="middle")
        yield _text(middle, 456, words, anchor="middle")
    # From the data down to the training, and from each model up to the texts that it writes.
    yield _arrow("M237 328V418")
    yield _arrow("M521 328V418")
    yield _arrow("M96 396V330")
    yield _text(104, 367, "writes, guided")
    yield _arrow("M380 396V330")
    yield _text(388, 367, "writes, unguided")


def _draw_evaluation() -> Iterator[str]:
    """Yield the evaluation of all three models, and the report."""
    for x in (96, 380, 664):
        yield _path("path", [(x, 446), (x, 474)])
    yield _path("path", [(96, 474), (664, 474)])
    yield _arrow("M300 474V492")
    yield _card(16, 494, 552, 80)
    yield _titled(30, 517, "Evaluation", "on held-out prompts, plainly and under attack")
    yield _text(30, 539, "harmful compliance · needless refusals · d' and threshold · ability · tokens")
    yield _text(30, 559, "judges measured against people, intervals, paired comparisons")
    yield _arrow("M568 534H586")
    yield _card(588, 494, 156, 80)
    yield _text(602, 517, "Report", "name")
    yield _text(602, 539, "each number opens")
    yield _text(602, 559, "its answers")


def _card(x: int, y: int, width: int, height: int) -> str:
    return f'<rect class="card" x="{x}" y="{y}" width="{width}" height="{height}" rx="7"/>'


def _text(x: int, y: int, words: str, style: str = "", anchor: str = "") -> str:
    style = f' class="{style}"' if style else ""
    anchor = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x}" y="{y}"{style}{anchor}>{escape(words)}</text>'


def _titled(x: int, y: int, title: str, words: str) -> str:
    return f'<text x="{x}" y="{y}"><tspan class="name">{escape(title)}</tspan> {escape(words)}</text>'


def _arrow(path: str) -> str:
    return f'<path class="arrow" d="{path}"/>'


def _path(style: str, places: Sequence[tuple[int, int]]) -> str:
    return f'<path class="{style}" d="M{" ".join(f"{x} {y}" for x, y in places)}"/>'


def _steps(letters: str, places: Iterable[tuple[int, int]]) -> Iterator[str]:
    """Yield the steps at their places: a cue is a diamond, all others are circles."""
    for letter, (x, y) in zip(letters, places, strict=True):
        if letter == "c":
            yield f'<path class="c" d="M{x} {y - 6}l6 6-6 6-6-6Z"/>'
        else:
            yield f'<circle class="{letter}" cx="{x}" cy="{y}" r="{5 if letter == "t" else 4}"/>'


def main() -> None:
    """Write the picture."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="SVG file to write")
    options = parser.parse_args()
    with atomic_write(options.output) as file:
        file.write(draw())
    print(options.output)


if __name__ == "__main__":
    main()
