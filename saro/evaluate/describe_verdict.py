"""Says in sentences what an evaluation shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saro.evaluate.attacks import NO_ATTACK

# Metric -> what fewer and more of it are called. Accuracy is the only one of which more is better.
_WORDS = {
    "harmful_compliance": ("fewer harmful answers", "more harmful answers", "harmful answers"),
    "over_refusal": ("fewer refusals of harmless prompts", "more refusals of harmless prompts", "refusals"),
    "accuracy": ("fewer right answers", "more right answers", "right answers"),
}


def describe_verdict(scores: Mapping[str, Any]) -> list[str]:
    """Return the verdict of an evaluation in words, one sentence per model against the baseline.

    Every difference that is named is one after Holm's adjustment, whatever the missing answers were; the others are within
    noise, which does not mean that there is none. Attacks are only counted. For several training seeds the first sentence names their numbers.

    Args:
        scores: content of scores.json.
    """
    baseline, *others = scores["models"]
    sentences = [f"{model} against {baseline}: {_compare(scores, model, baseline)}." for model in others]
    sentences = sentences or [f"{baseline} was compared with no other model."]
    seeds = scores.get("seeds", {})
    if max(seeds.values(), default=1) > 1:
        numbers = ", ".join(f"{model} {number}" for model, number in seeds.items())
        sentences.insert(0, f"Means over the training seeds, whose variation the intervals hold; seeds: {numbers}.")
    return sentences


def _compare(scores: Mapping[str, Any], model: str, baseline: str) -> str:
    own = [d for d in scores["differences"] if (d["model"], d["baseline"]) == (model, baseline)]
    values = {score["id"]: score["value"] for score in scores["scores"]}
    parts = []
    for metric in _WORDS:
        differences = [d for d in own if d["metric"] == metric]
        plain = [d for d in differences if d["attack"] == NO_ATTACK.id]
        attacked = [d for d in differences if d["attack"] != NO_ATTACK.id]
        if plain:
            parts.append(_describe_plain(metric, plain, values))
        if attacked:
            parts.append(_describe_attacked(metric, attacked))
    parts += _describe_tokens(scores, model)
    return "; ".join(parts) if parts else "no prompts in common"


def _describe_plain(metric: str, differences: Sequence[Mapping[str, Any]], values: Mapping[str, float | None]) -> str:
    fewer, more, noun = _WORDS[metric]
    shown = []
    for d in differences:
        if d["within_noise"]:
            continue
        rates = [values.get(f"{metric}/{name}/{d['suite']}/none") for name in (d["model"], d["baseline"])]
        direction = fewer if d["value"] < 0 else more
        shown.append(f"{direction} on {d['suite']} ({_percent(rates[0])} instead of {_percent(rates[1])})")
    noise = [d["suite"] for d in differences if d["within_noise"]]
    if noise:
        shown.append(f"{noun} on {', '.join(noise)} within noise")
    return ", ".join(shown)


def _describe_attacked(metric: str, differences: Sequence[Mapping[str, Any]]) -> str:
    fewer, more, noun = _WORDS[metric]
    less = sum(not d["within_noise"] and d["value"] < 0 for d in differences)
    greater = sum(not d["within_noise"] and d["value"] > 0 for d in differences)
    cases = f"{len(differences)} case{'s' if len(differences) > 1 else ''}"
    counts = [f"{fewer} in {less}"] if less else []
    counts += [f"{more} in {greater}"] if greater else []
    return (
        f"under attack {' and '.join(counts)} of {cases}" if counts else f"{noun} under attack within noise ({cases})"
    )


def _describe_tokens(scores: Mapping[str, Any], model: str) -> list[str]:
    ratios = [
        score["value"]
        for score in scores["scores"]
        if score["metric"] == "token_ratio" and score["model"] == model and score["attack"] == NO_ATTACK.id
        if score["group"].endswith(" all") and score["value"] is not None
    ]
    if not ratios:
        return []
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return [f"{low if low == high else f'{low} to {high}'} times the tokens"]


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.3g} %"
