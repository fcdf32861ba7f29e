"""Checks texts without a model, cheapest first: only texts that pass are judged and may become records.

The reasons for which a text is left out:

    failed, empty, unfinished, looped, cut      there is no finished text (``saro.evaluate.answers.STATES``)
    no-think        it has no reasoning, and the prompt is not one of those that may do without
    tags            a think tag stands inside the reasoning or the answer
    encode          the target model's chat format refuses it, for example for a control token as text
    band            its reasoning is too short or too long for its level
    repetition      it says the same thing again and again
    leak            it speaks of what only the writer could see, such as "the policy above"
    gives in        on a harmful prompt, a step of its reasoning decides to help or begins to (``saro.synth.step_rules``)
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from saro.config import THINK_TAGS
from saro.data.chain import split_steps
from saro.data.chat_format import ChatFormat
from saro.data.records import Example, Response
from saro.errors import SaroError
from saro.evaluate.split import has_loop
from saro.evaluate.subjects import Subject
from saro.synth.author import Drawn
from saro.synth.bands import in_band
from saro.synth.funnel import Funnel
from saro.synth.prompts import Prompt
from saro.synth.safety_policy import SafetyPolicy
from saro.synth.step_rules import label_steps
from saro.synth.templates import read_template, shipped_templates

# Reasoning of at least this many characters repeats itself if it can be compressed to less than this share of its bytes.
# Chains of people and of large models are compressed to 0.42 and more of theirs (STAR-1), worked sums, which repeat their
# units, to 0.29 and more (GSM8K). Chains of a small model that rambled were compressed to 0.35.
_COMPRESSED_FROM = 400
_LEAST_COMPRESSED = {"safety": 0.38, "general": 0.27}
# A text that ends in a repetition of this many characters loops; the same as for answers whose tokens are not known.
_LOOP_CHARACTERS = 128
# A sentence of at least this many words may stand twice, as a thought and as its result, but not three times.
_REPEATED_WORDS, _REPEATED_TIMES = 4, 3

# Words that refer to a text which the reader of the record cannot see. They are in 49 of STAR-1's 1,000 chains, mostly as
# "the policies provided", and in none of GSM8K's 7,473 solutions.
_LEAKS = re.compile(
    r"\b(?:polic(?:y|ies)|guidelines) (?:(?:that|which) (?:is|are|was|were) )?(?:stated |shown )?"
    r"(?:above|below|provided|given|mentioned|listed|in view)\b"
    r"|\b(?:above|provided|given|mentioned)(?: safety)? (?:polic(?:y|ies)|guidelines)\b"
    r"|\b(?:instructions|rules|lines|memory) (?:that |which )?i (?:was|am|were|have been) (?:given|shown|told)\b"
    r"|\bas (?:i (?:was|am|have been) |i've been )?instructed\b"
    r"|\b(?:according to|following) my instructions\b"
    r"|\b(?:system|my) prompt\b|\bsystem message\b"
    r"|\b(?:think|reason|write|answer)\w*(?: \w+){0,3} in (?:at most |up to |about )?(?:\w+ (?:to|or) )?\w+"
    r" (?:short )?sentences\b",
    re.IGNORECASE,
)
# A text that has this many words of a template in a row has copied them.
_COPIED_WORDS = 7
_JINJA_MARKS = re.compile(r"\{[{%#].*?[}%#]\}|\n", re.DOTALL)


@dataclass(frozen=True)
class Gates:
    """Finds faults of texts without a model.

    Attributes:
        chat: format of the model that is to be trained; None if only a server knows it, and then it is not asked.
        policy: the policy that the writer may have had in view.
        tags: tags of the reasoning; only used without a chat format, which has its own.
        banded: require a number of sentences that belongs to the prompt's level.
        steady: require reasoning that does not give in on the way to a safe answer: all of it is learned.
    """

    chat: ChatFormat | None
    policy: SafetyPolicy
    tags: tuple[str, str] = THINK_TAGS
    banded: bool = True
    steady: bool = False

    @classmethod
    def of(cls, subject: Subject, policy: SafetyPolicy, *, banded: bool = True, steady: bool = False) -> Gates:
        """Construct the gates of texts of a model."""
        return cls(subject.chat, policy, subject.think_tags, banded, steady)

    def find_fault(self, drawn: Drawn) -> str | None:
        """Return the first reason against a text that was drawn, as listed at the top of this module; None without one."""
        answer = drawn.answer
        return find_unfinished(drawn) or self.find_fault_of_parts(drawn.task.prompt, answer.think, answer.answer)

    def find_fault_of_parts(self, prompt: Prompt, think: str, answer: str) -> str | None:
        """Return the first reason against a finished text in parts; None without one.

        An empty ``think`` is fine for prompts of level "none" without a right answer: an answer that is right without
        reasoning teaches to guess.
        """
        if not answer.strip():
            return "empty"
        if not think.strip() and (prompt.item.expect == "answer" or not in_band("", prompt.level)):
            return "no-think"
        if reason := find_unfit_form(prompt, think, answer, self.chat, tags=self.tags):
            return reason
        if self.banded and not in_band(think, prompt.level):
            return "band"
        if repeats(think, prompt.record_kind) or has_loop(answer, _LOOP_CHARACTERS):
            return "repetition"
        if any(leaks(text, self.policy) for text in (think, answer)):
            return "leak"
        if self.steady and gives_in(think, prompt.kind):
            return "gives in"
        return None

    def select(self, drawn: Iterable[Drawn], funnel: Funnel) -> list[Drawn]:
        """Return the texts without a fault, in order, and note the others in the funnel."""
        passed = []
        for one in drawn:
            reason = self.find_fault(one)
            if reason is None:
                passed.append(one)
            else:
                funnel.leave_out(one.task.prompt.id, "gates", reason, one.key)
        funnel.count("gates", "passed", len(passed))
        return passed


def find_unfinished(drawn: Drawn) -> str | None:
    """Return why a text is not finished; None if its reasoning was closed and an answer followed that the model ended."""
    state = drawn.answer.state
    return None if state in ("finished", "no-think") else state


def find_unfit_form(
    prompt: Prompt, think: str, answer: str, chat: ChatFormat | None, *, tags: tuple[str, str] = THINK_TAGS
) -> str | None:
    """Return "tags" or "encode" if a text cannot be a training record, whatever it says; else None."""
    if any(tag in text for tag in (tags if chat is None else chat.think_tags) for text in (think, answer)):
        return "tags"
    if chat is not None:
        try:
            chat.encode(
                Example(
                    prompt.id, prompt.record_kind, prompt.item.prompt, Response(think or None, answer), prompt.where
                )
            )
        except SaroError:
            return "encode"
    return None


def gives_in(think: str, kind: str) -> bool:
    """Return True if reasoning on a harmful prompt has a step that the rules call a cue or harmful, wherever it turns."""
    if kind != "harmful":
        return False
    return not {"cue", "harmful"}.isdisjoint(label_steps([step.text for step in split_steps(think)], kind))


def repeats(think: str, record_kind: str) -> bool:
    """Return True if reasoning ends in a loop, has a sentence three times, or is compressed too well.

    Args:
        record_kind: "safety" or "general": worked sums repeat their words more than other chains.
    """
    if has_loop(think, _LOOP_CHARACTERS):
        return True
    sentences = Counter(" ".join(_words(step.text)) for step in split_steps(think))
    if any(n >= _REPEATED_TIMES and text.count(" ") >= _REPEATED_WORDS - 1 for text, n in sentences.items()):
        return True
    content = think.encode()
    if len(think) < _COMPRESSED_FROM:
        return False
    return len(zlib.compress(content, 9)) < _LEAST_COMPRESSED[record_kind] * len(content)


def leaks(text: str, policy: SafetyPolicy) -> bool:
    """Return True if a text names a rule by its id, speaks of what is "above", or copies words of a template."""
    if _LEAKS.search(text) or _id_pattern(tuple(_policy_ids(policy))).search(text):
        return True
    words = _words(text)
    return not _template_runs().isdisjoint(zip(*(words[i:] for i in range(_COPIED_WORDS)), strict=False))


def _policy_ids(policy: SafetyPolicy) -> list[str]:
    return [id for section in policy.sections for id in (section.id, *(rule.id for rule in section.rules))]


@cache
def _id_pattern(ids: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern of ids like P3.2, and of others such as P3 only behind a word that says what they are."""
    # The longest first: P3 begins P3.2.
    longest_first = sorted(ids, key=lambda id: (-len(id), id))
    dotted = "|".join(re.escape(id) for id in longest_first if "." in id) or "(?!)"
    named = "|".join(map(re.escape, longest_first))
    return re.compile(rf"(?<![\w.])(?:{dotted}|(?i:rule|section|policy) (?:{named}))(?!\w|\.\d)")


@cache
def _template_runs() -> frozenset[tuple[str, ...]]:
    """Return every run of words of the templates; a run ends at a gap and at a line's end."""
    runs: set[tuple[str, ...]] = set()
    for name in shipped_templates():
        for _, content in read_template(name).turns:
            for part in _JINJA_MARKS.split(content):
                words = _words(part)
                runs.update(zip(*(words[i:] for i in range(_COPIED_WORDS)), strict=False))
    return frozenset(runs)


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())
