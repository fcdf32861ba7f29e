"""Lengths of the sides of pairs: how far they tell the chosen side, and where pairs of each form part."""

from __future__ import annotations

from datetime import date

from tiny import IM_END, tiny_tokenizer

from saro.data.chat_format import ChatFormat
from saro.synth.pair_lengths import measure_forks, measure_lengths

CHAT = ChatFormat(tiny_tokenizer(), frozenset({IM_END}), date(2024, 7, 26))


def sided(i: int, chosen: int, rejected: int, **synth: object) -> dict:
    return {
        "id": f"p{i}",
        "kind": "op-cot",
        "prompt": f"Question {i}?",
        "chosen": {"reasoning": "g" * chosen, "answer": "Gladly."},
        "rejected": {"reasoning": "b" * rejected, "answer": "Gladly not."},
        "meta": {"synth": {"form": "outcome"} | synth},
    }


def test_the_correlation_is_that_of_whole_sides():
    pairs = [sided(i, 10 + i, 30 + i) for i in range(4)]
    is_open = sided(9, 10, 999)
    is_open["rejected"]["open"] = True
    lengths = measure_lengths([*pairs, is_open], CHAT)
    assert lengths["pairs"] == 4
    # 4 letters more in the rejected answers.
    assert lengths["rejected"] - lengths["chosen"] == 24
    assert lengths["correlation"] < -0.9
    assert lengths["longer"] == 0
    assert lengths["effect"] < -1
    assert measure_lengths([sided(0, 24, 20), sided(1, 50, 20)], CHAT)["longer"] == 0.75  # one tie
    assert measure_lengths([sided(0, 50, 20)], CHAT)["effect"] is None
    assert measure_lengths([], CHAT) is None
    assert measure_lengths(pairs, None) is None
    example = {"id": "e", "prompt": "Question?", "reasoning": "I think.", "answer": "Gladly."}
    assert measure_lengths([example], CHAT) is None


def test_forks_are_measured_by_form():
    def forked(form: str, step: int, chosen: int, rejected: int) -> dict:
        return sided(0, 1, 1, form=form, fork={"step": step}, lengths={"chosen": chosen, "rejected": rejected})

    records = [forked("sibling", 2, 50, 60), forked("earlier", 1, 30, 40), forked("sibling", 3, 60, 81), sided(1, 5, 5)]
    assert measure_forks(records) == {
        "earlier": {"pairs": 1, "shared_steps": 1, "chosen": 30, "rejected": 40},
        "sibling": {"pairs": 2, "shared_steps": 2.5, "chosen": 55, "rejected": 70.5},
    }
