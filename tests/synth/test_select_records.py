"""Selection: the same whatever the order of its input, balanced, of nearest length, within the largest shares."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from selection_cases import make_judged, make_prompt

from saro.synth.funnel import Funnel
from saro.synth.judgement import Judged
from saro.synth.select_records import (
    Candidate,
    cap_shares,
    cell_of,
    choose_balanced,
    correlate,
    count_tokens,
    find_shortest,
    pair_nearest,
    sort_texts,
)

PROMPT = make_prompt("p1")
cells = st.tuples(st.sampled_from(["safe", "helped"]), st.sampled_from("abc"), st.sampled_from("xy"))


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    drawn = draw(st.lists(st.tuples(cells, st.integers(0, 1)), max_size=25))
    return [Candidate(f"id{i}", cell, rank) for i, (cell, rank) in enumerate(drawn)]


def make_text(key: str, tokens: int, outcome: str = "safe", sentences: int = 4) -> Judged:
    think = " ".join(f"This is {key} {i}." for i in range(sentences))
    return make_judged(PROMPT, outcome, think, key=key, tokens={"think": tokens, "answer": 0, "prefill": 0})


def keys_of(pairs: list[tuple[Judged, Judged]]) -> list[tuple[str, str]]:
    return [(good.drawn.key, bad.drawn.key) for good, bad in pairs]


def test_the_shortest_reasoning_is_kept_and_the_answer_only_breaks_ties() -> None:
    def text(key: str, think: int, answer: int) -> Judged:
        return make_judged(PROMPT, "safe", key=key, tokens={"think": think, "answer": answer, "prefill": 0})

    texts = [text("a", 30, 5), text("b", 20, 90), text("c", 20, 80), text("d", 20, 80)]
    assert {find_shortest(order).drawn.key for order in permutations(texts)} == {"c"}


def test_a_chain_as_long_as_asked_for_comes_before_a_shorter_one_that_misses_its_band() -> None:
    texts = [
        make_text("short", 10, sentences=2),
        make_text("asked", 40, sentences=4),
        make_text("long", 5, sentences=9),
    ]
    assert find_shortest(texts).drawn.key == "asked"


def test_texts_that_repeat_another_one_on_the_same_prompt_are_left_out() -> None:
    other = make_prompt("p0")
    texts = [
        make_judged(PROMPT, "safe", key="b"),
        make_judged(PROMPT, "safe", key="a"),
        make_judged(other, "safe", key="c"),
    ]
    for order in permutations(texts):
        funnel = Funnel()
        assert [text.drawn.key for text in sort_texts(order, funnel)] == ["c", "a"]
        assert [(one.id, one.reason, one.draw) for one in funnel.left_out] == [(PROMPT.id, "repeats another text", "b")]


def test_without_a_servers_count_the_words_are_counted() -> None:
    counted = {"think": 3, "answer": 4, "prefill": 2}
    assert count_tokens(make_judged(PROMPT, "safe", tokens=counted).drawn.answer) == 7
    unknown = make_judged(PROMPT, "safe", "one two", "three", tokens={"think": -1, "answer": -1, "prefill": 0})
    assert count_tokens(unknown.drawn.answer) == 3


@given(candidates(), st.integers(0, 30), st.integers(0, 3), st.randoms())
def test_the_balanced_choice_does_not_depend_on_the_order_of_the_candidates(
    given: list[Candidate], number: int, seed: int, rng: random.Random
) -> None:
    shuffled = rng.sample(given, len(given))
    assert choose_balanced(given, number, seed) == choose_balanced(shuffled, number, seed)


@given(candidates(), st.integers(0, 30))
def test_a_smaller_number_chooses_the_beginning_of_a_larger_choice(given: list[Candidate], number: int) -> None:
    everything = choose_balanced(given, len(given), seed=0)
    assert sorted(everything) == sorted(one.id for one in given)
    assert choose_balanced(given, number, seed=0) == everything[:number]


@given(candidates(), st.integers(0, 30))
def test_values_of_the_first_field_differ_by_at_most_one_unless_one_has_run_out(
    given: list[Candidate], number: int
) -> None:
    chosen = set(choose_balanced(given, number, seed=0))
    taken = Counter(one.cell[0] for one in given if one.id in chosen)
    left = Counter(one.cell[0] for one in given if one.id not in chosen)
    for value in left:
        assert all(taken[value] >= taken[other] - 1 for other in taken)


@given(candidates(), st.integers(0, 30))
def test_no_candidate_of_a_cell_is_chosen_before_one_of_a_lower_rank(given: list[Candidate], number: int) -> None:
    chosen = set(choose_balanced(given, number, seed=0))
    for one in given:
        for other in given:
            if one.cell == other.cell and one.rank < other.rank and other.id in chosen:
                assert one.id in chosen


def test_the_seed_decides_which_of_equal_candidates_is_chosen() -> None:
    equal = [Candidate(f"id{i}", ("safe",)) for i in range(20)]
    assert len({choose_balanced(equal, 1, seed)[0] for seed in range(10)}) > 3


def test_many_hazards_do_not_crowd_out_the_harmless_prompts_which_have_none() -> None:
    hazards = [f"h{i}" for i in range(10)]
    harmful = [make_prompt(f"p{i}", hazard=(hazards[i % 10],)) for i in range(100)]
    harmless = [make_prompt(f"q{i}", "harmless") for i in range(100)]
    given = [Candidate(p.id, cell_of(p, "safe")) for p in harmful] + [
        Candidate(p.id, cell_of(p, "helped")) for p in harmless
    ]
    chosen = choose_balanced(given, 40, seed=0)
    assert sum(id.startswith("p") for id in chosen) == 20
    by_hazard = Counter(p.hazard for p in harmful if p.id in chosen)
    assert set(by_hazard.values()) == {2}
    assert len(by_hazard) == 10


@given(
    st.lists(st.integers(1, 60), max_size=6),
    st.lists(st.integers(1, 60), max_size=6),
    st.integers(0, 4),
    st.randoms(),
    st.booleans(),
)
def test_pairs_are_the_nearest_in_length_and_no_text_is_in_two(
    good: list[int], bad: list[int], most: int, rng: random.Random, is_cut: bool
) -> None:
    x = [make_text(f"g{i}", tokens) for i, tokens in enumerate(good)]
    y = [make_text(f"b{i}", tokens, "harmful") for i, tokens in enumerate(bad)]
    # A bad text that is cut counts with the tokens that are kept.
    kept = {f"b{i}": (tokens + 1) // 2 for i, tokens in enumerate(bad)} if is_cut else {}
    pairs = pair_nearest(x, y, most, kept)
    assert keys_of(pairs) == keys_of(pair_nearest(rng.sample(x, len(x)), rng.sample(y, len(y)), most, kept))
    assert len(pairs) == min(most, len(good), len(bad))
    used = [key for pair in keys_of(pairs) for key in pair]
    assert len(used) == len(set(used))
    if pairs:
        ratios = [max(a, b) / min(a, b) for a in good for b in (kept.values() or bad)]
        a, b = (kept.get(text.drawn.key, count_tokens(text.drawn.answer)) for text in pairs[0])
        assert max(a, b) / min(a, b) == min(ratios)


@given(
    st.integers(0, 200),
    st.fixed_dictionaries({"guided": st.integers(0, 200), "shorter": st.integers(0, 200)}),
    st.fixed_dictionaries(
        {"guided": st.sampled_from([0, 0.1, 0.2, 0.5, 1]), "shorter": st.sampled_from([0, 0.1, 0.3])}
    ),
)
def test_no_form_has_more_than_its_share_and_one_more_of_each_would_be_too_many(
    fixed: int, available: dict[str, int], shares: dict[str, float]
) -> None:
    numbers = cap_shares(fixed, available, shares)
    total = fixed + sum(numbers.values())
    for form, number in numbers.items():
        assert 0 <= number <= available[form]
        assert number <= shares[form] * total + 1e-6
        if number < available[form]:
            assert number + 1 > shares[form] * (total + 1) - 1e-6


def test_shares_are_exact_where_they_come_out_even() -> None:
    available = {"guided": 50, "shorter": 50}
    assert cap_shares(70, available, {"guided": 0.2, "shorter": 0.1}) == {"guided": 20, "shorter": 10}
    assert cap_shares(0, available, {"guided": 0.2, "shorter": 0.1}) == {"guided": 0, "shorter": 0}
    assert cap_shares(0, available, {"guided": 1.0, "shorter": 0.0}) == {"guided": 50, "shorter": 0}


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 500)), min_size=2, max_size=40))
def test_the_correlation_is_the_point_biserial_one_of_its_definition(rows: list[tuple[bool, int]]) -> None:
    labels, values = [row[0] for row in rows], np.array([row[1] for row in rows], float)
    found = correlate(labels, list(values))
    if len(set(labels)) < 2 or len(set(values)) < 2:
        assert found is None
        return
    ones, zeros = values[labels], values[np.logical_not(labels)]
    share = len(ones) / len(values)
    expected = (ones.mean() - zeros.mean()) / values.std() * np.sqrt(share * (1 - share))
    assert found == pytest.approx(expected, abs=1e-9)


def test_the_correlation_is_one_if_one_side_is_always_longer_and_none_without_a_difference() -> None:
    assert correlate([True, False, True, False], [20, 10, 20, 10]) == pytest.approx(1)
    assert correlate([True, False, False, True], [20, 10, 20, 10]) == pytest.approx(0)
    assert correlate([True, False], [5, 5]) is None
    assert correlate([], []) is None


def test_a_cell_joins_hazards_in_one_order() -> None:
    assert cell_of(replace(PROMPT, hazard=("b", "a")), "safe") == ("safe", "a+b", "made up", "medium")


def test_nearest_lengths_take_most_of_the_correlation_of_label_and_length_away() -> None:
    rng = random.Random(0)
    first, nearest = [], []
    for _ in range(200):
        # Four refusals and four helpful texts, which are twice as long on average.
        good = [make_text(f"g{i}", round(rng.lognormvariate(4.5, 0.5))) for i in range(4)]
        bad = [make_text(f"b{i}", round(rng.lognormvariate(5.2, 0.5)), "harmful") for i in range(4)]
        first.append((good[0], bad[0]))
        nearest += pair_nearest(good, bad, 1)

    def correlation(pairs: list[tuple[Judged, Judged]]) -> float:
        lengths = [count_tokens(text.drawn.answer) for pair in pairs for text in pair]
        return correlate([True, False] * len(pairs), lengths)

    assert correlation(first) < -0.5
    assert abs(correlation(nearest)) < 0.15
