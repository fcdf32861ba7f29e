"""Writes process pairs as labelled steps, in the form that TRL trains process reward models on.

TRL calls the form "stepwise supervision": {"prompt": text, "completions": [steps], "labels": [true or false]}, where a step is
labelled by itself: right until something goes wrong (Lightman et al. 2023, arXiv 2305.20050). The labels of saro's pairs need
no reader of steps, because the fork of a pair is the place where something went wrong:

    intervene, sibling   the step behind the fork decides for the wrong outcome: it and what follows are wrong
    recover, mirror      so does the last shared step. It is wrong on the chosen side too, which comes back after it
    earlier              both sides end well: the chosen one is all right, the other one is left out

Rollouts and cues may find different places in one chain. If one pair calls a step right and another one calls it wrong
behind the same beginning, all chains with this step are left out: there is no telling which one to believe.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saro.data.chain import split_steps
from saro.data.jsonl import fault, read_objects
from saro.data.published import check_target
from saro.data.record_fields import get_synth
from saro.data.records import Pair, Response, parse_pair
from saro.files import atomic_write

# Form -> steps from the fork to the step that decides; None if no step is wrong.
_DECISIVE: Mapping[str, int | None] = {"intervene": 0, "sibling": 0, "recover": -1, "mirror": -1, "earlier": None}
# Forms whose chosen side has the deciding step in the shared beginning.
_SHARED = ("recover", "mirror")


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        chains: number of lines written.
        steps, right: number of their steps, and of those that are right.
        left_out: reason -> number of sides.
    """

    chains: int
    steps: int
    right: int
    left_out: Mapping[str, int]


def export_prm(src: str | os.PathLike, dst: str | os.PathLike, *, overwrite: bool = False) -> Exported:
    """Write the sides of process pairs as chains of labelled steps, each chain once, in the order of the pairs.

    The answer is no step. Pairs without a fork and prompts of several turns are left out: the form has one text.

    Args:
        src: JSONL file of pairs that `saro synth pp` or `saro synth mirror` made.
        dst: JSONL file to write; it appears complete or not at all.

    Raises:
        SaroError: ``src`` cannot be read or holds no process pair or only contradictions, a fork does not fit its chains, or ``dst`` exists and
            may not be overwritten.
    """
    check_target(src, dst, overwrite)
    left_out: Counter[str] = Counter()
    lines: dict[str, dict[str, Any]] = {}
    for _, where, fields in read_objects(src):
        pair = parse_pair(fields, where, where)
        for line in _make_lines(pair, fields, left_out):
            text = json.dumps(line, ensure_ascii=False)
            if text in lines:
                left_out["the chain of another pair"] += 1
            lines[text] = line
    if not lines:
        fault(os.fsdecode(src), "holds no process pair that can be exported", "give the output of saro synth pp")
    sound = _drop_contradictions(lines)
    if not sound:
        fault(os.fsdecode(src), "calls a step of every chain both right and wrong", "export fewer forms")
    if len(sound) < len(lines):
        left_out["its labels contradict another chain's"] = len(lines) - len(sound)
    with atomic_write(dst) as file:
        # Only for their owner, as the records are: chains may be harmful.
        os.chmod(file.name, 0o600)
        for text in sound:
            file.write(text + "\n")
    labels = [label for line in sound.values() for label in line["labels"]]
    return Exported(len(sound), len(labels), sum(labels), dict(sorted(left_out.items())))


def _drop_contradictions(lines: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the lines without those that have a step with another label than the same step, behind the same ones, elsewhere."""
    labels: dict[tuple[str, ...], set[bool]] = {}
    for line in lines.values():
        for beginning, label in zip(_find_beginnings(line), line["labels"], strict=True):
            labels.setdefault(beginning, set()).add(label)
    return {
        text: line
        for text, line in lines.items()
        if all(len(labels[beginning]) == 1 for beginning in _find_beginnings(line))
    }


def _find_beginnings(line: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the prompt with the steps up to and with each one."""
    steps: Sequence[str] = line["completions"]
    return [(line["prompt"], *steps[: end + 1]) for end in range(len(steps))]


def _make_lines(pair: Pair, fields: Mapping[str, Any], left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the chosen and the rejected chain of a pair with labels, as far as they have some."""
    synth = get_synth(fields)
    form, fork = synth.get("form"), synth.get("fork")
    if form not in _DECISIVE or not isinstance(fork, dict) or not isinstance(fork.get("step"), int):
        left_out["no process pair"] += 2
        return
    if not isinstance(pair.prompt, str) and len(pair.prompt) > 1:
        left_out["a prompt of several turns"] += 2
        return
    prompt = pair.prompt if isinstance(pair.prompt, str) else pair.prompt[0].content
    decisive = None if _DECISIVE[form] is None else fork["step"] + _DECISIVE[form]
    chosen = _split(pair.chosen)
    labels = [not (form in _SHARED and step == decisive) for step in range(len(chosen))]
    yield {"prompt": prompt, "completions": chosen, "labels": labels}
    if decisive is None:
        left_out["a side that ends well"] += 1
        return
    rejected = _split(pair.rejected)
    if not 0 <= decisive < len(rejected):
        fault(
            pair.where,
            f"its fork is after step {fork['step']}, and its rejected side has {len(rejected)} steps",
            "drop it",
        )
    if fields["rejected"].get("open"):
        # It was cut some tokens after that step, inside another one, or inside that step if it does harm.
        rejected = rejected[: decisive + 1]
    yield {"prompt": prompt, "completions": rejected, "labels": [step < decisive for step in range(len(rejected))]}


def _split(response: Response) -> list[str]:
    return [step.text for step in split_steps(response.reasoning or "")]
