"""Defines the prompts that data is made from, reads them, and finds those that an evaluation needs."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from saro.config import DEMO
from saro.data.jsonl import fault, how_to_add, parse_text, read_objects, shown, type_name
from saro.demo import suite_files
from saro.errors import SaroError, nearest
from saro.evaluate.contamination import Contamination, find_contamination
from saro.evaluate.outcomes import find_units
from saro.evaluate.questions import choose_items
from saro.evaluate.suite import Item, check_name, parse_item, read_suite
from saro.synth.funnel import Funnel

# harmful: to be refused, or answered without what would do harm. harmless: a prompt that only sounds harmful, such as
# the twin of a harmful one. general: all others.
PROMPT_KINDS = ("harmful", "harmless", "general")
# How much harm a careless answer could do. It decides how long a chain may be (``saro.synth.bands``).
LEVELS = ("none", "low", "medium", "high")

# Codes and names of the hazards of AILuminate 1.0 (MLCommons), the values of column ``hazard`` of its prompt sets. There,
# spc and sxc have an ending that names the kind of advice or content (spc_fin, sxc_prn).
HAZARDS: Mapping[str, str] = {
    "vcr": "violent crimes",
    "ncr": "non-violent crimes",
    "src": "sex-related crimes",
    "cse": "child sexual exploitation",
    "iwp": "indiscriminate weapons",
    "ssh": "suicide and self-harm",
    "hte": "hate",
    "dfm": "defamation",
    "prv": "privacy",
    "ipv": "intellectual property",
    "sxc": "sexual content",
    "spc": "specialised advice",
}

_FIELDS = ("id", "prompt", "kind", "expect", "target", "match", "level", "hazard", "twin", "source", "licence")
# Fields that a suite's item has too.
_ITEM_FIELDS = ("id", "prompt", "target", "match", "twin", "source", "licence")
# What a good answer to a prompt of each kind may do. The first is the default; "answer" is, if there is a target.
_EXPECT = {"harmful": ("refuse",), "harmless": ("comply",), "general": ("comply", "answer")}
# What a model may say of a prompt if its file does not.
_OPEN_FIELDS = {"harmful": ("hazard", "level"), "harmless": ("level",), "general": ()}
_LEVEL = {"harmful": "high", "harmless": "low", "general": "none"}
# A line of a file of prompts, for error messages.
_FORM = '{"prompt": ..., "kind": ..., "source": ..., "licence": ...}'
# Overlaps that an error message names; it counts the others.
_MOST_OVERLAPS = 5


@dataclass(frozen=True)
class Prompt:
    """One prompt that data is made from.

    Attributes:
        item: the conversation and what a good answer does; judges read it like a suite's item. ``item.suite`` is the
            stem of the file, and ``item.id`` is unique over all files.
        kind: one of ``PROMPT_KINDS``.
        level: one of ``LEVELS``.
        hazard: codes of ``HAZARDS``, such as "vcr"; empty for prompts that are not harmful.
        where: "file.jsonl:17" for error messages.
        twin_hazard: the hazard of the harmful prompt of which this harmless one is the twin; empty for other prompts.
        defaults: which of "hazard" and "level" the file does not give, so that a model may (``saro.synth.hazard_judge``).
            The level of a general prompt and the hazard of a harmless one need not be given.
    """

    item: Item
    kind: Literal["harmful", "harmless", "general"]
    level: Literal["none", "low", "medium", "high"]
    hazard: tuple[str, ...]
    where: str
    defaults: tuple[str, ...] = ()
    twin_hazard: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The prompt's id."""
        return self.item.id

    @property
    def record_kind(self) -> str:
        """The kind of the training records that are made from it, one of ``saro.config.KINDS``."""
        return "general" if self.kind == "general" else "safety"


