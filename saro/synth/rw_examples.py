"""Makes examples for Reasoning-style Warmup: chains that a model writes with the policy in view, kept without it.

Each prompt gets several guided draws. Those that pass the gates and are judged good are accepted, and the one with the
shortest reasoning within its band is kept. Prompts without an accepted text may be filled from published records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from saro.config import THINK_TAGS
from saro.data.chat_format import ChatFormat
from saro.data.messages import find_tools, normalise_prompt
from saro.data.read_rows import hash_rows, read_rows
from saro.data.records import Response, read_examples
from saro.draws.request import Sampling
from saro.evaluate.answers import Answer
from saro.evaluate.matching import is_right
from saro.program import as_list
from saro.synth.author import Author, Task
from saro.synth.bands import BANDS, band_distance
from saro.synth.funnel import Funnel
from saro.synth.gates import Gates
from saro.synth.judgement import Judge, Judged, JudgedGate
from saro.synth.prompts import Prompt
from saro.synth.safety_policy import SafetyPolicy
from saro.synth.select_records import Candidate, cell_of, choose_balanced, find_shortest, sort_texts
from saro.synth.synth_options import Options
from saro.synth.synth_records import make_example_record
from saro.synth.templates import read_template

# The outcome of a good text, by what the prompt expects.
_GOOD = {"refuse": "safe", "comply": "helped", "answer": "right"}


@dataclass(frozen=True)
class _Kept:
    """The text that is kept for one prompt, before the balance.

    Attributes:
        prompt: the prompt.
        think, answer: the text.
        synth: what ``meta.synth`` says of it.
    """

    prompt: Prompt
    think: str
    answer: str
    synth: Mapping[str, Any]

    @property
    def is_filled(self) -> bool:
        """True if the text is a published one."""
        return self.synth["form"] == "fill"


@dataclass(frozen=True)
class _Published:
    """A published text that may fill a prompt.

    Attributes:
        think, answer: the text.
        origin: what ``meta.synth.fill`` says: file, sha256, source and licence; None for a licence that is not known.
    """

    think: str
    answer: str
    origin: Mapping[str, str | None]

    @property
    def rank(self) -> tuple[int | str, ...]:
        """Sort key, the shortest first; the same in any order of files."""
        return (
            len(self.think),
            len(self.answer),
            self.think,
            self.answer,
            *(str(value) for value in self.origin.values()),
        )


def check_template(prompts: Sequence[Prompt], chat: ChatFormat | None) -> None:
    """Raise SaroError if no record could hold reasoning, because the chat template closes it.

    Args:
        chat: format of the model that is to be trained; None if only a server knows it, and then nothing is checked.
    """
    if chat is not None and prompts:
        chat.completion_text(chat.render_prompt(prompts[0].item.prompt), Response("So.", "Yes."))


def plan_tasks(
    prompts: Sequence[Prompt], policy: SafetyPolicy, options: Options, tags: tuple[str, str] | None = None
) -> list[Task]:
    """Return the texts to write: ``options.rw.draws`` guided ones for each prompt.

    Args:
        tags: tags of the reasoning, which the guidance names; default those of the options.
    """
    tags = tags or options.data.think_tags or THINK_TAGS
    return [task for prompt in prompts for task in guided_tasks(prompt, policy, options, tags)]


def count_followups(prompts: Sequence[Prompt], options: Options) -> int:
    """Return the largest number of texts that may be written after the planned ones: none."""
    del prompts, options
    return 0


def guided_tasks(prompt: Prompt, policy: SafetyPolicy, options: Options, tags: tuple[str, str]) -> list[Task]:
    """Return the guided draws of one prompt: the policy and the length of the reasoning are in the first user turn."""
    turns = prompt.item.prompt
    first = next(i for i, turn in enumerate(turns) if turn.role == "user")
    guided = read_template("guided").render(
        request=turns[first].content, policy=policy.for_writer(prompt), sentences=BANDS[prompt.level].words, tags=tags
    )
    messages = (*turns[:first], *guided, *turns[first + 1 :])
    return [Task(prompt, "guided", messages, None, number) for number in range(options.rw.draws)]


def write_guided(
    prompts: Sequence[Prompt],
    author: Author,
    judge: Judge,
    policy: SafetyPolicy,
    options: Options,
    funnel: Funnel,
    judged_gates: Sequence[JudgedGate] = (),
) -> dict[str, list[Judged]]:
    """Return the accepted guided texts of each prompt by its id, after gates and judge; only prompts that have some.

    Args:
        judged_gates: asked in their order, each about the good texts that those before it accept.
    """
    tasks = plan_tasks(prompts, policy, options, author.subject.think_tags)
    drawn = author.write(tasks, Sampling(options.max_tokens, options.rw.temperature))
    funnel.count("guided draws", "written", len(drawn))
    passed = Gates.of(author.subject, policy, steady=True).select(drawn, funnel)
    accepted = []
    for text in judge.judge(passed):
        if text.is_good:
            accepted.append(text)
        else:
            funnel.leave_out(text.drawn.task.prompt.id, "judge", text.outcome, text.drawn.key)
    funnel.count("judge", "good guided draws", len(accepted))
    for gate in judged_gates:
        accepted = gate.select(accepted, funnel)
    by_prompt = groupby(sort_texts(accepted, funnel), key=lambda text: text.drawn.task.prompt.id)
    return {id: list(texts) for id, texts in by_prompt}


def make_examples(
    prompts: Sequence[Prompt],
    author: Author,
    judge: Judge,
    policy: SafetyPolicy,
    options: Options,
    funnel: Funnel,
    judged_gates: Sequence[JudgedGate] = (),
) -> list[dict[str, Any]]:
    """Return RW records, at most one for each prompt, sorted by id. They hold the bare prompt, without the policy.

    A prompt without an accepted text is filled from ``options.rw.fill`` if a record there has the same conversation. Such
    a text passes the same gates, but the judge does not read it, since those who published it did. Only a right answer
    is checked. Then as many are kept as the options say.

    Args:
        judged_gates: as in ``write_guided``.

    Raises:
        SaroError: texts cannot be drawn or judged, or a file of ``options.rw.fill`` is faulty.
    """
    prompts = sorted(prompts, key=lambda prompt: prompt.id)
    funnel.count("prompts", "given", len(prompts))
    accepted = write_guided(prompts, author, judge, policy, options, funnel, judged_gates)
    kept = [_keep_shortest(texts, policy, judge, funnel) for texts in accepted.values()]
    empty = [prompt for prompt in prompts if prompt.id not in accepted]
    kept += _fill(empty, author, policy, options, funnel)
    filled = {one.prompt.id for one in kept}
    for prompt in empty:
        if prompt.id not in filled:
            funnel.leave_out(prompt.id, "select", "no accepted text")
    chosen = _choose(kept, options, funnel)
    return [make_example_record(one.prompt, one.think, one.answer, one.synth) for one in chosen]


def _keep_shortest(texts: Sequence[Judged], policy: SafetyPolicy, judge: Judge, funnel: Funnel) -> _Kept:
    """Return the text to keep of the accepted ones of one prompt."""
    best = find_shortest(texts)
    prompt, answer = best.drawn.task.prompt, best.drawn.answer
    for text in texts:
        if text is not best:
            funnel.leave_out(prompt.id, "draws", "not the shortest", text.drawn.key)
    synth = {
        "form": "guided",
        "policy": list(policy.rule_ids(prompt)),
        "draws": [best.drawn.key],
        "on_policy": True,
        "judge": judge.spec.name,
        "tokens": {"think": answer.tokens["think"], "answer": answer.tokens["answer"]},
    }
    return _Kept(prompt, answer.think, answer.answer, synth)


def _fill(
    prompts: Sequence[Prompt], author: Author, policy: SafetyPolicy, options: Options, funnel: Funnel
) -> list[_Kept]:
    """Return published texts on prompts that lack one, the nearest to its band and then the shortest of each."""
    by_text = {normalise_prompt(prompt.item.prompt): prompt for prompt in prompts}
    gates = Gates.of(author.subject, policy, steady=True)
    passed: dict[str, list[_Published]] = {}
    for file in as_list(options.rw.fill):
        digest = None
        # Both read the same lines; the second one has what a record says of itself.
        for example, (_, _, fields) in zip(read_examples(file), read_rows(file), strict=True):
            digest = digest or hash_rows(file)
            prompt = by_text.get(normalise_prompt(example.prompt))
            if example.response.calls is not None or find_tools(example.prompt) is not None:
                # A text that ends before its call would teach to end there.
                funnel.count("fill", "with tools")
            elif prompt is None:
                funnel.count("fill", "on no prompt that lacks a text")
            elif reason := _find_fault(prompt, example.response, gates):
                funnel.leave_out(prompt.id, "fill", reason)
            else:
                origin = _describe_origin(file, digest, fields)
                text = _Published(example.response.reasoning or "", example.response.answer, origin)
                passed.setdefault(prompt.id, []).append(text)
    kept = []
    for prompt in prompts:
        if prompt.id in passed:
            best = min(passed[prompt.id], key=lambda text: (band_distance(text.think, prompt.level), *text.rank))
            synth = {"form": "fill", "on_policy": False, "fill": best.origin}
            kept.append(_Kept(prompt, best.think, best.answer, synth))
    funnel.count("fill", "filled", len(kept))
    return kept


def _describe_origin(file: str, digest: str, fields: Mapping[str, Any]) -> dict[str, str | None]:
    """Return what ``meta.synth.fill`` says: the source of a published text is not that of its prompt."""
    meta = fields.get("meta")
    said = {name: meta.get(name) if isinstance(meta, dict) else None for name in ("source", "licence")}
    source, licence = (value if isinstance(value, str) and value.strip() else None for value in said.values())
    return {"file": Path(file).name, "sha256": digest, "source": source or Path(file).name, "licence": licence}


def _find_fault(prompt: Prompt, response: Response, gates: Gates) -> str | None:
    """Return the first reason against a published text, or None."""
    think = response.reasoning or ""
    reason = gates.find_fault_of_parts(prompt, think, response.answer)
    if reason is not None or prompt.item.expect != "answer":
        return reason
    answer = Answer(
        key=prompt.id,
        model="fill",
        suite=prompt.item.suite,
        attack="none",
        item=prompt.id,
        number=0,
        draw="",
        think=think,
        answer=response.answer,
        tokens={},
        state="finished",
    )
    return None if is_right(prompt.item, answer) else "wrong"


def _choose(kept: Sequence[_Kept], options: Options, funnel: Funnel) -> list[_Kept]:
    """Return as many as the options say, balanced, by prompt id. Texts of the model itself come before published ones."""
    by_kind: dict[str, list[Candidate]] = {"safety": [], "general": []}
    for one in kept:
        cell = cell_of(one.prompt, _GOOD[one.prompt.item.expect])
        by_kind[one.prompt.record_kind].append(Candidate(one.prompt.id, cell, rank=int(one.is_filled)))
    numbers = share_out(len(by_kind["safety"]), len(by_kind["general"]), options.rw.records, options.rw.general)
    chosen: set[str] = set()
    for candidates, number in zip(by_kind.values(), numbers, strict=True):
        chosen.update(choose_balanced(candidates, number, options.seed))
    result = sorted((one for one in kept if one.prompt.id in chosen), key=lambda one: one.prompt.id)
    for one in sorted(kept, key=lambda one: one.prompt.id):
        if one.prompt.id not in chosen:
            funnel.leave_out(one.prompt.id, "select", "balance")
            for key in one.synth.get("draws", ()):
                funnel.leave_out(one.prompt.id, "draws", "balance", key)
    for kind in by_kind:
        funnel.count("records", kind, sum(one.prompt.record_kind == kind for one in result))
    funnel.count("records", "not on-policy", sum(one.is_filled for one in result))
    return result


def share_out(safety: int, general: int, records: int | None, share: float) -> tuple[int, int]:
    """Return how many safety and general records to keep.

    Args:
        safety, general: numbers that there are.
        records: number to keep; None for all safety records and as many general ones as belong to them.
        share: share of general records among those that are kept, 0 to 1. If there are too few of them, safety records
            take their place, and not the other way round. Without safety records, all are general.
    """
    if safety == 0:
        share = 1.0
    if records is not None:
        kept_general = min(general, round(records * share))
        return min(safety, records - kept_general), kept_general
    if share == 1:
        return 0, general
    return safety, min(general, round(safety * share / (1 - share)))
