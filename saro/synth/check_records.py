"""Checks files of records as a reader who does not trust who made them: everything is computed again from the records."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from saro.data.chain import split_steps
from saro.data.chat_format import ChatFormat
from saro.data.jsonl import fault
from saro.data.messages import as_messages, normalise_prompt
from saro.data.read_rows import read_rows
from saro.data.record_fields import READ_COLUMNS, get_synth
from saro.data.records import Example, Pair, Response, parse_example, parse_pair
from saro.data.tree import RowKind, ScoredSequence, common_prefix
from saro.errors import SaroError
from saro.evaluate.answers import Answer
from saro.evaluate.outcomes import find_outcome
from saro.evaluate.rules import RULES, judge_by_rules
from saro.evaluate.suite import Item
from saro.synth.branch import find_fork
from saro.synth.gates import leaks
from saro.synth.judgement import BAD, GOOD
from saro.synth.pair_lengths import describe_lengths, measure_encoded
from saro.synth.safety_policy import SafetyPolicy

# Largest difference of the shares of pairs in which the chosen side is the longer and the shorter one: beyond, a model may
# learn lengths instead. At 0.3, one who only looks at the lengths of a pair is right in 65 %.
_MOST_ONE_SIDED = 0.3
# Fewest records on harmless prompts for each on a harmful one: with none, models learn to refuse what only sounds harmful.
_LEAST_HARMLESS = 0.1
# Least share of answers on which the judge and the rules agree. The rules take help with the safe part of a harmful
# request for compliance, so they need not agree on all.
_LEAST_AGREEMENT = 0.7
# What a good answer to each kind of prompt does.
_EXPECT = {"harmful": "refuse", "harmless": "comply"}


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Attributes:
        check: its name.
        passed: False if something is wrong with the records.
        text: what was found, and for a fault the first places and what to do; no text of a record.
        is_warning: True if nothing is known to be wrong, but people should look at it.
    """

    check: str
    passed: bool
    text: str
    is_warning: bool = False


@dataclass(frozen=True)
class CheckedRecord:
    """One record of a file.

    Attributes:
        where: "file.jsonl:17".
        fields: as in the file.
        record: as our readers read it.
        sequences: its token ids, one or two sequences; None if it cannot be encoded.
        error: why it cannot be encoded; empty if it can.
    """

    where: str
    fields: Mapping[str, Any]
    record: Example | Pair
    sequences: tuple[ScoredSequence, ...] | None
    error: str = ""

    @property
    def synth(self) -> Mapping[str, Any]:
        """``meta.synth``; empty for records of other origin."""
        return get_synth(self.fields)

    @property
    def is_pair(self) -> bool:
        """True for a pair."""
        return isinstance(self.record, Pair)

    @property
    def kind(self) -> str:
        """The kind of its prompt; that of the record if it does not say."""
        return self.synth.get("kind", self.record.kind)


def read_records(files: Sequence[str], chat: ChatFormat) -> list[CheckedRecord]:
    """Read and encode the records of files, which may hold examples and pairs.

    Raises SaroError for a file or a record that cannot be read.
    """
    records = []
    for file in files:
        for line, where, fields in read_rows(file, READ_COLUMNS):
            is_pair = fields.get("chosen") is not None or fields.get("rejected") is not None
            record = (parse_pair if is_pair else parse_example)(fields, where, f"{file}:{line}")
            sequences, error = None, ""
            try:
                sequences = chat.encode_pair(record) if is_pair else (chat.encode(record),)
            except SaroError as raised:
                error = str(raised)
            records.append(CheckedRecord(where, fields, record, sequences, error))
    return records


def check_records(
    records: Sequence[CheckedRecord], chat: ChatFormat, policy: SafetyPolicy, *, sample: int = 200, seed: int = 0
) -> list[CheckResult]:
    """Return the results of all checks.

    Args:
        chat: format of the model that is to be trained, with which the records were read.
        policy: what the writer had in view.
        sample: compare the verdicts on this many answers with those of the rules.
        seed: chooses the sample.
    """
    return [
        _check_encoding(records),
        _check_duplicates(records),
        _check_forks(records, chat),
        _check_leaks(records, policy),
        _check_lengths(records),
        _check_balance(records),
        _check_verdicts(records, sample, seed),
        _describe_tokens(records),
    ]


def _check_encoding(records: Sequence[CheckedRecord]) -> CheckResult:
    wrong = [one for one in records if one.sequences is None]
    if wrong:
        return CheckResult("encoding", False, f"{len(wrong):,} records cannot be encoded; the first: {wrong[0].error}")
    return CheckResult("encoding", True, f"{len(records):,} records are encoded as in training")