def read_prompts(files: Sequence[str | os.PathLike], limit: int | None = None, seed: int = 0) -> list[Prompt]:
    """Read the prompts of JSONL files, one object a line, in order.

    Fields: ``prompt``, a string or messages; ``kind``, one of ``PROMPT_KINDS``; ``source`` and ``licence``. Those that may
    be left out:

    - ``id``: default the file's stem and the line, as in training records.
    - ``target`` and ``match``: the right answer of a general prompt, as in a suite.
    - ``expect``: refuse for harmful prompts, comply for harmless ones; answer for general ones with a target, else comply.
    - ``level``: one of ``LEVELS``; default high, low and none for harmful, harmless and general prompts.
    - ``hazard``: a list of codes of ``HAZARDS``, of harmful prompts only.
    - ``twin``: id of the harmful or harmless prompt of the same file of which this is the contrast. Each names the other.

    Args:
        limit: choose at most this many prompts of each file, by ``seed``; twins stay together.

    Raises:
        SaroError: "file:line: what is wrong; what to do" for the first faulty line. Ids are unique over all files.
    """
    places: dict[str, str] = {}
    prompts: list[Prompt] = []
    for path in files:
        in_file = _read_file(path, places)
        chosen = choose_items([prompt.item for prompt in in_file.values()], limit, seed)
        prompts += [in_file[item.id] for item in chosen]
    return prompts


def _read_file(path: str | os.PathLike, places: dict[str, str]) -> dict[str, Prompt]:
    """Return the prompts of one file by their ids. ``places``: id -> its place in this file or another one."""
    name = Path(os.fsdecode(path)).stem
    check_name(name, "the name of the file", os.fsdecode(path))
    prompts: dict[str, Prompt] = {}
    for line, where, fields in read_objects(path, _FORM):
        prompt = parse_prompt_fields({"id": f"{name}:{line}"} | fields, name, where)
        if (other := places.setdefault(prompt.id, where)) != where:
            fault(
                where,
                f"id {shown(prompt.id)} is already used by {other}",
                "give each prompt its own id, over all files",
            )
        prompts[prompt.id] = prompt
    for prompt in prompts.values():
        _check_twin(prompt, prompts)
    return {prompt.id: prompt for prompt in give_twin_hazards(prompts.values())}


def give_twin_hazards(prompts: Collection[Prompt]) -> list[Prompt]:
    """Return the prompts, in order; each harmless one with the hazard of its harmful twin, if that is among them."""
    hazards = {prompt.id: prompt.hazard for prompt in prompts}
    return [
        replace(prompt, twin_hazard=hazards[prompt.item.twin])
        if prompt.kind == "harmless" and hazards.get(prompt.item.twin)
        else prompt
        for prompt in prompts
    ]


def parse_prompt_fields(fields: Mapping[str, Any], name: str, where: str) -> Prompt:
    """Parse a JSON object as a prompt. Its twin is not looked up. Raises SaroError at ``where`` if it is faulty.

    Args:
        name: name of the file without the suffix.
    """
    if "prompt" not in fields:
        fault(where, 'field "prompt" is missing', how_to_add(fields, "prompt"))
    for field in fields:
        if field not in _FIELDS:
            fault(where, f"unknown field {shown(field)}", nearest(field, _FIELDS))
    for field in ("id", "kind", "source", "licence"):
        if field not in fields:
            fault(where, f"field {shown(field)} is missing", "add it")
    for field in ("source", "licence"):
        parse_text(fields[field], field, where, "say where the prompt comes from, and under which licence")
    kind = _parse_choice(fields["kind"], PROMPT_KINDS, "kind", where)
    level = _parse_choice(fields.get("level", _LEVEL[kind]), LEVELS, "level", where)
    if kind == "general" and fields.get("twin") is not None:
        fault(where, "twin is given and kind is general", "twins are a harmful and a harmless prompt; remove it")
    of_item = {field: fields[field] for field in _ITEM_FIELDS if field in fields}
    item = parse_item(of_item | {"expect": _parse_expect(fields, kind, where)}, name, where)
    hazard = _parse_hazard(fields.get("hazard", []), kind, where)
    defaults = tuple(field for field in _OPEN_FIELDS[kind] if field not in fields)
    return Prompt(item, kind, level, hazard, where, defaults)


def _parse_choice(value: Any, valid: tuple[str, ...], name: str, where: str) -> Any:
    if not isinstance(value, str) or value not in valid:
        wrong = f"{name} is {shown(value) if isinstance(value, str) else type_name(value)}"
        fault(where, wrong, nearest(str(value), valid))
    return value


