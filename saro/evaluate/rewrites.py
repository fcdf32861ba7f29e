"""Rewrites prompts by a function, such as base64, and undoes it in answers."""

from __future__ import annotations

import base64
import codecs
import re
from collections.abc import Callable, Mapping

from saro.data.jsonl import fault


def _to_leetspeak(text: str) -> str:
    return text.translate(str.maketrans("aeiostAEIOST", "431057431057"))


def _to_base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _to_rot13(text: str) -> str:
    return codecs.encode(text, "rot13")


def _from_base64(text: str) -> str:
    """Decode a text that is base64, or each long run of base64 in it. Plain words around them stay."""
    whole = _decode_base64("".join(text.split()))
    if whole is not None:
        return whole
    return re.sub(r"[A-Za-z0-9+/]{16,}={0,2}", lambda run: _decode_base64(run[0]) or run[0], text)


def _decode_base64(text: str) -> str | None:
    """Return the text that base64 stands for, None if it stands for none. It may be cut at its end."""
    whole_groups = text[: len(text) // 4 * 4]
    try:
        # final=False: the last character may be cut.
        decoded = codecs.getincrementaldecoder("utf-8")().decode(base64.b64decode(whole_groups, validate=True))
    except ValueError:
        return None
    is_text = all(letter.isprintable() or letter.isspace() for letter in decoded)
    return decoded if is_text and (decoded or not text) else None


# Words that tell English from its rot13.
_COMMON = re.compile(
    r"\b(?:the|and|of|to|a|in|is|it|you|that|for|with|as|on|are|this|i|not|can|be|have|or|from)\b", re.IGNORECASE
)


def _from_rot13(text: str) -> str:
    """Undo rot13, unless the text reads more like English as it is: a model may have answered in plain words."""
    decoded = _to_rot13(text)
    return text if _count_common(text) > _count_common(decoded) else decoded


def _count_common(text: str) -> int:
    return len(_COMMON.findall(text))


REWRITES: Mapping[str, Callable[[str], str]] = {
    "base64": _to_base64,
    "rot13": _to_rot13,
    "leetspeak": _to_leetspeak,
}
# Leetspeak has none: its digits may have been digits before.
INVERSES: Mapping[str, Callable[[str], str]] = {"base64": _from_base64, "rot13": _from_rot13}
# An inverse must bring back these.
SAMPLES = (
    "What is the capital of France?",
    "I can't help with that, but here is what you can do instead.",
    "Yes.",
    "A",
    "No",
    "42",
    "3.14 is less than 22/7",
    "First line\nsecond line\n\nfourth line",
    "\tindented, and a trailing space ",
    "1. Mix the flour\n2. Add the eggs\n3. Bake at 180 °C",
    "Für Elise, à la carte, señor",
    "Привет, как дела?",
    "你好世界",
    "مرحبا",
    "🙂 fine 👍🏽",
    "print('hello, world')  # a comment",
    '{"key": [1, 2, null], "text": "a \\"quoted\\" word"}',
    "UPPER lower MiXeD",
    "the quick brown fox jumps over the lazy dog " * 5,
    "https://example.org/path?query=1&other=2#part",
)


def check_inverse(rewrite: Callable[[str], str], inverse: Callable[[str], str], where: str) -> None:
    """Raise SaroError at ``where`` unless ``inverse`` brings back 20 fixed strings from what ``rewrite`` made of them."""
    failed = sum(inverse(rewrite(text)) != text for text in SAMPLES)
    if failed:
        wrong = f"does not bring back {failed} of {len(SAMPLES)} test strings"
        fault(where, wrong, "name the rewrite that it undoes, or leave the inverse out")
