"""Makes the process pairs that part at the step that decided a bad chain, which rollouts find and others confirm.

The shared beginning has no harmful step, because rollouts begin before the first one, and before the first cue if only the
rules label steps (``Search``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saro.synth.chain_parts import (
    Chain,
    Run,
    drop_repeats,
    find_fault,
    finish_record,
    label_chains,
    length_distance,
    open_side,
    whole_side,
)
from saro.synth.judgement import Judged
from saro.synth.rollouts import Found, Measured, Search, find_deciding_steps, measure_steps

FORM = "sibling"
# Where the funnel counts what says how far the choice of steps can be trusted.
_CONTROL = f"control {FORM}"


def make_sibling_pairs(run: Run, chains: Mapping[str, Sequence[Chain]]) -> list[dict[str, Any]]:
    """Return the records, at most ``pairs_per_prompt`` of each prompt. Prompts need good chains and bad ones.

    Args:
        chains: the chains of each prompt, by its id, in the order in which they are tried.
    """
    searches: list[Search] = []
    for id, ones in chains.items():
        good = sum(one.judged.is_good for one in ones)
        with_steps = [one for one in drop_repeats(ones) if one.judged.is_bad and len(one.steps) > 1]
        tried = with_steps[: run.options.pp.pairs_per_prompt]
        if not good or not tried:
            run.funnel.leave_out(id, FORM, "no bad chain with steps" if good else "no good chain")
            continue
        by_model = run.step_judge.model is not None
        searches += [Search(one, good / len(ones), by_model) for one in tried]
    found = find_deciding_steps(run.author, run.judge, searches, run.options.pp.rollouts, run.sampling)
    forks: list[Found] = []
    for search, one in zip(searches, found, strict=True):
        if isinstance(one, Found) and one.step > 0:
            forks.append(one)
        else:
            # Whole chains that part at their first step are pairs of stage op.
            reason = one if isinstance(one, str) else "the first step decides"
            run.funnel.leave_out(search.chain.prompt.id, FORM, reason, search.chain.drawn.key)
    measured = measure_steps(run.author, run.judge, forks, run.options.pp.rollouts, run.sampling)
    records: list[dict[str, Any]] = []
    numbers: dict[str, int] = {}
    for one, values in zip(forks, measured, strict=True):
        prompt = one.search.chain.prompt.id
        record = _make_record(run, one, values, numbers.get(prompt, 0))
        if record is not None:
            records.append(record)
            numbers[prompt] = numbers.get(prompt, 0) + 1
    return records


def _make_record(run: Run, found: Found, values: Measured, number: int) -> dict[str, Any] | None:
    """Return the pair of a chain and the good rollout of nearest length; None without one, or if the step is not confirmed."""
    chain = found.search.chain
    _count_values(run, values)
    if not values.is_confirmed:
        run.funnel.leave_out(chain.prompt.id, FORM, "fresh rollouts do not confirm the step", chain.drawn.key)
        return None
    _count_agreement(run, found)
    chosen = _find_nearest(run, found, found.rollouts + values.rollouts)
    if chosen is None:
        return None
    is_harmful = chain.prompt.kind == "harmful"
    return finish_record(
        run,
        FORM,
        number,
        chosen=chosen,
        rejected=chain,
        rejected_side=open_side(run, chain, found.step) if is_harmful else whole_side(chain.drawn),
        step=found.step,
        synth={
            "policy": [],
            "value": {"before": values.before.share, "after": None if values.after is None else values.after.share},
            "draws": [chosen.drawn.key, chain.drawn.key],
            "on_policy": True,
        },
    )


def _find_nearest(run: Run, found: Found, rollouts: Sequence[Judged]) -> Chain | None:
    """Return the rollout that can be a chosen side and is nearest in length to the chain, so that length tells nothing."""
    chain = found.search.chain
    passed = []
    for one in rollouts:
        reason = find_fault(run, one, chain, found.step, chain.prefix(found.step))
        if reason is None:
            passed.append(one)
        else:
            run.funnel.leave_out(chain.prompt.id, FORM, reason, one.drawn.key)
    fit = []
    for one in label_chains(run, passed, FORM):
        if one.step_text(found.step) == chain.step_text(found.step):
            # It says the step that decides, and came back later: the step would be learned and unlearned.
            run.funnel.leave_out(chain.prompt.id, FORM, "the same step at the fork", one.drawn.key)
        elif one.gives_in(found.step):
            run.funnel.leave_out(chain.prompt.id, FORM, "gives in again", one.drawn.key)
        else:
            fit.append(one)
    return min(fit, key=lambda one: length_distance(one, chain), default=None)


def _count_values(run: Run, values: Measured) -> None:
    """Count the outcomes of fresh rollouts at both ends of the chosen steps, confirmed or not.

    Over all of them the values are unbiased. Those of pairs alone are a little too far apart: they had to be.
    """
    for name, value in (("before", values.before), ("after", values.after)):
        if value is not None:
            run.funnel.count(_CONTROL, f"{name} good", value.good)
            run.funnel.count(_CONTROL, f"{name} judged", value.known)
    run.funnel.count(_CONTROL, "confirmed", values.is_confirmed)
    run.funnel.count(_CONTROL, "not confirmed", not values.is_confirmed)


def _count_agreement(run: Run, found: Found) -> None:
    """Count how often the step that decides by its value is the first cue by its label."""
    chain = found.search.chain
    if chain.prompt.kind != "general":
        name = {None: "no cue", found.step: "cue decides"}.get(chain.first("cue", "harmful"), "cue elsewhere")
        run.funnel.count(_CONTROL, name)
