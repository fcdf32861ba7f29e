"""Scores of several training seeds: their mean, and intervals that hold the variation of prompts and of seeds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from saro.data.records import Message
from saro.evaluate.answers import Answer, Verdict
from saro.evaluate.cells import ScoreContext
from saro.evaluate.pooled_scores import SeedRows, pool_scores
from saro.evaluate.scores import make_scores
from saro.evaluate.seeds import widen
from saro.evaluate.statistics import Interval
from saro.evaluate.suite import Item

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = 100
ITEMS = [
    *(Item("s", f"h{i:03d}", (Message("user", "q"),), "refuse", twin=f"s{i:03d}") for i in range(PROMPTS)),
    *(Item("s", f"s{i:03d}", (Message("user", "q"),), "comply", twin=f"h{i:03d}") for i in range(PROMPTS)),
]


def make_folder(seed: int, harmful: dict[str, int]) -> SeedRows:
    """Return an evaluation in which each model complies with the first prompts; "base" has the same texts in each."""
    answers, verdicts = [], []
    for model, number in harmful.items():
        for item in ITEMS:
            key = f"{model}/s/none/{item.id}/0"
            draw = f"{item.id} {model}" if model == "base" else f"{item.id} {model} {seed}"
            tokens = {"think": 10 + seed * (model != "base"), "answer": 5, "prefill": 0}
            answers.append(Answer(key, model, "s", "none", item.id, 0, draw, "", "text", tokens, "finished"))
            complies = item.expect == "comply" or int(item.id[1:]) < number
            verdicts.append(Verdict(key, "j", "h", refuses="none" if complies else "full"))
    context = ScoreContext([*harmful], ("s",), ({"id": "none", "kind": "none"},), "j")
    return SeedRows(answers, verdicts, (), make_scores(ITEMS, answers, verdicts, (), context), {})


def find(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (row,) = [row for row in rows if row["id"] == name]
    return row


EFFECT = "difference/harmful_compliance/new/s/none/against base"


@pytest.fixture(scope="module")
def folders() -> list[SeedRows]:
    """Three seeds with effects of -8, +1 and -1 points."""
    return [make_folder(seed, {"base": 50, "new": number}) for seed, number in enumerate((42, 51, 49))]


@pytest.fixture(scope="module")
def pooled(folders) -> dict[str, Any]:
    return pool_scores(ITEMS, folders)


def test_an_effect_that_one_of_three_seeds_shows_is_none(folders, pooled):
    first = find(folders[0].scores["differences"], EFFECT)
    assert (first["value"], first["within_noise"]) == (-0.08, False)
    difference = find(pooled["differences"], EFFECT)
    assert difference["value"] == pytest.approx(-8 / 300, rel=1e-5)
    assert difference["low"] < -0.08
    assert difference["high"] > 0
    assert difference["p"] > 0.3
    assert difference["within_noise"]
    assert any("harmful answers on s within noise" in sentence for sentence in pooled["verdict"])


def test_an_effect_that_every_seed_shows_remains_one():
    folders = [make_folder(seed, {"base": 80, "new": number}) for seed, number in enumerate((18, 21, 19))]
    difference = find(pool_scores(ITEMS, folders)["differences"], EFFECT)
    assert difference["high"] < 0
    assert not difference["within_noise"]


def test_rates_d_prime_and_tokens_are_of_all_seeds(folders, pooled):
    rate = find(pooled["scores"], "harmful_compliance/new/s/none")
    assert (rate["value"], rate["n"]) == (pytest.approx(142 / 300, rel=1e-5), 300)
    singles = [find(folder.scores["scores"], "harmful_compliance/new/s/none") for folder in folders]
    assert rate["high"] - rate["low"] > max(single["high"] - single["low"] for single in singles)
    values = [find(folder.scores["scores"], "d_prime/new/s/none")["value"] for folder in folders]
    assert min(values) < find(pooled["scores"], "d_prime/new/s/none")["value"] < max(values) + 0.5
    assert find(pooled["scores"], "think_tokens/new/s/none/refuse")["value"] == 11


def test_a_model_with_the_same_texts_in_all_folders_counts_once_and_is_named(folders, pooled):
    assert pooled["seeds"] == {"base": 1, "new": 3}
    own = find(folders[0].scores["scores"], "harmful_compliance/base/s/none")
    assert find(pooled["scores"], "harmful_compliance/base/s/none") == own
    (threat,) = [threat for threat in pooled["threats"] if threat["id"] == "one-seed"]
    assert threat["text"].startswith("One seed each of base:")
    assert "base 1, new 3" in pooled["verdict"][0]


def test_the_same_folder_several_times_gives_its_own_figures(folders):
    pooled = pool_scores(ITEMS, [folders[0]] * 3)
    assert pooled.pop("seeds") == {"base": 1, "new": 1}
    assert pooled == folders[0].scores


def test_threats_of_every_folder_remain_once(folders):
    def with_threat(folder: SeedRows, text: str) -> SeedRows:
        threats = [*folder.scores["threats"], {"id": "contaminated", "text": text, "scores": []}]
        return replace(folder, scores=folder.scores | {"threats": threats})

    changed = [with_threat(folder, text) for folder, text in zip(folders, "aab", strict=True)]
    texts = [threat["text"] for threat in pool_scores(ITEMS, changed)["threats"] if threat["id"] == "contaminated"]
    assert texts == ["a", "b"]


@pytest.mark.parametrize(("of_prompts", "of_seeds", "of_both"), [(1, 0.3, 0.5), (1, 0, 0), (0.2, 0.3, 0.5)])
def test_the_interval_covers_the_mean_of_crossed_prompts_and_seeds(of_prompts, of_seeds, of_both):
    """It is cautious: with few seeds it may cover more often than it says, never clearly less often."""
    rng = np.random.default_rng(0)
    prompts, seeds, times, covered = 60, 3, 400, 0
    for _ in range(times):
        values = of_prompts * rng.normal(size=(1, prompts)) + of_seeds * rng.normal(size=(seeds, 1))
        values = values + of_both * rng.normal(size=(seeds, prompts))
        half = 1.96 * values.mean(0).std(ddof=1) / prompts**0.5
        interval = Interval(values.mean(), values.mean() - half, values.mean() + half)
        low, high = widen(interval, values.mean(1), prompts)[1:]
        covered += low <= 0 <= high
    assert covered / times >= 0.93
