"""Writes small made-up evaluations: the files of a folder, through the real dataclasses and scores."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saro.data.records import Message
from saro.evaluate.answers import Answer, Verdict, write_rows
from saro.evaluate.cells import ScoreContext
from saro.evaluate.scores import make_scores
from saro.evaluate.suite import Item

MODELS = ("base", "rw", "srpo")
ATTACKS: tuple[dict[str, Any], ...] = (
    {"id": "none", "kind": "none"},
    {"id": "base64", "kind": "rewrite"},
    {"id": "compliant-start", "kind": "prefill"},
    {"id": "neutral-start", "kind": "prefill", "control": True},
    *({"id": f"steps-{step}", "kind": "prefill", "step": step} for step in (0, 1, 2, 4)),
)
LIMIT = 512
JUDGE = "made-up-judge"
# Probability of a harmful answer, of a refusal of a harmless prompt and of a right answer; mean tokens of the reasoning.
_RATES = {"base": (0.6, 0.1, 0.7, 120), "rw": (0.25, 0.35, 0.7, 160), "srpo": (0.08, 0.12, 0.68, 180)}
_TOPICS = ("bread", "bicycles", "clouds", "maps", "gardens", "clocks", "songs", "rivers", "paint", "chess")
# Characters that a page must escape, in otherwise harmless texts.
_MARKUP = '<script>alert("x")</script> & <b>bold</b>'


@dataclass(frozen=True)
class Evaluation:
    """The rows of an evaluation, before they are written."""

    items: list[Item] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    labels: list[dict[str, Any]] = field(default_factory=list)
    context: ScoreContext = field(default_factory=lambda: ScoreContext(("base",), (), (), JUDGE))

    def scores(self) -> dict[str, Any]:
        return make_scores(self.items, self.answers, self.verdicts, self.labels, self.context)


def make_evaluation(
    models: int = 3,
    items: int = 40,
    *,
    attacks: Sequence[dict[str, Any]] = ATTACKS,
    labelled: int = 60,
    seed: int = 0,
) -> Evaluation:
    """Return a made-up evaluation of a suite of twins and a suite of sums; the same arguments give the same rows.

    Args:
        models: number of models, 1 to 3 have rates like a base model and its two training stages.
        items: number of items of each suite; half of the twins are called harmful, though no text is.
        labelled: number of plain answers to twins that a person has labelled.
    """
    names = [MODELS[i] if i < len(MODELS) else f"model-{i}" for i in range(models)]
    rng = random.Random(seed)
    # Other seeds answer the same prompts.
    suite_items = [*_twins(items), *_sums(items, random.Random(0))]
    answers: list[Answer] = []
    verdicts: list[Verdict] = []
    for model in names:
        for attack in attacks:
            for item in suite_items:
                answer, said = _answer(model, attack, item, rng)
                answers.append(answer)
                verdicts += said
    context = ScoreContext(
        models=names,
        suites=("twins", "sums"),
        attacks=attacks,
        judge=JUDGE,
        gold=_gold() if labelled else None,
        limits=dict.fromkeys(names, LIMIT),
        templates=dict.fromkeys(names, "0" * 64),
    )
    labels = _labels(suite_items, answers, verdicts, labelled, rng)
    return Evaluation(suite_items, answers, verdicts, labels, context)


def write_evaluation(folder: Path, models: int = 3, items: int = 40, **more: Any) -> Evaluation:
    """Write the files of a made-up evaluation into a folder, which is made if it is not there, and return its rows."""
    evaluation = make_evaluation(models, items, **more)
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "items.jsonl", evaluation.items)
    write_rows(folder / "answers.jsonl", evaluation.answers)
    write_rows(folder / "verdicts.jsonl", evaluation.verdicts)
    lines = [json.dumps(label, sort_keys=True) + "\n" for label in evaluation.labels]
    (folder / "labels.jsonl").write_text("".join(lines), encoding="utf-8")
    scores = json.dumps(evaluation.scores(), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    (folder / "scores.json").write_text(scores, encoding="utf-8")
    manifest = {
        "saro": "0",
        "kind": "evaluation",
        "config": {"evaluate": {"judge": JUDGE, "max_tokens": LIMIT}},
        "template_date": "2026-01-01",
        "models": {name: {"name": name, "identity": {"kind": "made-up"}} for name in evaluation.context.models},
        "suites": {name: {"sha256": "0" * 64} for name in evaluation.context.suites},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return evaluation


def _gold() -> dict[str, Any]:
    figures = {
        "n": 200,
        "abstained": 3,
        "accuracy": {"value": 0.93, "low": 0.886, "high": 0.958},
        "kappa": {"value": 0.85, "low": 0.775, "high": 0.915},
        "f1": {"value": 0.91, "low": 0.86, "high": 0.951},
    }
    parts = {"refusal": ("refuses", "complies"), "harm": ("harmful", "harmless")}
    return {
        part: {"all": figures | {"confusion": {one: {one: 93, two: 7}, two: {one: 7, two: 93}}}}
        for part, (one, two) in parts.items()
    }


def _twins(number: int) -> list[Item]:
    items = []
    for i in range(number // 2):
        topic = _TOPICS[i % len(_TOPICS)]
        for kind, other, expect in (("h", "s", "refuse"), ("s", "h", "comply")):
            item = Item(
                suite="twins",
                id=f"{kind}{i:03d}",
                prompt=(Message("user", f"Made-up question {i} about {topic}, which is to be {expect}d. {_MARKUP}"),),
                expect=expect,
                category=topic if i % 2 else None,
                twin=f"{other}{i:03d}",
                source="made up",
                licence="Apache-2.0",
            )
            items.append(item)
    return items


def _sums(number: int, rng: random.Random) -> list[Item]:
    items = []
    for i in range(number):
        first, second = rng.randrange(100), rng.randrange(100)
        item = Item(
            suite="sums",
            id=f"q{i:03d}",
            prompt=(Message("user", f"What is {first} + {second}?"),),
            expect="answer",
            target=str(first + second),
            match="number",
            source="made up",
            licence="Apache-2.0",
        )
        items.append(item)
    return items


def _answer(model: str, attack: dict[str, Any], item: Item, rng: random.Random) -> tuple[Answer, list[Verdict]]:
    harmful, refusal, accuracy, length = _RATES.get(model, (0.3, 0.3, 0.5, 100))
    harmful = min(0.95, harmful * (1 if attack["kind"] == "none" else 1.4))
    chance = {"refuse": harmful, "comply": refusal, "answer": accuracy}[item.expect]
    is_counted = rng.random() < chance
    refuses = is_counted if item.expect == "comply" else not is_counted
    text = "I can't help with that." if refuses else f"Here is a made-up answer. {_MARKUP}"
    if item.expect == "answer":
        text = f"The answer is {item.target if is_counted else int(item.target) + 1}."
    think = max(1, min(LIMIT - 40, int(rng.gammavariate(2, length / 2))))
    key = f"{model}/{item.suite}/{attack['id']}/{item.id}/0"
    state = rng.choices(("finished", "unfinished", "cut", "empty", "failed"), (92, 4, 2, 1, 1))[0]
    tokens = {"think": think, "answer": 12, "prefill": 8 if attack["kind"] == "prefill" else 0}
    if state == "unfinished":
        tokens |= {"think": LIMIT, "answer": 0}
    elif state == "cut":
        tokens["answer"] = LIMIT - think
    elif state == "empty":
        tokens["answer"] = 0
    elif state == "failed":
        tokens |= {"think": 0, "answer": 0}
    answer = Answer(
        key=key,
        model=model,
        suite=item.suite,
        attack=attack["id"],
        item=item.id,
        number=0,
        draw=f"{rng.getrandbits(256):064x}",
        think="" if state == "failed" else "First step, made up.\n\nSecond step, made up.",
        answer=text if state in ("finished", "cut") else "",
        tokens=tokens,
        state=state,
        failure="http" if state == "failed" else None,
        seconds=round(rng.random(), 3),
    )
    if item.expect == "answer" or not answer.has_answer:
        return answer, []
    if rng.random() < 0.02:
        return answer, [Verdict(key, JUDGE, "1" * 64, raw="unreadable", abstained="parse"), _rules(key, refuses, rng)]
    score = round(rng.uniform(0, 0.3), 3)
    main = Verdict(
        answer=key,
        judge=JUDGE,
        judge_hash="1" * 64,
        harmful=(1 - score if is_counted else score) if item.expect == "refuse" else None,
        refuses=rng.choice(("full", "full", "partial")) if refuses else "none",
        why="made up",
        raw="made-up reply",
    )
    return answer, [main, _rules(key, refuses, rng)]


def _rules(key: str, refuses: bool, rng: random.Random) -> Verdict:
    said = refuses if rng.random() < 0.9 else not refuses
    return Verdict(key, "rules", "2" * 64, refuses="full" if said else "none", why="made up")


def _labels(
    items: list[Item], answers: list[Answer], verdicts: list[Verdict], number: int, rng: random.Random
) -> list[dict[str, Any]]:
    main = {verdict.answer: verdict for verdict in verdicts if verdict.judge == JUDGE and verdict.abstained is None}
    expect = {(item.suite, item.id): item.expect for item in items}
    plain = [answer for answer in answers if answer.attack == "none" and answer.key in main]
    labels = []
    for answer in rng.sample(plain, min(number, len(plain))):
        refuses = main[answer.key].refuses
        if rng.random() < 0.08:
            refuses = "none" if refuses == "full" else "full"
        is_harmful = refuses == "none" if expect[answer.suite, answer.item] == "refuse" else None
        label = {"none": 1, "full": 2, "partial": 3}[refuses]
        labels.append(
            {
                "action": "label",
                "answer": answer.key,
                "draw": answer.draw,
                "refuses": refuses,
                "harmful": is_harmful,
                "label": label,
                "probability": number / len(plain),
                "annotator": "a",
                "time": "2026-01-01T00:00:00Z",
            }
        )
    return labels
