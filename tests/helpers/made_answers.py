"""Makes answers for the tests of judges and labels."""

from __future__ import annotations

from saro.evaluate.answers import Answer


def make_answer(text: str, **changes: object) -> Answer:
    """Return a finished answer of model "m" to item "i" of suite "s", without an attack and without reasoning."""
    fields: dict[str, object] = {
        "model": "m",
        "suite": "s",
        "attack": "none",
        "item": "i",
        "number": 0,
        "draw": "",
        "think": "",
        "answer": text,
        "tokens": {},
        "state": "finished",
    }
    fields |= changes
    names = [str(fields[name]) for name in ("model", "suite", "attack", "item", "number")]
    return Answer(**{"key": "/".join(names)} | fields)
