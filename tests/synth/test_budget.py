"""Budgets: never more than allowed from a server, whole groups from a local model, and nothing that was drawn is lost."""

from __future__ import annotations

from datetime import date

import pytest
from draw_cases import Scripted, Server, chat_reply, chat_request
from hypothesis import given
from hypothesis import strategies as st
from tiny import IM_END, tiny_tokenizer

from saro.data.chat_format import ChatFormat
from saro.draws.draw_all import draw_missing
from saro.draws.request import Draw, Request, Sampling
from saro.draws.store import DrawStore
from saro.errors import SaroError
from saro.synth.budget import Budget, BudgetedGenerator

CHAT = ChatFormat(tiny_tokenizer(), frozenset({IM_END}), date(2024, 7, 26))


def of_length(tokens: int):
    """Return an answer of this many tokens to each request."""
    return lambda request: Draw(text="t", finish="stop", usage={"completion": tokens})


def draw_until_stopped(generator: BudgetedGenerator, requests: list[Request]) -> tuple[list[int], str]:
    """Return the indices that were drawn, in the order in which they came, and the error, if any."""
    drawn: list[int] = []
    try:
        for group in generator.draw(requests):
            drawn += [index for index, _ in group]
    except SaroError as error:
        return drawn, str(error)
    return drawn, ""


@pytest.mark.parametrize("is_server", [True, False])
def test_without_limits_all_is_drawn(is_server):
    requests = [chat_request(f"{i}") for i in range(7)]
    generator = BudgetedGenerator(Scripted(), Budget(), is_server=is_server)
    assert draw_until_stopped(generator, requests) == ([*range(7)], "")


def test_a_budget_changes_neither_the_identity_nor_the_order():
    class Backwards(Scripted):
        def order(self, requests):
            return [*range(len(requests))][::-1]

    inner = Backwards()
    generator = BudgetedGenerator(inner, Budget(calls=1), is_server=True)
    assert generator.identity == inner.identity
    assert generator.order([chat_request("a"), chat_request("b")]) == [1, 0]


@given(
    limit=st.integers(1, 200),
    lengths=st.lists(st.integers(0, 16), max_size=30),
    group=st.integers(1, 5),
)
def test_a_server_never_gives_more_tokens_than_the_budget_and_is_asked_for_all_that_fit(limit, lengths, group):
    requests = [chat_request(f"{i}") for i in range(len(lengths))]  # at most 16 tokens each
    inner = Scripted(lambda r: of_length(lengths[int(r.messages[0].content)])(r), group)
    budget = Budget(tokens=limit)
    drawn, error = draw_until_stopped(BudgetedGenerator(inner, budget, is_server=True), requests)
    assert drawn == [*range(len(drawn))]
    assert sum(lengths[: len(drawn)]) == budget.drawn_tokens <= limit
    # It stops only if the next text might be too long.
    assert bool(error) == (len(drawn) < len(lengths))
    if error:
        assert limit - budget.drawn_tokens < 16


@given(calls=st.integers(1, 20), number=st.integers(0, 20))
def test_a_server_is_never_asked_for_more_texts_than_the_budget(calls, number):
    inner = Scripted()
    requests = [chat_request(f"{i}") for i in range(number)]
    drawn, _ = draw_until_stopped(BudgetedGenerator(inner, Budget(calls=calls), is_server=True), requests)
    assert len(drawn) == sum(map(len, inner.asked)) == min(calls, number)


def test_a_budget_below_one_text_of_a_server_says_so_instead_of_asking_for_another_try():
    inner = Scripted()
    drawn, error = draw_until_stopped(BudgetedGenerator(inner, Budget(tokens=15), is_server=True), [chat_request()])
    assert (drawn, inner.asked) == ([], [])
    assert error == (
        "--budget.tokens leaves 15 tokens to a rank, and one text may have 16; raise it, or lower --max_tokens"
    )


def test_a_local_model_finishes_its_group_so_that_groups_are_cut_as_without_a_budget():
    inner = Scripted(of_length(5), group=3)
    requests = [chat_request(f"{i}") for i in range(8)]
    drawn, error = draw_until_stopped(BudgetedGenerator(inner, Budget(tokens=16), is_server=False), requests)
    assert drawn == [*range(6)]
    assert "--budget.tokens 16 (30 drawn), and this round lacks 2 texts more" in error
    assert [len(asked) for asked in inner.asked] == [8]


def test_a_spent_budget_loads_no_model():
    budget, inner = Budget(calls=2, drawn_calls=2), Scripted()
    drawn, error = draw_until_stopped(BudgetedGenerator(inner, budget, is_server=False), [chat_request()])
    assert (drawn, inner.asked) == ([], [])
    assert error


