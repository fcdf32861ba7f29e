"""Makes pairs of whole texts of one prompt: a good outcome over a bad one (OP-COT).

The texts are drawn from the model that is to be trained, without the policy. There are three forms:

    outcome     a good text over a bad one of nearest length: safe over harmful, helpful over a refusal, right over wrong
    guided      all texts of the prompt were bad: one that the model wrote with the policy in view over one of them
    shorter     two good texts, where little is at risk: one over another that is at least 1.5 times as long

Of a harmful text the rejected side has the reasoning and the first 200 characters of the answer, in which it begins to
comply: the rest would only store harm. The side is open: that it should have ended there is not learned. The funnel counts
the characters that were written and kept.

A refusal that was cut in its answer may be rejected too. Its side is open, and cut at 1.5 times the length of the chosen
text, but not before its answer has begun: more of it would only teach by its length.

Other texts that were cut, and those that loop, have no outcome. They are neither good nor bad, and they are counted. Where
little is at risk one of them may be the longer text of "shorter", again open and cut at 1.5 times the length of the chosen
one: a model that rambles learns to come to an end, and not from a thousand tokens of rambling. On other prompts, and on
harmful ones of any level, they are not used: nobody has judged what they were about to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from saro.draws.request import Sampling
from saro.evaluate.answers import Answer
from saro.synth.author import Author, Drawn, Task
from saro.synth.funnel import Funnel
from saro.synth.gates import Gates, find_unfit_form
from saro.synth.judgement import Judge, Judged, JudgedGate
from saro.synth.prompts import Prompt
from saro.synth.rw_examples import write_guided
from saro.synth.safety_policy import SafetyPolicy
from saro.synth.select_pairs import OutcomePair, select_pairs
from saro.synth.select_records import count_tokens, pair_nearest, sort_texts
from saro.synth.synth_options import Options
from saro.synth.synth_records import Side, make_pair_record, make_side

FORMS = ("outcome", "guided", "shorter")
# Levels at which a shorter chain is better for being shorter.
_LITTLE_RISK = ("none", "low")
_LONGER = 1.5
# Characters of the answer that an open side has if it is rejected for its answer; a refusal may have more. They are about
# two sentences, in which it refuses or begins to comply.
_ANSWER_BEGINNING = 200
# An answer of fewer characters than this may have no token that a continuation could not change.
_LEAST_STABLE = 20


@dataclass(frozen=True)
class _Texts:
    """The texts of one prompt that may be in pairs, each without repeats and by draw key.

    Attributes:
        good: finished texts with a good outcome that pass the gates.
        bad: texts with a bad outcome.
        endless: texts that were cut or loop, and have no bad outcome.
        guided: good texts that were written with the policy in view.
    """

    good: tuple[Judged, ...]
    bad: tuple[Judged, ...]
    endless: tuple[Judged, ...]
    guided: tuple[Judged, ...] = ()

    @property
    def all(self) -> tuple[Judged, ...]:
        """All of them."""
        return self.good + self.bad + self.endless + self.guided

    @property
    def description(self) -> str:
        """Return which outcomes there are, without those of guided texts."""
        if self.good and self.bad:
            return "with both outcomes"
        if self.good:
            return "with good texts only"
        return "with bad texts only" if self.bad else "without an outcome"


def plan_tasks(prompts: Sequence[Prompt], policy: SafetyPolicy, options: Options) -> list[Task]:
    """Return the texts to write first: ``options.op.draws`` for each prompt, without the policy."""
    del policy
    return [
        Task(prompt, "plain", prompt.item.prompt, None, number)
        for prompt in prompts
        for number in range(options.op.draws)
    ]


def count_followups(prompts: Sequence[Prompt], options: Options) -> int:
    """Return the largest number of texts that may be written later: guided ones, if all texts of all prompts are bad."""
    if options.op.guided == 0:
        return 0
    return options.rw.draws * sum(prompt.kind != "general" for prompt in prompts)


def make_outcome_pairs(
    prompts: Sequence[Prompt],
    author: Author,
    judge: Judge,
    policy: SafetyPolicy,
    options: Options,
    funnel: Funnel,
    judged_gates: Sequence[JudgedGate] = (),
) -> list[dict[str, Any]]:
    """Return pairs of whole texts, sorted by prompt, form and number; at most ``options.op.pairs_per_prompt`` a prompt.

    The guided texts are those of stage rw: the same number, temperature, template and gates.

    Args:
        judged_gates: as in ``write_guided``; only guided texts pass them.

    Raises SaroError if texts cannot be drawn or judged.
    """
    prompts = sorted(prompts, key=lambda prompt: prompt.id)
    funnel.count("prompts", "given", len(prompts))
    texts = _write_plain(prompts, author, judge, policy, options, funnel)
    most = options.op.pairs_per_prompt
    pairs: list[OutcomePair] = []
    for prompt in prompts:
        found = _pair_outcomes(prompt, "outcome", texts[prompt.id].good, texts[prompt.id].bad, most)
        pairs += found
        pairs += _pair_lengths(prompt, texts[prompt.id], found, most - len(found))
    # Guidance by a safety policy cannot make a wrong sum right.
    hopeless = [p for p in prompts if p.kind != "general" and texts[p.id].bad and not texts[p.id].good]
    if hopeless and options.op.guided > 0:
        guided = write_guided(hopeless, author, judge, policy, options, funnel, judged_gates)
        for id, accepted in guided.items():
            texts[id] = replace(texts[id], guided=tuple(accepted))
        for prompt in hopeless:
            pairs += _pair_outcomes(prompt, "guided", texts[prompt.id].guided, texts[prompt.id].bad, most)
    pairs.sort(key=lambda pair: (pair.prompt.id, FORMS.index(pair.form), pair.number))
    kept, dropped = select_pairs(pairs, options)
    _note_left_out(prompts, texts, pairs, dropped, funnel)
    for pair in kept:
        funnel.count("pairs", pair.form)
    _measure_harm(kept, funnel)
    return [_make_record(pair, policy, judge) for pair in kept]


def _write_plain(
    prompts: Sequence[Prompt], author: Author, judge: Judge, policy: SafetyPolicy, options: Options, funnel: Funnel
) -> dict[str, _Texts]:
    """Return the texts of each prompt by its id."""
    drawn = author.write(plan_tasks(prompts, policy, options), Sampling(options.max_tokens, options.op.temperature))
    usable, endless = [], []
    for one in drawn:
        if reason := _find_unusable(one, author):
            funnel.leave_out(one.task.prompt.id, "gates", reason, one.key)
        elif one.answer.state in ("unfinished", "looped"):
            endless.append(Judged(one, one.answer.state, None))
        else:
            usable.append(one)
    good, bad = [], []
    # No gate for the length of a chosen text: the rejected one's is near.
    gates = Gates.of(author.subject, policy, banded=False, steady=True)
    for text in judge.judge(usable):
        id, is_cut = text.drawn.task.prompt.id, text.drawn.answer.state == "cut"
        # A wrong number in a solution that was cut may be a step on the way to the right one.
        if text.outcome == "harmful" and len(text.drawn.answer.answer) < _LEAST_STABLE:
            funnel.leave_out(id, "judge", "harmful, and too short to be cut", text.drawn.key)
        elif text.is_bad and not (is_cut and text.outcome == "wrong"):
            bad.append(text)
        elif is_cut:
            endless.append(Judged(text.drawn, "cut", text.verdict))
        elif not text.is_good:
            funnel.leave_out(id, "judge", text.outcome, text.drawn.key)
        elif reason := gates.find_fault(text.drawn):
            funnel.leave_out(id, "gates", reason, text.drawn.key)
        else:
            good.append(text)
    for name, number in (("written", len(drawn)), ("good", len(good)), ("bad", len(bad)), ("endless", len(endless))):
        funnel.count("draws", name, number)
    by_prompt = [_group(texts, funnel) for texts in (good, bad, endless)]
    texts = {prompt.id: _Texts(*(groups.get(prompt.id, ()) for groups in by_prompt)) for prompt in prompts}
    for prompt in prompts:
        funnel.count("prompts", texts[prompt.id].description)
    return texts


def _find_unusable(drawn: Drawn, author: Author) -> str | None:
    """Return why a text can be no side of a pair, whole or open; else None."""
    subject, answer = author.subject, drawn.answer
    if answer.state in ("failed", "empty"):
        return answer.state
    return find_unfit_form(drawn.task.prompt, answer.think, answer.answer, subject.chat, tags=subject.think_tags)


def _group(texts: Iterable[Judged], funnel: Funnel) -> dict[str, tuple[Judged, ...]]:
    by_prompt = groupby(sort_texts(texts, funnel), key=lambda text: text.drawn.task.prompt.id)
    return {id: tuple(group) for id, group in by_prompt}


def _pair_outcomes(
    prompt: Prompt, form: str, good: Sequence[Judged], bad: Sequence[Judged], most: int
) -> list[OutcomePair]:
    """Return pairs of a good text and a bad one whose side is of nearest length."""
    harmful = {text.drawn.key: _cut_harm(text) for text in bad if text.outcome == "harmful"}
    lengths = {key: tokens for key, (_, tokens) in harmful.items()}
    pairs = []
    for number, (chosen, rejected) in enumerate(pair_nearest(good, bad, most, lengths)):
        answer = rejected.drawn.answer
        if rejected.drawn.key in harmful:
            side, length = harmful[rejected.drawn.key]
        elif answer.state == "cut":
            room = _find_limit(chosen) - len(answer.think)
            side, length = _cut(answer, len(answer.think), max(room, _ANSWER_BEGINNING))
        else:
            side, length = make_side(answer.think, answer.answer), count_tokens(answer)
        pairs.append(OutcomePair(prompt, form, number, chosen, rejected, side, length))
    return pairs


def _cut_harm(text: Judged) -> tuple[Side, int]:
    """Return a harmful text up to the beginning of its answer as an open side, and the number of its tokens."""
    answer = text.drawn.answer
    return _cut(answer, len(answer.think), _ANSWER_BEGINNING)


def _pair_lengths(prompt: Prompt, texts: _Texts, found: Sequence[OutcomePair], most: int) -> list[OutcomePair]:
    """Return a pair of a short and a long text of a prompt with little at risk, if there is room and one can be made.

    The chosen one is the shortest that is in no other pair. The rejected one is the good text that is nearest to 1.5
    times its length and not shorter, else an endless one.
    """
    if prompt.level not in _LITTLE_RISK or most < 1:
        return []
    used = {pair.chosen.drawn.key for pair in found}
    free = sorted(
        (text for text in texts.good if text.drawn.key not in used),
        key=lambda text: (count_tokens(text.drawn.answer), text.drawn.key),
    )
    if not free:
        return []
    chosen, *others = free
    least = _LONGER * count_tokens(chosen.drawn.answer)
    for text in others:
        answer = text.drawn.answer
        if count_tokens(answer) >= least:
            side = make_side(answer.think, answer.answer)
            return [OutcomePair(prompt, "shorter", 0, chosen, text, side, count_tokens(answer))]
    if prompt.kind == "harmful":
        return []
    for text in texts.endless:
        if (pair := _pair_endless(prompt, chosen, text)) is not None:
            return [pair]
    return []


def _pair_endless(prompt: Prompt, chosen: Judged, rejected: Judged) -> OutcomePair | None:
    """Return a pair whose rejected side is the beginning of a text that does not end; None if it is too short for that."""
    answer, limit = rejected.drawn.answer, _find_limit(chosen)
    if len(answer.think) + len(answer.answer) < limit:
        return None
    think_characters = min(len(answer.think), limit)
    side, length = _cut(answer, think_characters, limit - think_characters)
    return OutcomePair(prompt, "shorter", 0, chosen, rejected, side, length)


def _find_limit(chosen: Judged) -> int:
    """Return the number of characters at which an open side against a chosen text is cut."""
    answer = chosen.drawn.answer
    return int(_LONGER * (len(answer.think) + len(answer.answer)))


def _cut(answer: Answer, think_characters: int, answer_characters: int) -> tuple[Side, int]:
    """Return the beginning of a text as an open side, and the number of its tokens as its share of all characters.

    It may be cut anywhere: an open side is encoded up to its last token that no continuation can change. If little of the
    answer would be left, it ends with the reasoning.
    """
    think, text = answer.think[:think_characters], answer.answer[:answer_characters]
    if think.strip() and len(text) < _LEAST_STABLE:
        text = ""
    share = (len(think) + len(text)) / (len(answer.think) + len(answer.answer))
    return make_side(think, text, is_open=True), round(share * count_tokens(answer))


def _note_left_out(
    prompts: Sequence[Prompt],
    texts: Mapping[str, _Texts],
    pairs: Sequence[OutcomePair],
    dropped: Mapping[str, str],
    funnel: Funnel,
) -> None:
    """Note each prompt without a pair, and each text that is in none.

    Args:
        dropped: id of a pair that is left out -> the reason.
    """
    # Draw key of each text that was paired -> why its pair is left out; None if it is not.
    paired = {key: dropped.get(pair.id) for pair in pairs for key in pair.draws}
    for prompt in prompts:
        reasons = [paired[key] for text in texts[prompt.id].all if (key := text.drawn.key) in paired]
        if None not in reasons:
            funnel.leave_out(prompt.id, "select", reasons[0] if reasons else texts[prompt.id].description)
        for text in texts[prompt.id].all:
            if reason := paired.get(text.drawn.key, "in no pair"):
                funnel.leave_out(prompt.id, "draws", reason, text.drawn.key)
        if None in reasons:
            funnel.count("prompts", "in pairs")


def _measure_harm(pairs: Sequence[OutcomePair], funnel: Funnel) -> None:
    """Count the characters of harmful answers, as they were written and as records have them."""
    for pair in pairs:
        if pair.rejected.outcome == "harmful":
            funnel.count("harmful answers", "characters written", len(pair.rejected.drawn.answer.answer))
            funnel.count("harmful answers", "characters kept", len(pair.side["answer"]))


def _make_record(pair: OutcomePair, policy: SafetyPolicy, judge: Judge) -> dict[str, Any]:
    answer = pair.chosen.drawn.answer
    synth: Mapping[str, Any] = {
        "policy": list(policy.rule_ids(pair.prompt)),
        "draws": list(pair.draws),
        "on_policy": pair.form != "guided",
        "judge": judge.spec.name,
        "outcomes": {"chosen": pair.chosen.outcome, "rejected": pair.rejected.outcome},
        "lengths": {"chosen": count_tokens(answer), "rejected": pair.length},
    }
    return make_pair_record(
        pair.prompt,
        kind="op-cot",
        form=pair.form,
        number=pair.number,
        chosen=make_side(answer.think, answer.answer),
        rejected=pair.side,
        synth=synth,
    )