def _parse_expect(fields: Mapping[str, Any], kind: str, where: str) -> str:
    default = "answer" if kind == "general" and "target" in fields else _EXPECT[kind][0]
    expect = fields.get("expect", default)
    if expect not in _EXPECT[kind]:
        wrong = f"kind is {kind} and expect is {shown(expect) if isinstance(expect, str) else type_name(expect)}"
        fault(where, wrong, f"for this kind it is {' or '.join(_EXPECT[kind])}; correct one of them")
    return expect


def check_hazards(value: Any, where: str, fix: str) -> None:
    """Raise SaroError at ``where`` unless a value is a list of codes of ``HAZARDS``.

    Args:
        fix: what to do if it is no list, for the error message.
    """
    if not isinstance(value, list):
        fault(where, f"hazard is {type_name(value)}", fix)
    for code in value:
        if not isinstance(code, str) or code not in HAZARDS:
            wrong = f"hazard has {shown(code) if isinstance(code, str) else type_name(code)}, which is no code"
            fault(where, wrong, nearest(str(code), HAZARDS))


def _parse_hazard(value: Any, kind: str, where: str) -> tuple[str, ...]:
    check_hazards(value, where, "give a list of codes")
    if value and kind != "harmful":
        fault(where, f"hazard is given and kind is {kind}", "only harmful prompts have one; remove it")
    return tuple(dict.fromkeys(value))


def _check_twin(prompt: Prompt, prompts: Mapping[str, Prompt]) -> None:
    if prompt.item.twin is None:
        return
    twin = prompts.get(prompt.item.twin)
    if twin is None:
        wrong = f"the file has no prompt {shown(prompt.item.twin)}, which is named as twin"
        fault(prompt.where, wrong, nearest(prompt.item.twin, prompts))
    if twin.kind == prompt.kind:
        wrong = f"the twin {shown(twin.id)} is of kind {twin.kind} too"
        fault(prompt.where, wrong, "one of two twins is harmful and the other harmless")
    if twin.item.twin != prompt.id:
        wrong = f"the twin {shown(twin.id)} does not name {shown(prompt.id)} as its twin"
        fault(prompt.where, wrong, "name each in the other")


def drop_duplicates(prompts: Sequence[Prompt], funnel: Funnel) -> list[Prompt]:
    """Return the prompts, in order, each conversation once; the funnel learns which were left out.

    Conversations are the same if they have the same turns up to case, white space and the punctuation of sentences. Of
    each, the prompt with the first id in the alphabet stays. If they do not want the same of an answer, none stays,
    because nobody can say which is right. A prompt whose twin is left out is the twin of the one that stays, if that is in
    its file, so that they are held out together; else it has none.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(_normalise(prompt), []).append(prompt)
    reasons: dict[str, str] = {}
    # Id of a prompt that is left out -> the one that stays.
    same: dict[str, Prompt] = {}
    for group in groups.values():
        first = min(group, key=lambda prompt: prompt.id)
        if len({_wanted(prompt) for prompt in group}) > 1:
            reasons |= {prompt.id: "contradictory duplicate" for prompt in group}
            continue
        for prompt in group:
            if prompt is not first:
                is_exact = prompt.item.prompt == first.item.prompt
                reasons[prompt.id] = "duplicate" if is_exact else "normalised duplicate"
                same[prompt.id] = first
    kept = []
    for prompt in prompts:
        if prompt.id in reasons:
            funnel.leave_out(prompt.id, "prompts", reasons[prompt.id])
        else:
            kept.append(_with_twin(prompt, same.get(prompt.item.twin)) if prompt.item.twin in reasons else prompt)
    funnel.count("prompts", "read", len(prompts))
    funnel.count("prompts", "kept", len(kept))
    return kept


# Brackets and the signs of arithmetic stay: without them, "3 + 4" would be "3 - 4".
_WORD_OR_SIGN = re.compile(r"[^\W_]+|[^\w\s.,;:!?…\"'`´‘’“”„«»]")  # noqa: RUF001


def _normalise(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    """Return (role, words) of each turn. A turn without words is its text."""
    turns = []
    for turn in prompt.item.prompt:
        text = unicodedata.normalize("NFKC", turn.content).casefold()
        turns.append((turn.role, " ".join(_WORD_OR_SIGN.findall(text)) or turn.content))
    return tuple(turns)


def _wanted(prompt: Prompt) -> tuple[str, str, str | None]:
    return prompt.kind, prompt.item.expect, prompt.item.target


def _with_twin(prompt: Prompt, twin: Prompt | None) -> Prompt:
    """Return a prompt with another twin; with none if that is not in its file, since twins are named by ids of one file."""
    is_near = twin is not None and twin.item.suite == prompt.item.suite
    return replace(prompt, item=replace(prompt.item, twin=twin.id if is_near else None))


def excluded_files(suites: Sequence[str]) -> list[str]:
    """Return the files of the suites whose prompts may not be used, the demo's always among them."""
    return list(dict.fromkeys(suite_files([DEMO, *suites])))


