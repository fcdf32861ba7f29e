"""Splits a chain of reasoning into steps: lines, and the sentences of a line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# A line that opens or closes a block of code. A block is one step.
_FENCE = re.compile(r"[ \t]*(```|~~~)")
# Text of a line in which nothing ends a sentence.
_INLINE_CODE = re.compile(r"`[^`\n]+`")
# Marks that end a sentence, with the quotes, brackets and emphasis that close behind them, and white space. The
# full-width marks need no white space behind them.
_SENTENCE_END = re.compile(r"""[.!?…]+["'”’)\]*_]*(?=\s)|[。！？]+[”’」』）]*""")  # noqa: RUF001
# The number or letter of an item at the beginning of a line or sentence, such as "1.", "(b).", "- 2." or "**3.".
_ITEM = re.compile(r"\s*(?:[-*•>#]+\s*)?[*_(]*(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,4})\)?$")
_OPENING = "([{\"'“‘*_"  # noqa: RUF001
# Words before a full stop that does not end a sentence. "etc." and "No." are not among them: they end one as often.
_ABBREVIATION = re.compile(
    r"(?:e\.g|i\.e|u\.[ksn]|a\.m|p\.m|eg|ie|cf|vs|viz|ca|approx|incl|esp|resp|figs?|eqs?|secs?|ch|vol|pp|art"
    r"|mr|mrs|ms|dr|prof|sr|jr|st|rev|hon|gen|col|sgt|capt|lt)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ChainStep:
    """One step of a chain.

    Attributes:
        text: its text, without the white space around it.
        start, stop: the characters of the chain that it covers, ``chain[start:stop]``. White space after a step belongs
            to it, and white space before the first step to the first.
    """

    text: str
    start: int
    stop: int


def split_steps(think: str) -> tuple[ChainStep, ...]:
    """Return the steps of a chain, which cover it without gaps; none if it has no text.

    A step is a line, or a sentence of a line. A block of code between fences is one step. Abbreviations, initials,
    decimals, numbers of items ("1. First") and code do not end a sentence, nor does a full stop before a small letter.

    A chain that is cut at the end of a step has the same steps up to there.
    """
    ends = [end for end in _find_ends(think) if think[:end].strip()]
    steps: list[ChainStep] = []
    start = 0
    for end in ends:
        if text := think[start:end].strip():
            steps.append(ChainStep(text, start, end))
            start = end
        elif steps:
            steps[-1] = ChainStep(steps[-1].text, steps[-1].start, end)
            start = end
    return tuple(steps)


def _find_ends(think: str) -> Iterator[int]:
    """Yield the places where steps end, behind the white space that follows them, in order; the last is the text's end."""
    fence: str | None = None
    position = 0
    for line in think.splitlines(keepends=True):
        end = position + len(line)
        mark = _FENCE.match(line)
        if fence is not None:
            if mark and mark[1] == fence:
                fence = None
                yield end
        elif mark:
            fence = mark[1]
        else:
            yield from (position + place for place in _find_sentence_ends(line))
            yield end
        position = end
    if fence is not None:
        yield len(think)


def _find_sentence_ends(line: str) -> Iterator[int]:
    """Yield the places in a line where a sentence begins after another one."""
    code = [found.span() for found in _INLINE_CODE.finditer(line)]
    start = 0
    for found in _SENTENCE_END.finditer(line):
        is_in_code = any(begin < found.end() < end for begin, end in code)
        if is_in_code or _is_abbreviation(line[start : found.start()], found[0]):
            continue
        rest = line[found.end() :].lstrip()
        if rest and not rest[0].islower():
            start = len(line) - len(rest)
            yield start


def _is_abbreviation(before: str, mark: str) -> bool:
    """Return True if a mark is a full stop that belongs to the word before it, the last one of ``before``."""
    if mark != "." or not before.strip():
        return False
    word = before.rsplit(maxsplit=1)[-1].lstrip(_OPENING)
    is_initial = len(word) == 1 and word.isupper() and word != "I"
    return is_initial or _ABBREVIATION.fullmatch(word) is not None or _ITEM.fullmatch(before) is not None