def _check_duplicates(records: Sequence[CheckedRecord]) -> CheckResult:
    """Find examples on one prompt, pairs of one form that say the same, and pairs of any forms that say the opposite."""
    prompts: Counter[Any] = Counter()
    pairs: Counter[Any] = Counter()
    orders: set[Any] = set()
    double, opposite = [], []
    for one in records:
        record = one.record
        prompt = normalise_prompt(record.prompt)
        if not one.is_pair:
            prompts[prompt] += 1
            if prompts[prompt] > 1:
                double.append(one.where)
            continue
        form = one.synth.get("form")
        pairs[form, prompt, record.chosen, record.rejected] += 1
        if pairs[form, prompt, record.chosen, record.rejected] > 1:
            double.append(one.where)
        orders.add((prompt, record.chosen, record.rejected))
        if (prompt, record.rejected, record.chosen) in orders:
            opposite.append(one.where)
    faults = []
    if double:
        faults.append(f"{len(double):,} repeat another one's prompt, or a whole pair ({_first(double)})")
    if opposite:
        faults.append(f"{len(opposite):,} pairs are the reverse of another ({_first(opposite)})")
    if faults:
        return CheckResult("duplicates", False, "; ".join(faults) + "; drop them")
    return CheckResult("duplicates", True, "no prompt has two examples, and no pair is there twice or reversed")


def _check_forks(records: Sequence[CheckedRecord], chat: ChatFormat) -> CheckResult:
    """Check that both sides of each pair share all steps before the recorded fork, in this model's tokens."""
    forked = [one for one in records if one.sequences is not None and one.synth.get("fork") is not None]
    if not forked:
        return CheckResult("forks", True, "no record has a fork")
    early, other = [], 0
    for one in forked:
        shared = common_prefix([sequence.tokens for sequence in one.sequences])
        # One less: a model may have continued with text that merges with the last token before the fork.
        if shared < _count_before_fork(one, chat) - 1:
            early.append(one.where)
        other += shared != one.synth["fork"].get("token")
    if early:
        return CheckResult(
            "forks",
            False,
            f"{len(early):,} of {len(forked):,} pairs part before their fork ({_first(early)}); drop them",
        )
    text = f"{len(forked):,} pairs share all tokens before their fork"
    if other:
        text += f"; {other:,} were made with a model that has other tokens"
    return CheckResult("forks", True, text)


def _count_before_fork(one: CheckedRecord, chat: ChatFormat) -> int:
    """Return the tokens of the prompt and of the steps before the fork that no continuation can change."""
    think, number = one.record.chosen.reasoning or "", one.synth["fork"]["step"]
    steps = split_steps(think)
    if not 0 <= number <= len(steps):
        fault(one.where, f"its fork is after step {number}, and its chosen side has {len(steps)} steps", "drop it")
    try:
        return len(find_fork(chat, one.record.prompt, think[: steps[number - 1].stop] if number else "").ids)
    except SaroError as error:
        raise SaroError(f"{one.where}: {error}") from error


def _check_leaks(records: Sequence[CheckedRecord], policy: SafetyPolicy) -> CheckResult:
    """Find texts to be learned that speak of what only the writer saw."""
    found = []
    for one in records:
        response = one.record.chosen if one.is_pair else one.record.response
        if any(leaks(text, policy) for text in (response.reasoning or "", response.answer or "")):
            found.append(one.where)
    if found:
        return CheckResult(
            "leaks",
            False,
            f"{len(found):,} texts to learn speak of the policy or a prompt ({_first(found)}); drop them",
        )
    return CheckResult("leaks", True, "no text to learn speaks of the policy or a prompt")


def _check_lengths(records: Sequence[CheckedRecord]) -> CheckResult:
    """Check that lengths do not tell the sides apart: neither over all pairs, nor on the prompts of one kind."""
    pairs = [one for one in records if one.is_pair and one.sequences is not None]
    lengths = _measure_whole(pairs)
    if lengths is None:
        return CheckResult("lengths", True, "no pair has two whole texts of different length")
    text = describe_lengths(lengths)
    if _is_one_sided(lengths):
        return CheckResult(
            "lengths", False, f"{text}; a model can tell the sides by their length: draw more texts, or drop pairs"
        )
    by_kind = {
        kind: _measure_whole([one for one in pairs if one.kind == kind]) for kind in sorted({one.kind for one in pairs})
    }
    hidden = [
        f"in {found['longer']:.0%} of {found['pairs']:,} on {kind} prompts"
        for kind, found in by_kind.items()
        if found is not None and _is_one_sided(found)
    ]
    if hidden:
        wrong = f"but {' and '.join(hidden)}, and a model knows the kind: draw more texts, or drop pairs"
        return CheckResult("lengths", True, f"{text}; {wrong}", is_warning=True)
    return CheckResult("lengths", True, text)


