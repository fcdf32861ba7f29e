"""Writes what was selected as native records, which `recipes/rw.py` and `recipes/srpo.py` read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from saro.config import PAIR_KINDS
from saro.synth.prompts import Prompt

# One side of a pair, or the response of an example: {"reasoning", "answer"}, perhaps with "open".
Side = dict[str, Any]


def make_side(reasoning: str, answer: str = "", *, is_open: bool = False) -> Side:
    """Return a response as a record has it.

    Reasoning without text is left out, since records have no empty reasoning. The chat format then writes an empty block
    if the template opens one, and none otherwise.

    Args:
        is_open: the text ends here without a stop token. Without an answer it then ends inside the reasoning.

    Raises:
        ValueError: there is neither reasoning nor an answer, or a closed response has no answer.
    """
    if not answer.strip() and not (is_open and reasoning.strip()):
        raise ValueError("a response needs an answer, or reasoning if it is open")
    side: Side = {"reasoning": reasoning} if reasoning.strip() else {}
    if answer.strip():
        side["answer"] = answer
    if is_open:
        side["open"] = True
    return side


def make_example_record(prompt: Prompt, reasoning: str, answer: str, synth: Mapping[str, Any]) -> dict[str, Any]:
    """Return the RW record of a prompt; its id is the prompt's.

    Args:
        synth: what ``meta.synth`` says beside the prompt's own fields, which ``make_pair_record`` describes.
    """
    return {
        "id": prompt.id,
        "kind": prompt.record_kind,
        "prompt": _prompt_field(prompt),
        **make_side(reasoning, answer),
        "meta": _make_meta(prompt, synth),
    }


def make_pair_record(
    prompt: Prompt,
    *,
    kind: Literal["op-cot", "pp-cot"],
    form: str,
    number: int,
    chosen: Side,
    rejected: Side,
    synth: Mapping[str, Any],
) -> dict[str, Any]:
    """Return one pair of a prompt. Its id is that of the prompt, the form and the number, joined by "-".

    ``meta`` has the source and the licence of the prompt, and ``synth``: the form, the prompt's id, kind, level,
    hazards and what a good answer does, and what ``synth`` says.

    Args:
        form: how the pair was made, such as "outcome"; metrics are reported by it.
        number: of the pair among those of its prompt and form, from 0.
        chosen, rejected: the two sides, as ``make_side`` makes them.

    Raises:
        ValueError: the kind is not one of ``PAIR_KINDS``, or the two sides are the same.
    """
    if kind not in PAIR_KINDS:
        raise ValueError(f"the kind is {kind!r}; it must be one of {', '.join(PAIR_KINDS)}")
    if chosen == rejected:
        raise ValueError(f"{prompt.id}: both sides of a pair are the same")
    return {
        "id": f"{prompt.id}-{form}-{number}",
        "kind": kind,
        "prompt": _prompt_field(prompt),
        "chosen": chosen,
        "rejected": rejected,
        "meta": _make_meta(prompt, {"form": form, **synth}),
    }


def _prompt_field(prompt: Prompt) -> str | list[dict[str, str]]:
    """Return the conversation: a string if it is one user turn."""
    turns = prompt.item.prompt
    if [turn.role for turn in turns] == ["user"]:
        return turns[0].content
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _make_meta(prompt: Prompt, synth: Mapping[str, Any]) -> dict[str, Any]:
    form = {"form": synth["form"]} if "form" in synth else {}
    described = {
        "prompt": prompt.id,
        "kind": prompt.kind,
        "expect": prompt.item.expect,
        "level": prompt.level,
        "hazard": list(prompt.hazard),
    }
    return {"synth": form | described | dict(synth), "source": prompt.item.source, "licence": prompt.item.licence}
