"""Finds out if an answer is right, by its text alone: the reasoning before it never counts.

lm-evaluation-harness scores GSM8K in two ways. ``strict-match`` takes the first number after "####" and counts an answer
without it as wrong. ``flexible-extract`` takes the last number, whatever was announced. Both compare characters after
removing commas, dollar signs and a final point, so "18.00" is not 18. Here the announced number is taken, else the last
one, and values are compared: "18.00", "$18" and "36/2" are all 18. Where an answer ends in its plain result, all three
agree.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from saro.errors import SaroError
from saro.evaluate.answers import Answer
from saro.evaluate.suite import Item

# Longer digit strings are no results, and Python refuses to read those of thousands of digits.
_MOST_CHARACTERS = 100
_LETTERS = "ABCDEFGHIJ"

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
# A minus is a sign only right before its digits and after no word, digit or bracket: "5-3" and "5 - 3" have the numbers 5
# and 3, and "- 3" begins a list. Digits that end a word, as in "m2", are no number. A fraction may follow a whole number:
# "1 1/2".
_NUMBER = re.compile(
    rf"(?<![A-Za-z\d])(?P<sign>(?<![.)\]])-)?(?P<currency>[$€£¥]\s?-?)?(?<![A-Za-z\d])"
    rf"(?P<first>{_DIGITS})(?P<exponent>[eE][+-]?\d{{1,2}}\b)?"
    rf"(?:(?P<second>\s\d+)?\s?/\s?(?P<below>\d+(?:\.\d+)?)(?![\d/]))?"
)
# An answer says here that it now answers: "#### 18", "The answer is 18", "Final answer (in dollars): 18".
_ANNOUNCED = re.compile(r"####|\banswer\b[^.\n:=]{0,60}?(?:\bis\b\s*:?|[:=])", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
# "The answer is 2 dogs / 4 dogs = 0.5": only what follows the last equals sign is the result. A calculation ends with its
# clause: in "The answer is 5, because 10 = 2 * 5" and "The answer is 5 (x = 3)" nothing is calculated.
_CLAUSE_END = r"\b(?:because|since|as|so|if|for|where|when|with|and)\b|(?<=\d)\s?\(|,\D|\.\s|[;\n=]"
_CALCULATION = re.compile(rf"(?:(?:(?!{_CLAUSE_END}).)*=)+", re.IGNORECASE)
_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([$%#])"), r"\1"),
    (re.compile(r"\\[,;! ]"), ""),
    (re.compile(r"\\[()\[\]]"), " "),
)
# Half and quarters as one character, with the space that they need after a whole number; other minus signs; bold; code.
_PLAIN = str.maketrans({"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "−": "-", "–": "-", "’": "'", "`": ""})  # noqa: RUF001
_THOUSANDS = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")

_OPTION = re.compile(r"^\s*[(\[]?([A-J])[)\].:]\s*(.+?)\s*$", re.MULTILINE)
_LETTER = r"[\s\"'(\[]*(?:(?:option|choice|letter)\s+)?[(\[]?(?:([A-J])(?![A-Za-z0-9'])|([a-j])(?=[)\].,]|\s*$))"
_AT_START = re.compile(r"[(\[]?([A-J])(?:[)\].:]|\s*$|\s*\n)")
_IN_TEXT = re.compile(r"[(\[]([A-J])[)\]]|\b(?:[Oo]ption|[Cc]hoice)\s+([A-J])\b")


def is_right(item: Item, answer: Answer) -> bool:
    """Return True if an answer gives the item's target, by the item's ``match``.

    - number: the number in the last \\boxed{}, else after the last "####" or "the answer is", else the last one of the
      text. Values are compared exactly; thousands separators, currency, units and percent signs do not matter.
    - choice: a letter from A to J, announced as above, at the start, in brackets, or as the text of one of the options
      that the prompt lists.
    - exact: the announced text, the last line or the whole answer, without regard to case, spaces, markup and the
      punctuation around it.

    Raises SaroError if the target is none of its kind.
    """
    if item.target is None:
        raise SaroError(f"{item.suite}: {item.id} has no target; give one, or another expect than answer")
    if item.match == "number":
        wanted = find_number(item.target)
        if wanted is None:
            raise SaroError(f"{item.suite}: {item.id}: the target is no number; correct it, or use match exact")
        return find_number(answer.answer) == wanted
    if item.match == "choice":
        letter = item.target.strip(" ().").upper()
        if len(letter) != 1 or letter not in _LETTERS:
            raise SaroError(f"{item.suite}: {item.id}: the target is no letter from A to J; correct it")
        return find_choice(answer.answer, item.prompt[-1].content) == letter
    wanted_text = normalise(item.target)
    return wanted_text in {normalise(text) for text in _candidates(_plain(answer.answer))}


def find_number(text: str) -> Fraction | None:
    """Return the number that a text gives as its result, None if it has none."""
    text = _plain(text)
    boxed = _BOXED.findall(text)
    if boxed and (numbers := _numbers(boxed[-1])):
        return numbers[-1]
    announced = _announced(text)
    if announced is not None:
        calculation = _CALCULATION.match(announced)
        rest = announced[calculation.end() :] if calculation else announced
        if numbers := _numbers(rest):
            return numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def find_choice(text: str, prompt: str = "") -> str | None:
    """Return the letter that a text chooses, None if it chooses none.

    Args:
        prompt: lists the options, one a line, such as "(B) red" or "B. red".
    """
    text = _plain(text)
    parts = [*_BOXED.findall(text)[-1:], *([] if (rest := _announced(text)) is None else [rest])]
    for part in parts:
        if found := re.match(_LETTER, part):
            return (found[1] or found[2]).upper()
    if found := _AT_START.match(text.strip()):
        return found[1]
    if in_text := _IN_TEXT.findall(text):
        return "".join(in_text[-1])
    lines = text.strip().splitlines()
    if lines and (found := re.fullmatch(r"\W*([A-Ja-j])\W*", lines[-1])):
        return found[1].upper()
    candidates = {normalise(part) for part in _candidates(text)}
    chosen = {letter for letter, option in _OPTION.findall(_plain(prompt)) if normalise(option) in candidates}
    return chosen.pop() if len(chosen) == 1 else None


def normalise(text: str) -> str:
    """Return a text in small letters, with single spaces, without markup and the punctuation around it."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("*", "").replace("_", " ")
    return " ".join(text.split()).strip(" .,;:!?\"'()[]{}$")


