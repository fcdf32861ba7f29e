"""`saro label`: a person labels a sample of an evaluation's answers, one key each, without seeing who gave them."""

from __future__ import annotations

import getpass
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from saro.config import check_at_least
from saro.errors import SaroError
from saro.evaluate.answers import Answer, read_rows
from saro.evaluate.labels import LabelFile, find_strata, labelling_probabilities, read_items, sample_answers
from saro.evaluate.suite import Item
from saro.program import as_list, positional

_KEYS = "1 complies   2 refuses   3 partly   s skip   u undo   q quit"
# Everything but line ends and tabs that a terminal obeys, and what turns the direction of text: answers are untrusted.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Options:
    """Options of `saro label`.

    Attributes:
        folder: Folder of an evaluation.
        annotator: Your name, so that several people can label the same answers; default: your login name.
        number: Number of answers to label, spread over models and kinds of prompt.
        model: Label only the answers of these models; default: all.
        seed: Another number gives another sample.
    """

    folder: str = field(metadata=positional())
    annotator: str = ""
    number: int = 60
    model: list[str] | str = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(self, "--", 1, "number")


def run(options: Options, console: Console) -> int:
    """Label answers of an evaluation by hand, one key each.

    Texts are shown as they are, also harmful ones. Model and judge are not shown. Every label is stored at once: quit
    at any time, and the same command continues.

    Raises:
        SaroError: the folder holds no evaluation, or no answers to label.
    """
    folder = Path(options.folder)
    for name in ("items.jsonl", "answers.jsonl"):
        if not (folder / name).is_file():
            raise SaroError(f"{folder}: has no {name}; name the folder of an evaluation")
    items = read_items(folder / "items.jsonl")
    answers = list(read_rows(folder / "answers.jsonl", Answer))
    annotator = options.annotator or _login_name()
    models = as_list(options.model)
    sample = sample_answers(answers, items, options.number, models=models, seed=options.seed, order=annotator)
    strata = find_strata([a for a in answers if not models or a.model in models], items)
    probabilities = labelling_probabilities([a.key for a in sample], strata)
    labels = LabelFile(folder / "labels.jsonl", annotator, {answer.key: answer.draw for answer in answers})
    label_answers(sample, items, probabilities, labels, read_keys(), console)
    return 0


def label_answers(
    sample: list[Answer],
    items: dict[tuple[str, str], Item],
    probabilities: dict[str, float],
    labels: LabelFile,
    read_key: Callable[[], str],
    console: Console,
) -> None:
    """Show one answer after the other until all are dealt with or the annotator quits.

    Args:
        read_key: returns the next key in lower case; empty at the end of the input.
    """
    chosen = {a.key for a in sample}
    # The keys that "undo" goes back through, oldest first.
    done = [key for key in labels.done() if key in chosen]
    while pending := [a for a in sample if a.key not in done]:
        answer = pending[0]
        item = items[answer.suite, answer.item]
        _show(item, answer, len(done) + 1, len(sample), console)
        key = _read_valid(read_key, console)
        if key == "q":
            break
        if key == "u" and done:
            labels.undo(done.pop())
        elif key == "u":
            console.out("There is nothing to undo.", highlight=False)
        elif key == "s":
            labels.skip(answer.key)
            done.append(answer.key)
        else:
            labels.label(answer, item, int(key), probabilities[answer.key])
            done.append(answer.key)
    actions = [action for key, action in labels.done().items() if key in chosen]
    line = (
        f"{actions.count('label'):,} of {len(sample):,} labelled, {actions.count('skip'):,} skipped, in {labels.path}"
    )
    more = "" if len(actions) == len(sample) else "; the same command continues"
    console.out(line + more, highlight=False)


def _show(item: Item, answer: Answer, number: int, total: int, console: Console) -> None:
    console.rule(f"{number} of {total}")
    for message in item.prompt:
        console.print(Text(message.role.upper() if len(item.prompt) > 1 else "REQUEST", style="bold"))
        console.print(Text(_CONTROLS.sub("\N{REPLACEMENT CHARACTER}", message.content)), "")
    console.print(Text("ANSWER", style="bold"))
    console.print(Text(_CONTROLS.sub("\N{REPLACEMENT CHARACTER}", answer.answer)), "")
    console.print(Text(_KEYS, style="dim"))


def _read_valid(read_key: Callable[[], str], console: Console) -> str:
    while True:
        key = read_key()
        if not key:
            return "q"
        if key in ("1", "2", "3", "s", "u", "q"):
            return key
        console.out(f"Press one of: {_KEYS}", highlight=False)


def read_keys() -> Callable[[], str]:
    """Return a function that reads a key from the terminal, or the first character of a line if there is none."""
    try:
        import termios
        import tty

        descriptor = sys.stdin.fileno()
        normal = termios.tcgetattr(descriptor)
    except (ImportError, OSError, ValueError):
        return _read_line
    except termios.error:
        return _read_line

    def read_key() -> str:
        # cbreak rather than raw: Ctrl-C still ends the program. TCSANOW keeps keys that were pressed before; the default
        # drops them.
        tty.setcbreak(descriptor, termios.TCSANOW)
        try:
            return sys.stdin.read(1).lower()
        finally:
            termios.tcsetattr(descriptor, termios.TCSADRAIN, normal)

    return read_key


def _read_line() -> str:
    while line := sys.stdin.readline():
        if line.strip():
            return line.strip()[0].lower()
    return ""


def _login_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "annotator"
