"""Defines the one exception that users are meant to see."""

from collections.abc import Iterable
from difflib import get_close_matches


class SaroError(Exception):
    """A fault in the input or the set-up that the user can fix.

    The message is one line that says where and what to do, for example
    ``pairs.jsonl:17: chosen equals rejected; drop this pair``. The command line prints only this line and exits with
    code 2.
    """


def install_extra(extra: str) -> str:
    """Return the end of a message about a missing package: how the READMEs install the extra that has it."""
    return f"; run in saro's folder: pip install -c constraints.txt -e '.[{extra}]'"


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the nearest valid name, or some of them if none is near."""
    names = [str(v) for v in valid]
    close = get_close_matches(str(name), names, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; valid are {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