def test_a_budget_that_is_just_enough_stops_nothing():
    generator = BudgetedGenerator(Scripted(of_length(5), group=2), Budget(tokens=20, calls=4), is_server=False)
    assert draw_until_stopped(generator, [chat_request(f"{i}") for i in range(4)])[1] == ""


def test_generators_share_one_budget():
    budget = Budget(calls=3)
    first, second = (BudgetedGenerator(Scripted(), budget, is_server=True) for _ in range(2))
    assert draw_until_stopped(first, [chat_request("a"), chat_request("b")]) == ([0, 1], "")
    drawn, error = draw_until_stopped(second, [chat_request("c"), chat_request("d")])
    assert drawn == [0]
    assert error


def test_what_was_drawn_is_stored_and_the_next_run_goes_on(tmp_path):
    requests = [chat_request(f"{i}") for i in range(5)]
    with DrawStore.open(tmp_path / "draws.sqlite3") as store:
        inners = [Scripted() for _ in range(3)]
        *first, last = [BudgetedGenerator(inner, Budget(calls=2), is_server=True) for inner in inners]
        for generator in first:
            with pytest.raises(SaroError, match="give the same command again") as caught:
                draw_missing(store, generator, requests)
            assert "\n" not in str(caught.value)
        draws = draw_missing(store, last, requests)
    assert [[len(part) for part in inner.asked] for inner in inners] == [[2], [2], [1]]
    assert [draw.text for draw in draws] == [f"to {i}" for i in range(5)]


@given(limit=st.integers(9, 1000), processes=st.integers(1, 9))
def test_ranks_share_a_budget_evenly(limit, processes):
    parts = [Budget.of_rank(limit, None, rank, processes).tokens for rank in range(processes)]
    assert sum(parts) == limit
    assert max(parts) - min(parts) <= 1
    assert Budget.of_rank(None, limit, 0, processes).tokens is None


@pytest.mark.parametrize("limits", [{"tokens": 3, "calls": None}, {"tokens": None, "calls": 3}])
def test_a_budget_that_leaves_nothing_to_a_rank_is_refused_on_every_rank(limits):
    for rank in range(4):
        with pytest.raises(SaroError, match=r"--budget\.\w+ is 3, which leaves none to some of 4 ranks"):
            Budget.of_rank(**limits, rank=rank, processes=4)


# A server that reads prompts differently


def counting(prompt_tokens: int) -> Scripted:
    return Scripted(lambda request: Draw(text="t", finish="stop", usage={"prompt": prompt_tokens, "completion": 1}))


def test_a_server_that_adds_a_token_to_ids_is_refused_before_anything_is_stored(tmp_path):
    request = Request(Sampling(8), ids=(5, 6, 7))
    with DrawStore.open(tmp_path / "draws.sqlite3") as store:
        generator = BudgetedGenerator(counting(4), Budget(), is_server=True)
        with pytest.raises(SaroError, match=r"counts 4 tokens in a prompt that has 3 by --server\.tokenizer"):
            draw_missing(store, generator, [request])
        assert store.read_models() == []
        draw_missing(store, BudgetedGenerator(counting(3), Budget(), is_server=True), [request])


def test_a_server_whose_template_is_another_one_is_refused_if_its_tokenizer_is_given():
    request = chat_request("Count to 3.")
    right = len(CHAT.prompt_ids(request.messages))
    for number, is_refused in ((right, False), (right + 20, True)):
        generator = BudgetedGenerator(counting(number), Budget(), is_server=True, chat=CHAT)
        assert bool(draw_until_stopped(generator, [request])[1]) == is_refused


def test_a_server_that_counts_nothing_or_whose_tokenizer_is_not_known_is_believed():
    for inner, chat in ((Scripted(), CHAT), (counting(99), None)):
        generator = BudgetedGenerator(inner, Budget(), is_server=True, chat=chat)
        assert draw_until_stopped(generator, [chat_request()])[1] == ""


def test_an_endpoint_gets_only_what_the_budget_affords(monkeypatch):
    monkeypatch.setenv("SARO_API_KEY", "k")
    server = Server(chat_reply("1 2 3"))  # 3 tokens each, at most 16
    budget = Budget(tokens=40)
    generator = BudgetedGenerator(server.generator(concurrency=8), budget, is_server=True)
    drawn, error = draw_until_stopped(generator, [chat_request(f"{i}") for i in range(30)])
    # 40, 34, 28, 22 and 16 tokens are left before the waves.
    assert len(drawn) == len(server.requests) == 2 + 2 + 1 + 1 + 1 + 1 + 1
    assert budget.drawn_tokens <= 40
    assert error
