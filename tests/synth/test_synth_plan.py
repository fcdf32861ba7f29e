"""Plans: what would be asked, what a prefix cache saves, the price and the time; from the store, with nothing sent."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from draw_cases import Scripted, chat_request, name_of
from hypothesis import given, settings
from hypothesis import strategies as st

from saro.draws.draw_all import draw_missing
from saro.draws.request import Draw, Request, Sampling
from saro.draws.store import DrawStore
from saro.synth.synth_options import BudgetOptions
from saro.synth.synth_plan import describe_plan, plan_stage

IDENTITY = Scripted.identity


@pytest.fixture
def store(tmp_path):
    with DrawStore.open(tmp_path / "draws.sqlite3") as store:
        yield store


def asked(*requests: Request) -> list:
    return [SimpleNamespace(request=request) for request in requests]


def of_ids(*ids: int, number: int = 0) -> Request:
    return Request(Sampling(10), ids=ids, number=number)


def plan(store, requests, **options):
    return plan_stage(store, IDENTITY, asked(*requests), **{"max_tokens": 10} | options)


def test_what_prompts_share_at_their_beginning_counts_once_with_a_prefix_cache(store):
    found = plan(store, [of_ids(1, 2, 3), of_ids(1, 2, 4, 5), of_ids(9), of_ids(1, 2, 3, number=1)])
    assert (found.asked, found.stored) == (4, 0)
    assert found.prompt_tokens == 3 + 4 + 1 + 3
    assert found.distinct_tokens == 3 + 2 + 1
    assert found.drawn_tokens == 40
    assert not found.is_estimate


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=8))
def test_distinct_tokens_are_the_nodes_of_the_trie(tmp_path_factory, prompts):
    with DrawStore.open(tmp_path_factory.mktemp("store") / "draws") as store:
        found = plan(store, [of_ids(*ids, number=number) for number, ids in enumerate(prompts)])
    assert found.distinct_tokens == len({tuple(ids[:n]) for ids in prompts for n in range(1, len(ids) + 1)})


def test_what_the_store_has_is_not_asked_again(store):
    draw_missing(store, Scripted(), [chat_request("a")])
    found = plan(store, [chat_request("a"), chat_request("b"), chat_request("b")])
    assert (found.asked, found.stored, found.drawn_tokens) == (2, 1, 16)


@pytest.mark.parametrize(("failure", "stored"), [("refused", 1), ("length", 1), ("server", 0), ("timeout", 0)])
def test_a_stored_failure_counts_only_if_it_would_not_be_drawn_again(store, failure, stored):
    draw_missing(store, Scripted(lambda request: Draw(failure=failure)), [chat_request("a")])
    again = Scripted()
    found = plan(store, [chat_request("a")])
    draw_missing(store, again, [chat_request("a")])
    assert found.stored == stored
    assert found.drawn_tokens == 16 * sum(map(len, again.asked))


def test_a_judge_is_asked_about_each_text_and_whatever_else_is_read_at_most_twice(store):
    assert plan(store, [of_ids(1)], followups=2, judges=1, more_read=20).verdicts == 2 * (1 + 2) + 2 * 20
    assert plan(store, [of_ids(1)], followups=2).verdicts == 0


def test_prompts_of_a_server_without_tokenizer_are_estimated_by_their_characters(store):
    found = plan(store, [chat_request("x" * 94)])  # with "user" and two line ends 100 characters
    assert found.is_estimate
    assert found.prompt_tokens == found.distinct_tokens == 25
    assert "about 25 tokens" in " ".join(describe_plan(found, BudgetOptions()))


def test_later_rounds_and_judges_are_bounded(store):
    found = plan(store, [of_ids(1, 2, 3)], followups=5, judges=2)
    assert (found.followups, found.followup_tokens, found.verdicts) == (5, 50, 24)
    assert found.followup_prompt_tokens == 5 * (3 + 10)
    assert plan(store, [of_ids(1, 2, 3)], followups=5, more_prompt=7).followup_prompt_tokens == 5 * (3 + 7 + 10)
    text = "\n".join(describe_plan(found, BudgetOptions()))
    assert "at most 5 texts more in later rounds" in text
    assert "at most 24 replies of judges" in text


def test_the_price_is_that_of_prompts_and_of_the_longest_texts(store):
    found = plan(store, [of_ids(1, 2, 3)], followups=1)
    budget = BudgetOptions(input_price=1e6, output_price=2e6)
    assert found.price(budget) == (3 + 13) * 1 + (10 + 10) * 2
    assert "at most 56.00 at the given prices" in describe_plan(found, budget)
    assert not any("price" in line for line in describe_plan(found, BudgetOptions()))


def test_the_time_is_that_of_earlier_texts_of_the_same_model(store):
    draw = Draw(text="t", finish="stop", usage={"completion": 20}, seconds=4.0)
    draw_missing(store, Scripted(lambda request: draw), [chat_request(f"{i}") for i in range(3)])

    class Other(Scripted):
        identity = {"kind": "scripted", "model": "other"}  # noqa: RUF012

    slow = Draw(text="t", finish="stop", usage={"completion": 1}, seconds=1000.0)
    draw_missing(store, Other(lambda request: slow), [chat_request("x")])
    failed = Draw(failure="refused", seconds=1000.0)
    draw_missing(store, Scripted(lambda request: failed), [chat_request("y")])
    found = plan(store, [of_ids(1), of_ids(2)], concurrency=2)
    assert found.speed == pytest.approx(10)  # 20 tokens in 4 seconds, two at a time
    assert found.mean_tokens == 20
    assert found.seconds == pytest.approx(2 * 20 / 10)
    assert "4 s at 10 tokens/s and 20 tokens a text" in describe_plan(found, BudgetOptions())[-1]


def test_texts_of_this_round_say_more_of_the_time_than_others_of_the_model(store):
    """Those of a template that closes the reasoning are shorter than all others of the model."""
    lengths = {"short": 4, "long": 400}
    writer = Scripted(
        lambda r: Draw(text="t", finish="stop", usage={"completion": lengths[name_of(r).split()[0]]}, seconds=1.0)
    )
    closed = [chat_request(f"short {i}") for i in range(3)]
    draw_missing(store, writer, [*(chat_request(f"long {i}") for i in range(9)), closed[0]])
    assert plan(store, closed).mean_tokens == 4
    assert plan(store, [chat_request("other")]).mean_tokens == pytest.approx((9 * 400 + 4) / 10)


def test_without_earlier_texts_the_time_is_not_known(store):
    assert plan(store, [of_ids(1)]).seconds is None


def test_a_plan_without_prompts_asks_for_nothing(store):
    found = plan(store, [])
    assert describe_plan(found, BudgetOptions()) == ["0 texts in the first round, 0 of them in the store"]
