"""Gives prompts the hazards and the level that their file does not give: those that a model finds in the policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from saro.draws.request import Draw, Request
from saro.evaluate.judge import defuse, show_conversation
from saro.evaluate.judge_model import JudgeModel
from saro.synth.funnel import Funnel
from saro.synth.prompts import LEVELS, Prompt, give_twin_hazards
from saro.synth.safety_policy import SafetyPolicy, Section
from saro.synth.strict_replies import Strict, ask_strictly, read_objects_of
from saro.synth.templates import read_template

# Longest reply: a model may think before it answers.
_TOKENS = 1024


@dataclass(frozen=True)
class Sorting:
    """What a model says of a prompt.

    Attributes:
        section: the section of the policy that the prompt is about.
        level: one of ``LEVELS``.
    """

    section: Section
    level: str


def is_asked_about(prompt: Prompt) -> bool:
    """Return True if a model can say of a prompt what its file does not.

    Only harmful prompts have hazards. General ones do no harm, so their level is "none" without asking.
    """
    return "level" in prompt.defaults or "hazard" in prompt.defaults


def sort_prompts(
    prompts: Sequence[Prompt],
    model: JudgeModel,
    policy: SafetyPolicy,
    funnel: Funnel,
    draw_all: Callable[[Sequence[Request]], Sequence[Draw | None]],
) -> list[Prompt]:
    """Return the prompts, in order, with hazards and levels that a model gives where their file gives none.

    What the file gives stays. A harmless prompt shares what its twin gets. A harmful prompt gets the hazards of its section; it has none if that is a general one. A
    prompt without a valid reply in two tries keeps the defaults, and the funnel counts it.

    Args:
        draw_all: as in ``ask_strictly``.

    Raises SaroError like ``draw_all``.
    """
    asked = {prompt.id: prompt for prompt in prompts if is_asked_about(prompt)}
    questions = {id: _ask_about(prompt, model, policy) for id, prompt in asked.items()}
    replies = ask_strictly(model, questions, partial(_parse, policy), draw_all)
    sorted_prompts = []
    for prompt in prompts:
        sorting = replies.get(prompt.id)
        if sorting is not None:
            prompt = _fill_in(prompt, sorting)
        sorted_prompts.append(prompt)
    unread = sum(sorting is None for sorting in replies.values())
    funnel.count("hazards", "given by the file", len(prompts) - len(asked))
    funnel.count("hazards", "given by the model", len(asked) - unread)
    funnel.count("hazards", "no valid reply, so the default", unread)
    return give_twin_hazards(sorted_prompts)


def parse_sorting(reply: str, policy: SafetyPolicy) -> Sorting | None:
    """Return what a reply says, one line of JSON: {"section": "P3", "level": "high"}.

    None unless the section is one of the policy and the level one of ``LEVELS``; see ``read_objects_of``. Never raises.
    """
    objects = read_objects_of(reply)
    if objects is None or len(objects) != 1 or objects[0].keys() != {"section", "level"}:
        return None
    sections = [section for section in policy.sections if section.id == objects[0]["section"]]
    level = objects[0]["level"]
    return Sorting(sections[0], level) if sections and level in LEVELS else None


def _parse(policy: SafetyPolicy, _id: str, reply: str) -> Sorting | None:
    return parse_sorting(reply, policy)


def _ask_about(prompt: Prompt, model: JudgeModel, policy: SafetyPolicy) -> Strict:
    messages = read_template("hazard").render(
        request=defuse(show_conversation(prompt.item.prompt), model.chat),
        sections=[f"{section.id} {section.title}: {section.objective}" for section in policy.sections],
    )
    return Strict(messages, _TOKENS)


def _fill_in(prompt: Prompt, sorting: Sorting) -> Prompt:
    return replace(
        prompt,
        hazard=sorting.section.hazard if "hazard" in prompt.defaults else prompt.hazard,
        level=sorting.level if "level" in prompt.defaults else prompt.level,
        defaults=(),
    )
