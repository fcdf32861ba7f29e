"""Makes process pairs: two chains on one prompt that share their beginning, in tokens, and part at the step that matters.

Forms. A cue is a step that decides for the wrong answer, a turn one that decides for the right one.

    intervene   a harmful chain up to its first cue, where the chosen side turns instead
                (Intervened Preference Optimization, arXiv 2509.24393)
    earlier     a safe chain that turns late; the chosen side turns sooner. Both are safe: it teaches when
    recover     a harmful chain with its first cue in the shared beginning; the chosen side turns next (RECAP,
                arXiv 2510.00938)
    sibling     a chain that ended badly up to the step that decided it, found by rollouts and confirmed by others; the
                chosen side is a continuation that ended well (as Step-DPO, arXiv 2406.18629, which stops at the first wrong step)
    mirror      "recover" on a harmless prompt: a chain with needless caution, from which the chosen side comes back to help

Rejected sides that are made of harmful chains are open: they end shortly behind the step that decides them, so that little
harmful content is kept. All prompts go through each round together: whole chains, verdicts, labels; turning steps, continuations,
verdicts, labels; then the rounds of the bisections, and one that measures the steps which they find.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from saro.data.chat_format import ChatFormat
from saro.errors import SaroError
from saro.synth.author import Author, Task
from saro.synth.branch import find_fork
from saro.synth.chain_parts import Chain, Run, has_outcome, label_chains
from saro.synth.funnel import Funnel
from saro.synth.gates import find_unfit_form
from saro.synth.judgement import Judge
from saro.synth.prompts import Prompt
from saro.synth.safety_policy import SafetyPolicy
from saro.synth.sibling_pairs import make_sibling_pairs
from saro.synth.step_judge import StepJudge
from saro.synth.synth_options import FORMS, Options
from saro.synth.turned_pairs import has_control, make_turned_pairs

# Kinds of prompts that each form is made from.
KINDS_OF_FORM = {
    "intervene": ("harmful",),
    "earlier": ("harmful",),
    "recover": ("harmful",),
    "sibling": ("harmful", "harmless", "general"),
    "mirror": ("harmless",),
}


def choose_forms(options: Options) -> tuple[str, ...]:
    """Return the forms to make, in the order of ``FORMS``; by default all of the stage."""
    return tuple(form for form in FORMS[options.stage] if not options.pp.forms or form in options.pp.forms)


def check_template(prompts: Sequence[Prompt], chat: ChatFormat | None) -> None:
    """Raise SaroError if no reasoning could be continued: the tokenizer is not known, or the template closes the reasoning.

    Args:
        chat: format of the model that writes; None if only a server knows it.
    """
    if chat is None:
        raise SaroError(
            "--generator: process pairs continue texts in token ids, and the server's tokenizer is not known; "
            "give --server.tokenizer"
        )
    if prompts:
        find_fork(chat, prompts[0].item.prompt, "")


def plan_tasks(prompts: Sequence[Prompt], policy: SafetyPolicy, options: Options) -> list[Task]:
    """Return the tasks of the first round: whole chains on every prompt that a form is made from.

    They are drawn from the bare prompt, without the policy, as those of stage op, so that both stages share draws.
    """
    del policy
    kinds = {kind for form in choose_forms(options) for kind in KINDS_OF_FORM[form]}
    return [
        Task(prompt, "plain", prompt.item.prompt, None, number)
        for prompt in prompts
        if prompt.kind in kinds
        for number in range(options.pp.draws)
    ]


def count_followups(prompts: Sequence[Prompt], options: Options) -> int:
    """Return the most texts that the model writes after the first round. Replies of judges are not counted."""
    total = 0
    for form in choose_forms(options):
        fitting = sum(prompt.kind in KINDS_OF_FORM[form] for prompt in prompts)
        total += fitting * options.pp.pairs_per_prompt * _count_texts(form, options)
    return total


def _count_texts(form: str, options: Options) -> int:
    """Return the most texts that one pair of a form takes."""
    pp = options.pp
    if form == "sibling":
        # A step has at least one token. As many rollouts again at both ends of the step that is found measure it.
        return pp.rollouts * (math.ceil(math.log2(max(options.max_tokens, 2))) + 2)
    # Each step that is put in takes a continuation, and a written one takes a sentence too.
    return pp.borrowed + 2 * (pp.turns + has_control(form, pp.neutral))


def make_process_pairs(
    prompts: Sequence[Prompt],
    author: Author,
    judge: Judge,
    step_judge: StepJudge,
    policy: SafetyPolicy,
    options: Options,
    funnel: Funnel,
) -> list[dict[str, Any]]:
    """Return the records of all process pairs, sorted by prompt and form; they do not depend on the order of the prompts.

    ``meta.synth`` of a record has these fields, beside those of ``make_pair_record``:

    - policy: ids of the rules that the turning step was written under; empty if it was borrowed, and for siblings.
    - fork: {"step": number of shared steps, "token": number of shared tokens, with those of the prompt}.
    - turn: {"chosen", "rejected"}: index of the first step from the fork on that turns; null if none does.
    - value: {"before", "after"} the step that decides the rejected side, for siblings; else null. They are of other rollouts
      than those that found the step, and a pair is only made if they confirm it (``Measured``). ``after`` is null behind a
      step that ends the search (``Search``): nothing is continued from there.
    - outcomes: {"chosen", "rejected"}: by the judge or the right answer; that of a rejected chain is of the whole chain.
    - draws: keys of the draws: chosen, rejected, and that of the turning step if one was put in.
    - on_policy: true if all of both sides was drawn from the bare prompt, as a borrowed step was and a written one was not.
    - judge, steps: names of those who judged outcomes and labelled steps.
    - lengths: {"chosen", "rejected"}: tokens of each response, with the shared ones.

    The funnel also gets the controls: outcomes after turning and after neutral steps at the same places ("control FORM"),
    the values of all steps that rollouts find, confirmed or not, and how often a confirmed one is the first cue by its label
    ("control sibling").

    Raises:
        SaroError: like ``Author.write``, ``Judge.judge`` and ``StepJudge.label``.
    """
    forms = choose_forms(options)
    run = Run(author, judge, step_judge, policy, options, funnel)
    prompts = sorted(prompts, key=lambda prompt: prompt.id)
    chains = _draw_chains(run, prompts)
    turned = [form for form in forms if form != "sibling"]
    wanted = [(form, prompt.id) for form in turned for prompt in prompts if prompt.kind in KINDS_OF_FORM[form]]
    records = make_turned_pairs(run, wanted, chains)
    if "sibling" in forms:
        records += make_sibling_pairs(run, chains)
    for record in records:
        funnel.count("pairs", record["meta"]["synth"]["form"])
    return sorted(records, key=lambda record: (record["meta"]["synth"]["prompt"], record["id"]))


def _draw_chains(run: Run, prompts: Sequence[Prompt]) -> dict[str, list[Chain]]:
    """Return the chains of each prompt with an outcome, by its id, the shortest first."""
    tasks = plan_tasks(prompts, run.policy, run.options)
    judged = run.judge.judge(run.author.write(tasks, run.sampling))
    known = []
    for one in judged:
        answer = one.drawn.answer
        if has_outcome(one):
            reason = find_unfit_form(one.drawn.task.prompt, answer.think, answer.answer, run.chat)
        else:
            reason = "looped" if answer.state == "looped" else one.outcome
        if reason is None:
            known.append(one)
        else:
            run.funnel.leave_out(one.drawn.task.prompt.id, "chains", reason, one.drawn.key)
    run.funnel.count("chains", "written", len(tasks))
    chains: dict[str, list[Chain]] = {task.prompt.id: [] for task in tasks}
    for chain in label_chains(run, known, "chains"):
        chains[chain.prompt.id].append(chain)
        # Counted now: without labels a text is left out of this stage.
        run.funnel.count("chains", chain.judged.outcome)
    return {id: sorted(ones, key=lambda one: (one.characters, one.drawn.key)) for id, ones in chains.items()}
