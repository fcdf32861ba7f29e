"""Selects outcome pairs: as many on harmful prompts as on harmless ones, and of no form more than its largest share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from saro.synth.judgement import Judged
from saro.synth.prompts import Prompt
from saro.synth.select_records import Candidate, cap_shares, cell_of, choose_balanced
from saro.synth.synth_options import Options
from saro.synth.synth_records import Side


@dataclass(frozen=True)
class OutcomePair:
    """A pair of whole texts of one prompt, before the selection.

    Attributes:
        prompt, form, number: as in ``make_pair_record``.
        chosen, rejected: the two texts. A rejected text that has no outcome has its state instead.
        side: the rejected side.
        length: number of tokens of the rejected side.
    """

    prompt: Prompt
    form: str
    number: int
    chosen: Judged
    rejected: Judged
    side: Side
    length: int

    @property
    def id(self) -> str:
        """The id of its record."""
        return f"{self.prompt.id}-{self.form}-{self.number}"

    @property
    def draws(self) -> tuple[str, str]:
        """Draw keys of its texts. Each text is in one pair at most."""
        return self.chosen.drawn.key, self.rejected.drawn.key

    @property
    def candidate(self) -> Candidate:
        """The pair as something to choose."""
        return Candidate(self.id, cell_of(self.prompt, self.chosen.outcome), self.number)


def select_pairs(pairs: Sequence[OutcomePair], options: Options) -> tuple[list[OutcomePair], dict[str, str]]:
    """Return the pairs to keep, in their order, and why the others are left out, by their ids.

    What is kept is balanced, and no form has more than its largest share. A form that is cut back may upset the balance, and
    fewer pairs may hold fewer of a form. So both are done until nothing changes.
    """
    dropped: dict[str, str] = {}
    kept = list(pairs)
    while True:
        surplus = _balance(kept, options.seed) if options.op.balance else {}
        surplus |= _cap([pair for pair in kept if pair.id not in surplus], options)
        if not surplus:
            return kept, dropped
        dropped |= surplus
        kept = [pair for pair in kept if pair.id not in surplus]


def _cap(pairs: Sequence[OutcomePair], options: Options) -> dict[str, str]:
    """Return the pairs that the largest shares of their forms do not allow, by their ids, with the reason."""
    shares = {"guided": options.op.guided, "shorter": options.op.shorter}
    available = Counter(pair.form for pair in pairs)
    numbers = cap_shares(available["outcome"], {form: available[form] for form in shares}, shares)
    dropped: dict[str, str] = {}
    for form, number in numbers.items():
        candidates = [pair.candidate for pair in pairs if pair.form == form]
        chosen = set(choose_balanced(candidates, number, options.seed))
        reason = f"largest share of form {form}"
        dropped |= {one.id: reason for one in candidates if one.id not in chosen}
    return dropped


def _balance(pairs: Sequence[OutcomePair], seed: int) -> dict[str, str]:
    """Return the pairs of harmful prompts, or of harmless ones, that are too many, by their ids, with the reason.

    Those of form "shorter" say nothing of harm, and do not count.
    """
    prompts = {pair.prompt.id for pair in pairs}
    groups = [
        [pair for pair in pairs if pair.prompt.kind == kind and pair.form != "shorter"]
        for kind in ("harmful", "harmless")
    ]
    number = min(map(len, groups))
    dropped: dict[str, str] = {}
    for group in groups:
        chosen: set[str] = set()
        for is_with_twin in (True, False):
            candidates = [pair.candidate for pair in group if (pair.prompt.item.twin in prompts) is is_with_twin]
            chosen.update(choose_balanced(candidates, number - len(chosen), seed))
        reason = "balance of harmful and harmless prompts"
        dropped |= {pair.id: reason for pair in group if pair.id not in chosen}
    return dropped
