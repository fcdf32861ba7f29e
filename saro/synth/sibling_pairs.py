"""Makes the process pairs that part at the step that decided a bad chain, which rollouts find.

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
from saro.synth.rollouts import Found, Search, find_deciding_steps

FORM = "sibling"


def make_sibling_pairs(run: Run, chains: Mapping[str, Sequence[Chain]]) -> list[dict[str, Any]]:
    """Return the records, at most ``pairs_per_prompt`` of each prompt. Prompts need good chains and bad ones.

    Args:
        chains: the chains of each prompt, by its id, in the order in which they are tried.
    """
    bad: list[Chain] = []
    searches: list[Search] = []
    for id, ones in chains.items():
        good = sum(one.judged.is_good for one in ones)
        with_steps = [one for one in drop_repeats(ones) if one.judged.is_bad and len(one.steps) > 1]
        tried = with_steps[: run.options.pp.pairs_per_prompt]
        if not good or not tried:
            run.funnel.leave_out(id, FORM, "no bad chain with steps" if good else "no good chain")
            continue
        bad += tried
        by_model = run.step_judge.model is not None
        searches += [Search(one, good / len(ones), by_model) for one in tried]
    found = find_deciding_steps(run.author, run.judge, searches, run.options.pp.rollouts, run.sampling)
    records: list[dict[str, Any]] = []
    numbers: dict[str, int] = {}
    for chain, one in zip(bad, found, strict=True):
        record = _make_record(run, one, chain, numbers.get(chain.prompt.id, 0))
        if record is not None:
            records.append(record)
            numbers[chain.prompt.id] = numbers.get(chain.prompt.id, 0) + 1
    return records


def _make_record(run: Run, found: Found | str, chain: Chain, number: int) -> dict[str, Any] | None:
    """Return the pair of a chain and the good rollout of nearest length, or None."""
    if isinstance(found, str):
        run.funnel.leave_out(chain.prompt.id, FORM, found, chain.drawn.key)
        return None
    _count_agreement(run, found, chain)
    if found.step == 0:
        # Whole chains that part at their first step are pairs of stage op.
        run.funnel.leave_out(chain.prompt.id, FORM, "the first step decides", chain.drawn.key)
        return None
    chosen = _find_nearest(run, found, chain)
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
            "value": {"before": found.before, "after": found.after},
            "draws": [chosen.drawn.key, chain.drawn.key],
            "on_policy": True,
        },
    )


def _find_nearest(run: Run, found: Found, chain: Chain) -> Chain | None:
    """Return the rollout that can be a chosen side and is nearest in length to the chain, so that length tells nothing."""
    passed = []
    for one in found.rollouts:
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


def _count_agreement(run: Run, found: Found, chain: Chain) -> None:
    """Count how often the step that decides by its value is the first cue by its label."""
    if chain.prompt.kind != "general":
        name = {None: "no cue", found.step: "cue decides"}.get(chain.first("cue", "harmful"), "cue elsewhere")
        run.funnel.count(f"control {FORM}", name)
