"""Reads answers that were made elsewhere, so that they are judged and reported like ours."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from saro.config import THINK_TAGS
from saro.data.jsonl import fault, parse_text, read_objects, shown
from saro.errors import SaroError, nearest
from saro.evaluate.answers import Answer
from saro.evaluate.attacks import NO_ATTACK, Attack, invert
from saro.evaluate.questions import answer_key
from saro.evaluate.split import split_text
from saro.evaluate.suite import Item

_FIELDS = frozenset({"suite", "item", "attack", "number", "text", "finish"})


def read_foreign_answers(
    files: Sequence[str],
    items: Mapping[tuple[str, str], Item],
    known: Collection[tuple[str, str]],
    attacks: Sequence[Attack],
    taken: Sequence[str],
) -> list[Answer]:
    """Return the answers of JSONL files, one model each, named by the file.

    A line is ``{"suite", "item", "text"}``, and may have ``attack`` (default "none"), ``number`` (of the draw, from 0)
    and ``finish`` ("stop", or "length" if the text was cut). Reasoning stands in the text, in <think> tags. A line on an
    item that is not evaluated, as with --limit, is left out.

    Args:
        items: the items that are evaluated, by (suite, id).
        known: (suite, id) of all items of the suites.
        taken: names that other models have.

    Raises:
        SaroError: a line is not of this form, two lines answer the same, or a file has no answer to any item.
    """
    answers = []
    names = set(taken)
    by_id = {attack.id: attack for attack in (NO_ATTACK, *attacks)}
    for file in files:
        model = Path(file).stem
        if model in names:
            raise SaroError(f"{file}: another model is called {model} already; rename the file, which names its model")
        names.add(model)
        of_file = _read_file(file, model, items, known, by_id)
        if not of_file:
            raise SaroError(f"{file}: has no answer to any item of the suites; check its suite and item fields")
        answers += of_file
    return answers


def _read_file(
    file: str,
    model: str,
    items: Mapping[tuple[str, str], Item],
    known: Collection[tuple[str, str]],
    attacks: Mapping[str, Attack],
) -> list[Answer]:
    first: dict[str, str] = {}
    answers = []
    suites = {suite for suite, _ in items}
    for _, where, line in read_objects(file):
        for name in line:
            if name not in _FIELDS:
                fault(where, f"unknown field {shown(name)}", nearest(name, _FIELDS))
        suite, item_id = (parse_text(line.get(name), name, where) for name in ("suite", "item"))
        if suite not in suites:
            fault(where, f"unknown suite {shown(suite)}", nearest(suite, suites))
        attack = attacks.get(str(line.get("attack", NO_ATTACK.id)))
        if attack is None:
            fault(where, f"unknown attack {shown(str(line['attack']))}", nearest(str(line["attack"]), attacks))
        if (suite, item_id) not in known:
            fault(where, f"suite {suite} has no item {shown(item_id)}", "give the id of an item")
        item = items.get((suite, item_id))
        if item is None:
            continue
        answer = _parse_answer(line, where, model, item, attack)
        if (other := first.setdefault(answer.key, where)) != where:
            fault(where, f"answers the same item under the same attack as {other}", "keep one, or number them")
        answers.append(answer)
    return answers


def _parse_answer(line: dict[str, object], where: str, model: str, item: Item, attack: Attack) -> Answer:
    text = parse_text(line.get("text"), "text", where, may_be_empty=True)
    finish = line.get("finish", "stop")
    if finish not in ("stop", "length"):
        fault(where, "finish is neither stop nor length", "write stop, or length if the text was cut")
    number = line.get("number", 0)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        fault(where, "number is not a whole number from 0", "fix it or leave it out")
    split = split_text(THINK_TAGS, False, text, finish)
    return Answer(
        key=answer_key(model, item, attack.id, number),
        model=model,
        suite=item.suite,
        attack=attack.id,
        item=item.id,
        number=number,
        # No draw of ours: the text itself is its key.
        draw=hashlib.sha256(text.encode()).hexdigest(),
        think=split.think,
        answer=invert(attack, split.answer),
        tokens=split.tokens,
        state=split.state,
    )