def _plain(text: str) -> str:
    """Return a text without bold marks and the LaTeX that stands around results."""
    text = _THOUSANDS.sub("", text.translate(_PLAIN).replace("**", ""))
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def _announced(text: str) -> str | None:
    """Return what follows the last announcement of the answer, None without any."""
    ends = [found.end() for found in _ANNOUNCED.finditer(text)]
    return text[ends[-1] :] if ends else None


def _candidates(text: str) -> list[str]:
    """Return the parts of a text that may be its answer."""
    lines = [line for line in text.splitlines() if line.strip()]
    announced = _announced(text)
    first_lines = announced.strip().splitlines()[:1] if announced else []
    return [text, *lines[-1:], *first_lines, *_BOXED.findall(text)[-1:]]


def _numbers(text: str) -> list[Fraction]:
    return [value for found in _NUMBER.finditer(text) if (value := _value(found)) is not None]


def _value(found: re.Match[str]) -> Fraction | None:
    if len(found[0]) > _MOST_CHARACTERS:
        return None
    value = Fraction(found["first"].replace(",", "") + (found["exponent"] or ""))
    below = Fraction(found["below"]) if found["below"] else Fraction(1)
    if below == 0:
        return None
    value = value + Fraction(found["second"].strip()) / below if found["second"] else value / below
    is_negative = bool(found["sign"]) or "-" in (found["currency"] or "")
    return -value if is_negative else value
