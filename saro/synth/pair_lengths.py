"""Measures the lengths of the sides of pairs: how far they tell the chosen side, and where pairs part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from saro.data.chat_format import ChatFormat
from saro.data.records import SIDES, parse_pair
from saro.data.tree import ScoredSequence
from saro.errors import SaroError
from saro.synth.select_records import correlate


def measure_lengths(records: Iterable[Mapping[str, Any]], chat: ChatFormat | None) -> dict[str, Any] | None:
    """Return how far length tells the chosen side of pairs, as plain JSON; None if there is nothing to compare.

    {"pairs", "chosen", "rejected", "longer", "effect", "correlation"}: number of pairs with two whole texts; mean tokens of
    each side; share of pairs whose chosen side is longer, where equal lengths count half; mean of log(chosen / rejected)
    over its standard deviation, None if that is 0; and the point-biserial correlation of "is chosen" and length. The
    correlation is over all texts: lengths that differ more between prompts than within pairs hide in it what every pair
    shows. Open sides do not count: where they end is no choice.

    Args:
        records: native records; examples do not count.
        chat: format of the model; None if it is not known, and there is nothing to measure.
    """
    encoded = []
    for fields in records:
        if chat is None or "chosen" not in fields:
            continue
        try:
            encoded.append((fields, chat.encode_pair(parse_pair(dict(fields), fields["id"], fields["id"]))))
        except SaroError:
            continue
    return measure_encoded(encoded)


def measure_encoded(pairs: Sequence[tuple[Mapping[str, Any], Sequence[ScoredSequence]]]) -> dict[str, Any] | None:
    """Return what ``measure_lengths`` does of (fields of a pair, its two sequences)."""
    whole = [sequences for fields, sequences in pairs if not any(fields[side].get("open") for side in SIDES)]
    lengths = np.array([[len(s.tokens) - s.scored_from for s in sequences] for sequences in whole], np.float64).reshape(
        -1, 2
    )  # (P, 2) chosen, rejected
    correlation = correlate([True, False] * len(whole), lengths.reshape(-1).tolist())
    if correlation is None:
        return None
    chosen, rejected = lengths.mean(0)
    # Every side has at least its tags or its answer.
    ratios = np.log(lengths[:, 0] / lengths[:, 1])
    spread = ratios.std()
    figures = {
        "chosen": chosen,
        "rejected": rejected,
        "longer": (np.sign(ratios).mean() + 1) / 2,
        "effect": ratios.mean() / spread if spread > 1e-9 else None,
        "correlation": correlation,
    }
    return {"pairs": len(whole)} | {name: _round(value) for name, value in figures.items()}


def describe_lengths(lengths: Mapping[str, Any]) -> str:
    """Return what ``measure_lengths`` found as a line."""
    return (
        f"{lengths['pairs']:,} pairs of two whole texts have {lengths['chosen']:,.0f} tokens on the chosen side and "
        f"{lengths['rejected']:,.0f} on the rejected one; the chosen side is longer in {lengths['longer']:.0%}, and label and "
        f"length correlate by {lengths['correlation']:+.2f}"
    )


def measure_forks(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return where the process pairs of each form part and how long their sides are, as plain JSON; means over the pairs.

    form -> {"pairs", "shared_steps", "chosen", "rejected"}: number of pairs, steps before the fork, and tokens of each
    response, with the shared ones. Open sides count as far as they go.
    """
    by_form: dict[str, list[tuple[int, int, int]]] = {}
    for fields in records:
        synth = fields["meta"]["synth"]
        if "fork" in synth:
            lengths = synth["lengths"]
            by_form.setdefault(synth["form"], []).append(
                (synth["fork"]["step"], lengths["chosen"], lengths["rejected"])
            )
    measured = {}
    for form, rows in sorted(by_form.items()):
        means = map(_round, np.mean(rows, axis=0))
        measured[form] = {"pairs": len(rows)} | dict(zip(("shared_steps", *SIDES), means, strict=True))
    return measured


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