def _measure_whole(pairs: Sequence[CheckedRecord]) -> dict[str, Any] | None:
    return measure_encoded([(one.fields, one.sequences) for one in pairs])


def _is_one_sided(lengths: Mapping[str, Any]) -> bool:
    # With few pairs, chance alone gives a larger difference: two standard errors of equal shares.
    return abs(2 * lengths["longer"] - 1) > max(_MOST_ONE_SIDED, 2 / sqrt(lengths["pairs"]))


def _check_balance(records: Sequence[CheckedRecord]) -> CheckResult:
    kinds = Counter(one.kind for one in records)
    forms = Counter(one.synth["form"] for one in records if "form" in one.synth)
    text = f"prompts: {_list_counts(kinds)}" + (f"; forms: {_list_counts(forms)}" if forms else "")
    if kinds["harmless"] < _LEAST_HARMLESS * kinds["harmful"]:
        return CheckResult(
            "balance",
            False,
            f"{text}; too few are on harmless prompts, and a model would learn to refuse them: add twins or stage mirror, "
            "and check all files of one training together",
        )
    return CheckResult("balance", True, text)


def _check_verdicts(records: Sequence[CheckedRecord], sample: int, seed: int) -> CheckResult:
    """Compare the outcomes that the judge gave with those of the rules, on a sample of answers."""
    by_rules = sum(one.kind == "harmful" and one.synth.get("judge") == RULES for one in records)
    only_rules = f"{by_rules:,} records on harmful prompts: rules only: not compared; the rules call all harmful that does not refuse"
    sides = [(one, name, outcome) for one in records for name, outcome in _judged_sides(one)]
    if not sides:
        text = "no answer was judged by a model, so there is nothing to compare with the rules"
        return CheckResult("verdicts", True, only_rules if by_rules else text, is_warning=by_rules > 0)
    chosen = sorted(sides, key=lambda side: hashlib.sha256(f"{seed}/{side[0].record.id}/{side[1]}".encode()).digest())[
        :sample
    ]
    differ = [one.where for one, name, outcome in chosen if _is_good_by_rules(one, name) != (outcome in GOOD)]
    share = 1 - len(differ) / len(chosen)
    text = f"judge and rules agree on {share:.0%} of {len(chosen):,} answers"
    if share < _LEAST_AGREEMENT:
        return CheckResult(
            "verdicts", False, f"{text} ({_first(differ)}); read some, and check the judge with judge-check"
        )
    return CheckResult("verdicts", True, f"{text}; {only_rules}" if by_rules else text, is_warning=by_rules > 0)


def _judged_sides(one: CheckedRecord) -> list[tuple[str, str]]:
    """Return (name, outcome) of the whole answers to harmful or harmless prompts that a judge model has read."""
    if one.synth.get("judge", RULES) == RULES or one.kind not in _EXPECT:
        return []
    if not one.is_pair:
        return [("response", "safe" if one.kind == "harmful" else "helped")] if one.synth.get("on_policy") else []
    outcomes = one.synth.get("outcomes") or {}
    return [
        (name, outcomes[name])
        for name in ("chosen", "rejected")
        if outcomes.get(name) in (*GOOD, *BAD) and not one.fields[name].get("open")
    ]


def _is_good_by_rules(one: CheckedRecord, name: str) -> bool:
    response: Response = getattr(one.record, name)
    item = Item("checked", one.record.id, as_messages(one.record.prompt), _EXPECT[one.kind])
    answer = Answer(
        key=one.record.id,
        model="",
        suite=item.suite,
        attack="none",
        item=item.id,
        number=0,
        draw="",
        think=response.reasoning or "",
        answer=response.answer,
        tokens={},
        state="finished",
    )
    return find_outcome(item, answer, judge_by_rules(item, answer)) in GOOD


def _describe_tokens(records: Sequence[CheckedRecord]) -> CheckResult:
    """Return the mean tokens of the reasoning to be learned, by the level of the prompt."""
    by_level: dict[str, list[int]] = {}
    for one in records:
        if one.sequences is not None:
            tokens = int((one.sequences[0].row_kinds == RowKind.THINK).sum())
            by_level.setdefault(one.synth.get("level", "unknown"), []).append(tokens)
    listed = ", ".join(f"{level} {sum(values) / len(values):,.0f}" for level, values in sorted(by_level.items()))
    return CheckResult("tokens", True, f"reasoning to learn, in tokens on average by level: {listed}")


def _first(places: Sequence[str]) -> str:
    return ", ".join(places[:3]) + (", ..." if len(places) > 3 else "")


def _list_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in sorted(counts.items()))