def check_exclusion(prompts: Sequence[Prompt], suites: Sequence[str] = ()) -> None:
    """Raise SaroError if prompts are in suites, whose scores would say nothing about a model that was trained on them.

    Prompts are compared by ``find_contamination``: the same words, or 13 words in a row of a turn or of all turns.

    Args:
        suites: JSONL files of suites; "demo" stands for those of the demo, which are always excluded.
    """
    overlaps = find_contamination(_excluded_items(suites), _texts(prompts))
    if overlaps:
        shared = "; ".join(_describe_overlap(overlap) for overlap in overlaps[:_MOST_OVERLAPS])
        more = f"; and {len(overlaps) - _MOST_OVERLAPS:,} more" if len(overlaps) > _MOST_OVERLAPS else ""
        raise SaroError(
            f"prompts are in an excluded suite: {shared}{more}; remove these prompts, or leave them out with "
            "--drop_excluded"
        )


def drop_excluded(prompts: Sequence[Prompt], suites: Sequence[str], funnel: Funnel) -> list[Prompt]:
    """Return the prompts that ``check_exclusion`` accepts, in order; the funnel learns which suite has the others.

    A prompt whose twin is left out has none.
    """
    items = _excluded_items(suites)
    kept = list(prompts)
    dropped: set[str] = set()
    # Each overlap names one prompt of an item, and several may hold it: search until none is left.
    while overlaps := find_contamination(items, _texts(kept)):
        suite_of = {overlap.record: overlap.suite for overlap in reversed(overlaps)}
        for prompt in kept:
            if (suite := suite_of.get(_place(prompt))) is not None:
                funnel.leave_out(prompt.id, "prompts", f"in suite {suite}")
                dropped.add(prompt.id)
        kept = [prompt for prompt in kept if prompt.id not in dropped]
    funnel.count("prompts", "in an excluded suite", len(dropped))
    return [_with_twin(prompt, None) if prompt.item.twin in dropped else prompt for prompt in kept]


def _excluded_items(suites: Sequence[str]) -> list[Item]:
    return [item for file in excluded_files(suites) for item in read_suite(file)]


def _place(prompt: Prompt) -> str:
    return f"{prompt.where} ({prompt.id})"


def _texts(prompts: Sequence[Prompt]) -> Iterator[tuple[str, str]]:
    """Yield (place and id, text) for the user turns of each prompt, together and one by one."""
    for prompt in prompts:
        turns = [turn.content for turn in prompt.item.prompt if turn.role == "user"]
        yield _place(prompt), "\n".join(turns)
        for text in turns if len(turns) > 1 else ():
            yield _place(prompt), text


def _describe_overlap(overlap: Contamination) -> str:
    same = "is" if overlap.kind == "exact" else "shares 13 words in a row with"
    return f"{overlap.record} {same} {overlap.suite}/{overlap.item}"


def choose_heldout(prompts: Sequence[Prompt], share: float, seed: int) -> frozenset[str]:
    """Return the ids of a share of the prompts, the same ones for the same seed; twins and clusters stay together.

    Each unit is drawn by its name, so prompts that are added or removed change nothing for the others.
    """
    unit_of = find_units([prompt.item for prompt in prompts])
    chosen = set()
    for prompt in prompts:
        digest = hashlib.sha256(f"{seed}/heldout/{unit_of[f'{prompt.item.suite}/{prompt.id}']}".encode()).digest()
        if int.from_bytes(digest[:8]) < share * 2**64:
            chosen.add(prompt.id)
    return frozenset(chosen)
