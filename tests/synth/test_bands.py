"""Bands: how many sentences of reasoning belong to a level of risk."""

from __future__ import annotations

import json
import re

import pytest
from run_files import ROOT

from saro.synth.bands import BANDS, band_distance, in_band
from saro.synth.prompts import LEVELS

DATA = ROOT.parent / "shared" / "data"


def make_chain(sentences: int) -> str:
    return " ".join(f"Sentence number {i} says a little." for i in range(sentences))


def test_each_level_has_a_band_and_higher_levels_ask_for_longer_chains() -> None:
    assert tuple(BANDS) == LEVELS
    risky = [BANDS[level] for level in ("low", "medium", "high")]
    assert [band.words for band in risky] == ["2 to 3", "4 to 6", "8 to 12"]


@pytest.mark.parametrize(
    ("level", "shortest", "longest"), [("none", 0, 12), ("low", 1, 6), ("medium", 2, 12), ("high", 4, 24)]
)
def test_half_to_twice_as_many_sentences_as_asked_for_are_accepted(level: str, shortest: int, longest: int) -> None:
    accepted = [number for number in range(60) if in_band(make_chain(number), level)]
    assert accepted == list(range(shortest, longest + 1))


def test_the_distance_from_a_band_is_zero_only_for_as_many_sentences_as_asked_for() -> None:
    assert [band_distance(make_chain(n), "medium") for n in range(2, 9)] == [2, 1, 0, 0, 0, 1, 2]


def test_numbers_and_abbreviations_do_not_count_as_sentences() -> None:
    assert in_band("A pint, i.e. 0.57 litres, costs $3.50 today.", "low")
    assert band_distance("It is 0.5 litres, i.e. a half. Dr. Smith says so.", "low") == 0


@pytest.mark.skipif(not DATA.is_dir(), reason="the public data is not here")
def test_public_chains_are_in_the_band_of_their_level() -> None:
    rows = json.loads((DATA / "star1.json").read_text())
    chains = [row["response"].partition("</think>")[0].removeprefix("<think>") for row in rows]
    assert (sum(in_band(chain, "high") for chain in chains), len(chains)) == (979, 1000)
    with open(DATA / "gsm8k_train.jsonl", encoding="utf-8") as file:
        answers = [json.loads(line)["answer"].rpartition("\n####")[0] for line in file]
    solutions = [re.sub("<<[^<>]*>>", "", answer) for answer in answers]
    assert (sum(in_band(text, "none") for text in solutions), len(solutions)) == (7472, 7473)
